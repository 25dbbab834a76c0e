"""The problems: every public operator, with the sizes and the inputs that it is measured on.

Operators come from `fla_ops.ops()`, and their names tell the family. Decays are those of a freshly initialised Mamba-2:
a rate of 1 to 16 for each head times a step of 0.001 to 0.1. "Strong" problems use those of a plain log-sigmoid gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fla_ops

from . import roofline
from .roofline import Sizes, Work

Inputs = dict[str, Any]
FORWARD, TRAINING, DECODE = "forward", "training", "decode"
FORMS = ("fused_recurrent", "fused_chunk", "chunk", "parallel")

LONG = {"K": 128, "V": 128}
CUDA = {
    "linear": [{"B": 8, "T": 4096, "H": 16, **LONG}, {"B": 1, "T": 131072, "H": 16, **LONG}],
    "fused_recurrent": [{"B": 8, "T": 64, "H": 16, **LONG}],
    "parallel": [{"B": 8, "T": 512, "H": 16, **LONG}],
    "gsa": [{"B": 8, "T": 4096, "H": 16, **LONG, "M": 64}],
    "attn": [{"B": 8, "T": 4096, "H": 16, "HQ": 16, **LONG}],
    "causal_conv": [{"B": 8, "T": 4096, "D": 4096, "W": 4}],
    "simple_gla_step_": [{"N": 256, "H": 32, **LONG}, {"N": 1, "H": 32, **LONG}],
    "linear_attn_step_": [{"N": 256, "H": 32, **LONG}],
    "gated_delta_rule_step_": [{"N": 256, "H": 32, **LONG}],
    "ssd_step_": [{"N": 256, "H": 32, **LONG}],
    "gsa_step_": [{"N": 256, "H": 16, **LONG, "M": 64}],
    "causal_conv_step_": [{"N": 256, "D": 4096, "W": 4}],
    "attn_decoding_one_step": [{"N": 32, "T": 4096, "H": 8, "HQ": 32, **LONG}],
}
CPU = {
    "linear": [{"B": 1, "T": 4096, "H": 4, "K": 64, "V": 64}],
    "fused_recurrent": [{"B": 1, "T": 64, "H": 4, "K": 64, "V": 64}],
    "parallel": [{"B": 1, "T": 512, "H": 4, "K": 64, "V": 64}],
    "gsa": [{"B": 1, "T": 1024, "H": 4, "K": 64, "V": 64, "M": 64}],
    "attn": [{"B": 1, "T": 4096, "H": 4, "HQ": 4, "K": 64, "V": 64}],
    "causal_conv": [{"B": 1, "T": 4096, "D": 1024, "W": 4}],
    "simple_gla_step_": [{"N": 8, "H": 32, **LONG}],
    "linear_attn_step_": [{"N": 8, "H": 32, **LONG}],
    "gated_delta_rule_step_": [{"N": 8, "H": 32, **LONG}],
    "ssd_step_": [{"N": 8, "H": 32, **LONG}],
    "gsa_step_": [{"N": 8, "H": 16, **LONG, "M": 64}],
    "causal_conv_step_": [{"N": 8, "D": 1024, "W": 4}],
    "attn_decoding_one_step": [{"N": 8, "T": 4096, "H": 2, "HQ": 8, "K": 64, "V": 64}],
}
QUICK = {  # of a large problem's sizes, those that are cut
    "cpu": {"T": 256, "H": 2, "HQ": 2, "N": 2},
    "cuda": {"T": 2048, "B": 2},
}
SWEEP = {  # lengths of the plots
    "cpu": (256, 1024, 4096, 16384, 65536, 131072),
    "cuda": (1024, 4096, 16384, 65536, 131072),
}


def sizes_for(device: str, family: str, form: str, quick: bool = False) -> list[dict[str, int]]:
    """List the sizes for an operator of this family and form; a quick run takes the first, made smaller."""
    table = CUDA if device == "cuda" else CPU
    found = table[form] if form in table and family != "attn" else table.get(family, table["linear"])
    if family == "gsa":
        found = [{**sizes, "M": table["gsa"][0]["M"]} for sizes in found]
    if quick:
        limits = QUICK["cuda" if device == "cuda" else "cpu"]
        found = [{letter: min(size, limits.get(letter, size)) for letter, size in found[0].items()}]
    return [dict(sizes) for sizes in found]


@dataclass(frozen=True)
class Draw:
    """Draws the random tensors of one problem."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Draw activations."""
        return self._random(torch.randn, shape).to(dtype or self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Draw numbers from 0 to 1 in float32."""
        return self._random(torch.rand, shape)

    def decay(self, *shape: int, axis: int = 2, strong: bool = False) -> Tensor:
        """Draw log decays in float32; `axis` is that of the heads, the last or the one before."""
        if strong:
            return torch.nn.functional.logsigmoid(self._random(torch.randn, shape))
        rate = 1 + 15 * self.uniform(shape[axis])
        step = 10 ** (-3 + 2 * self.uniform(*shape))
        return -step * (rate if axis == len(shape) - 1 else rate[:, None])

    def _random(self, kind: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        return kind(shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Family:
    """Says how to call the operators of a family, or one operator that belongs to none, and how to count their work."""

    draw: Callable[[Draw, Sizes, bool], Inputs]
    trained: tuple[str, ...]
    work: Callable[[Sizes, int], tuple[Work, Work]]


@dataclass(frozen=True)
class Problem:
    """One operator at one size."""

    operator: str
    family: str
    form: str  # one of FORMS, "auto" for a dispatcher, else the operator's own name
    sizes: Sizes = field(hash=False)
    dtype: torch.dtype = torch.float32
    strong: bool = False

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes to time: forward and forward+backward, or a decode step alone."""
        return (FORWARD, TRAINING) if _table(self.operator).trained else (DECODE,)

    @property
    def trained(self) -> tuple[str, ...]:
        """The arguments that a gradient is taken for."""
        return _table(self.operator).trained

    def inputs(self, device: torch.device, seed: int = 0, dtype: torch.dtype | None = None) -> Inputs:
        """Draw the arguments, by the schema's names."""
        draw = Draw(device, dtype or self.dtype, torch.Generator(device).manual_seed(seed))
        drawn = _table(self.operator).draw(draw, self.sizes, self.strong)
        taken = {a.name for a in schema_arguments(self.operator)}
        return {name: value for name, value in drawn.items() if name in taken}

    def work(self, pass_: str, dtype: torch.dtype | None = None) -> Work:
        """Count the operations and bytes that a pass cannot avoid."""
        element = torch.empty((), dtype=dtype or self.dtype).element_size()
        count = roofline.quadratic if self.form == "parallel" else _table(self.operator).work
        forward, backward = count(self.sizes, element)
        return forward + backward if pass_ == TRAINING else forward

    def label(self, pass_: str) -> str:
        """The name of a row, in `--list` and for `--only`."""
        sizes = " ".join(f"{letter}{size}" for letter, size in self.sizes.items())
        return f"{self.operator} {pass_} {sizes} {dtype_name(self.dtype)}{' strong' if self.strong else ''}"

    def resized(self, **sizes: int) -> Problem:
        """The same call at other sizes."""
        return replace(self, sizes={**self.sizes, **sizes})


def dtype_name(dtype: torch.dtype) -> str:
    """The name as in "float32"."""
    return str(dtype).removeprefix("torch.")


def _linear(draw: Draw, s: Sizes, _strong: bool) -> Inputs:
    b, t, h = s["B"], s["T"], s["H"]
    return {
        "q": draw.normal(b, t, s.get("HK", h), s["K"]),
        "k": draw.normal(b, t, s.get("HK", h), s["K"]),
        "v": draw.normal(b, t, h, s["V"]),
    }


def _gated(draw: Draw, s: Sizes, strong: bool) -> Inputs:
    return {**_linear(draw, s, strong), "g": draw.decay(s["B"], s["T"], s["H"], strong=strong)}


def _positive(draw: Draw, s: Sizes, strong: bool) -> Inputs:
    """Make q and k positive, as normalised linear attention needs them."""
    inputs = _linear(draw, s, strong)
    return {name: x.exp() if name != "v" else x for name, x in inputs.items()} | {"normalize": True}


def _lightning(draw: Draw, s: Sizes, strong: bool) -> Inputs:
    return {**_linear(draw, s, strong), "layer_idx": 3, "num_layers": 12}


def _slots(draw: Draw, s: Sizes, strong: bool) -> Inputs:
    shape = (s["B"], s["T"], s["H"], s["M"])
    gate = draw.decay(*shape, strong=strong).to(draw.dtype)
    return {**_linear(draw, s, strong), "s": draw.normal(*shape), "g": gate}


def _softmax(draw: Draw, s: Sizes, strong: bool) -> Inputs:
    inputs = _linear(draw, {**s, "HK": s["H"]}, strong)
    inputs["q"] = draw.normal(s["B"], s["T"], s["HQ"], s["K"])
    return {**inputs, "g": draw.decay(s["B"], s["T"], s["HQ"], strong=strong)}


def _step(draw: Draw, s: Sizes, strong: bool) -> Inputs:
    n, h, key, value = s["N"], s["H"], s["K"], s["V"]
    return {
        "q": draw.normal(n, h, key),
        "k": draw.normal(n, h, key),
        "v": draw.normal(n, h, value),
        "state": draw.normal(n, h, key, value, dtype=torch.float32),
        "g": draw.decay(n, h, axis=1, strong=strong),
    }


def _unit(x: Tensor) -> Tensor:
    """Divide rows by their length."""
    return torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype)


