"""Linear attention with one scalar decay per head: RetNet, Mamba-2 (SSD), gated RFA."""
