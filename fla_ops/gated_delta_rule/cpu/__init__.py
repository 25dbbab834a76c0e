"""The CPU implementations of the gated delta rule; its ATen file serves a GPU too."""
