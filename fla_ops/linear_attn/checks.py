"""What the operators of linear_attn accept beyond what simple_gla's operators check."""

from __future__ import annotations

from fla_ops import validation as valid

from .call import Call, Normalize, NormalizeStep, Step


def call(c: Call) -> None:
    """Raise ValueError or TypeError unless the arguments describe one call of a form; sizes may be symbolic."""
    pair(c)
    valid.axes(c, grouped=_grouped("v"))
    valid.same_dtype(q=c.q, k=c.k, v=c.v)
    valid.floating(initial_state=c.initial_state, initial_z=c.initial_z)
    valid.same_device(c)
    valid.chunk_size(c.chunk_size)


def inputs(c: Normalize) -> valid.Sizes:
    """Raise ValueError or TypeError unless the arguments describe one normalisation; sizes may be symbolic."""
    sizes = valid.axes(c, grouped=_grouped("o"))
    valid.same_dtype(q=c.q, k=c.k, o=c.o)
    valid.floating(initial_z=c.initial_z)
    valid.same_device(c)
    return sizes


def step(c: NormalizeStep) -> valid.Sizes:
    """The arguments of one step of the normalisation; sizes may be symbolic."""
    return _step(c, "o", ("z",))


def whole_step(c: Step) -> valid.Sizes:
    """The arguments of one decode step; sizes may be symbolic."""
    return _step(c, "v", ("state", "z"))


def _step(c: Step | NormalizeStep, values: str, pools: tuple[str, ...]) -> valid.Sizes:
    sizes = valid.axes(c, grouped=_grouped(values))
    valid.same_dtype(**{name: getattr(c, name) for name in ("q", "k", values)})
    valid.pools(c, *pools)
    valid.same_device(c)
    return sizes


def _grouped(values: str) -> tuple[str, str, str, str]:
    """Each query/key head serves H // HK heads of the values."""
    return values, "H", "q and k", "HK"


def pair(c: Call) -> None:
    """A normalised run starts from both parts of a state or from none; any other run has no z."""
    wanted = "(kv [N, H, K, V], z [N, 1, H, K])"
    if c.normalize and (c.initial_state is None) != (c.initial_z is None):
        got = "no initial_z" if c.initial_z is None else "initial_z alone"
        raise ValueError(f"with normalize=True, initial_state must be a pair {wanted}, got {got}")
    if not c.normalize and c.initial_z is not None:
        raise ValueError(f"with normalize=False, initial_state must be kv [N, H, K, V] alone, got a pair {wanted}")


eager = valid.once(inputs)
eager_step = valid.once(step, pools=("z",))
eager_whole_step = valid.once(whole_step, pools=("state", "z"))
