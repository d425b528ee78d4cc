"""README and docs: snippets run, commands parse, links resolve, and every figure is what its source makes."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from documents import ROOT, Page, arguments, pages

import smt.cli

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


def test_pictures_are_those_that_their_sources_draw(publish) -> None:
    sys.path.insert(0, str(ROOT / "docs" / "pictures"))
    try:
        draw = importlib.import_module("draw")
    finally:
        sys.path.pop(0)
    for name, picture in draw.PICTURES.items():
        assert (draw.FOLDER / f"{name}.svg").read_text(encoding="utf-8") == picture().svg(), f"draw {name}.svg again"
    plots = importlib.import_module("publish_plots")
    for path in (plots.SPEED, plots.MEMORY):
        assert plots.digest(path) in path.read_text(encoding="utf-8"), "run python benchmarks/publish.py"
