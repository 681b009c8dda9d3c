"""Errors, files, places on disk, the configuration engine."""
