"""Engines turn prompts into trajectories: one protocol (base.py), our own decoder (local.py)."""
