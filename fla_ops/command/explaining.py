"""`python -m fla_ops explain`: which form a dispatcher takes for a call of some sizes. Nothing is allocated."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fla_ops
from fla_ops.dispatch import DISPATCHERS
from fla_ops.validation import letters_of

from . import Report

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
NO_GPU = "there is no GPU here: the order is a GPU's, and notes on its kernels are left out"


def names() -> list[str]:
    """The dispatchers."""
    return sorted(function.__name__ for function in DISPATCHERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a call."""
    parser.add_argument("dispatcher", choices=names())
    sizes = parser.add_argument_group("sizes")
    for name, default, meaning in (
        ("batch", 1, "B, 1 for packed sequences"),
        ("time", 1024, "T, of all packed sequences together"),
        ("heads", 4, "H, the heads of v"),
        ("key-width", 64, "K"),
        ("value-width", 64, "V"),
        ("slots", 64, "M of gsa"),
    ):
        sizes.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} (default {default})")
    for name, meaning in (
        ("key-heads", "HK, the heads of q and k, where they are fewer than v's"),
        ("query-heads", "HQ of gsa and attn, where they are more than v's"),
        ("queries", "steps of q, where they are not T: attn's decoding has one for each sequence"),
        ("sequences", "how many packed sequences; without it, a dense batch"),
    ):
        sizes.add_argument(f"--{name}", type=int, metavar="N", help=meaning)
    call = parser.add_argument_group("the call")
    call.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    call.add_argument("--dtype", choices=DTYPES, default="float32")
    call.add_argument("--gradient", action="store_true", help="q, k, v and the gate have a gradient")
    call.add_argument("--gate", action="store_true", help="give g")
    call.add_argument("--initial-state", action="store_true", help="give initial_state")
    call.add_argument("--final-state", action="store_true", help="output_final_state=True")
    call.add_argument("--reverse", action="store_true", help="reverse=True")
    call.add_argument("--mode", help="a form by name")


def report(options: argparse.Namespace) -> Report:
    """The choice, or what the call raises."""
    function = getattr(fla_ops, options.dispatcher)
    absent = options.device == "cuda" and not torch.cuda.is_available()
    with FakeTensorMode():
        choice = fla_ops.explain(function, **_arguments(function, options, "meta" if absent else options.device))
    notes = [*choice.notes, *[NO_GPU] * absent]
    data = {
        "operator": choice.form.signature.name,
        "form": choice.form.name,
        "preferred": choice.preferred,
        "refused": choice.refused,
        "notes": notes,
    }
    return Report(data, "\n".join([str(choice), *[f"  note: {NO_GPU}"] * absent]))


def _arguments(function: Callable[..., Any], options: argparse.Namespace, device: str) -> dict[str, Any]:
    """The public function's arguments: tensors of the axes that the family declares."""
    family, _ = DISPATCHERS[function]
    call = family.signature.call
    axes = call(**{name: None for name in call._fields if name not in call._field_defaults}).axes
    sizes = {
        "B": options.batch,
        "T": options.time,
        "H": options.heads,
        "HK": options.key_heads or options.heads,
        "HQ": options.query_heads or options.heads,
        "K": options.key_width,
        "V": options.value_width,
        "M": options.slots,
        "N": options.sequences or options.batch,
        "1": 1,
    }

    def tensor(name: str, dtype: torch.dtype = DTYPES[options.dtype], **others: int) -> Tensor:
        shape = [(sizes | others)[letter] for letter in letters_of(axes[name])]
        return torch.empty(shape, dtype=dtype, device=device, requires_grad=options.gradient)

    required = [x.name for x in inspect.signature(function).parameters.values() if x.default is x.empty]
    arguments: dict[str, Any] = {name: tensor(name) for name in required if name in axes}
    if options.queries is not None:
        arguments["q"] = tensor("q", T=options.queries)
    if "layer_idx" in required:
        arguments |= {"layer_idx": 0, "num_layers": 1}  # no form depends on the layer
    if options.gate:
        arguments["g"] = tensor("g") if "g" in axes else None
    if options.initial_state:
        states = tuple(tensor(name) for name in call._fields if name.startswith("initial_"))
        arguments["initial_state"] = states[0] if len(states) == 1 else states
    if options.sequences is not None:
        arguments["cu_seqlens"] = torch.empty(options.sequences + 1, dtype=torch.int64, device=device)
    given = {"output_final_state": options.final_state, "reverse": options.reverse, "mode": options.mode}
    return arguments | {name: value for name, value in given.items() if value}
