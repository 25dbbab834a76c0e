"""One line for the models of transformers: `enable()`, before or after a model is built, or `patch(model)` for one.

    import fla_ops.integrations.transformers as integration

    integration.enable()    # every model of this process that can be served; disable() puts everything back

What transformers calls to mix tokens are functions that its modelling modules hold by name. Those are replaced: models
with Mamba-2 layers or with the gated delta rule are served, also those that transformers adds later, and MiniMax's
lightning attention. Compiled code follows, since Dynamo guards on them. Softmax attention is an attention
implementation of its own, for every model that takes one: `attn_implementation="fla_ops"`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import weakref
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fla_ops
from fla_ops.integrations import delta_rule, mamba, softmax_attention

NAME = "fla_ops"
MODULES = "transformers.models."
# Models that have no other choice than eager attention where there is no flash kernel: their attention has sinks.
EAGER_ONLY = ("gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash")
# States up to this many numbers are in the cache of a core: three passes of ATen over them cost less than one call of
# an operator in eager code.
SMALL_STATE = 1 << 17

Model = TypeVar("Model", bound=nn.Module)


def enable(*, force: bool = False) -> None:
    """Serve every model of transformers in this process, whether its module is imported already or later.

    Args:
        force: replace kernels of mamba_ssm, causal_conv1d and flash-linear-attention too. Without it only what runs
            transformers' own PyTorch code is replaced, and flash-linear-attention's kernels where they have no device.

    Raises:
        RuntimeError: if this release of transformers calls one of the functions otherwise. Nothing is replaced then; a
            module that is imported later raises it on import.
    """
    _serve([module for name, module in sorted(sys.modules.items()) if _is_modelling(name)], force)
    _register_attention()
    _Finder.install(force)


def patch(model: Model, *, force: bool = False) -> Model:
    """Serve this model, and with it others of its architecture in this process; returns the model.

    Where attention with sinks runs eagerly for want of another choice (gpt-oss), it is set to `fla_ops` as well.

    Args:
        model: a model of transformers.
        force: as for enable.

    Raises:
        ValueError: if nothing of the model can be served.
        RuntimeError: as for enable.
    """
    names = dict.fromkeys(type(m).__module__ for m in model.modules() if _is_modelling(type(m).__module__))
    served = _serve([sys.modules[name] for name in names], force)
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention in ("eager", NAME) and any(name.split(".")[2] in EAGER_ONLY for name in names):
        _register_attention()
        _attention_before.setdefault(model, attention)
        model.set_attn_implementation(NAME)  # type: ignore[operator]
        served = True
    if not served:
        raise ValueError(
            f"patch wants a model with Mamba-2 layers, the gated delta rule, MiniMax's lightning attention or "
            f"attention with sinks, on transformers' own PyTorch code, got {type(model).__name__}. force=True also "
            f'replaces kernels of mamba_ssm; attn_implementation="{NAME}" after enable() serves softmax attention'
        )
    return model


def disable() -> None:
    """Put back what enable and patch replaced."""
    _Finder.remove()
    while _replaced:
        owner, name, old = _replaced.pop()
        setattr(owner, name, old)
    for model, attention in list(_attention_before.items()):
        model.set_attn_implementation(attention)  # type: ignore[operator]
    _attention_before.clear()
    for interface in _interfaces() if sys.modules.get("transformers") else ():
        interface._global_mapping.pop(NAME, None)


# What was replaced, in this order: the module or class, the name in it, what it held.
_replaced: list[tuple[Any, str, Any]] = []
_attention_before: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def _chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = mamba.NO_LIMIT,
    return_final_states: bool = False,
    **kwargs: Any,
) -> Any:
    return mamba.mamba_chunk_scan_combined(
        hidden_states,
        dt,
        A,
        B,
        C,
        chunk_size,
        D,
        kwargs.get("z"),
        dt_bias,
        initial_states,
        _seq_idx(kwargs, hidden_states.shape[1]),
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )


def _state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    return mamba.selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _convolution(
    hidden_states: Tensor,
    weight: nn.Parameter,
    bias: nn.Parameter | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    own, then = _activation(activation)
    seq_idx = _seq_idx(kwargs, hidden_states.shape[-1])
    o: Tensor = then(mamba.causal_conv1d_fn(hidden_states, weight, bias, seq_idx, activation=own))
    return o


def _convolution_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: nn.Parameter,
    bias: nn.Parameter | None = None,
    activation: str | None = None,
) -> Tensor:
    own, then = _activation(activation)
    o: Tensor = then(mamba.causal_conv1d_update(hidden_states, conv_state, weight, bias, own))
    return o


def _activation(name: str | None) -> tuple[Any, Callable[[Any], Any]]:
    """What the convolution applies, and what is left for transformers to apply."""
    if name in (None, "silu", "swish"):
        return name, lambda o: o
    return None, importlib.import_module("transformers.activations").ACT2FN[name]


def _seq_idx(kwargs: dict[str, Any], time: int) -> Tensor | None:
    """Which sequence a step belongs to, from seq_idx or offsets, by either name."""
    seq_idx, cu_seqlens = kwargs.get("seq_idx"), kwargs.get("cu_seqlens", kwargs.get("cu_seq_lens_q"))
    if seq_idx is None and cu_seqlens is not None:
        steps = torch.arange(time, device=cu_seqlens.device)
        seq_idx = torch.bucketize(steps, cu_seqlens[1:], right=True)[None]
    return seq_idx


def _no_fused_mixer(*args: Any, **kwargs: Any) -> None:
    """What the whole mixer at once answers where there is no kernel for it: the mixer then calls its parts."""


def _lightning_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """MiniMaxLightningAttention.forward; the loops over blocks and over steps are one operator each."""
    qkv = self.act_fn(self.qkv_proj(hidden_states))
    if attention_mask is not None:  # padding writes nothing into the state
        qkv = (qkv * attention_mask[:, :, None]).to(qkv.dtype)
    batch, time, width = qkv.shape
    heads = self.num_attention_heads
    state = None if past_key_values is None else past_key_values.get_linear_cache(self.layer_idx)
    if state is not None and time == 1 and not torch.is_grad_enabled():
        q, k, v = qkv.view(batch, heads, 3, -1).unbind(2)
        o = _lightning_step(q, k, v, state, self.slope_rate)
    else:
        q, k, v = qkv.view(batch, time, heads, 3, -1).unbind(3)
        decay = self.slope_rate.view(-1).neg()
        o, state = fla_ops.simple_gla(q, k, v, None, decay, 1.0, initial_state=state, output_final_state=True)
    if past_key_values is not None:
        past_key_values.set_linear_cache(self.layer_idx, state)
    o = self.norm(o.view(batch, time, width // 3))
    return self.out_proj(F.sigmoid(self.output_gate(hidden_states)) * o), state


def _lightning_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, slope_rate: Tensor) -> Tensor:
    """One step of the state [B, H, K, V], in place; q, k and v [B, H, K], slope_rate [H, 1, 1]."""
    small = state.device.type == "cpu" and state.numel() <= SMALL_STATE and q.dtype == state.dtype
    if small and not torch.compiler.is_compiling():
        state.mul_(slope_rate.neg().exp()).addcmul_(k[..., None], v[..., None, :])
        return (q[..., None, :] @ state)[..., 0, :]
    return fla_ops.simple_gla_step_(q, k, v, state, None, slope_rate.view(-1).neg(), 1.0)


# By the name in a modelling module; a replacement has the parameters of what it replaces. The convolutions are taken
# only along with a scan, for packed sequences: models with nothing but a convolution gain nothing.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "mamba2_chunk_scan": _chunk_scan,
    "mamba2_selective_state_update": _state_update,
    "mamba2_split_conv1d_scan_combined": _no_fused_mixer,
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _convolution_update,
}
DELTA_RULE: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": delta_rule.chunk,
    "torch_recurrent_gated_delta_rule": delta_rule.recurrent,
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _convolution_update,
}
FORWARDS: dict[str, Callable[..., Any]] = {"MiniMaxLightningAttention": _lightning_attention}


def _is_modelling(name: str) -> bool:
    return name.startswith(MODULES) and ".modeling_" in name


def _serve(modules: list[ModuleType], force: bool) -> bool:
    """Replace what can be replaced in some modelling modules; whether anything of them is served now."""
    places = [place for module in modules for place in _places(module)]
    todo = []
    for owner, name, new in places:
        old = getattr(owner, name)
        if old is not new and (force or _is_torch_code(old) or _cannot_run(name)):
            _check_parameters(f"{owner.__name__}.{name}", old, new)
            todo.append((owner, name, old, new))
    for owner, name, old, new in todo:  # after every check, so that an error leaves all modules as they were
        setattr(owner, name, new)
        _replaced.append((owner, name, old))
    return any(getattr(owner, name) is new for owner, name, new in places)


def _places(module: ModuleType) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Where a modelling module, or a class of it, holds what can be replaced, and by what."""
    found: list[tuple[Any, str, Callable[..., Any]]] = []
    for functions in (FUNCTIONS, DELTA_RULE):
        if next(iter(functions)) in vars(module):
            found += [(module, name, new) for name, new in functions.items() if name in vars(module)]
    for name, new in FORWARDS.items():
        cls = vars(module).get(name)
        if isinstance(cls, type) and cls.__module__ == module.__name__:
            found.append((cls, "forward", new))
    return found


