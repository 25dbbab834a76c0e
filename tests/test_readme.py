"""The README's Python blocks run, in order, as one program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    program = "\n".join(blocks)
    names: dict[str, object] = {}
    exec(compile(program, str(README), "exec"), names)
    assert names["o"].shape == names["v"].shape
    assert (tmp_path / "layer.pt2").exists()
    printed = capsys.readouterr().out
    promised = re.findall(r"print\(error\)\s+# (.*)", program)
    assert promised
    for message in promised:
        assert message in printed


def test_every_public_function_is_named() -> None:
    import fla_ops

    text = README.read_text()
    missing = [name for name in fla_ops.__all__ if name != "__version__" and not _is_named(name, text)]
    assert not missing, f"README.md does not mention {missing}"


def _is_named(name: str, text: str) -> bool:
    """In full, or as a form's prefix beside its family: `chunk_` ... `fused_recurrent_simple_gla`."""
    if name in text:
        return True
    return any(
        name.startswith(prefix) and name.removeprefix(prefix) in text for prefix in re.findall(r"`(\w+_)`", text)
    )
