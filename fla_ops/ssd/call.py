"""The arguments of ssd and of its decode step, by mamba_ssm's names, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fla_ops.signature import Pool, Signature

# The axes of every tensor. A size is bound by the first tensor that has its letter; the others must agree.
AXES = {
    "x": "B T H V",
    "dt": "B T H",
    "A": "H",
    "B": "B T HK K",
    "C": "B T HK K",
    "D": "H",
    "z": "B T H V",
    "dt_bias": "H",
    "seq_idx": "B T",
    "cu_seqlens": "N+1",
    "cu_seqlens_cpu": "N+1",
    "initial_state": "N H V K",
    "o": "B T H V",
    "final_state": "N H V K",
}
STEP_AXES = {
    "x": "N H V",
    "dt": "N H",
    "A": "H",
    "state": "P H V K",
    "B": "N HK K",
    "C": "N HK K",
    "D": "H",
    "z": "N H V",
    "dt_bias": "H",
    "slots": "N",
    "o": "N H V",
}


class Call(NamedTuple):
    """One call."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    dt_softplus: bool = False
    dt_min: float | None = None
    dt_max: float | None = None
    initial_state: Tensor | None = None
    output_final_state: bool = False
    seq_idx: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    chunk_size: int = 64
    mode: str = "auto"

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this call."""
        return _with_skip(AXES, self.D)


class Step(NamedTuple):
    """One decode step."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    state: Pool
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    dt_softplus: bool = False
    slots: Tensor | None = None

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every tensor of this step."""
        axes = STEP_AXES if self.slots is not None else STEP_AXES | {"state": "N H V K (without slots)"}
        return _with_skip(axes, self.D)


class Outputs(NamedTuple):
    """What ssd returns."""

    o: Tensor
    final_state: Tensor | None


def _with_skip(axes: Mapping[str, str], skip: Tensor | None) -> Mapping[str, str]:
    """D is a number for each head, or for each of its channels."""
    return axes if skip is None or skip.dim() != 2 else {**axes, "D": "H V"}


SSD = Signature("ssd", Call, Outputs)
STEP = Signature("ssd_step_", Step, "Tensor")
