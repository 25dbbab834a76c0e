"""docs/adding_an_operator.md, followed to the letter in a copy of the project: the contract tests pass there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_an_operator.md").read_text()
FILES = re.findall(r"^`([\w/.]+)`:\n\n```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
LINES = re.findall(r"^\| `([\w/.]+)` \| `(.+)` \|$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the page's files and lines."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("fla_ops", "meta", "registrations", "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for name, text in FILES:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text)
    for name, line in LINES:
        with (copy / name).open("a") as file:
            file.write(f"{line}\n")
    return copy


def test_the_page_names_files_and_lines() -> None:
    assert len(FILES) == 10
    assert {name for name, _ in LINES} == {"registrations/__init__.py", "fla_ops/__init__.py"}


def test_the_operator_passes_the_contract(project: Path) -> None:
    selected = ("tests/contract", "-k", "fading_sum", "-m", "not slow")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected]
    run = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert re.search(r"\d{2,} passed", run.stdout), run.stdout[-500:]
