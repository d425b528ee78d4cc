"""Where nobody watches, progress is a few lines; on a terminal it is a bar."""

import io
import re

import pytest

from smt.runtime import process
from smt.runtime.progress_bar import Bar, Lines, progress_bar

LINE = re.compile(r" *\d+%, step \d+, loss \d\.\d{3}, 5,120 tokens/s, \d:\d\d:\d\d passed, \d:\d\d:\d\d remaining")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(n_updates, seconds, *, done=0.0):
    """The lines of a simulated run of so many updates."""
    now, stream = 0.0, io.StringIO()
    lines = Lines(stream, done, now=lambda: now)
    for step in range(1, n_updates + 1):
        now = seconds * step / n_updates
        lines.update(done + (1 - done) * step / n_updates, f"step {step}, loss {9 - step / n_updates:.3f}, 5,120 tokens/s")
    lines.close()
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(
    ("n_updates", "seconds", "most"), [(2000, 60, 7), (7, 60, 7), (3, 1, 1), (1, 300, 1), (24000, 240, 25)]
)
def test_lines_are_ten_seconds_apart_each_says_how_far_it_is_and_the_last_where_it_ended(n_updates, seconds, most):
    lines = shown(n_updates, seconds)
    assert 1 <= len(lines) <= most
    assert all(LINE.fullmatch(line) for line in lines)
    assert lines[-1].startswith(f"100%, step {n_updates}, loss 8.000") and lines[-1].endswith(" 0:00:00 remaining")


def test_a_line_tells_the_time_that_passed_and_that_remains():
    assert shown(100, 100)[2] == " 30%, step 30, loss 8.700, 5,120 tokens/s, 0:00:30 passed, 0:01:10 remaining"


def test_what_was_done_before_does_not_count_as_fast():
    assert shown(100, 100, done=0.5)[2] == " 65%, step 30, loss 8.700, 5,120 tokens/s, 0:00:30 passed, 0:01:10 remaining"


def test_an_end_that_was_told_is_not_told_twice():
    assert [line.split(",")[0] for line in shown(4, 40)] == [" 25%", " 50%", " 75%", "100%"]


def test_without_an_update_nothing_is_said():
    assert shown(0, 60) == []


def test_a_terminal_has_a_bar_and_a_file_has_none(capsys):
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        bar = progress_bar(stream)
        bar.update(0.5, "step 3")
        bar.write("held-out loss 2.0")
        bar.close()
    assert " 50%|" in terminal.getvalue() and "step 3" in terminal.getvalue() and "\r" in terminal.getvalue()
    assert re.fullmatch(r" 50%, step 3, 0:00:00 passed, 0:00:00 remaining\n", file.getvalue())
    assert capsys.readouterr().out.count("held-out loss 2.0\n") == 2


class Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("stream", [None, io.StringIO(), Gone()], ids=["none", "closed", "gone"])
def test_where_there_is_no_output_nothing_is_shown_and_nothing_fails(stream):
    if type(stream) is io.StringIO:
        stream.close()
    bar = progress_bar(stream)
    bar.update(1.0, "step 1")
    bar.close()
    assert not isinstance(bar, Bar)


@pytest.mark.parametrize(("stream", "expected"), [(Terminal(), None), (io.StringIO(), "1")], ids=["terminal", "file"])
def test_bars_of_libraries_are_for_terminals_too(stream, expected, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream)
    for name in process.BARS:
        monkeypatch.delenv(name, raising=False)
    process.no_bars_unless_watched()
    assert [process.os.environ.get(name) for name in process.BARS] == [expected] * 2
    for name in process.BARS:
        monkeypatch.setenv(name, "0")
    process.no_bars_unless_watched()
    assert [process.os.environ[name] for name in process.BARS] == ["0"] * 2, "what the user says is left as it is"
