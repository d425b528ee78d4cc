"""README and docs: snippets run, commands parse, links resolve, and every figure is what its source makes."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest
import torch
from documents import ROOT, Page, arguments, pages

import smt.cli
from smt_kernels import stride_write

PAGES = pages()
README = PAGES[0]
SNIPPETS = [page for page in PAGES if page.snippets]
COMMANDS = sorted({command for page in PAGES for command in page.commands})
TOOLS = {"pip", "ruff", "mkdocs"}


def _needs(page: Page) -> list[pytest.MarkDecorator]:
    """What the snippets of a page need beyond PyTorch."""
    code = "\n".join(page.snippets)
    needs = {"triton": 'backend="triton"' in code, "interpreter": "TRITON_INTERPRET" in code}
    return [getattr(pytest.mark, name) for name, needed in needs.items() if needed]


@pytest.mark.parametrize("page", [pytest.param(page, marks=_needs(page), id=str(page)) for page in SNIPPETS])
def test_snippets_run_in_order_in_an_empty_folder(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for number, snippet in enumerate(page.snippets, 1):
        exec(compile(snippet, f"{page}, snippet {number}", "exec"), namespace)


def test_the_pages_that_show_python_are_found():
    assert {"README.md", "docs/decoding.md", "docs/kernels/stride_write.md"} <= {str(page) for page in SNIPPETS}


def _marks(command: str) -> list[pytest.MarkDecorator]:
    """The audit turns the interpreter on as soon as it is imported."""
    return [pytest.mark.triton, pytest.mark.interpreter] if "audit_kernels" in command else []


@pytest.mark.parametrize("command", [pytest.param(command, marks=_marks(command), id=command) for command in COMMANDS])
def test_every_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = arguments(command)
    if "-m" in words and words[words.index("-m") + 1] == "smt":  # torchrun, accelerate launch
        words = words[words.index("-m") + 1 :]
    if words[:3] == ["python", "-m", "smt_kernels.testing.null_gpu"]:
        words = words[3:]
    program, *rest = words
    if program == "smt":
        _parse_smt(rest, monkeypatch)
    elif program == "python":
        _parse_script(ROOT / rest[0], rest[1:], monkeypatch)
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests")), f"{command!r} names no test"
    else:
        assert program in TOOLS
        extras = re.findall(r"\[([\w,]+)\]", command)
        known = re.findall(r'^ {8}"(\w+)": ', (ROOT / "setup.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert {extra for group in extras for extra in group.split(",")} <= {*known}, f"{command!r}: extras are {known}"


def test_commands_are_found_in_blocks_and_in_sentences():
    programs = {command.split()[0] for command in COMMANDS}
    assert {"smt", "python", "pip", "pytest", "torchrun", "accelerate"} <= programs and len(COMMANDS) > 40


def _parse_smt(rest: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if "--help" in rest:
        with pytest.raises(SystemExit) as end:
            smt.cli.main(rest)
        assert end.value.code == 0
        return
    module = importlib.import_module(f"smt.cli.{rest[0]}")
    parsed = []
    monkeypatch.setattr(module, "run", lambda options, started: parsed.append(options) or 0)
    assert smt.cli.main(rest) == 0 and parsed


class _Parsed(Exception):
    """A command line that was read."""


def _parse_script(path: Path, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert path.is_file(), f"there is no {path}"
    if "argparse" not in path.read_text(encoding="utf-8"):
        assert not rest, f"{path.name} takes no arguments, got {rest}"
        return
    monkeypatch.syspath_prepend(str(path.parent))
    module = importlib.import_module(path.stem)
    read = argparse.ArgumentParser.parse_args

    def parse_args(self, words, namespace=None):
        read(self, words, namespace)
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(_Parsed):
        module.main(rest)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings_that_exist(page: Page) -> None:
    by_path = {other.path: other for other in PAGES}
    for link in page.links:
        name, _, anchor = link.partition("#")
        target = (page.path.parent / name).resolve() if name else page.path
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in by_path[target].anchors, f"{page} links to {link}, which has {sorted(by_path[target].anchors)}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_are_named_exist(page: Page) -> None:
    named = page.paths
    if page is README:  # its tree of files
        tree = re.search(r"^smt_kernels/ .*?^```$", page.text, flags=re.DOTALL | re.MULTILINE)[0]
        folder = ""
        for line in tree.splitlines()[:-1]:
            name = line.split()[0]
            folder, named = (name, named) if not line.startswith(" ") else (folder, [*named, folder + name.rstrip(",")])
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_readme_stays_short():
    assert len(README.text.splitlines()) <= 180
    assert len(README.text.split()) <= 1800


def test_the_readme_holds_the_two_commands_each_on_its_line():
    lines = README.text.splitlines()
    assert lines.count('pip install -e ".[train]" && smt train') == lines.count('pip install -e ".[test]" && pytest tests') == 1


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("publish")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_tables_are_what_their_sources_make(page: Page, publish) -> None:
    assert publish.filled(page.text) == page.text, f"{page} is behind its sources: run python benchmarks/publish.py"


def test_a_table_that_differs_from_its_source_is_found(publish) -> None:
    results = next(page for page in PAGES if str(page) == "docs/results.md")
    changed = re.sub(r"\(0\.\d+x\)", "(9.87x)", results.text, count=1)
    assert changed != results.text and publish.filled(changed) == results.text


def test_figures_of_the_readme_stand_in_the_results(publish) -> None:
    blocks = [match[0] for match in publish.BLOCK.finditer(README.text)]
    figures = {figure for block in blocks for figure in re.findall(r"[-+]?\d[\d,.]*\d?x?", block)}
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert len(blocks) == 3 and len(figures) > 20
    assert sorted(figure for figure in figures if figure not in results) == []


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "pictures"))
    return importlib.import_module("draw")


def test_pictures_are_those_that_their_sources_draw(publish, draw) -> None:
    for name, picture in draw.PICTURES.items():
        assert (draw.FOLDER / f"{name}.svg").read_text(encoding="utf-8") == picture().svg(), f"draw {name}.svg again"
    plots = importlib.import_module("publish_plots")
    for path in (plots.SPEED, plots.MEMORY, plots.POSITION):
        assert plots.digest(path) in path.read_text(encoding="utf-8"), "run python benchmarks/publish.py"


def test_pictures_of_windows_name_every_colour_and_are_no_wider_than_their_grid(draw) -> None:
    for name, picture in draw.PICTURES.items():
        made, svg = picture(), picture().svg()
        assert {colour for colour, _ in made.cells.values()} <= {*made.legend}, name
        last = max(int(x) for x in re.findall(rf"M(\d+) \d+h{draw.CELL - 1}", svg))
        assert int(re.search(r' width="(\d+)"', svg)[1]) <= last + 4 * draw.CELL, name


def test_the_picture_of_stream_attention_shows_the_queries_of_slots_too(draw) -> None:
    made = draw.stream_attention()
    of_slots = {(row, column) for row, group, column in made.cells if group == 0 and row >= made.parted}
    assert of_slots == {(24 + slot, seen) for slot in range(5) for seen in range(max(0, slot - 2), slot + 1)}
    assert made.rows[made.parted :] == [f"of slot {slot}" for slot in range(5)]


def test_the_picture_of_stride_write_is_what_gradients_show(draw) -> None:
    made, shapes = draw.stride_write(), {"x": (1, 8, 2), "z": (1, 8, 2), "conv_state": (1, 2, 3), "ssm_state": (1, 2, 2)}
    draws = torch.Generator().manual_seed(0)
    given = {name: torch.rand(shape, generator=draws, dtype=torch.float64) for name, shape in shapes.items()}
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    sizes = {"conv_weight": (2, 4), "conv_bias": (2,), "x_proj_weight": (5, 2), "dt_proj_weight": (2, 1), "dt_proj_bias": (2,)}
    weights = {name: torch.rand(size, generator=draws, dtype=torch.float64) for name, size in sizes.items()}
    gate, a = torch.arange(8)[None] != 4, -torch.ones(2, 2, dtype=torch.float64)

    def acts_on(write: int, a: torch.Tensor, state_reaches: bool) -> set[tuple[int, int]]:
        d = torch.ones(2, dtype=torch.float64)
        written = {**weights, "a": a} if state_reaches else {**weights, "a": 1e6 * a}  # what decays at once is not carried
        y = stride_write(**leaves, **written, d=d, gate=gate)[0][0, write].sum()
        slopes = torch.autograd.grad(y, list(leaves.values()), allow_unused=True, retain_graph=False)
        x, z, before, h = (torch.zeros(1) if slope is None else slope.abs() for slope in slopes)
        seen = {(1, index) for index in range(8) if (x[0, index].sum() + z[0, index].sum()) > 0}
        return seen | {(0, index) for index in range(3) if before[0, :, index].sum() > 0} | ({(2, 0)} if h.sum() > 0 else set())

    for write in range(8):
        shown = {(group, column): colour for (row, group, column), (colour, _) in made.cells.items() if row == write}
        assert acts_on(write, a, True) == {*shown}
        taps = acts_on(write, a, False)
        assert taps == {place for place, colour in shown.items() if colour in (draw.TOKEN, draw.BOTH)} - {(2, 0)}
        earlier = {(group, column) for row, group, column in made.cells if row < write}  # what the state holds
        assert taps & earlier == {place for place, colour in shown.items() if colour == draw.BOTH}


def test_the_picture_of_speeds_marks_ours_what_was_measured_and_why_a_curve_ends(publish, monkeypatch) -> None:
    plots, drawn = importlib.import_module("publish_plots"), []
    monkeypatch.setattr(plots, "_save", lambda figure, path, plot: drawn.append(figure))
    plots.draw_speed()
    *panels, card = drawn[0].axes
    for panel in panels:
        thick = {line.get_label() for line in panel.get_lines() if line.get_linewidth() > 2}
        assert thick == {line.get_label() for line in panel.get_lines() if "(ours)" in line.get_label()} != set()
        assert all(line.get_marker() != "None" for line in panel.get_lines())
    of_panels = [text.get_text() for panel in panels for text in panel.texts]
    assert of_panels == ["full attention, 64k:\npredicted 52.7 s,\nlimit 40 s, not run"]
    assert "H100" in card.get_title("left") and re.search(r"20\d\d-\d\d-\d\d", card.get_title("right"))
    assert len(card.patches) == 5 and card.get_xlim()[0] == 0
