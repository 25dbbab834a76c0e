"""Times of every operator beside other implementations: see `python -m benchmarks --help`."""
