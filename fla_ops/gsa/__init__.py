"""Gated slot attention: two gated linear recurrences over M slots with a softmax between them."""