def _is_torch_code(function: Any) -> bool:
    """Whether transformers found no package to call in place of its own PyTorch code.

    Its decorator keeps the answer in a variable, which its wrapper closes over; what is not wrapped is its own code.
    What is no function at all is somebody else's.
    """
    while inspect.isfunction(function):
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if "is_new_implementation" in cells:
            return not cells["is_new_implementation"].cell_contents
        if not hasattr(function, "__wrapped__"):
            return True
        function = function.__wrapped__
    return False


def _cannot_run(name: str) -> bool:
    """Whether the package that transformers takes for a function has nothing but kernels for a device that is not here:
    flash-linear-attention may be installed beside a CPU.
    """
    return name.endswith("_gated_delta_rule") and not torch.accelerator.is_available()


def _check_parameters(what: str, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Raise RuntimeError unless both are called in the same way."""
    if new is _no_fused_mixer:  # it looks at none of them
        return
    theirs, ours = ([str(p.replace(annotation=p.empty)) for p in _parameters(f)] for f in (old, new))
    if theirs != ours:
        version = importlib.import_module("transformers").__version__
        raise RuntimeError(
            f"transformers {version} calls {what} with ({', '.join(theirs)}); fla_ops serves it with "
            f"({', '.join(ours)}). Nothing was replaced: use a release of one that fits the other, or "
            "disable()"
        )


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _interfaces() -> tuple[Any, Any]:
    """Where transformers looks up an attention implementation, and the mask that belongs to it."""
    attention = importlib.import_module("transformers.modeling_utils").AttentionInterface
    return attention, importlib.import_module("transformers.masking_utils").AttentionMaskInterface


def _register_attention() -> None:
    attention, mask = _interfaces()
    attention.register(NAME, softmax_attention.attention)
    mask.register(NAME, softmax_attention.mask)


class _Finder:
    """A finder that looks for nothing itself: modelling modules that others find are served once they have run."""

    def __init__(self, force: bool) -> None:
        self.force = force

    @staticmethod
    def install(force: bool) -> None:
        """Put one finder before all others."""
        _Finder.remove()
        sys.meta_path.insert(0, _Finder(force))

    @staticmethod
    def remove() -> None:
        """Take it out again."""
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of a modelling module, whose loader serves it after running it."""
        if not _is_modelling(name):
            return None
        specs = (finder.find_spec(name, path, target) for finder in list(sys.meta_path) if finder is not self)
        spec: ModuleSpec | None = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_serve(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:
                    _serve([module], self.force)

            spec.loader.exec_module = run_and_serve  # type: ignore[method-assign]
        return spec
