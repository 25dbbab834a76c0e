"""Lightning attention: linear attention with a constant decay that depends on the head and on the layer."""
