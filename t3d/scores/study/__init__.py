"""Many runs of several methods on one benchmark, as tables.py makes them, and the page about them."""
