"""SmolLM2-135M-Instruct from end to end: converted, taught to diffuse, distilled to few steps (`make smollm`)."""
