"""The layout: who may import whom, how long a file may be, what the two links point to, what no file may say."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("meta", "registrations")
PACKAGE_FOLDERS = ("fla_ops", *LINKED)
FOLDERS = (*PACKAGE_FOLDERS, "tests", "benchmarks", "examples")

TEXT_SUFFIXES = {".py", ".cpp", ".h", ".md", ".toml", ".txt", ".json", ".csv"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 120
MAX_PARAMETERS = 9  # of a function that is neither a kernel nor public: what takes more takes a call

# The rooms of a family: what every backend shares, and a folder for each backend.
BACKENDS = ("fla_ops.*.cpu", "fla_ops.*.gpu")
CALLS = ("fla_ops.signature", "fla_ops.*.call")
CHECKS = ("fla_ops.validation", "fla_ops.*.checks", *CALLS)
PUBLIC = ("fla_ops.dispatch", "fla_ops.public", "fla_ops.*.api", "fla_ops.*.forms", "fla_ops.*.reference")
REGISTRY = ("fla_ops.meta", "fla_ops.registrations")
SHARED = ("fla_ops.common", "fla_ops.launch")


@dataclass(frozen=True)
class Rule:
    """What some modules may import, beside the standard library: `only` these, and of these `never` those.

    A pattern stands for a module and all it holds; `{family}` is the importing module's own package.
    """

    name: str
    modules: tuple[str, ...]
    but: tuple[str, ...] = ()
    only: tuple[str, ...] = ("*",)
    never: tuple[str, ...] = ()


RULES = [
    Rule("validation", ("fla_ops.validation",), only=("torch",)),
    Rule("calls", CALLS, only=("torch", *CALLS)),
    Rule("checks", ("fla_ops.*.checks",), only=("torch", *CHECKS)),
    Rule("fakes", ("fla_ops.meta",), only=("torch", "fla_ops.meta", *CHECKS)),
    Rule("registrations", ("fla_ops.registrations",), only=("torch", "fla_ops.launch", *REGISTRY, *CHECKS)),
    Rule("public functions", ("fla_ops.*.api",), never=("triton", *SHARED, *BACKENDS)),
    Rule("choice of a form", ("fla_ops.dispatch", "fla_ops.*.forms"), never=("triton", *BACKENDS)),
    Rule("references", ("fla_ops.*.reference",), never=("triton", *SHARED, *BACKENDS)),
    Rule(
        "CPU implementations",
        ("fla_ops.*.cpu",),
        only=("torch", *CHECKS, "{family}", "fla_ops.common.cpu"),
        never=(*PUBLIC, "fla_ops.*.gpu"),
    ),
    Rule(
        "GPU implementations",
        ("fla_ops.*.gpu",),
        only=("torch", "triton", *CHECKS, "{family}", "fla_ops.common.gpu", "fla_ops.launch"),
        never=(*PUBLIC, "fla_ops.*.cpu"),
    ),
    Rule(
        "sharding",
        ("fla_ops.distributed",),
        only=("torch", "fla_ops.distributed", "fla_ops.registrations", *CHECKS),
    ),
    Rule("launch settings", ("fla_ops.launch",), only=("torch", "triton", "fla_ops.launch")),
    Rule(
        "integrations",
        ("fla_ops.integrations",),
        only=("torch", "transformers", "fla_ops"),
        never=(*BACKENDS, *CHECKS, *PUBLIC, *REGISTRY, *SHARED),
    ),
]


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def module_name(path: Path) -> str:
    """The import name of a package file; `meta` and `registrations` are reached through the links."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "fla_ops" else ("fla_ops", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every dotted name that a file imports, anywhere in it, relative ones resolved."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_import_directions(rule: Rule) -> None:
    names = {path: module_name(path) for path in sources(*PACKAGE_FOLDERS)}
    bound = [path for path, name in names.items() if matches(name, rule.modules) and not matches(name, rule.but)]
    assert bound, f"no module is called {rule.modules}: the rule no longer guards anything"
    broken = []
    for path in bound:
        family = ".".join(names[path].split(".")[:2])
        only = tuple(pattern.format(family=family) for pattern in rule.only)
        for name in imports(path):
            if name.split(".")[0] in sys.stdlib_module_names:
                continue
            if not matches(name, only) or matches(name, rule.never):
                broken.append(f"{relative(path)} imports {name}")
    assert not broken, f"{rule.name} may import {rule.only}, and never {rule.never}: " + "; ".join(broken)