def _delta(draw: Draw, s: Sizes, strong: bool) -> Inputs:
    """Make keys of unit length, so that the state does not grow."""
    inputs = _gated(draw, s, strong)
    beta = draw.normal(s["B"], s["T"], s["H"], dtype=torch.float32).sigmoid()
    return {**inputs, "k": _unit(inputs["k"]), "beta": beta}


def _delta_step(draw: Draw, s: Sizes, strong: bool) -> Inputs:
    inputs = _step(draw, s, strong)
    return {**inputs, "k": _unit(inputs["k"]), "beta": draw.normal(s["N"], s["H"], dtype=torch.float32).sigmoid()}


def _normalised_step(draw: Draw, s: Sizes, strong: bool) -> Inputs:
    inputs = _step(draw, s, strong)
    inputs |= {name: inputs[name].exp() for name in ("q", "k")}
    return {**inputs, "z": draw.normal(s["N"], 1, s["H"], s["K"], dtype=torch.float32).exp()}


def _slot_step(draw: Draw, s: Sizes, strong: bool) -> Inputs:
    n, h, key, value, m = s["N"], s["H"], s["K"], s["V"], s["M"]
    return {
        "q": draw.normal(n, h, key),
        "k": draw.normal(n, h, key),
        "v": draw.normal(n, h, value),
        "s": draw.normal(n, h, m),
        "g": draw.decay(n, h, m, axis=1, strong=strong).to(draw.dtype),
        "state_k": draw.normal(n, h, key, m, dtype=torch.float32),
        "state_v": draw.normal(n, h, m, value, dtype=torch.float32),
    }


