"""Students and trajectories for other people: cards, uploads to the hub, and folders that need no t3d."""
