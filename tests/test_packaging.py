"""What is shipped: the wheel holds the package and works alone, importing is light, the constraints are complete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {"fla_ops": "fla_ops", "meta": "fla_ops/meta", "registrations": "fla_ops/registrations"}
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "out", "runs")


def run(*command: str | Path, cwd: Path, pythonpath: str = "") -> str:
    """The command's output; its error output is in the failure's message."""
    env = {**os.environ, "PYTHONPATH": pythonpath}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the project, built in a copy, so that the checkout gets no build folder."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = Path(shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=NOT_COPIED))
    pip_wheel = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    run(*pip_wheel, "--wheel-dir", folder, checkout, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder that holds the wheel's content and nothing else."""
    target = wheel.parent / "installed"
    pip_install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip_install, "--target", target, wheel, cwd=wheel.parent)
    return target


def package_files() -> Iterator[tuple[str, bytes]]:
    """Each file that the wheel owes, by its name there."""
    for folder, shipped_as in SHIPPED.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and (path.suffix in {".py", ".json", ".cpp", ".h"} or path.name == "py.typed"):
                yield f"{shipped_as}/{path.relative_to(ROOT / folder).as_posix()}", path.read_bytes()


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert shipped == dict(package_files())
    assert {"fla_ops/py.typed", "fla_ops/meta/simple_gla.py", "fla_ops/registrations/simple_gla.py"} <= shipped.keys()
    assert any(name.startswith("fla_ops/launch/") and name.endswith(".json") for name in shipped)
    assert {"fla_ops/common/cpu/kernels.h", "fla_ops/simple_gla/cpu/chunk.cpp"} <= shipped.keys()


COMPUTE = """
import sys
from pathlib import Path
import torch, fla_ops

torch.manual_seed(0)
q, k = (torch.randn(2, 70, 3, 12, dtype=torch.float64) for _ in range(2))
v = torch.randn(2, 70, 3, 20, dtype=torch.float64)
g = torch.nn.functional.logsigmoid(torch.randn(2, 70, 3, dtype=torch.float64))
chunk = fla_ops.chunk_simple_gla(q, k, v, g=g, output_final_state=True)
recurrent = fla_ops.fused_recurrent_simple_gla(q, k, v, g=g, output_final_state=True)
torch.testing.assert_close(chunk, recurrent)
o, _ = fla_ops.chunk_simple_gla(q.float(), k.float(), v.float(), g=g)  # in C++
torch.testing.assert_close(o, chunk[0].float())

folder = Path(sys.argv[1])
files = [Path(m.__file__) for name, m in list(sys.modules.items()) if name.split(".")[0] == "fla_ops"]
assert files and all(folder in file.parents for file in files), files
"""


def test_wheel_works_without_the_checkout(installed: Path) -> None:
    run(sys.executable, "-c", COMPUTE, installed, cwd=installed.parent, pythonpath=str(installed))


IMPORT = """
import sys
import torch
before = set(sys.modules)
import fla_ops
assert not torch.cuda.is_initialized()
print(*(set(sys.modules) - before))
"""


def test_import_loads_neither_triton_nor_a_launcher_nor_dtensor() -> None:
    loaded = run(sys.executable, "-c", IMPORT, cwd=ROOT).split()
    assert "fla_ops.simple_gla.api" in loaded
    assert "triton" not in loaded
    assert "torch.distributed.tensor" not in loaded
    launchers = {"chunk", "fused_chunk", "parallel", "fused_recurrent", "decoding", "aten", "host"}
    assert [name for name in loaded if name.startswith("fla_ops.") and name.split(".")[-1] in launchers] == []


@pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip), reason="the constraints describe a CPU set-up")
def test_constraints_pin_all_that_make_installs() -> None:
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml, which needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert all(pins.values()), "every line reads name==version"

    wanted = [Requirement(line) for line in project["dependencies"]]
    wanted += [Requirement(line) for extra in ("test", "demo") for line in project["optional-dependencies"][extra]]
    seen = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no line in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is not {requirement.specifier}"
        if (name, *requirement.extras) in seen:
            continue
        seen.add((name, *requirement.extras))
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed: `make test` sets everything up")
        for need in map(Requirement, needs):
            extras = ("", *requirement.extras)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras):
                wanted.append(need)
