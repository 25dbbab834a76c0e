"""`python -m fla_ops`: what each subcommand prints, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fla_ops
from fla_ops.__main__ import main
from fla_ops.command.problems import problems
from tests import aot

ROOT = Path(__file__).parents[1]


def output(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """What a subcommand that ends with this status prints."""
    assert main(arguments) == status
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one error of wrong usage."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return error


def test_list_names_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    entries = {x["name"]: x for x in json.loads(output(capsys, "list", "--json"))}
    assert entries.keys() == fla_ops.ops().keys()
    text = output(capsys, "list")
    for name, operator in fla_ops.ops().items():
        assert f"\n{name}: {entries[name]['kind']}, " in f"\n{text}"
        assert operator.schema in text


@pytest.mark.parametrize(
    ("name", "kind", "inlines_on"),
    [
        ("chunk_simple_gla", "forward", ["cpu", "cuda"]),
        ("parallel_simple_gla_backward", "backward", ["cpu"]),
        ("gsa_step_", "step", ["cpu"]),
        ("attn_decoding_one_step", "step", ["cpu"]),
        ("simple_gla", "composite", None),
    ],
)
def test_list_tells_kinds(capsys: pytest.CaptureFixture[str], name: str, kind: str, inlines_on: Any) -> None:
    (entry,) = [x for x in json.loads(output(capsys, "list", "--json")) if x["name"] == name]
    assert (entry["kind"], entry["inlines_on"]) == (kind, inlines_on)


def dense(heads: int, time: int) -> Any:
    return torch.zeros(3, 2, time, heads, 16, requires_grad=True).unbind()


CALLS = [
    pytest.param("simple_gla", ["--gate", "--final-state"], {"g": True, "output_final_state": True}, id="gate"),
    pytest.param("linear_attn", ["--mode", "chunk"], {"mode": "chunk"}, id="named"),
    pytest.param("lightning_attn", ["--reverse"], {"layer_idx": 0, "num_layers": 1, "reverse": True}, id="reverse"),
    pytest.param("attn", [], {}, id="attn"),
]


@pytest.mark.parametrize("time", [5, 300])
@pytest.mark.parametrize(("name", "options", "arguments"), CALLS)
def test_explain_says_what_fla_ops_explain_says(
    capsys: pytest.CaptureFixture[str], name: str, options: list[str], arguments: dict[str, Any], time: int
) -> None:
    q, k, v = dense(6, time)
    given = arguments | ({"g": -torch.rand(2, time, 6, requires_grad=True)} if "g" in arguments else {})
    choice = fla_ops.explain(getattr(fla_ops, name), q, k, v, **given)
    sizes = ["--batch", "2", "--time", str(time), "--heads", "6", "--key-width", "16", "--value-width", "16"]
    command = ["explain", name, *sizes, "--gradient", *options]
    assert output(capsys, *command) == f"{choice}\n"
    data = json.loads(output(capsys, *command, "--json"))
    assert (data["operator"], data["form"]) == (choice.form.signature.name, choice.form.name)
    assert (tuple(data["preferred"]), data["refused"]) == (choice.preferred, choice.refused)


def test_explain_makes_states_packs_and_caches(capsys: pytest.CaptureFixture[str]) -> None:
    packed = ("explain", "gsa", "--sequences", "3", "--time", "9", "--initial-state", "--gate", "--json")
    assert json.loads(output(capsys, *packed))["form"] == "fused_recurrent"
    decoding = ("explain", "attn", "--sequences", "4", "--queries", "4", "--query-heads", "8", "--json")
    assert json.loads(output(capsys, *decoding))["form"] == "decoding"
    assert "fused_recurrent" in output(capsys, "explain", "linear_attn", "--initial-state", "--time", "2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which says more")
def test_explain_for_a_gpu_says_that_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no GPU here" in output(capsys, "explain", "simple_gla", "--device", "cuda")
    assert "there is no GPU here" in refusal(capsys, "check", "--device", "cuda")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["simple_glaa"], "'simple_glaa' (choose from", id="name"),
        pytest.param(["attn", "--reverse"], "attn: got an unexpected keyword argument 'reverse'", id="argument"),
        pytest.param(["simple_gla", "--key-heads", "3"], "must have a multiple of the 3 heads", id="heads"),
        pytest.param(["gsa", "--mode", "fast"], "mode must be auto", id="mode"),
        pytest.param(["simple_gla", "--mode", "parallel", "--final-state"], "has no state", id="refused"),
    ],
)
def test_explain_refuses_in_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert said in refusal(capsys, "explain", *arguments)


def test_every_public_operator_has_a_problem() -> None:
    public = fla_ops.ops().keys() & set(fla_ops.__all__)
    assert sorted(x.function for x in problems()) == sorted(public)


def test_check_finds_every_operator_right(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(output(capsys, "check", "--device", "cpu", "--json"))
    assert data["right"]
    assert data["machine"]["torch"] == torch.__version__
    assert all(0 <= x["error"] <= x["allowed"] < 1e-4 for x in data["operators"])
    assert {x["operator"] for x in data["operators"]} == fla_ops.ops().keys() & set(fla_ops.__all__)


def off_by_a_little(*args: Any, function: Any = fla_ops.chunk_simple_gla, **kwargs: Any) -> Any:
    o, state = function(*args, **kwargs)
    return 1.0001 * o, state


def wrong_gradient(*args: Any, function: Any = fla_ops.chunk_simple_gla, **kwargs: Any) -> Any:
    o, state = function(*args, **kwargs)
    return 2 * o - o.detach(), state


def not_finite(*args: Any, function: Any = fla_ops.chunk_simple_gla, **kwargs: Any) -> Any:
    o, state = function(*args, **kwargs)
    return o * float("nan"), state


def raising(*_: Any, **__: Any) -> Any:
    raise RuntimeError("spoiled")


def without_state(*args: Any, function: Any = fla_ops.chunk_simple_gla, **kwargs: Any) -> Any:
    return function(*args, **kwargs)[0], None


@pytest.mark.parametrize(
    ("spoiled", "said"),
    [
        (off_by_a_little, "error 1."),
        (wrong_gradient, "error "),
        (not_finite, "not finite"),
        (raising, "RuntimeError: spoiled"),
        (without_state, ""),
    ],
)
def test_check_finds_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spoiled: Any, said: str
) -> None:
    monkeypatch.setattr(fla_ops, "chunk_simple_gla", spoiled)
    text = output(capsys, "check", "--device", "cpu", status=1)
    (wrong,) = [line for line in text.splitlines() if "WRONG" in line]
    assert wrong.startswith("chunk_simple_gla ")
    assert said in wrong
    assert text.endswith("\nwrong: chunk_simple_gla\n")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fla_ops", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_warm_fills_the_cache(tmp_path: Path) -> None:
    first = run("warm", "--json", FLA_OPS_CACHE_DIR=str(tmp_path))
    data = json.loads(first.stdout)
    assert (first.returncode, all(data["compiled"].values())) == (0, True)
    assert len(list(tmp_path.glob("*.so"))) == len(data["compiled"])
    assert run("warm", FLA_OPS_CACHE_DIR=str(tmp_path), CXX="none").returncode == 0


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")
def test_warm_compiles_triton_kernels_for_cards_that_are_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    from fla_ops.simple_gla.gpu.decoding import decoding_kernel

    command = [
        "warm",
        "--target",
        "sm_90",
        "gfx942",
        "--widths",
        "32x16",
        "--operators",
        "^simple_gla_step_$",
        "--json",
    ]
    with aot.private_cache() as folder:
        found = json.loads(output(capsys, *command))["kernels"]
        assert [(x["target"], x["key_width"], x["value_width"]) for x in found] == [
            ("sm_90", 32, 16),
            ("gfx942", 32, 16),
        ]
        assert all(list(x["kernels"]) == ["decoding_kernel"] for x in found)
        kept = sorted(folder.rglob("*"))
        assert {".cubin", ".hsaco"} <= {path.suffix for path in kept}
        decoding_kernel.device_caches.clear()  # as in another process, which finds them
        output(capsys, *command)
        assert sorted(folder.rglob("*")) == kept
    assert "wanted a width such as 128, or 128x64, got '64x'" in refusal(capsys, "warm", "--widths", "64x")


def test_warm_fails_where_nothing_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    warm = run("warm", "--json", FLA_OPS_CACHE_DIR=str(tmp_path / "file"))
    assert warm.returncode == 1
    assert not json.loads(warm.stdout)["writable"]


def test_without_a_compiler_warm_fails_and_check_says_so(tmp_path: Path) -> None:
    warm = run("warm", FLA_OPS_CACHE_DIR=str(tmp_path), CXX="none")
    assert warm.returncode == 1
    assert "does not compile" in warm.stdout
    check = run("check", "--device", "cpu", FLA_OPS_CACHE_DIR=str(tmp_path), CXX="none")
    assert check.returncode == 0
    assert "none does not run" in check.stdout


def test_importing_the_package_leaves_the_commands_alone() -> None:
    program = "import sys, fla_ops; sys.exit(any(name.startswith('fla_ops.command') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
