"""The attention predicate, decode settings, drawing tokens, unmasking strategies. Nothing of ours is imported."""
