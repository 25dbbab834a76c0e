"""A short causal convolution of each channel: o_t = act(bias + sum_i weight_i x_{t - W + 1 + i})."""
