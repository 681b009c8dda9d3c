"""The decoder: cache, forwards, continuous batching, verification."""
