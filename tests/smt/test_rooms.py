"""Arrows run one way: from the command line down to the kernels, never up, and no module imports itself on a detour.

Every import counts: those inside of functions, those for type checkers alone, and a module that a string names in full. The
packages on the way to a module do not: ``from smt.model.loss import x`` is an arrow to ``smt.model.loss``, not to ``smt``.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from smt.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]

# A room may import from itself and from the levels below its own, not from another room of its level.
LEVELS = [
    ["benchmarks"],
    ["smt.__init__", "smt.__main__"],  # the front door
    ["smt.cli"],
    ["smt.study"],
    ["smt.experiments"],
    ["smt.training"],
    ["smt.evaluation", "smt.huggingface"],
    ["smt.baselines"],
    ["smt.hymba"],
    ["smt.model"],
    ["smt.pretrained", "smt.state"],
    ["smt.config", "smt.data"],
    ["smt.runtime", "smt_kernels"],
]
LANDING = ["__init__.py", "__main__.py", "config.py", "configs"]  # and the rooms

Graph = dict[str, set[str]]


def import_graph(root: Path, packages: Sequence[str]) -> Graph:
    """Which module of the packages imports which, by names like ``smt.model.loss`` and ``smt.cli.__init__``."""
    modules = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            modules[".".join(path.relative_to(root).with_suffix("").parts)] = path
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules.items()}
    return {name: _imports(name, tree, modules) - {name} for name, tree in trees.items()}


def _imports(name: str, tree: ast.Module, modules: dict[str, Path]) -> set[str]:
    folder = name.rpartition(".")[0]

    def found(imported: str) -> str | None:
        # The scripts of a folder without __init__.py find each other by plain names.
        beside = [] if f"{folder}.__init__" in modules else [f"{folder}.{imported}"]
        return next((module for module in (imported, f"{imported}.__init__", *beside) if module in modules), None)

    arrows: set[str | None] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            arrows.update(found(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*name.split(".")[: -node.level], *filter(None, [node.module])]) if node.level else node.module
            arrows.update(found(f"{base}.{alias.name}") or found(base) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            arrows.add(found(node.value))
    return {module for module in arrows if module is not None}


def upward(graph: Graph, levels: Sequence[Sequence[str]]) -> list[str]:
    """The arrows that do not run down, nor inside of a room."""
    level_of = {room: level for level, rooms in enumerate(levels) for room in rooms}

    def room_of(module: str) -> str:
        rooms = [room for room in level_of if f"{module}.".startswith(f"{room}.")]
        assert len(rooms) == 1, f"{module} is in {rooms or 'no room'}"
        return rooms[0]

    return [
        f"{module} -> {imported}"
        for module, arrows in graph.items()
        for imported in sorted(arrows)
        if (here := room_of(module)) != (there := room_of(imported)) and level_of[here] >= level_of[there]
    ]


def circle(graph: Graph) -> list[str]:
    """The modules of a circle of imports, the first of them again at the end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def graph() -> Graph:
    return import_graph(ROOT, ["smt", "smt_kernels", "benchmarks"])


def test_no_room_imports_from_above_or_beside_it(graph):
    assert upward(graph, LEVELS) == []


def test_no_module_is_part_of_a_circle_of_imports(graph):
    assert circle(graph) == []


def test_every_room_is_on_the_list_and_opens_with_a_map_of_its_files():
    rooms = {path.parent.name: path for path in (ROOT / "smt").glob("*/__init__.py")}
    assert {f"smt.{room}" for room in rooms} == {room for level in LEVELS for room in level if room[:4] == "smt."} - {
        "smt.__init__", "smt.__main__", "smt.config",
    }  # fmt: skip
    for room, path in rooms.items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        files = {file.stem for file in path.parent.glob("*.py")} - {"__init__"}
        if room == "cli":
            files -= set(COMMANDS)  # these have a table with what each of them does
        assert [file for file in sorted(files) if f"``{file}``" not in text] == [], room


def test_nothing_but_the_front_door_and_the_configuration_lies_on_the_landing():
    rooms = [path.parent.name for path in (ROOT / "smt").glob("*/__init__.py")]
    lying = [path.name for path in (ROOT / "smt").iterdir() if path.name != "__pycache__"]
    assert sorted(lying) == sorted([*LANDING, *rooms])


MADE_UP = {
    "house/__init__.py": "import house.attic.roof",
    "house/attic/__init__.py": "",
    "house/attic/roof.py": "from house.cellar import floor\nfrom house.cellar.floor import tiles",
    "house/cellar/__init__.py": "",
    "house/cellar/floor.py": "import os",
    "house/shed.py": "import tool",
    "tools/saw.py": "import blade",
    "tools/blade.py": "",
}
DOWN = [["tools"], ["house.__init__"], ["house.attic", "house.shed"], ["house.cellar"]]


@pytest.mark.parametrize(
    "floor",
    [
        "def late():\n    from house.attic import roof",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.attic.roof import tiles",
        "import importlib\nroof = importlib.import_module('house.attic.roof')",
        "from ..attic import roof",
        "import house.attic.roof as roof",
    ],
    ids=["in a function", "for type checkers", "by a string", "relative", "plain"],
)
def test_an_arrow_up_and_a_circle_are_found_wherever_the_import_hides(floor, tmp_path):
    def build(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return import_graph(tmp_path, ["house", "tools"])

    graph = build(MADE_UP)
    assert graph["house.attic.roof"] == {"house.cellar.floor"} and graph["tools.saw"] == {"tools.blade"}
    assert upward(graph, DOWN) == [] and circle(graph) == []
    graph = build({"house/cellar/floor.py": floor})
    assert upward(graph, DOWN) == ["house.cellar.floor -> house.attic.roof"]
    assert set(circle(graph)) == {"house.attic.roof", "house.cellar.floor"}
    graph = build({"house/cellar/floor.py": "", "house/shed.py": "import house.attic.roof", "tools/blade.py": "import saw"})
    assert upward(graph, DOWN) == ["house.shed -> house.attic.roof"]
    assert set(circle(graph)) == {"tools.saw", "tools.blade"}
