"""Who inlines: the threads that ask, for as long as they ask; and who says so where an operator cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

import fla_ops
from fla_ops.registrations import _inline
from tests.contract.helpers import INTERPRETED

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels cannot be traced")


def calls(function: Callable[..., Tensor] = fla_ops.chunk_simple_gla, namespace: str = "fla") -> list[str]:
    """The operators of a namespace, ours, that a trace of a function of q, k, v holds."""
    inputs = [torch.ones(1, 20, 2, 4) for _ in range(3)]
    graph = make_fx(dispatch_functionalize(lambda *args: function(*args)[0]))(*inputs)
    names = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return [name.split(".")[1] for name in names if name.startswith(f"{namespace}.")]


def in_thread(function: Callable[[], object]) -> object:
    """What a function returns in a thread of its own."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_contexts_of_two_threads_that_overlap_leave_nothing_on() -> None:
    """Each begins before the other ends: what either one found must not be what the last one leaves."""
    tag, began, ended = torch.compiler.config.cache_key_tag, threading.Event(), threading.Event()
    seen: list[list[str]] = []

    def first() -> None:
        with fla_ops.inlining():
            began.set()
            ended.wait()
            seen.append(calls())

    thread = threading.Thread(target=first)
    thread.start()
    began.wait()
    with fla_ops.inlining():
        ended.set()
        thread.join()
        assert calls() == []
    assert seen == [[]]
    assert calls() == ["chunk_simple_gla"]
    assert torch.compiler.config.cache_key_tag == tag


def test_contexts_that_do_not_end_in_order_leave_nothing_on() -> None:
    """Two threads where PyTorch's settings are those of all threads do this to each other."""
    tag = torch.compiler.config.cache_key_tag
    first, second = fla_ops.inlining(), fla_ops.inlining()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert calls() == []
    second.__exit__(None, None, None)
    assert calls() == ["chunk_simple_gla"]
    assert torch.compiler.config.cache_key_tag == tag


def test_a_graph_is_cached_under_what_it_holds() -> None:
    """In every thread: bodies if, and only if, the key of the compile caches says so."""

    def consistent() -> bool:
        return (calls() == []) == ("fla-inlined" in torch.compiler.config.cache_key_tag)

    assert consistent()
    assert in_thread(consistent)
    with fla_ops.inlining():
        assert consistent()
        assert in_thread(consistent)


def test_an_exception_ends_it() -> None:
    with pytest.raises(KeyError), fla_ops.inlining():
        raise KeyError
    assert calls() == ["chunk_simple_gla"]


@pytest.mark.parametrize("before", ["", "theirs"])
def test_every_thread_has_the_sources_digest_in_its_key(before: str) -> None:
    code = """
import threading, torch, fla_ops
print(torch.compiler.config.cache_key_tag)
thread = threading.Thread(target=lambda: print(torch.compiler.config.cache_key_tag))
thread.start()
thread.join()
"""
    environment = os.environ | {"TORCH_COMPILE_CACHE_KEY_TAG": before}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, cwd=ROOT, capture_output=True, text=True
    )
    here, there = done.stdout.splitlines()
    assert here == there
    assert re.fullmatch(f"{before};?fla=[0-9a-f]+", there)


@pytest.fixture
def without_a_body() -> Iterator[Callable[..., Tensor]]:
    """An operator of somebody else's that has no body to inline."""
    with torch.library._scoped_library("theirs", "FRAGMENT") as library:
        library.define("sum_of(Tensor q, Tensor k, Tensor v) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl("sum_of", lambda q, k, v: q + k + v, "CompositeExplicitAutograd")
        operator = torch.ops.theirs.sum_of.default
        _inline.register(operator, {}, library)
        _inline._warn.cache_clear()
        yield operator
        del _inline._DECOMPOSITIONS[operator]


def test_an_operator_that_stays_a_call_is_named_once(without_a_body: Callable[..., Tensor]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert calls(without_a_body, "theirs") == ["sum_of"]
        assert [w for w in caught if "theirs" in str(w.message)] == []  # nobody asked for bodies
        with fla_ops.inlining():
            for _ in range(2):
                assert calls(without_a_body, "theirs") == ["sum_of"]
                assert calls(fla_ops.chunk_simple_gla) == []
    (message,) = (str(w.message) for w in caught if "theirs" in str(w.message))
    assert message.startswith("theirs.sum_of.default has no body to inline on cpu, and stays a call")


def test_an_operator_without_a_body_is_not_decomposed(without_a_body: Callable[..., Tensor]) -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return without_a_body(q, k, v)

    program = torch.export.export(Layer(), tuple(torch.ones(1, 20, 2, 4) for _ in range(3)))
    with pytest.raises(NotImplementedError, match=r"theirs\.sum_of\.default has no body of ATen calls"):
        program.run_decompositions(fla_ops.decompositions())


def test_the_readme_says_what_is_inlined_where() -> None:
    """Every operator with a body, and none without, by the kinds of device that it serves."""
    readme = (ROOT / "README.md").read_text()
    promised: dict[str, tuple[str, ...]] = {}
    for words, devices in (("a CPU and a GPU", ("cpu", "cuda")), ("a CPU", ("cpu",))):
        (sentence,) = re.findall(rf"^(?:.*\. )?Inlined on {words}:\s([^.]*)\.", readme, re.MULTILINE)
        assert "with their gradients" in sentence
        named = re.findall(r"`(\w+)`", sentence)
        promised |= dict.fromkeys(named, devices)
        gradients = {f"{name}_backward" for name in named} & fla_ops.ops().keys()
        promised |= dict.fromkeys(gradients, devices)
    found = {name.removesuffix("_forward"): op.inlines_on for name, op in fla_ops.ops().items() if op.inlines_on}
    assert found == promised
