"""The programs that produce our own figures: the embedded benchmark and the speed benchmarks. Not in the wheel."""