def _cache_step(draw: Draw, s: Sizes, strong: bool) -> Inputs:
    n, cached = s["N"], s["N"] * s["T"]
    return {
        "q": draw.normal(1, n, s["HQ"], s["K"]),
        "k": draw.normal(1, cached, s["H"], s["K"]),
        "v": draw.normal(1, cached, s["H"], s["V"]),
        "g": draw.decay(1, cached, s["HQ"], strong=strong),
        "cu_seqlens": torch.arange(0, cached + 1, s["T"], dtype=torch.int32, device=draw.device),
    }


def _normalise(draw: Draw, s: Sizes, strong: bool) -> Inputs:
    inputs = _positive(draw, s, strong)
    return {"q": inputs["q"], "k": inputs["k"], "o": inputs["v"]}


def _convolution(draw: Draw, s: Sizes, _strong: bool) -> Inputs:
    filters = {"weight": draw.normal(s["D"], s["W"]), "bias": draw.normal(s["D"]), "activation": "silu"}
    return {"x": draw.normal(s["B"], s["T"], s["D"]), **filters}


def _convolution_step(draw: Draw, s: Sizes, strong: bool) -> Inputs:
    n, channels, taps = s["N"], s["D"], s["W"]
    filters = _convolution(draw, {**s, "B": 1, "T": 1}, strong)
    return {**filters, "x": draw.normal(n, channels), "state": draw.normal(n, channels, taps - 1)}


def _mamba(draw: Draw, s: Sizes, _strong: bool) -> Inputs:
    b, t, h = s["B"], s["T"], s["H"]
    rate, step = 1 + 15 * draw.uniform(h), 10 ** (-3 + 2 * draw.uniform(b, t, h))
    keys = {name: draw.normal(b, t, h, s["K"]) for name in ("B", "C")}
    return {"x": draw.normal(b, t, h, s["V"]), "dt": step, "A": -rate, **keys, "D": draw.uniform(h)}


