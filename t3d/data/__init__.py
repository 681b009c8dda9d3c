"""Data: rows and prompts, the record of a rollout, and the files that hold it."""
