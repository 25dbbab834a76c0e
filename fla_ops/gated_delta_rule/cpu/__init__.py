"""The CPU implementations of the gated delta rule; a GPU's inlined code holds its ATen file too."""
