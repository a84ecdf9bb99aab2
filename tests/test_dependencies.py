"""Packages that are imported are declared in pyproject.toml; those of an extra are imported where they are needed."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import sys
from collections.abc import Iterator

import pytest
from support.files import ROOT

tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 has no reader of pyproject.toml")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BY_NAME = ("import_module", "find_spec", "importorskip")  # calls that import the package named by their argument


homes = functools.cache(importlib.metadata.packages_distributions)
OWN = {"lit_bilevel", *(path.stem for path in (ROOT / "scripts").rglob("*"))}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


ALWAYS = declared(PROJECT["dependencies"])
EXTRAS = declared([name for group in PROJECT["optional-dependencies"].values() for name in group])


def imported(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Names of packages, and whether each is imported as soon as the file is."""
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")  # never runs
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in BY_NAME:
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for name in names:
            yield name.split(".")[0], node not in late


def undeclared(source: str, extras_at_once: bool = False) -> list[str]:
    """Packages that a file imports without a right to: not declared, or of an extra as soon as the file is imported."""
    found = []
    for name, at_once in imported(ast.parse(source)):
        if not name or name in OWN or name in sys.stdlib_module_names:
            continue
        distributions = {normal(home) for home in homes().get(name, [name])}
        allowed = ALWAYS if at_once and not extras_at_once else ALWAYS | EXTRAS
        if not distributions & allowed:
            found.append(name)
    return sorted(set(found))


@pytest.mark.parametrize("path", sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "lit_bilevel").rglob("*.py")))
def test_what_the_package_imports_is_declared(path):
    assert undeclared((ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "scripts").rglob("*.py")))
def test_what_scripts_import_is_declared(path):
    assert undeclared((ROOT / path).read_text(), extras_at_once=True) == []


def test_the_check_finds_what_is_not_declared():
    assert undeclared("import yaml, torch.nn, json\nfrom lit_bilevel.types import Row") == []
    assert undeclared("import sympy.core") == ["sympy"]
    assert undeclared("def f():\n    from sympy import core") == ["sympy"]
    assert undeclared("import importlib\nm = importlib.import_module('pandas.core')") == ["pandas"]
    assert undeclared("import matplotlib") == ["matplotlib"]
    assert undeclared("def f():\n    import matplotlib") == []
    assert undeclared("if TYPE_CHECKING:\n    import matplotlib, sympy") == ["sympy"]
