"""House rules that no linter knows: sizes, documented names, nothing left over. Source: TigerBeetle's tidy.zig."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (ROOT / "client_sdk" / "src" / "kitemq", ROOT / "services" / "src" / "kitemq_server")
MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
# Built from halves, so that this file does not find itself.
LEFTOVERS = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X:", "breakpoint" + r"\(")))


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted(package.rglob("*.py")) if "proto/v1" not in path.as_posix()]


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_sizes_and_docstrings(path: Path) -> None:
    source = path.read_text()
    lines = source.count("\n")
    assert lines <= MODULE_LINES_MAX, f"{lines} lines: at most {MODULE_LINES_MAX}"
    tree = ast.parse(source)
    if source.strip():
        assert ast.get_docstring(tree), "a module says why it exists"
    undocumented = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES_MAX, f"{node.name} has {length} lines: at most {FUNCTION_LINES_MAX}"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            undocumented += [node.name] * (ast.get_docstring(node) is None)
    assert not undocumented, f"public names without a docstring: {undocumented}"


def test_nothing_left_over() -> None:
    found = []
    for path in tracked():
        if path.suffix in {".py", ".md", ".proto", ".toml", ".yml", ".yaml", ""} and path.name != "LICENSE":
            try:
                text = path.read_text()
            except UnicodeDecodeError:
                continue
            found += [f"{name_of(path)}:{i}" for i, line in enumerate(text.splitlines(), 1) if LEFTOVERS.search(line)]
    assert not found


def test_no_paths_of_one_machine() -> None:
    """Nothing committed names a home directory or a mirror of somebody's machine."""
    pattern = re.compile(r"/home/(?!kitemq)\w+/|/root/|--index-url|--extra-index-url|PIP_INDEX_URL")
    found = []
    for path in tracked():
        if path == Path(__file__):
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{name_of(path)}:{i}" for i, line in enumerate(text.splitlines(), 1) if pattern.search(line)]
    assert not found


def test_links_in_documents_lead_somewhere() -> None:
    broken = []
    for path in tracked():
        if path.suffix == ".md":
            for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
                if "://" not in target and not (path.parent / target).exists():
                    broken.append(f"{name_of(path)}: {target}")
    assert not broken
