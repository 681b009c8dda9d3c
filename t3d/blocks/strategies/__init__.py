"""The unmasking strategies, one a file (see t3d.blocks.strategy)."""
