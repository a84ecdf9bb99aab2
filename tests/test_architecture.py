"""The shape of the house: which part may import which, how long files and functions may be.

An import under `if TYPE_CHECKING:` is for annotations and never runs, so it may go up; the rules of the mathematics and
of the sockets hold for it too.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lit_bilevel"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in FILES}
HEAVY = ("lightning", "transformers", "peft", "datasets")
PURE = (
    *("types.py", "losses.py", "problem.py", "errors.py", "refinement/response_weights.py", "refinement/choose.py"),
    *("refinement/alike.py", "refinement/trust.py", "refinement/consensus.py", "refinement/groups.py"),
    *("weights/", "solvers/", "objectives/"),
)
# Each room, or file at the root, and those it may import: only ones above it, so that there is no way round.
ROOMS = {
    "errors": "",
    "files": "",
    "types": "",
    "problem": "",
    "resources": "",
    "version": "",
    "losses": "types",
    "weights": "errors types",
    "solvers": "errors problem",
    "objectives": "errors losses types",
    "data": "errors files resources types version",
    "policy": "errors losses objectives problem resources types",
    "refinement": "errors policy problem types weights",
    "scores": "data errors files policy types version",
    "generation": "data errors policy types",
    "training": "data errors files losses objectives policy problem refinement types weights",
    "module": "errors generation objectives policy refinement solvers training types weights",
    "inspection": "errors files module policy refinement scores training",
    "callbacks": "data errors files generation inspection module policy refinement resources scores training types"
    " version weights",
    "__init__": "version",
    "parser": "__init__ errors",
    "cli": "callbacks data errors generation module objectives parser refinement resources solvers training weights",
    "commands": "cli data errors files inspection policy refinement resources scores training",
    "comparison": "callbacks cli commands data errors files inspection losses objectives policy refinement resources"
    " scores solvers training types weights",
    "__main__": "version",
}


def for_types(name: str) -> list[ast.stmt]:
    """What stands under `if TYPE_CHECKING:`, which never runs."""
    guards = [
        node for node in TREES[name].body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return [statement for guard in guards for statement in guard.body]


def imports(name: str, running: bool = False) -> set[str]:
    """Every module a file imports, also inside functions; `running`: without those that only types need."""
    skipped = for_types(name) if running else []
    found = set()
    for node in (node for node in ast.walk(TREES[name]) if node not in skipped):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} uses a relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(name: str) -> str:
    """The room of a file: its folder, or itself where it stands at the root."""
    return name.split("/")[0].removesuffix(".py")


def inside(name: str, *places: str) -> list[str]:
    """Imports of a file that lead into the given places of the package."""
    return [other for other in imports(name) if any(f"{other}.".startswith(f"lit_bilevel.{p}.") for p in places)]


@pytest.mark.parametrize("name", [n for n in TREES if n.startswith(PURE)])
def test_the_mathematics_knows_torch_alone(name):
    assert not [other for other in imports(name) if other.split(".")[0] in HEAVY]
    assert not inside(name, "data", "policy", "generation", "training", "module", "inspection", "callbacks", "cli")


@pytest.mark.parametrize("name", [n for n in TREES if n.startswith(("weights/", "solvers/"))])
def test_weights_and_solvers_do_not_know_each_other(name):
    room, other = ("weights", "solvers") if name.startswith("weights/") else ("solvers", "weights")
    assert not inside(name, other)
    if not name.endswith(("base.py", "__init__.py")):
        own = [m.removeprefix(f"lit_bilevel.{room}.").split(".")[0] for m in inside(name, room)]
        assert set(own) <= {"base", "table", "running", "pool_model"}, f"{name} knows a concrete sibling"


@pytest.mark.parametrize("name", list(TREES))
def test_a_room_imports_the_rooms_of_its_line(name):
    room = room_of(name)
    used = {other.split(".")[1] for other in imports(name, running=True) if other.startswith("lit_bilevel.")}
    used &= set(ROOMS) - {room}
    if "lit_bilevel" in imports(name, running=True):
        used.add("__init__")
    assert used <= set(ROOMS[room].split()), f"{name} imports {sorted(used - set(ROOMS[room].split()))}"


def test_the_lines_of_rooms_run_one_way():
    assert {room_of(name) for name in TREES} == set(ROOMS)
    above: set[str] = set()
    for room, allowed in ROOMS.items():
        assert set(allowed.split()) <= above, f"`{room}` may import a room that stands below it"
        above.add(room)


def annotations(tree: ast.AST) -> list[ast.expr]:
    """The annotations of arguments, of what is returned, and of variables."""
    found: list[ast.expr | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            found.append(node.returns)
    return [annotation for annotation in found if annotation is not None]


def bound_by_imports(tree: ast.AST) -> set[str]:
    """Names that imports inside a function (or at the top, for a module's body) give."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {(alias.asname or alias.name).split(".")[0] for node in nodes for alias in node.names}


@pytest.mark.parametrize("name", [n for n in TREES if for_types(n)])
def test_what_is_imported_for_types_stands_in_annotations_alone(name):
    """Such an import may lead to any room, for it never runs; a name used otherwise would be missing at run time."""
    tree = TREES[name]
    assert all(isinstance(statement, ast.Import | ast.ImportFrom) for statement in for_types(name))
    assert any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body), "annotations would run"
    names = bound_by_imports(ast.Module(for_types(name), []))
    typed = {id(node) for annotation in annotations(tree) for node in ast.walk(annotation)}
    for function in ast.walk(tree):  # which may import the same for its own use
        if isinstance(function, ast.FunctionDef):
            own = bound_by_imports(function)
            typed |= {id(node) for node in ast.walk(function) if isinstance(node, ast.Name) and node.id in own}
    loads = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in typed]
    assert not names & {node.id for node in loads}


