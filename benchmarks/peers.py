"""The peers: other implementations of the same functions, in fla-core, transformers' PyTorch paths and PyTorch itself.

A peer turns our inputs into its own, once, before timing. `make` imports the peer's package. If that is missing, the
peer is shown as not installed.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .problems import DECODE, FAMILIES, FORWARD, Inputs, Problem
from .roofline import SIDE

Made = tuple[Callable[[], Any], list[Tensor]]  # the call, and what a gradient is taken for
LONG = ("chunk", "fused_chunk", "auto")
PRODUCT = "matrix product"


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    name      the name to show
    package   the distribution that it comes from
    make      turns (inputs, variant) into the call and its leaves
    same      tells whether it computes the same function as ours; if not, it is there for scale
    variants  the settings, such as chunk sizes, of which the fastest is compared
    """

    name: str
    package: str
    make: Callable[[Inputs, Any], Made]
    same: bool = True
    variants: tuple[Any, ...] = (None,)


def peers_of(problem: Problem, pass_: str, device: torch.device) -> Iterator[Peer]:
    """Yield the peers of one operator on this device."""
    if pass_ == DECODE:
        yield Peer(f"copy of the {'cache' if 'T' in problem.sizes else 'state'}", "torch", _copy, same=False)
    if problem.operator in MAMBA:
        yield MAMBA[problem.operator]
        return
    if device.type == "cuda":
        yield from _on_a_gpu(problem, pass_) if problem.operator != "normalize_output" else ()
    else:
        yield from _on_a_cpu(problem)
        if problem.form == "chunk" and pass_ == FORWARD:
            yield Peer(PRODUCT, "torch", _product, same=False)
    if problem.form in (*LONG, "parallel"):
        yield Peer("softmax attention", "torch", _softmax, same=False)


def _on_a_gpu(problem: Problem, pass_: str) -> Iterator[Peer]:
    name = f"chunk_{problem.family}" if problem.form == "auto" else problem.operator
    if problem.family == "attn":
        name = "parallel_attn" if problem.form == "auto" else problem.operator
    if pass_ == DECODE and problem.operator.endswith("_step_"):
        family = problem.operator.removesuffix("_step_")
        yield Peer("fla-core fused_recurrent", "fla-core", _one_step(family, f"fused_recurrent_{family}"))
    else:
        module = f"fla.ops.{problem.family if problem.family in FAMILIES else 'attn'}"
        if problem.operator == "attn_decoding_one_step":
            module += ".decoding"
        yield Peer("fla-core", "fla-core", _by_name(module, name))


def _on_a_cpu(problem: Problem) -> Iterator[Peer]:
    family, form = problem.family, problem.form
    naive = f"fla.ops.{family}.naive"
    if family == "simple_gla" and form in LONG:
        chunked = _by_name(naive, "naive_chunk_simple_gla", "chunk_size")
        yield Peer("fla-core naive_chunk", "fla-core", chunked, variants=(32, 64, 128))
        yield Peer("transformers Mamba-2", "transformers", _mamba2, variants=(32, 64, 128, 256))
        yield Peer("transformers MiniMax", "transformers", _minimax, same=False)
    elif family == "linear_attn" and form in LONG:
        yield Peer("fla-core naive_chunk", "fla-core", _by_name(naive, "naive_chunk_linear_attn"))
    elif family == "lightning_attn" and form in LONG:
        yield Peer("transformers MiniMax", "transformers", _minimax, same=False)
    elif family == "gated_delta_rule" and form in LONG:
        yield Peer("transformers Qwen3-Next", "transformers", _qwen3_next)
    elif family == "gsa":
        yield Peer("fla-core naive_recurrent", "fla-core", _by_name(naive, "naive_recurrent_gsa"))
    elif family == "attn":
        yield Peer("fla-core naive_parallel", "fla-core", _by_name(naive, "naive_parallel_attn"))
    elif problem.operator == "attn_decoding_one_step":
        yield Peer("fla-core naive_attn_decoding", "fla-core", _by_name("fla.ops.attn.naive", "naive_attn_decoding"))
    elif problem.operator.endswith("_step_"):
        own = problem.operator.removesuffix("_step_")
        if own == "simple_gla":
            yield Peer("transformers Mamba-2 step", "transformers", _mamba2_step)
        if own == "gated_delta_rule":
            yield Peer("transformers Qwen3-Next step", "transformers", _qwen3_next_step)
            return
        yield Peer("fla-core naive_recurrent", "fla-core", _one_step(own, f"naive_recurrent_{own}", "naive"))
    elif form == "parallel" and family == "simple_gla":
        yield Peer("fla-core naive_parallel", "fla-core", _by_name(naive, "naive_parallel_simple_gla"))
    elif form == "fused_recurrent" and family in ("simple_gla", "linear_attn"):
        yield Peer("fla-core naive_recurrent", "fla-core", _by_name(naive, f"naive_recurrent_{family}"))


