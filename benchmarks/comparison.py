"""One comparison: an operator and its peers on one problem, timed in one loop, as rows of results.

Our side is the public function: eager, compiled, and compiled with the operators' bodies inlined.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fla_ops

from .machine import cache_bytes, version
from .peers import Peer, peers_of
from .problems import FORWARD, TRAINING, Inputs, Problem, dtype_name
from .roofline import Roofline
from .timing import Implementation, measure, peak_memory

EAGER, COMPILED, INLINED = WAYS = ("eager", "compiled", "inlined")
OURS = "fla_ops"
ROTATED = 256 << 20  # bytes of inputs that calls rotate through at most
MOST_SETS = 32
LONGEST_PROFILED = 1.0  # seconds: the profile of a peer's longer loop over time fills the memory itself
FOR_SCALE = "another function, for scale"
AGREE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # relative difference at which a peer's result gets a remark
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement."""

    device: torch.device
    seconds: float  # that the rounds of one comparison take
    ways: tuple[str, ...] = WAYS
    peers: bool = True
    half: bool = True  # also time bfloat16, where the problem is in float32


class FoundPeer(NamedTuple):
    """A peer with its fastest variant, or the reason why it cannot run."""

    peer: Peer
    fastest: Implementation | None
    note: str  # a remark on its result, or the reason


