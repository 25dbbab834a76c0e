"""What other projects call, on the operators of this package. Each module is imported on demand, by its own name."""