def _leaf(x: Tensor, like: Tensor) -> Tensor:
    """Copy x into a leaf of its own, which needs a gradient if `like` does."""
    return x.detach().clone().requires_grad_(like.requires_grad)


def _by_name(module: str, function: str, setting: str | None = None) -> Callable[[Inputs, Any], Made]:
    """Call a function whose arguments have our names; the variant is its argument `setting`."""

    def make(inputs: Inputs, variant: Any) -> Made:
        found = getattr(importlib.import_module(module), function, None)
        if found is None:
            raise NotImplementedError(f"there is no {function}")
        taken = inspect.signature(found).parameters
        given = {name: value for name, value in inputs.items() if name in taken}
        if setting is not None:
            given[setting] = variant
        return lambda: found(**given), [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]

    return make


def _conv1d(inputs: Inputs, _variant: Any) -> Made:
    """Convolve channels-first copies, as models without causal_conv1d do."""
    x, weight, bias = _leaf(inputs["x"].mT, inputs["x"]), inputs["weight"], inputs["bias"]
    channels, taps = weight.shape
    filters = {"bias": bias, "padding": taps - 1, "groups": channels}
    return lambda: F.silu(F.conv1d(x, weight[:, None], **filters)[..., : x.shape[2]]).mT, _trained(x, weight, bias)


def _one_step(family: str, function: str, module: str = "") -> Callable[[Inputs, Any], Made]:
    """Ask a recurrent function for a single step; it returns the new state instead of updating one in place."""

    def make(inputs: Inputs, _variant: Any) -> Made:
        found = getattr(importlib.import_module(".".join(filter(None, ("fla.ops", family, module)))), function)
        steps = {name: inputs[name].unsqueeze(1) for name in ("q", "k", "v", "s", "g", "beta") if name in inputs}
        states = tuple(inputs[name] for name in ("state", "z", "state_k", "state_v") if name in inputs)
        settings = {"initial_state": states if len(states) > 1 else states[0], "output_final_state": True}
        if "z" in inputs:
            settings["normalize"] = True
        return lambda: found(**steps, **settings), []

    return make


def _softmax(inputs: Inputs, _variant: Any) -> Made:
    """Call causal softmax attention on the same q, k and v."""
    q, k, v = (_leaf(inputs[name].transpose(1, 2), inputs[name]) for name in ("q", "k", "v"))
    grouped = q.shape[1] != k.shape[1]
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped), _trained(q, k, v)


def _product(inputs: Inputs, _variant: Any) -> Made:
    """Multiply two square matrices, for the share of that rate that others reach."""
    a, b = _factors(inputs["q"].dtype)
    return lambda: a @ b, []


@cache
def _factors(dtype: torch.dtype) -> Tensor:
    """Draw two matrices, which all sets of inputs share."""
    return torch.randn(2, SIDE["cpu"], SIDE["cpu"], dtype=dtype)


def _copy(inputs: Inputs, _variant: Any) -> Made:
    """Copy as many bytes as the step must move: all of a state, which it reads and writes, or half of a cache."""
    moved = [inputs[name] for name in ("state", "state_k", "state_v") if name in inputs]
    if not moved:
        half = inputs["k"].shape[1] // 2
        moved = [inputs["k"][:, :half], inputs["v"][:, :half]]
    targets = [x.clone() for x in moved]

    def run() -> None:
        for target, x in zip(targets, moved, strict=True):
            target.copy_(x)

    return run, []


def modeling(model: str) -> Any:
    """A model's module of transformers. On its import it takes kernels of fla that are installed, but need a GPU."""
    before = {name: module for name, module in sys.modules.items() if name == "fla"}
    if not torch.cuda.is_available():
        sys.modules["fla"] = None  # type: ignore[assignment]  # as Python marks what cannot be imported
    try:
        return importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    finally:
        if not sys.modules.get("fla", True):
            del sys.modules["fla"]
        sys.modules.update(before)


def _trained(*tensors: Tensor) -> list[Tensor]:
    return [x for x in tensors if x.requires_grad]


def _mamba2(inputs: Inputs, chunk_size: int) -> Made:
    """Call the chunked scan of the Mamba-2 model with step -g and rate 1; its values are divided by the step."""
    scan = _mamba2_module().mamba2_chunk_scan
    step = _leaf(-inputs["g"], inputs["g"])
    keys, queries = _leaf(inputs["k"], inputs["k"]), _leaf(inputs["q"] * inputs["q"].shape[-1] ** -0.5, inputs["q"])
    values = _leaf(inputs["v"] / step.detach()[..., None].to(inputs["v"].dtype), inputs["v"])
    rate = -torch.ones(values.shape[2], device=values.device)

    def run() -> Any:
        return scan(values, step, rate, keys, queries, chunk_size=chunk_size)

    return run, _trained(values, step, keys, queries)


