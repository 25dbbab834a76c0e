"""How large the measured problems are, for each kind of device. Letters are those of the documentation."""

from __future__ import annotations

from typing import Any

LONG = {"K": 128, "V": 128}
CUDA = {
    "linear": [{"B": 8, "T": 4096, "H": 16, **LONG}, {"B": 1, "T": 131072, "H": 16, **LONG}],
    "fused_recurrent": [{"B": 8, "T": 64, "H": 16, **LONG}],
    "parallel": [{"B": 8, "T": 512, "H": 16, **LONG}],
    "gsa": [{"B": 8, "T": 4096, "H": 16, **LONG, "M": 64}],
    "attn": [{"B": 8, "T": 4096, "H": 16, "HQ": 16, **LONG}],
    "simple_gla_step_": [{"N": 256, "H": 32, **LONG}, {"N": 1, "H": 32, **LONG}],
    "linear_attn_step_": [{"N": 256, "H": 32, **LONG}],
    "gsa_step_": [{"N": 256, "H": 16, **LONG, "M": 64}],
    "attn_decoding_one_step": [{"N": 32, "T": 4096, "H": 8, "HQ": 32, **LONG}],
}
CPU = {
    "linear": [{"B": 1, "T": 4096, "H": 4, "K": 64, "V": 64}],
    "fused_recurrent": [{"B": 1, "T": 64, "H": 4, "K": 64, "V": 64}],
    "parallel": [{"B": 1, "T": 512, "H": 4, "K": 64, "V": 64}],
    "gsa": [{"B": 1, "T": 1024, "H": 4, "K": 64, "V": 64, "M": 64}],
    "attn": [{"B": 1, "T": 4096, "H": 4, "HQ": 4, "K": 64, "V": 64}],
    "simple_gla_step_": [{"N": 8, "H": 32, **LONG}],
    "linear_attn_step_": [{"N": 8, "H": 32, **LONG}],
    "gsa_step_": [{"N": 8, "H": 16, **LONG, "M": 64}],
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


def sizes_for(device: str, family: str, role: str, quick: bool = False) -> list[dict[str, Any]]:
    """The sizes of an operator of this family and role; a quick run takes the first, made smaller."""
    table = CUDA if device == "cuda" else CPU
    form = role in ("fused_recurrent", "parallel") and family != "attn"
    own = dict(table[role][0]) if form else None
    if own is not None:
        found = [own | {"M": table["gsa"][0]["M"]} if family == "gsa" else own]
    else:
        found = table.get(family, table["linear"])
    if quick:
        limits = QUICK["cuda" if device == "cuda" else "cpu"]
        found = [{letter: min(size, limits.get(letter, size)) for letter, size in found[0].items()}]
    return [dict(sizes) for sizes in found]
