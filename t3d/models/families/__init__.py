"""The families of block-diffusion models, one a file (t3d.models.family). A file's name is the family's name."""
