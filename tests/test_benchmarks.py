"""The benchmark command lists everything and runs; tables and documentation say what was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

import fla_ops
from benchmarks import __main__ as command
from benchmarks import models, report
from benchmarks.problems import UNTIMED, problems, public_operators
from benchmarks.tuning import crossovers, kernels
from fla_ops import launch
from fla_ops.dispatch.crossovers import TABLE

RESULTS = Path(report.RESULTS)


def test_list_names_every_operator(capsys: pytest.CaptureFixture) -> None:
    assert command.main(["--list", "--device", "cpu"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    missing = [name for name in fla_ops.ops() if hasattr(fla_ops, name) and name not in listed]
    assert not missing, f"benchmarks/problems.py has no problem for {missing}"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_operator_has_a_problem_and_a_floor(device: str) -> None:
    found = list(problems(torch.device(device)))
    assert {p.operator for p in found} == set(public_operators())
    assert set(UNTIMED) <= set(fla_ops.ops())
    for problem in found:
        for pass_ in problem.passes:
            assert problem.work(pass_).bytes > 0


def test_a_quick_run_of_one_row(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--quick", "--only", "^chunk_simple_gla forward", "--seconds", "0.01", "--no-peers", "--device", "cpu"]
    assert command.main([*arguments, "--ways", "eager", "--sections", "rows", "--json", str(out)]) == 0
    assert "chunk_simple_gla  forward" in capsys.readouterr().out
    row, half = json.loads(out.read_text())["rows"]
    assert (row["who"], half["who"]) == ("fla_ops eager", "fla_ops eager bfloat16")
    assert 0 < row["best_ms"] <= row["median_ms"]
    assert row["peak_mib"] > 0


def test_a_model_is_timed_on_both_implementations(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "models.json"
    arguments = ["--quick", "--only", "^model mamba2$", "--sections", "models", "--seconds", "0.01", "--device", "cpu"]
    assert command.main([*arguments, "--json", str(out)]) == 0
    assert "small models of transformers, patched" in capsys.readouterr().out
    rows = json.loads(out.read_text())["models"]
    assert [row["pass"] for row in rows] == list(models.PASSES)
    assert all(min(row["theirs_ms"], row["ours_ms"], row["times_faster"]) > 0 for row in rows)
    scan = importlib.import_module("transformers.models.mamba2.modeling_mamba2").mamba2_chunk_scan
    assert scan.__module__.startswith("transformers")


def test_nothing_matches(capsys: pytest.CaptureFixture) -> None:
    assert command.main(["--only", "no such row", "--device", "cpu"]) == 2
    assert "--list" in capsys.readouterr().err


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        command.main(["--sections", "rows,row", "--device", "cpu"])
    assert "wanted some of rows,details,overhead,first-call,sweep,models, got row" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_says_so(capsys: pytest.CaptureFixture) -> None:
    assert kernels.main([]) == 1
    assert capsys.readouterr().err == "benchmarks.tuning.kernels needs a GPU, and torch sees none\n"


@pytest.mark.parametrize("device_class", launch.CLASSES)
def test_tuning_rewrites_a_table_as_it_is_written(device_class: str) -> None:
    path = Path(launch.__file__).with_name(f"{device_class}.json")
    assert kernels.as_text(json.loads(path.read_text())) == path.read_text()


def test_fitted_thresholds_are_the_best_for_their_grid(tmp_path: Path) -> None:
    sizes = {"B": 1, "H": 4, "K": 64, "V": 64, "M": 64}
    points = [
        {
            "family": "gsa",
            "device": "cpu",
            "sizes": sizes | {"T": time},
            "gradient": gradient,
            "dtype": "float32",
            "ms": {"chunk": 1.0, "fused_recurrent": 0.1 * time},
        }
        for time in (1, 4, 8, 16, 64)
        for gradient in (False, True)
    ]
    copy = tmp_path / "table.json"
    copy.write_text(TABLE.read_text())
    crossovers.rewrite(points, "cpu", "made up", copy)
    row = json.loads(copy.read_text())["gsa"]["cpu"]
    assert row == {"source": "made up", "forward": {"recurrent_up_to": 8}, "training": {"recurrent_up_to": 8}}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("crossovers_*.json")), ids=lambda path: path.stem)
def test_auto_is_close_to_the_best_form_on_the_measured_grid(path: Path) -> None:
    kept = json.loads(path.read_text())
    far = [p for p in kept["points"] if max(crossovers.regret(p), crossovers.regret(p, True)) > crossovers.ALLOWED]
    assert not far, f"auto is over {crossovers.ALLOWED} times slower than the best form at {far}"
    table = json.loads(TABLE.read_text())
    for point in kept["points"]:
        assert table[point["family"]][point["device"]]["source"] == kept["source"]


@pytest.mark.parametrize("path", report.PAGES, ids=lambda path: path.stem)
def test_the_documentation_says_what_was_measured(path: Path) -> None:
    page = path.read_text()
    assert report.rendered(page) == page, "run python -m benchmarks.report"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_state_where_they_come_from(path: Path) -> None:
    where = json.loads(path.read_text())["machine"]
    assert all(where[name] for name in ("device", "versions", "date", "commit"))
