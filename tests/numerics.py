"""Tolerances: the only place. A result may be twice as wrong as its reference in the same dtype, plus a floor.

    error(result) <= 2 * error(reference in that dtype) + FLOOR[dtype],    both against the reference in float64

The error is the norm of the difference over the norm of the truth, for each output on its own. Nothing relaxes it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOOR = {
    # A decay that forgets may enter a running sum as -1000, and float64 holds differences of such sums to 1e-13.
    torch.float64: 1e-12,
    # 256 roundings. The gradient of a gate is a running sum of differences q . dq - k . dk that nearly cancel, which
    # autograd through the recurrence never forms. A product in tf32 (3e-4) is far outside.
    torch.float32: 2.0**-16,
    # One rounding of an operand: tensor cores take decayed scores and states in the activations' dtype.
    torch.bfloat16: 2.0**-9,
    torch.float16: 2.0**-12,
}


def error(x: Tensor, truth: Tensor) -> float:
    """Norm of the difference relative to the truth's; where the truth is zero, the norm itself. Where both are the same
    infinity they do not differ.
    """
    x, truth = x.detach().double(), truth.detach().double()
    size = float(truth.masked_fill(truth.isinf(), 0).norm())
    difference = float((x - truth).masked_fill(x == truth, 0).norm())
    return difference / size if size > 0 else difference


def check(
    results: Mapping[str, Tensor | None],
    references: Mapping[str, Tensor | None],
    truths: Mapping[str, Tensor | None],
    dtype: torch.dtype,
) -> None:
    """Fail, with the figures of what is wrong, unless every output obeys the rule. `dtype` is the activations'."""
    assert results.keys() == references.keys() == truths.keys()
    wrong = []
    for name, result in results.items():
        reference, truth = references[name], truths[name]
        if truth is None or reference is None or result is None:
            if not (truth is reference is result is None):
                wrong.append(f"{name}: None in only some of result, reference and truth")
            continue
        if result.shape != truth.shape:
            wrong.append(f"{name}: shape {tuple(result.shape)}, not {tuple(truth.shape)}")
            continue
        found, allowed = error(result, truth), 2 * error(reference, truth) + FLOOR[dtype]
        if not found <= allowed:  # NaN fails too
            wrong.append(f"{name}: error {found:.2e}, over {allowed:.2e}")
    assert not wrong, "; ".join(wrong)


def close(result: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Two computations of one thing, neither of which is the truth: each may be off by the floor."""
    assert result.shape == expected.shape
    found, allowed = error(result, expected), 2 * FLOOR[dtype or expected.dtype]
    assert found <= allowed, f"they differ by {found:.2e}, over {allowed:.2e}"