def test_only_package_inits_import_an_api() -> None:
    modules = (path for path in sources(*PACKAGE_FOLDERS) if path.name != "__init__.py")
    broken = [
        f"{relative(path)} imports {name}"
        for path in modules
        for name in imports(path)
        if matches(name, ("fla_ops.*.api",))
    ]
    assert not broken, "; ".join(broken)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_what_two_families_share_is_common_and_nothing_else_is(backend: str) -> None:
    """A module of fla_ops/common/ is imported by two families or more, if need be through others of that folder."""
    modules = [p for p in sources(f"fla_ops/common/{backend}") if p.name != "__init__.py"]
    names = {path: module_name(path) for path in sources("fla_ops")}
    users: dict[str, set[str]] = {}
    for path in modules:
        found = [n for p, n in names.items() if any(matches(x, (module_name(path),)) for x in imports(p)) and p != path]
        users[module_name(path)] = {n.split(".")[1] if not n.startswith("fla_ops.common") else n for n in found}

    def families(module: str) -> set[str]:
        direct = users.get(module, set())
        return {x for x in direct if "." not in x}.union(*(families(x) for x in direct if "." in x))

    alone = {module: families(module) for module in users if len(families(module)) < 2 and families(module)}
    assert not alone, f"these have one family that uses them, and live with it: {alone}"


def test_linear_and_lightning_own_no_kernel_but_normalisation() -> None:
    modules = (path for path in sources("fla_ops/linear_attn", "fla_ops/lightning_attn") if path.name != "normalize.py")
    broken = [relative(path) for path in modules if any(matches(name, ("triton",)) for name in imports(path))]
    assert not broken, f"these families run simple_gla's kernels, but own some in {broken}"


@pytest.mark.parametrize("name", LINKED)
def test_package_reaches_root_folder_through_a_link(name: str) -> None:
    link = ROOT / "fla_ops" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()
    assert (link / "__init__.py").is_file()


def test_files_and_functions_are_short() -> None:
    long = []
    compiled = [path for path in (ROOT / "fla_ops").rglob("*") if path.suffix in (".cpp", ".h")]
    assert compiled
    for path in (*sources(*FOLDERS), *compiled):
        lines = len(path.read_text().splitlines())
        if lines > MAX_FILE_LINES:
            long.append(f"{relative(path)}: {lines} lines, over {MAX_FILE_LINES}")
    for path in sources(*FOLDERS):
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                start = min(item.lineno for item in (node, *node.decorator_list))
                if (lines := node.end_lineno - start + 1) > MAX_FUNCTION_LINES:
                    long.append(
                        f"{relative(path)}:{node.lineno}: {node.name} has {lines} lines, over {MAX_FUNCTION_LINES}"
                    )
    assert not long, "; ".join(long)


def test_functions_take_a_call_rather_than_its_arguments() -> None:
    """Kernels take what they load, public functions and references what people pass."""
    long = []
    for path in sources(*PACKAGE_FOLDERS):
        if path.name in ("api.py", "reference.py") or path.is_relative_to(ROOT / "fla_ops" / "integrations"):
            continue
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.FunctionDef) or any("jit" in ast.unparse(d) for d in node.decorator_list):
                continue
            count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
            if count > MAX_PARAMETERS:
                long.append(f"{relative(path)}:{node.lineno}: {node.name} has {count} parameters")
    assert not long, f"over {MAX_PARAMETERS}: {'; '.join(long)}"


def project_texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the project, for rules about words."""
    folders = [ROOT / folder for folder in (".ci", *FOLDERS)]
    candidates = [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]
    for path in candidates:
        if path.is_file() and (
            path.suffix in TEXT_SUFFIXES or path.name in {"Makefile", "LICENSE", ".gitignore", "run"}
        ):
            yield path, path.read_text()


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(r"(?<![\w.])/(?:work|opt|root|home|Users)/\w", id="path-of-one-machine"),
        pytest.param(r"\b(?:TOD[O]|FIXM[E]|XX[X])\b", id="unfinished"),  # the brackets spare this line
        pytest.param(r"\b(?:pypi|pythonhosted|download\.pytorch)\.org", id="registry-host"),
    ],
)
def test_no_file_mentions(pattern: str) -> None:
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path, text in project_texts()
        for number, line in enumerate(text.splitlines(), start=1)
        if re.search(pattern, line)
    ]
    assert not found, "\n".join(found)
