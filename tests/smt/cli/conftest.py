"""Texts of the size of a paragraph, and runs on them, made once."""

import pytest
from command_line import TINY

from smt.cli import main


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of four texts, of which one is held out."""
    folder = tmp_path_factory.mktemp("texts")
    for index in range(4):
        (folder / f"{index}.txt").write_text(" ".join(f"word{(index * j) % 11}" for j in range(60)))
    return folder


@pytest.fixture(scope="session")
def runs(texts, tmp_path_factory):
    """The folders of two runs, of the encodings stride and stream, and of one on tokens of its own."""
    out = tmp_path_factory.mktemp("runs")
    for experiment, options in {
        "stride": ["--encoding", "stride"],
        "stream": ["--encoding", "stream", "--steps", "2"],
        "other_tokens": ["--vocab_size", "261"],
    }.items():
        arguments = ["train", "--text", str(texts), "--out", str(out), "--experiment", experiment, *TINY, *options]
        assert main(arguments) == 0
    return {folder.name: next(folder.iterdir()) for folder in out.iterdir()}
