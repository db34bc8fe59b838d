"""Read the structure of the package from its source: which file imports which, on how many floors.

    python tests/structure.py [ROOT]

Counts every import below `step_skip/` and of the three scripts, those inside functions and under
TYPE_CHECKING, too. A file's floor is one above the highest file that it imports; files in a circle share one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = "step_skip"
SCRIPTS = ("generate_prior", "infer_from_prior", "prior_utils")
# from the bottom up: a folder imports only what stands before it, and of itself what makes no circle
LAYERS = (
    *("errors", "files", "method", "media", "models", "pipeline", "prior", "generate", "infer"),
    *("diffusers", "comfyui", "sweep", "cli", "page", "cluster", "api", "__init__"),
)


def modules(root: Path) -> dict[str, Path]:
    """Return every module of the package and the scripts, by dotted name."""
    found = {name: root / f"{name}.py" for name in SCRIPTS}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)] = path
    return found


def imports(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules among the known ones that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        for name in names:
            name = f"{PACKAGE}.__init__" if name == PACKAGE else name
            if name in known:
                yield name


def arrows(root: Path) -> dict[str, set[str]]:
    """Return by module what it imports of the package, without itself."""
    known = modules(root)
    return {name: set(imports(path, known)) - {name, f"{PACKAGE}.__init__"} for name, path in known.items()}


def layer_of(module: str) -> int:
    """Return the place of a module's folder in LAYERS; the scripts stand above all."""
    parts = module.split(".")
    return len(LAYERS) if parts[0] != PACKAGE else LAYERS.index(parts[1])


def upward(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Return the imports of something that stands above the importing file's folder."""
    return sorted((one, other) for one in graph for other in graph[one] if layer_of(other) > layer_of(one))


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or not."""
    reach = {name: _reachable(name, graph) for name in graph}
    groups = {frozenset(o for o in reach[n] if n in reach[o]) for n in graph if n in reach[n]}
    return sorted(map(sorted, groups))


def _reachable(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    left = list(graph[start])
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += graph[name]
    return found


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """Return the floor of each module, from 1."""
    circle_of = {name: frozenset(circle) for circle in circles(graph) for name in circle}
    known: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in known:
            circle = circle_of.get(name, frozenset([name]))
            below = {other for each in circle for other in graph[each]} - circle
            known.update(dict.fromkeys(circle, 1 + max(map(floor, below), default=0)))
        return known[name]

    return {name: floor(name) for name in graph}


def of_folders(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the same graph between the package's folders and files."""

    def room(module: str) -> str:
        parts = module.split(".")
        return parts[0] if parts[0] != PACKAGE else parts[1]

    rooms: dict[str, set[str]] = {}
    for one, others in graph.items():
        rooms.setdefault(room(one), set()).update(room(each) for each in others if room(each) != room(one))
    return rooms


def summarize(graph: Mapping[str, set[str]]) -> str:
    """Return the sums of a graph in a line."""
    found = circles(graph)
    sizes = ", ".join(str(len(circle)) for circle in found)
    return (
        f"{len(graph)} nodes, {max(floors(graph).values())} floors, {sum(map(len, graph.values()))} arrows, "
        f"{len(found)} circles{f' of {sizes}' if sizes else ''}"
    )


def main() -> None:
    """Print the sums of files and of folders, then each floor of folders."""
    root = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).resolve().parents[1]
    graph = arrows(root)
    rooms = of_folders(graph)
    print(f"files:   {summarize(graph)}")
    print(f"folders: {summarize(rooms)}")
    if all(name in (*LAYERS, *SCRIPTS) for name in rooms):
        print(f"arrows up: {len(upward(graph))}")
        for one, other in upward(graph):
            print(f"  {one} -> {other}")
    for circle in circles(graph):
        print(f"circle: {', '.join(circle)}")
    by_floor = floors(rooms)
    for level in range(max(by_floor.values()), 0, -1):
        print(f"{level:3}  {', '.join(sorted(name for name, each in by_floor.items() if each == level))}")


if __name__ == "__main__":
    main()
