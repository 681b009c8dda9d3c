"""Stage 3: train a student."""
