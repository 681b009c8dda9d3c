"""The tests. Each process computes on one thread: two threads on tiny models wait for each other at every kernel."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded
