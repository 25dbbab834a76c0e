"""fla's operators as fla_ops serves them, against fla's own PyTorch definitions, called by fla's signatures."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fla_ops.integrations.fla import attention, operators
from tests.numerics import close

with warnings.catch_warnings():  # fla warns that there is no GPU
    warnings.simplefilter("ignore")
    pytest.importorskip("fla.ops", reason="flash-linear-attention is not installed: `make test` installs it")


def naive(family: str, function: str) -> Any:
    return getattr(importlib.import_module(f"fla.ops.{family}.naive"), f"naive_{function}")


def inputs(time: int = 64) -> list[Tensor]:
    """q, k, v [B, T, H, K or V], g [B, T, H]."""
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 2, time, 3, 8, generator=generator)
    v, g = torch.randn(2, time, 3, 12, generator=generator), torch.randn(2, time, 3, generator=generator)
    return [q, k, v, F.logsigmoid(g)]


def test_simple_gla() -> None:
    q, k, v, g = inputs()
    state = torch.randn(2, 3, 8, 12)
    expected, final = naive("simple_gla", "recurrent_simple_gla")(q, k, v, g, 0.5, state, True)
    for name in ("chunk", "fused_chunk", "fused_recurrent"):
        form = getattr(operators, f"{name}_simple_gla")
        o, after = form(q=q, k=k, v=v, g=g, scale=0.5, initial_state=state, output_final_state=True)
        close(o, expected)
        close(after, final)
    expected, _ = naive("simple_gla", "parallel_simple_gla")(q, k, v, g)
    close(operators.parallel_simple_gla(q, k, v, g)[0], expected)
    close(operators.chunk_simple_gla(q, k, v, g, chunk_size=16)[0], expected)


def test_retention() -> None:
    q, k, v, _ = inputs()
    expected = naive("retention", "retention")(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    for name in ("chunk", "fused_chunk", "fused_recurrent", "parallel"):
        close(getattr(operators, f"{name}_retention")(q, k, v)[0], expected)
    _, state = operators.chunk_retention(q[:, :40], k[:, :40], v[:, :40], output_final_state=True)
    later = (x[:, 40:] for x in (q, k, v))
    close(operators.fused_recurrent_retention(*later, initial_state=state)[0], expected[:, 40:])


@pytest.mark.parametrize("normalize", [False, True])
def test_linear_attn(normalize: bool) -> None:
    q, k, v, _ = inputs()
    q, k = q.abs(), k.abs()
    expected, _ = naive("linear_attn", "recurrent_linear_attn")(q, k, v, normalize=normalize)
    for name in ("chunk", "fused_chunk", "fused_recurrent"):
        close(getattr(operators, f"{name}_linear_attn")(q, k, v, normalize=normalize)[0], expected)


def test_lightning_attn() -> None:
    q, k, v, _ = inputs()
    decay = -(8 / 3 * (1 - 2 / 5)) * torch.arange(3.0)
    expected, _ = naive("simple_gla", "recurrent_simple_gla")(q, k, v, decay.expand(2, 64, 3))
    for form in (operators.chunk_lightning_attn, operators.fused_recurrent_lightning_attn):
        close(form(q, k, v, layer_idx=2, num_layers=5)[0], expected)


def test_gsa() -> None:
    q, k, v, _ = inputs()
    g = F.logsigmoid(torch.randn(2, 64, 3, 5))
    expected, states = naive("gsa", "recurrent_gsa")(q, k, v, 1 - g.exp(), g, 0.5, output_final_state=True)
    for form in (operators.chunk_gsa, operators.fused_recurrent_gsa):
        o, after = form(q=q, k=k, v=v, s=1 - g.exp(), g=g, scale=0.5, output_final_state=True)
        close(o, expected)
        for found, wanted in zip(after, states, strict=True):
            close(found, wanted)


def test_attn() -> None:
    q, k, v, g = inputs()
    expected = naive("forgetting_attn", "forgetting_attn")(q, k, v, g, 0.5)
    close(operators.parallel_forgetting_attn(q, k, v, g, 0.5), expected)
    close(operators.parallel_attn(q, k, v, g, 0.5), expected)
    offsets = torch.tensor([0, 64, 128], dtype=torch.int32)
    packed = [x.flatten(0, 1)[None] for x in (k, v, g)]
    close(operators.attn_decoding_one_step(q[None, :, -1], *packed, 0.5, offsets)[0], expected[:, -1])


def dense(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """q [S, HQ, K] are the last rows of [T, HQ, K]; a row sees its own key and those before it, `window` in all."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    rows = torch.arange(k.shape[0] - q.shape[0], k.shape[0])[:, None]
    columns = torch.arange(k.shape[0])
    scores = torch.einsum("shk,thk->hst", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill((columns > rows) | (columns <= rows - window), -torch.inf)
    return torch.einsum("hst,thv->shv", scores.softmax(-1), v)


@pytest.mark.parametrize("steps", [1, 5, 37])
def test_flash_attn(steps: int) -> None:
    q, k, v = torch.randn(2, steps, 4, 8), torch.randn(2, 37, 2, 8), torch.randn(2, 37, 2, 8)
    for sizes, window in (((-1, -1), 37), ((6, 0), 7)):
        found = attention.flash_attn_func(q, k, v, causal=True, window_size=sizes)
        close(found, torch.stack([dense(q[n], k[n], v[n], window) for n in range(2)]))


@pytest.mark.parametrize("window", [37, 7])
def test_flash_attn_of_packed_sequences(window: int) -> None:
    q, k, v = torch.randn(37, 4, 8), torch.randn(37, 2, 8), torch.randn(37, 2, 8)
    offsets = torch.tensor([0, 14, 37], dtype=torch.int32)
    sizes = {"causal": True, "window_size": (window - 1, 0)}
    expected = [dense(q[s:e], k[s:e], v[s:e], window) for s, e in ((0, 14), (14, 37))]
    found = attention.flash_attn_varlen_func(q, k, v, offsets, offsets, 23, 23, **sizes)
    close(found, torch.cat(expected))
    newest = torch.arange(3, dtype=torch.int32)
    found = attention.flash_attn_varlen_func(q[[13, 36]], k, v, newest, offsets, 1, 23, **sizes)
    close(found, torch.stack([o[-1] for o in expected]))
    with pytest.raises(NotImplementedError, match=r"whole sequences, or for one query of each; got .* max_seqlen_q 2"):
        attention.flash_attn_varlen_func(q[:4], k, v, newest * 2, offsets, 2, 23, **sizes)


def test_what_is_not_served_is_refused_by_name() -> None:
    q, k, v, g = inputs()
    with pytest.raises(NotImplementedError, match="serves chunk_simple_gla without head_first"):
        operators.chunk_simple_gla(q, k, v, g, head_first=True)
    with pytest.raises(NotImplementedError, match="without attention that is not causal, softcap"):
        attention.flash_attn_func(q, k, v, softcap=30.0)
    with pytest.raises(NotImplementedError, match="serves flash_attn_func without dropout_p"):
        attention.flash_attn_func(q, k, v, causal=True, dropout_p=0.1)
    attention.flash_attn_func(q, k, v[..., :8], causal=True, dropout_p=0.0)
