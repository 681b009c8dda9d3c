"""T3D: few-step diffusion language models by trajectory self-distillation (arXiv 2602.12262)."""

__version__ = "0.2.0"