def compare(
    problem: Problem, pass_: str, settings: Settings, roofline: Roofline, other_forms: Sequence[Problem] = ()
) -> list[Row]:
    """Time one comparison; its rows are ours first, then other forms of ours on the same inputs, then the peers."""
    device = settings.device
    sets = input_sets(problem, pass_, device)
    half = None
    with fresh_compiler(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ways = [way for way in settings.ways if way != INLINED or inlines(problem, sets[0], device)]
        mine = [ours(problem, pass_, way, sets, f"{OURS} {problem.form if other_forms else way}") for way in ways]
        mine += [ours(other, pass_, EAGER, sets, f"{OURS} {other.form}") for other in other_forms]
        if settings.half and problem.form == "chunk" and problem.dtype is torch.float32:
            narrow = input_sets(problem, pass_, device, torch.bfloat16)
            half = ours(problem, pass_, EAGER, narrow, f"{OURS} {EAGER} bfloat16")
            mine.append(half)
        peers = peers_of(problem, pass_, device) if settings.peers else ()
        found = [_fastest(peer, problem, pass_, sets, settings) for peer in peers]
        theirs = [f.fastest for f in found if f.fastest is not None]
        measure([*mine, *theirs], device, settings.seconds)
        for x in (*mine, *(x for x in theirs if x.median < LONGEST_PROFILED)):
            x.peak = peak_memory(x, device)
    rows = []
    for x in mine:
        faster_than = {peer.name: peer.times_slower_than(x) for peer in theirs}
        dtype = torch.bfloat16 if x is half else problem.dtype
        rows.append(_row(x, problem, pass_, dtype, roofline) | {"faster_than": faster_than, "note": None})
    for peer, fastest, note in found:
        if fastest is not None:
            row = _row(fastest, problem, pass_, problem.dtype, roofline)
            rows.append(row | {"faster_than": {}, "same": peer.same, "note": note or None})
    missing = [f.note for f in found if f.fastest is None]
    return rows + [{**_identity(problem, pass_, problem.dtype), "who": note, "missing": True} for note in missing]


def input_sets(
    problem: Problem, pass_: str, device: torch.device, dtype: torch.dtype | None = None, rotate: bool = True
) -> list[Inputs]:
    """Draw sets of inputs: one, or as many as together exceed the cache, within ROTATED and MOST_SETS."""
    sets = [problem.inputs(device, 0, dtype)]
    if rotate:
        size = sum(x.nbytes for x in sets[0].values() if isinstance(x, Tensor))
        wanted = min(cache_bytes(device) * 2, ROTATED) // max(size, 1) + 1
        sets += [problem.inputs(device, seed, dtype) for seed in range(1, min(max(wanted, 2), MOST_SETS))]
    if pass_ == TRAINING:
        for inputs in sets:
            for name in problem.trained:
                if name in inputs:
                    inputs[name].requires_grad_()
    return sets


def first_tensor(output: Any) -> Tensor:
    """The output o."""
    return output[0] if isinstance(output, tuple) else output


def implementation(name: str, call: Callable[[int], Any], leaves: list[list[Tensor]], pass_: str) -> Implementation:
    """Make an implementation of `call(i)`, which in training also takes the gradients for `leaves[i]`."""
    if pass_ != TRAINING:

        def forward(i: int) -> Any:
            with torch.no_grad():
                return call(i)

        return Implementation(name, forward, len(leaves))
    upstream: list[Tensor] = []

    def training(i: int) -> Any:
        o = first_tensor(call(i))
        if not upstream:
            upstream.append(torch.randn_like(o))
        return torch.autograd.grad(o, leaves[i], upstream[0])

    return Implementation(name, training, len(leaves))


def ours(problem: Problem, pass_: str, way: str, sets: list[Inputs], name: str | None = None) -> Implementation:
    """Make an implementation of the operator's public function, called on each set of inputs in one of WAYS."""
    function = getattr(fla_ops, problem.operator)
    if way != EAGER:
        function = _compiled(function)

    def call(i: int) -> Any:
        return function(**sets[i])

    leaves = [[inputs[name] for name in problem.trained if name in inputs] for inputs in sets]
    made = implementation(name or way, call, leaves, pass_)
    if way == INLINED:  # the first call compiles both graphs
        with fla_ops.inlining():
            made.call(0)
    return made


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile one graph of a fresh code object, since torch.compile keeps what it compiled by code object."""

    def call(**inputs: Any) -> Any:
        return first_tensor(function(**inputs))

    fresh = types.FunctionType(
        call.__code__.replace(), call.__globals__, call.__name__, call.__defaults__, call.__closure__
    )
    return torch.compile(fresh, fullgraph=True)


class _CalledOperators(TorchDispatchMode):
    """Records the names of our operators that a call reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fla":
            self.names.add(function._schema.name.removeprefix("fla::"))
        return function(*args, **(kwargs or {}))


def inlines(problem: Problem, inputs: Inputs, device: torch.device) -> bool:
    """Whether compiled code can hold the body of an operator that this call reaches."""
    with FakeTensorMode() as fake, torch.no_grad():
        given = {name: fake.from_tensor(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        with _CalledOperators() as called:
            getattr(fla_ops, problem.operator)(**given)
    operators = fla_ops.ops()
    return any(device.type in operators[name].inlines_on for name in called.names)


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    """Begin with nothing compiled, and keep nothing that is compiled inside."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _fastest(peer: Peer, problem: Problem, pass_: str, sets: list[Inputs], settings: Settings) -> FoundPeer:
    """Find the fastest variant of a peer."""
    variants = []
    for variant in peer.variants:
        try:
            made = [peer.make(inputs, variant) for inputs in sets]
            name = peer.name if variant is None else f"{peer.name} C={variant}"
            calls = [call for call, _ in made]
            leaves = [leaves for _, leaves in made]
            x = implementation(name, lambda i, calls=calls: calls[i](), leaves, pass_)
            x.call(0)
        except ImportError as error:
            reason = "not installed" if version(peer.package) is None else str(error)
            return FoundPeer(peer, None, f"{peer.name}: {reason}")
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            first = (str(error).splitlines() or [""])[0]
            reason = f"cannot run here ({type(error).__name__}: {first[:100]})"
            return FoundPeer(peer, None, f"{peer.name}: {reason}")
        variants.append(x)
    if len(variants) > 1:
        measure(variants, settings.device, min(settings.seconds / 2, 1.0))
    best = min(variants, key=lambda x: min(x.samples, default=0.0))
    best.samples.clear()
    return FoundPeer(peer, best, _remark(peer, problem, pass_, best, sets))


def _remark(peer: Peer, problem: Problem, pass_: str, best: Implementation, sets: list[Inputs]) -> str:
    """Remark on a peer that computes another function, or whose result differs from ours."""
    if not peer.same:
        return FOR_SCALE
    if pass_ != FORWARD:
        return ""
    theirs = first_tensor(best.call(0)).double()
    mine = first_tensor(ours(problem, pass_, EAGER, sets).call(0)).double()
    difference = float((theirs - mine).norm() / mine.norm())
    return f"differs by {difference:.0e}" if not difference < AGREE[problem.dtype] else ""


def _identity(problem: Problem, pass_: str, dtype: torch.dtype) -> Row:
    return {
        "operator": problem.operator,
        "family": problem.family,
        "pass": pass_,
        "sizes": dict(problem.sizes),
        "strong": problem.strong,
        "dtype": dtype_name(dtype),
    }


def _row(x: Implementation, problem: Problem, pass_: str, dtype: torch.dtype, roofline: Roofline) -> Row:
    work = problem.work(pass_, dtype)
    floor = roofline.floor(work, dtype)
    return {
        **_identity(problem, pass_, dtype),
        "who": x.name,
        "median_ms": x.median * 1e3,
        "best_ms": min(x.samples) * 1e3,
        "spread": x.dispersion,
        "samples": len(x.samples),
        "flops": work.flops,
        "bytes": work.bytes,
        "floor_ms": floor * 1e3,
        "of_floor": floor / x.median,
        "of_product": work.flops / x.median / roofline.rate(dtype),
        "peak_mib": None if x.peak is None else x.peak / 2**20,
    }
