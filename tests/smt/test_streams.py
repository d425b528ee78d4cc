"""No command dies of what its standard streams are: of another encoding, closed, full, or left by their reader."""

import contextlib
import io
import os
import subprocess
import sys
import types

import pytest

from smt import cli
from smt.cli import main


class Stream(io.TextIOWrapper):
    """A text stream whose end can fail."""

    def __init__(self, encoding="utf-8", error=None):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)
        self.error = error

    def write(self, text):
        if self.error is not None:
            raise self.error
        return super().write(text)

    @property
    def written(self):
        return self.buffer.getvalue()


def command(name, action, monkeypatch):
    """``smt NAME`` does what ``action`` does."""
    module = types.SimpleNamespace(EXAMPLES="", add_options=lambda parser: None, run=lambda *arguments: action() or 0)
    monkeypatch.setattr(cli.importlib, "import_module", lambda path: module)
    return main([name])


@pytest.fixture
def streams(monkeypatch):
    def put(output, errors=None):
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "stderr", Stream() if errors is None else errors)
        return sys.stdout, sys.stderr

    return put


@pytest.mark.parametrize(
    ("encoding", "shown"), [("cp1252", b"na\xefve ?"), ("ascii", b"na?ve ?"), ("utf-8", "naïve 猫".encode())]
)
@pytest.mark.parametrize("name", ["generate", "train"])
def test_a_character_that_cannot_be_shown_is_a_question_mark(name, encoding, shown, streams, monkeypatch):
    output, errors = streams(Stream(encoding), Stream(encoding))

    def action():
        print("naïve 猫")
        print("naïve 猫", file=sys.stderr)

    assert command(name, action, monkeypatch) == 0
    assert output.written == shown + b"\n" and errors.written.startswith(b"na")
    assert output.errors == "strict" and sys.stdout is output, "they are as they were when the command has ended"


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")], ids=["gone", "full"]
)
def test_a_command_whose_results_are_in_files_goes_on_without_its_output(error, streams, monkeypatch):
    streams(Stream(error=error), Stream(error=error))
    done = []

    def action():
        for _ in range(3):
            print("working", flush=True)
            print("working", file=sys.stderr, flush=True)
        done.append(True)

    assert command("train", action, monkeypatch) == 0 and done


def test_a_command_that_only_writes_ends_with_its_reader(streams, monkeypatch):
    _, errors = streams(Stream(error=BrokenPipeError(32, "Broken pipe")))
    assert command("generate", lambda: print("text", flush=True), monkeypatch) == 1
    assert errors.written == b""


def test_a_command_that_only_writes_says_that_it_cannot(streams, monkeypatch):
    _, errors = streams(Stream(error=OSError(28, "No space left on device")))
    assert command("generate", lambda: print("text", flush=True), monkeypatch) == 1
    assert errors.written == b"smt: error: [Errno 28] No space left on device\n"


def test_an_error_is_no_worse_where_it_cannot_be_said(streams, monkeypatch):
    def action():
        raise ValueError("wrong")

    streams(Stream(), Stream(error=BrokenPipeError(32, "Broken pipe")))
    assert command("generate", action, monkeypatch) == 1


def test_closed_streams_are_nowhere(streams, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    def action():
        print("text", flush=True)
        print("text", file=sys.stderr, flush=True)
        assert sys.stdin.read() == "" and sys.stdout.encoding

    assert command("generate", action, monkeypatch) == 0
    assert (sys.stdin, sys.stdout, sys.stderr) == (None, None, None)


def test_what_is_said_never_lands_in_a_file_of_the_command(tmp_path):
    program = f"""
import sys
from smt.runtime.streams import standard_streams
with standard_streams(results_in_files=True):
    with open({str(tmp_path / "file")!r}, "w") as file:
        print("said", flush=True)
        print("said", file=sys.stderr, flush=True)
        import os
        os.write(1, b"written")
        os.write(2, b"written")
        file.write("kept")
"""
    closed = [0, 1, 2]
    done = subprocess.run(
        [sys.executable, "-c", program], close_fds=True, preexec_fn=lambda: [os.close(number) for number in closed], check=False
    )
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "kept"


def test_help_in_ascii_to_a_reader_that_has_gone():
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(
        [sys.executable, "-m", "smt", "--help"], stdout=write, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(write)
    assert done.returncode == 1 and done.stderr == b""


def test_a_stream_without_an_encoding_is_taken_as_it_is(monkeypatch):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert command("info", lambda: print("naïve"), monkeypatch) == 0
    assert output.getvalue() == "naïve\n"
