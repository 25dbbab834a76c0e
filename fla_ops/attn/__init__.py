"""Softmax attention with decay, a window and sinks; see README.md for the mathematics."""
