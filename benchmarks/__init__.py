"""Times of every operator beside what else computes it: `python -m benchmarks --help`."""
