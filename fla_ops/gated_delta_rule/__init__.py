"""The gated delta rule: each step replaces what the state says about its key, beside a scalar decay per head."""
