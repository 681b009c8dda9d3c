"""Training objectives, one file each, behind one interface (base.py)."""
