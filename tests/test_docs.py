"""The pages' Python blocks run, and what the pages say of their results is true. Files that the READMEs name exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fla_ops
from fla_ops.attn import reference as softmax
from fla_ops.causal_conv import reference as causal_conv
from fla_ops.simple_gla import reference
from tests.numerics import close

ROOT = Path(__file__).parent.parent
WITH_KERNELS = [page for page in sorted((ROOT / "fla_ops").glob("*/README.md")) if (page.parent / "cpu").exists()]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def run(program: str, names: dict[str, Any]) -> dict[str, Any]:
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in names.items()}
    exec(compile(program, "a block of the page", "exec"), names)
    return before


def test_serving() -> None:
    prefill, pool, convolution, packed, prefixes, drafted, attention, chunk, apart = blocks("serving.md")
    names: dict[str, Any] = {}

    run(prefill, names)
    q, k, v, g = (names[name] for name in "qkvg")
    o, state = reference.recurrent(q, k, v, g)
    close(torch.stack(names["outputs"], 1), o[:, 16:])
    close(names["state"], state)

    run(pool, names)
    o, state = reference.recurrent(*(x[:, -1:] for x in (q, k, v, g)), initial_state=state)
    close(names["o"][:3], o[:, 0])
    close(names["pool"][[5, 0, 2]], state)
    assert not names["o"][3].any()
    assert not names["pool"][[1, 3, 4, 6, 7]].any()

    run(convolution, names)
    o, _ = causal_conv.convolve(*(names[name] for name in ("x", "weight", "bias")), activation="silu")
    close(names["convolved"][:3], o[:, 16])
    assert not names["convolved"][3].any()
    assert torch.equal(names["conv_pool"][[5, 0, 2]], names["x"][:, 14:17].mT)

    run(packed, names)
    initial = torch.cat([state[:2], torch.zeros_like(state[2:])])
    o, final = reference.recurrent(*names["packed"], initial_state=initial, cu_seqlens=names["cu_seqlens"])
    close(names["o"], o)
    close(names["pool"][[5, 0, 4]], final)
    close(names["pool"][2], state[2])

    run(prefixes, names)
    prompt = [names[f"p{x}"] for x in "qkvg"]
    for steps, kept in names["cache"].items():
        close(kept[None], reference.recurrent(*(x[:, :steps] for x in prompt))[1])

    before = run(drafted, names)["pool"]
    for row, steps, n in zip((5, 0, 2), (2, 4, 0), range(3), strict=True):
        if steps == 0:
            assert torch.equal(names["pool"][row], before[row])
        else:
            taken = (x[n : n + 1, :steps] for x in (q, k, v, g))
            close(names["pool"][row], reference.recurrent(*taken, initial_state=before[row : row + 1])[1][0])

    run(attention, names)
    assert names["o"].shape == (1, 3, 8, 16)

    run(chunk, names)
    o, lse = softmax.parallel(*(names[name] for name in "qkv"))
    close(names["o"], o[:, 32:])
    close(names["lse"], lse[:, 32:])
    run(apart, names)
    close(names["joined"], o[:, 32:])
    close(names["total"], lse[:, 32:])


def test_migrating() -> None:
    imported, retention = blocks("migrating_from_fla.md")
    names: dict[str, Any] = {}
    run(imported, names)
    q, k, v, g = (names[name] for name in "qkvg")
    close(names["o"], reference.recurrent(q, k, v, g)[0])
    run(retention, names)
    close(names["g_gamma"].exp(), torch.tensor([31 / 32, 63 / 64, 127 / 128, 255 / 256]))
    close(names["o"], reference.recurrent(q, k, v, g_gamma=names["g_gamma"])[0])


def test_functions_that_the_migration_page_names_exist() -> None:
    here = re.findall(
        r"^\| `fla\.[^|]*\| ([^|]*) \|$", (ROOT / "docs" / "migrating_from_fla.md").read_text(), re.MULTILINE
    )
    named = {name for cell in here for name in re.findall(r"`([a-z]\w+)[`(]", cell)} - {"g", "g_gamma"}
    assert named >= {
        "simple_gla",
        "linear_attn",
        "lightning_attn",
        "gated_delta_rule",
        "gsa",
        "attn",
        "chunk_gsa",
        "parallel_attn",
    }
    assert not [name for name in named if not hasattr(fla_ops, name)]


@pytest.mark.parametrize("page", WITH_KERNELS, ids=lambda page: page.parent.name)
def test_files_that_a_family_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:[\w.]+/)*[cg]pu/[\w./{},]+)`", page.read_text())
    assert named
    for path in named:
        stem, _, choices = path.partition("{")
        for name in choices.partition("}")[0].split(","):
            assert (page.parent / f"{stem}{name}{choices.partition('}')[2]}").exists(), path
