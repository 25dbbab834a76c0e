"""The registry: names, schemas, kinds, tags, other libraries of the same name, what an import does and does not."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fla_ops
from tests.contract.helpers import operators

ROOT = Path(__file__).resolve().parents[1]
OPERATORS = pytest.mark.parametrize("operator", fla_ops.ops().values(), ids=lambda op: op.name)

# What the flash-linear-attention project registers under the same library name.
UPSTREAM = {
    "chunk_dplr_delta_rule_fwd",
    "chunk_dplr_delta_rule_bwd",
    "fused_addcmul_rwkv7",
    "fused_k_rwkv7",
    "gate_output_correction_rwkv7",
    "token_shift_rwkv7",
}


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.strip()


def test_ops_lists_every_registered_operator() -> None:
    found = fla_ops.ops()
    assert found
    registered = {name.removeprefix("fla::") for name in torch._C._dispatch_get_all_op_names() if name[:5] == "fla::"}
    assert set(found) == registered - {name for name in registered if name.startswith("test_")}
    for name, operator in found.items():
        assert operator.name == name
        assert operator.overload is getattr(torch.ops.fla, name).default
        assert operator.schema == str(operator.overload._schema)
        assert operator.schema in str(operator)


def test_the_list_is_a_copy() -> None:
    fla_ops.ops().clear()
    assert fla_ops.ops()


def test_every_public_function_is_an_operator_too() -> None:
    functions = {name for name in fla_ops.__all__ if inspect.isfunction(getattr(fla_ops, name))}
    helpers = {"decompositions", "explain", "inlining", "ops", "sac_ops"}
    assert functions - helpers <= set(fla_ops.ops())


def test_no_name_of_the_upstream_project_is_taken() -> None:
    assert not [name for name in fla_ops.ops() if any(name.startswith(taken.rsplit("_", 1)[0]) for taken in UPSTREAM)]


@pytest.mark.parametrize("first", ["upstream", "ours"])
def test_both_projects_can_be_imported(first: str) -> None:
    upstream = "; ".join(f"lib.define('{name}(Tensor x) -> Tensor')" for name in sorted(UPSTREAM))
    theirs = f"lib = torch.library.Library('fla', 'FRAGMENT'); {upstream}"
    order = [theirs, "import fla_ops"] if first == "upstream" else ["import fla_ops", theirs]
    code = "; ".join(["import torch", *order, "print(len(dir(torch.ops.fla)), torch.ops.fla.fused_k_rwkv7.default)"])
    assert "fla.fused_k_rwkv7" in python(code)


def test_importing_twice_registers_once() -> None:
    code = (
        "import fla_ops, importlib; n = len(fla_ops.ops()); importlib.reload(fla_ops); print(n == len(fla_ops.ops()))"
    )
    assert python(code) == "True"


def test_import_loads_no_kernel() -> None:
    """Neither Triton nor an implementation: both wait for the first launch."""
    code = (
        "import sys, torch; before = set(sys.modules); import fla_ops; "
        "new = set(sys.modules) - before; "
        "print([m for m in new if m.split('.')[0] == 'triton' or m.startswith('fla_ops.common') "
        "or m.split('.')[-1] in ('aten', 'chunk', 'fused_chunk', 'parallel', 'fused_recurrent', 'decoding', 'host')])"
    )
    assert python(code) == "[]"


def test_compile_cache_key_holds_the_sources_digest() -> None:
    """The compile cache on disk does not see an edit to a registered backward: it would run the old one."""
    tag = torch.compiler.config.cache_key_tag
    assert re.search(r"fla=[0-9a-f]{8,}", tag), tag
    assert tag.count("fla=") == 1
    with fla_ops.inlining():
        assert torch.compiler.config.cache_key_tag != tag
    assert torch.compiler.config.cache_key_tag == tag


@OPERATORS
def test_kind_says_what_is_registered(operator: fla_ops.Operator) -> None:
    def has(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"fla::{operator.name}", key)

    if operator.kind == "composite":
        assert has("CompositeImplicitAutograd")
        assert not has("CPU")
        return
    for key in ("CPU", "CUDA", "Meta", "Autograd", "AutocastCPU", "AutocastCUDA"):
        assert has(key), f"{operator.name} has no {key} kernel"
    for path in (operator.cpu, operator.cuda):
        assert re.fullmatch(r"fla_ops(\.\w+)+:\w+", path)


@OPERATORS
def test_schema(operator: fla_ops.Operator) -> None:
    schema = operator.overload._schema
    assert torch.Tag.pt2_compliant_tag in operator.overload.tags
    for argument in schema.arguments:
        if argument.alias_info is not None:
            assert str(argument.type) == "Tensor", "an optional or a list that is updated in place does not compile"
            assert operator.name.endswith("_"), "an operator that updates an argument says so in its name"
    for result in schema.returns:
        assert result.alias_info is None, "an output must not alias an input"
    if operator.name.endswith("_backward"):
        assert operator.kind == "inference"
        assert schema.arguments[-1].name == "output_mask" or len(schema.returns) == 1


@pytest.mark.parametrize("operator", operators(), ids=lambda op: op.name)
def test_public_function_takes_the_operators_arguments(operator: fla_ops.Operator) -> None:
    """Every argument by the same name, with the same default; a pair of states may stand for two."""
    function = getattr(fla_ops, operator.name)
    parameters = inspect.signature(function).parameters
    assert function.__doc__
    for argument in operator.overload._schema.arguments:
        if argument.name in parameters and argument.has_default_value():
            assert parameters[argument.name].default == argument.default_value, argument.name
