"""A small call of each public operator, and what its family's reference says must come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fla_ops.attn import reference as attn
from fla_ops.causal_conv import reference as causal_conv
from fla_ops.gated_delta_rule import reference as gated_delta_rule
from fla_ops.gsa import reference as gsa
from fla_ops.lightning_attn import reference as lightning_attn
from fla_ops.linear_attn import reference as linear_attn
from fla_ops.simple_gla import reference as simple_gla
from fla_ops.ssd import reference as ssd

OFFSETS = (0, 30, 70)  # of the caches that a step of attn reads


@dataclass(frozen=True)
class Sizes:
    """The sizes of all calls: two chunks of 64 steps, and grouped heads, unless told. D and W are a convolution's."""

    B: int = 2
    T: int = 70
    HK: int = 2
    H: int = 4
    K: int = 16
    M: int = 8
    V: int = 24
    D: int = 24
    W: int = 4

    def of(self, letters: str) -> tuple[int, ...]:
        """The sizes of some axes, in this order."""
        return tuple(getattr(self, letter) for letter in letters.split())


@dataclass(frozen=True)
class Problem:
    """One call.

    function   name of the public function, which is the operator's
    inputs     arguments of the function and of the reference; tensors are in float64, on a CPU
    reference  returns the function's outputs, and then the tensors that it updates
    flags      arguments of the function alone
    updated    inputs that are updated in place
    trained    whether the gradients of all inputs are compared too
    """

    function: str
    inputs: dict[str, Any]
    reference: Callable[..., Any]
    flags: dict[str, Any] = field(default_factory=dict)
    updated: tuple[str, ...] = ()
    trained: bool = True


def problems(sizes: Sizes | None = None) -> list[Problem]:
    """The calls of every public operator, with the same numbers each time."""
    s = sizes or Sizes()
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, dtype=torch.float64, generator=generator)
    uniform = partial(torch.rand, dtype=torch.float64, generator=generator)
    return [
        *_simple_gla(s, normal, uniform),
        *_linear_attn(s, normal, uniform),
        *_lightning_attn(s, normal),
        *_gated_delta_rule(s, normal, uniform),
        *_gsa(s, normal, uniform),
        *_attn(s, normal, uniform),
        *_causal_conv(s, normal),
        *_ssd(s, normal, uniform),
    ]


Draw = Callable[..., Tensor]


def _simple_gla(s: Sizes, normal: Draw, uniform: Draw) -> list[Problem]:
    B, T, HK, H, K, V = s.of("B T HK H K V")

    def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, g = (x[:, None] for x in (q, k, v, g))
        o, state = simple_gla.recurrent(q, k, v, g, initial_state=state)
        return o[:, 0], state

    def prefill(state: Tensor, slots: Tensor, **x: Any) -> tuple[Tensor, Tensor]:
        o, final = simple_gla.recurrent(**x, initial_state=state[slots])
        return o, state.index_copy(0, slots, final)

    def advance(state: Tensor, accepted: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor]:
        taken = (torch.arange(k.shape[1], device=k.device) < accepted[:, None])[..., None]
        k, v, g = k * taken[..., None], v * taken[..., None], g * taken
        return (simple_gla.recurrent(k, k, v, g, initial_state=state)[1],)

    def states(initial_state: Tensor, **x: Any) -> tuple[Tensor, Tensor, Tensor]:
        first = {name: value[:, :64] for name, value in x.items()}
        o, final = simple_gla.recurrent(**x, initial_state=initial_state)
        return o, simple_gla.recurrent(**first, initial_state=initial_state)[1], final

    q, k, v, g = normal(B, T, HK, K), normal(B, T, HK, K), normal(B, T, H, V), -uniform(B, T, H)
    activations, state = {"q": q, "k": k, "v": v, "g": g}, normal(B, H, K, V)
    forms = ("simple_gla", "chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla")
    given, flags = activations | {"initial_state": state}, {"output_final_state": True}
    first = {name: x[:, 0] for name, x in activations.items()} | {"state": state}
    drafted = {"k": k[:, :5], "v": v[:, :5], "g": g[:, :5], "state": state, "accepted": torch.tensor([2, 5])}
    pooled = activations | {"state": normal(3, H, K, V), "slots": torch.tensor([2, 0])}
    return [
        *(Problem(form, given, simple_gla.recurrent, flags) for form in forms),
        Problem("parallel_simple_gla", activations, lambda **x: simple_gla.parallel(**x)[0]),
        Problem("simple_gla_step_", first, step, updated=("state",), trained=False),
        Problem("simple_gla_states", given, states, trained=False),
        Problem("simple_gla_advance_", drafted, advance, updated=("state",), trained=False),
        Problem("simple_gla_prefill_", pooled, prefill, updated=("state",), trained=False),
    ]


def _linear_attn(s: Sizes, normal: Draw, uniform: Draw) -> list[Problem]:
    """Queries and keys are positive, as a feature map makes them."""
    B, T, HK, H, K, V = s.of("B T HK H K V")

    def recurrent(initial_state: tuple[Tensor, Tensor], **x: Any) -> Any:
        return linear_attn.recurrent(**x, initial_state=initial_state[0], initial_z=initial_state[1])

    def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, z: Tensor) -> Any:
        q, k, v = (x[:, None] for x in (q, k, v))
        o, *states = linear_attn.recurrent(q, k, v, initial_state=state, initial_z=z)
        return (o[:, 0], *states)

    q, k, v = 0.1 + uniform(B, T, HK, K), 0.1 + uniform(B, T, HK, K), normal(B, T, H, V)
    state, z = normal(B, H, K, V), 0.1 + uniform(B, 1, H, K)
    forms = ("linear_attn", "chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn")
    given = {"q": q, "k": k, "v": v, "initial_state": (state, z), "normalize": True}
    first = {"q": q[:, 0], "k": k[:, 0], "v": v[:, 0], "state": state, "z": z}
    divided = {"q": q, "k": k, "o": v, "initial_z": z}
    return [
        *(Problem(form, given, recurrent, {"output_final_state": True}) for form in forms),
        Problem("normalize_output", divided, linear_attn.divide, {"output_final_z": True}),
        Problem("linear_attn_step_", first, step, updated=("state", "z"), trained=False),
    ]


def _lightning_attn(s: Sizes, normal: Draw) -> list[Problem]:
    B, T, HK, H, K, V = s.of("B T HK H K V")
    layer = {"layer_idx": 1, "num_layers": 4}
    forms = ("lightning_attn", "chunk_lightning_attn", "fused_chunk_lightning_attn", "fused_recurrent_lightning_attn")
    given = {"q": normal(B, T, HK, K), "k": normal(B, T, HK, K), "v": normal(B, T, H, V), **layer}
    given |= {"initial_state": normal(B, H, K, V)}
    return [
        *(Problem(form, given, lightning_attn.recurrent, {"output_final_state": True}) for form in forms),
        Problem("lightning_decay", {"num_heads": H, **layer}, lightning_attn.decay, trained=False),
    ]


def _gated_delta_rule(s: Sizes, normal: Draw, uniform: Draw) -> list[Problem]:
    B, T, HK, H, K, V = s.of("B T HK H K V")

    def step(state: Tensor, **x: Any) -> tuple[Tensor, Tensor]:
        x = {name: value[:, None] if isinstance(value, Tensor) else value for name, value in x.items()}
        o, state = gated_delta_rule.recurrent(**x, initial_state=state)
        return o[:, 0], state

    given: dict[str, Any] = {"q": normal(B, T, HK, K), "k": normal(B, T, HK, K), "v": normal(B, T, H, V)}
    given |= {"g": -uniform(B, T, H), "beta": uniform(B, T, H)}
    state, normalized = normal(B, H, K, V), {"use_qk_l2norm_in_kernel": True}
    first = {name: x[:, 0] for name, x in given.items()} | {"state": state} | normalized
    given |= {"initial_state": state} | normalized
    forms = ("gated_delta_rule", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
    return [
        *(Problem(form, given, gated_delta_rule.recurrent, {"output_final_state": True}) for form in forms),
        Problem("gated_delta_rule_step_", first, step, updated=("state",), trained=False),
    ]


def _gsa(s: Sizes, normal: Draw, uniform: Draw) -> list[Problem]:
    B, T, HK, H, K, M, V = s.of("B T HK H K M V")

    def recurrent(initial_state: tuple[Tensor, Tensor], **x: Any) -> Any:
        return gsa.recurrent(**x, initial_k=initial_state[0], initial_v=initial_state[1])

    def step(state_k: Tensor, state_v: Tensor, **x: Tensor) -> Any:
        first: dict[str, Any] = {name: value[:, None] for name, value in x.items()}
        o, *states = gsa.recurrent(**first, initial_k=state_k, initial_v=state_v)
        return (o[:, 0], *states)

    def prefill(state_k: Tensor, state_v: Tensor, slots: Tensor, **x: Any) -> Any:
        o, *states = gsa.recurrent(**x, initial_k=state_k[slots], initial_v=state_v[slots])
        return (o, *(y.index_copy(0, slots, z) for y, z in zip((state_k, state_v), states, strict=True)))

    def advance(state_k: Tensor, state_v: Tensor, accepted: Tensor, **x: Any) -> Any:
        taken = (torch.arange(x["k"].shape[1], device=accepted.device) < accepted[:, None])[..., None, None]
        x = {name: value * taken for name, value in x.items()}
        return tuple(gsa.recurrent(x["k"], **x, initial_k=state_k, initial_v=state_v)[1:])

    def on_the_way(initial_state: tuple[Tensor, Tensor], **x: Any) -> Any:
        first = {name: value[:, :64] for name, value in x.items()}
        (o, *final), (_, *kept) = recurrent(initial_state, **x), recurrent(initial_state, **first)
        return (o, *kept, *final)

    activations = {"q": normal(B, T, H, K), "k": normal(B, T, HK, K), "v": normal(B, T, HK, V)}
    activations |= {"s": uniform(B, T, HK, M), "g": -uniform(B, T, HK, M)}
    states = normal(B, HK, K, M), normal(B, HK, M, V)
    first = {name: x[:, 0] for name, x in activations.items()} | {"state_k": states[0], "state_v": states[1]}
    given = activations | {"initial_state": states}
    pooled = activations | {
        "state_k": normal(3, HK, K, M),
        "state_v": normal(3, HK, M, V),
        "slots": torch.tensor([2, 0]),
    }
    drafted = {name: x[:, :5] for name, x in activations.items() if name != "q"} | {"accepted": torch.tensor([2, 5])}
    drafted |= {"state_k": states[0], "state_v": states[1]}
    return [
        *(
            Problem(form, given, recurrent, {"output_final_state": True})
            for form in ("gsa", "chunk_gsa", "fused_recurrent_gsa")
        ),
        Problem("gsa_advance_", drafted, advance, updated=("state_k", "state_v"), trained=False),
        Problem("gsa_prefill_", pooled, prefill, updated=("state_k", "state_v"), trained=False),
        Problem("gsa_states", given, on_the_way, trained=False),
        Problem("gsa_step_", first, step, updated=("state_k", "state_v"), trained=False),
    ]


def _attn(s: Sizes, normal: Draw, uniform: Draw) -> list[Problem]:
    B, T, HK, H, K, V = s.of("B T HK H K V")
    beside = {"sink_bias": normal(H), "window_size": 23}
    given = {"q": normal(B, T, H, K), "k": normal(B, T, HK, K), "v": normal(B, T, HK, V), "g": -uniform(B, T, H)}
    chunk = given | beside | {"q": given["q"][:, -20:], "softcap": 2.0}
    caches: dict[str, Any] = {name: x[:1] for name, x in given.items()} | {"q": normal(1, len(OFFSETS) - 1, H, K)}
    caches |= {"scale": 0.3, "cu_seqlens": torch.tensor(OFFSETS)}
    return [
        *(Problem(form, given | beside, lambda **x: attn.parallel(**x)[0]) for form in ("attn", "parallel_attn")),
        Problem("attn_prefill", chunk, attn.prefill),
        Problem("attn_decoding_one_step", caches | beside, attn.one_step, trained=False),
    ]


def _causal_conv(s: Sizes, normal: Draw) -> list[Problem]:
    B, T, D, W = s.of("B T D W")
    filters = {"weight": normal(D, W), "bias": normal(D), "activation": "silu"}
    given = {"x": normal(B, T, D), **filters, "initial_state": normal(B, D, W - 1)}
    first = {"x": normal(B, D), "state": normal(B, D, W), **filters}
    return [
        Problem("causal_conv", given, causal_conv.convolve, {"output_final_state": True}),
        Problem("causal_conv_step_", first, causal_conv.step, updated=("state",), trained=False),
    ]


def _ssd(s: Sizes, normal: Draw, uniform: Draw) -> list[Problem]:
    B, T, HK, H, K, V = s.of("B T HK H K V")

    def step(state: Tensor, **x: Any) -> tuple[Tensor, Tensor]:
        once = {name: value[:, None] if name in moving else value for name, value in x.items()}
        o, state = ssd.recurrent(**once, initial_state=state)
        return o[:, 0], state

    moving = ("x", "dt", "B", "C", "z")
    given = {"x": normal(B, T, H, V), "dt": uniform(B, T, H), "A": -uniform(H), "B": normal(B, T, HK, K)}
    given |= {"C": normal(B, T, HK, K), "D": normal(H), "z": normal(B, T, H, V), "dt_bias": uniform(H)}
    first = {name: x[:, 0] if name in moving else x for name, x in given.items()} | {"state": normal(B, H, V, K)}
    given["initial_state"] = normal(B, H, V, K)
    return [
        Problem("ssd", given, ssd.recurrent, {"output_final_state": True}),
        Problem("ssd_step_", first, step, updated=("state",), trained=False),
    ]