SOCKETS = ("weights.base", "weights.optimizer", "solvers.base")


def test_the_module_knows_sockets_only():
    concrete = [
        other
        for other in inside("module.py", "weights", "solvers")
        if not other.startswith(tuple(f"lit_bilevel.{socket}" for socket in SOCKETS))
    ]
    assert not concrete


@pytest.mark.parametrize("name", list(TREES))
def test_budgets(name):
    assert len((PACKAGE / name).read_text().splitlines()) <= 300
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{name}: {node.name} has {length} lines"
            if name == "module.py" and node.name == "training_step":
                assert length <= 30


@pytest.mark.parametrize("name", [n for n in TREES if n != "__init__.py"])
def test_every_module_says_what_it_is(name):
    assert ast.get_docstring(TREES[name])


def test_imports_have_no_circle():
    def module(name: str) -> str:
        return "lit_bilevel." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    graph = {
        module(n): {o for o in imports(n, running=True) if o.startswith("lit_bilevel.")}
        for n in TREES
        if n != "__init__.py"
    }
    graph = {n: {o for o in others if o in graph and o != n} for n, others in graph.items()}
    state: dict[str, int] = {}

    def visit(node: str, path: list[str]) -> None:
        assert state.get(node) != 1, f"circle: {' > '.join([*path, node])}"
        if node not in state:
            state[node] = 1
            for other in graph[node]:
                if not node.startswith(f"{other}."):  # a package's __init__ may import its rooms
                    visit(other, [*path, node])
            state[node] = 2

    for node in graph:
        visit(node, [])


@pytest.mark.parametrize("name", list(TREES))
def test_every_module_imports(name):
    parts = name.removesuffix(".py").split("/")
    importlib.import_module(".".join(["lit_bilevel", *(part for part in parts if part != "__init__")]))


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_no_test_file_imports_another(path):
    """What several of them need stands in `tests/support`."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not [module for module in modules if module.startswith(("test_", "conftest"))]


def test_public_names_exist():
    package = importlib.import_module("lit_bilevel")
    for name in package.__all__:
        assert getattr(package, name) is not None
