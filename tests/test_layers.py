"""The architecture: what imports what, where torch is loaded, and that one name is of one thing."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator

import pytest
from helpers import ROOT
from structure import PACKAGE, arrows, circles, modules, of_folders, upward

MODULES = {name: path for name, path in modules(ROOT).items() if name.startswith(f"{PACKAGE}.")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}

# may be of several modules: a logger, a type variable, and the bridge's twins of the package's two functions
OWN_EVERYWHERE = {"log", "T"}
TWINS = {
    "generate_prior": {"step_skip.diffusers", "step_skip.generate.generate"},
    "infer_from_prior": {"step_skip.diffusers", "step_skip.infer.infer"},
}


def names_of(node: ast.stmt) -> list[str]:
    """Return what an import names in full, of the package or another; nothing for other statements."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def packages_of(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the top names that are imported by some nodes."""
    return {name.split(".")[0] for node in nodes if isinstance(node, ast.stmt) for name in names_of(node)}


def top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run on import, those below an if or try, too, but for TYPE_CHECKING."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            skipped = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from top_level([] if skipped else node.body)
            for handler in getattr(node, "handlers", []):
                yield from top_level(handler.body)
            yield from top_level(getattr(node, "orelse", []))
            yield from top_level(getattr(node, "finalbody", []))


def defined_by(tree: ast.Module) -> set[str]:
    """Return the public functions, classes and constants of a module."""
    found: set[str] = set()
    for node in top_level(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {each.id for one in targets for each in ast.walk(one) if isinstance(each, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def test_nothing_imports_in_a_circle_or_upward():
    """Imports inside functions and under TYPE_CHECKING count."""
    graph = arrows(ROOT)
    assert circles(graph) == []
    assert circles(of_folders(graph)) == []
    assert upward(graph) == []


def test_no_import_is_hidden_from_the_graph():
    """A relative import, or one of the package itself, would be no arrow."""
    for name, tree in TREES.items():
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes), name
        assert not any(PACKAGE in names_of(node) for node in nodes), name


def test_every_folder_has_an_init_that_is_a_docstring():
    folders = {path.parent for path in MODULES.values()} - {ROOT / PACKAGE}
    assert len(folders) > 10
    for folder in folders:
        tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) and len(tree.body) == 1, folder


def test_importing_loads_torch_only_where_tensors_are_computed_with():
    loads = {name: packages_of(top_level(tree.body)) for name, tree in TREES.items()}
    heavy = {name for name, packages in loads.items() if packages & {"torch", "diffsynth"}}
    allowed = ("step_skip.method.", "step_skip.pipeline.", "step_skip.diffusers")
    assert heavy and all(name.startswith(allowed) for name in heavy), sorted(heavy)


def test_the_method_knows_neither_files_nor_diffsynth():
    for name, tree in TREES.items():
        if name.startswith("step_skip.method"):
            found = {each for node in ast.walk(tree) if isinstance(node, ast.stmt) for each in names_of(node)}
            own = {each for each in found if each.split(".")[0] == PACKAGE}
            assert all(each.startswith(("step_skip.method", "step_skip.errors")) for each in own), (name, own)
            assert not packages_of(ast.walk(tree)) & {"diffsynth", "pathlib", "os", "io", "shutil"}, name


def test_no_two_modules_define_one_name():
    homes: dict[str, set[str]] = defaultdict(set)
    for name, tree in TREES.items():
        for each in defined_by(tree) - OWN_EVERYWHERE:
            homes[each].add(name)
    assert {each: found for each, found in homes.items() if len(found) > 1} == TWINS


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch", {"torch"}),
        ("from torch.nn import Module", {"torch"}),
        ("try:\n    import torch\nexcept ImportError:\n    import diffsynth", {"torch", "diffsynth"}),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import diffsynth", {"diffsynth"}),
        ("def load():\n    import torch", set()),
    ],
)
def test_what_counts_as_imported_at_module_level(source, found):
    """Shows that the tests above can fail."""
    assert packages_of(top_level(ast.parse(source).body)) == found