def _mamba2_module() -> Any:
    """The Mamba-2 model's module, which else would say once that its fast path is not installed."""
    import transformers

    transformers.logging.set_verbosity_error()
    return modeling("mamba2")


def _ssd(inputs: Inputs, chunk_size: int) -> Made:
    """Call the chunked scan of the Mamba-2 model as it stands: its arguments are ours."""
    names = ("x", "dt", "A", "B", "C", "D")
    scan, given = _mamba2_module().mamba2_chunk_scan, [_leaf(inputs[name], inputs[name]) for name in names]
    *most, skip = given
    return lambda: scan(*most, chunk_size, skip), _trained(*given)


def _ssd_step(inputs: Inputs, _variant: Any) -> Made:
    """Call the decode step of the Mamba-2 model on a state of its own."""
    update, state = _mamba2_module().mamba2_selective_state_update, inputs["state"].clone()
    values, keys, queries = (inputs[name] for name in ("x", "B", "C"))
    rate, skip = inputs["A"][:, None, None], inputs["D"][:, None]
    return lambda: update(state, values, inputs["dt"][..., None], rate, keys, queries, skip), []


def _convolution_step(inputs: Inputs, _variant: Any) -> Made:
    """Call the convolution's decode step of the Mamba-2 model on a state of its own."""
    update, state = _mamba2_module().causal_conv1d_update, inputs["state"].clone()
    x, filters = inputs["x"][..., None], [inputs[name] for name in ("weight", "bias", "activation")]
    return lambda: update(x, state, *filters), []


MAMBA = {
    "causal_conv": Peer("conv1d and silu", "torch", _conv1d),
    "causal_conv_step_": Peer("transformers Mamba-2 step", "transformers", _convolution_step),
    "ssd": Peer("transformers Mamba-2", "transformers", _ssd, variants=(32, 64, 128, 256)),
    "ssd_step_": Peer("transformers Mamba-2 step", "transformers", _ssd_step),
}


def _mamba2_step(inputs: Inputs, _variant: Any) -> Made:
    """Call the decode step of the Mamba-2 model on a state of its own, in its layout."""
    update = _mamba2_module().mamba2_selective_state_update
    value_width, key_width = inputs["v"].shape[-1], inputs["q"].shape[-1]
    step = -inputs["g"][..., None].expand(-1, -1, value_width)[..., 0]
    rate = -torch.ones(inputs["v"].shape[1], 1, 1, device=step.device)
    values = inputs["v"] / step[..., None]
    state = inputs["state"].mT.contiguous()
    queries = inputs["q"] * key_width**-0.5

    def run() -> Any:
        return update(state, values, step[..., None], rate, inputs["k"], queries)

    return run, []


class _Ungated:
    """Stands for an output gate of one."""

    def sigmoid(self) -> _Ungated:
        return self

    def __mul__(self, x: Tensor) -> Tensor:
        return x


def _qwen3_next(inputs: Inputs, _variant: Any) -> Made:
    """Call the chunked gated delta rule of the Qwen3-Next model."""
    rule = modeling("qwen3_next").torch_chunk_gated_delta_rule
    given = {name: _leaf(inputs[name], inputs[name]) for name in ("q", "k", "v", "g", "beta")}
    return lambda: rule(*given.values()), list(given.values())


def _qwen3_next_step(inputs: Inputs, _variant: Any) -> Made:
    """Call the recurrent gated delta rule of the Qwen3-Next model for one step, which returns the new state."""
    rule = modeling("qwen3_next").torch_recurrent_gated_delta_rule
    steps = [inputs[name].unsqueeze(1) for name in ("q", "k", "v", "g", "beta")]
    return lambda: rule(*steps, inputs["state"], True), []


def _minimax(inputs: Inputs, _variant: Any) -> Made:
    """Call the block loop of the MiniMax model's lightning attention, without projections, normalisation and gate."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    heads, width = inputs["v"].shape[2:]
    config = MiniMaxConfig(
        hidden_size=8,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 4,
    )
    layer = MiniMaxLightningAttention(config, layer_idx=1).to(inputs["v"].device)
    nothing = torch.nn.Identity()
    layer.act_fn = layer.qkv_proj = layer.norm = layer.out_proj = nothing
    layer.output_gate = _Gate()
    packed = torch.cat([inputs[name].detach() for name in ("q", "k", "v")], -1).flatten(2)
    packed.requires_grad_(inputs["q"].requires_grad)
    return lambda: layer(packed, None, None)[0], _trained(packed)


class _Gate(torch.nn.Module):
    def forward(self, _: Tensor) -> Any:
        return _Ungated()