def _mamba_step(draw: Draw, s: Sizes, strong: bool) -> Inputs:
    inputs = _mamba(draw, {**s, "B": s["N"], "T": 1}, strong)
    once = {name: x if name in ("A", "D") else x[:, 0] for name, x in inputs.items()}
    return {**once, "state": draw.normal(s["N"], s["H"], s["V"], s["K"], dtype=torch.float32)}


TABLE: Mapping[str, Family] = {  # by an operator's name, else by its family's
    "simple_gla_step_": Family(_step, (), roofline.state_step),
    "gated_delta_rule_step_": Family(_delta_step, (), roofline.state_step),
    "linear_attn_step_": Family(_normalised_step, (), roofline.state_step),
    "gsa_step_": Family(_slot_step, (), roofline.state_step),
    "causal_conv_step_": Family(_convolution_step, (), roofline.convolution_step),
    "attn_decoding_one_step": Family(_cache_step, (), roofline.cache_step),
    "normalize_output": Family(_normalise, ("q", "k", "o"), roofline.normalisation),
    "ssd_step_": Family(_mamba_step, (), roofline.state_step),
    "ssd": Family(_mamba, ("x", "dt", "A", "B", "C", "D"), roofline.scalar_decay),
    "causal_conv": Family(_convolution, ("x", "weight", "bias"), roofline.convolution),
    "simple_gla": Family(_gated, ("q", "k", "v", "g"), roofline.scalar_decay),
    "linear_attn": Family(_positive, ("q", "k", "v"), roofline.no_decay),
    "lightning_attn": Family(_lightning, ("q", "k", "v"), roofline.no_decay),
    "gated_delta_rule": Family(_delta, ("q", "k", "v", "g", "beta"), roofline.delta_rule),
    "gsa": Family(_slots, ("q", "k", "v", "s", "g"), roofline.slot_attention),
    "attn": Family(_softmax, ("q", "k", "v", "g"), roofline.quadratic),
}
FAMILIES = ("simple_gla", "linear_attn", "lightning_attn", "gated_delta_rule", "gsa", "attn")
UNTIMED = {
    "lightning_decay": "a few numbers per layer, computed once",
    "simple_gla_advance_": "the decode step without its outputs",
    "gsa_advance_": "the same for gsa",
    "gsa_states": "chunk_gsa, with the states that it keeps for its gradient",
    "gsa_prefill_": "chunk_gsa, from rows of pools to the same rows",
    "simple_gla_prefill_": "the chunk forms' kernels, from rows of a pool to the same rows",
    "simple_gla_states": "the chunk forms' kernels, with some states more",
    "attn_prefill": "parallel_attn's kernels, for the last of its rows",
}


def schema_arguments(operator: str) -> list[torch.Argument]:
    """The arguments of an operator's schema."""
    return list(fla_ops.ops()[operator].overload._schema.arguments)


def public_operators() -> list[str]:
    """The operators that a user calls: those with a public function of the same name."""
    return [name for name in fla_ops.ops() if hasattr(fla_ops, name) and name not in UNTIMED]


def family_of(operator: str) -> str:
    """The family that an operator's name ends in; the operator's own name if it belongs to none."""
    known = [name for name in TABLE if operator == name or operator.endswith(f"_{name}")]
    if not known:
        raise KeyError(f"{operator} has no benchmark problem: add one to benchmarks/problems.py")
    return max(known, key=len)


def form_of(operator: str) -> str:
    """The form that an operator's name begins with; "auto" for a dispatcher, else the operator's own name."""
    found = [form for form in FORMS if operator.startswith(f"{form}_")]
    if found:
        return found[0]
    return "auto" if operator in FAMILIES else operator


def _table(operator: str) -> Family:
    return TABLE[family_of(operator)]


def problems(device: torch.device, quick: bool = False) -> Iterator[Problem]:
    """Yield everything that the command measures, in order."""
    for operator in sorted(public_operators(), key=lambda name: (FAMILIES + tuple(TABLE)).index(family_of(name))):
        family, form = family_of(operator), form_of(operator)
        for sizes in sizes_for(device.type, family, form, quick):
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            yield Problem(operator, family, form, sizes, dtype)
        if operator == "chunk_simple_gla" and not quick:
            yield Problem(operator, family, form, sizes_for(device.type, family, form)[0], dtype, strong=True)
