"""Block-diffusion models in lm-evaluation-harness: the model ``t3d_sdar``. See docs/HARNESS.md."""
