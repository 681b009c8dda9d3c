"""Training objectives, one file each, with one interface (base.py)."""
