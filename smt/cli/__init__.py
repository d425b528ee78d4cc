"""The command line: ``smt COMMAND ...``, a module of this package for each command, imported when it is called.

A command's module has EXAMPLES, ``add_options(parser)`` and ``run(options, started) -> exit code``. Errors are one line on
standard error, with a traceback only under ``--debug``.

Beside the commands: ``parser`` and ``run_fields`` (their options), and what two of them do: ``continuation`` (text continued,
for ``generate``) and ``conversion`` (pretrained weights into a checkpoint, for ``convert``).
"""

from __future__ import annotations

import importlib
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from typing import TextIO

from smt.cli.parser import Parser, UsageError
from smt.runtime.fields import nearest
from smt.runtime.process import (
    Interrupted,
    keep_freed_memory,
    no_bars_unless_watched,
    signals_as_interrupts,
    sleep_while_waiting,
    use_huge_pages,
)
from smt.runtime.streams import standard_streams

COMMANDS = {
    "train": "train a model on text, evaluate it on held-out documents, and leave the run in a folder",
    "eval": "measure a trained model: perplexity, loss by position, recall, and what its memory is worth",
    "generate": "continue a prompt, writing text as it is drawn, or many prompts in batches",
    "convert": "put a pretrained GPT-2, a Mamba or both into one model, and write it as a checkpoint",
    "plot": "draw the training curves of a run again, or those of several runs in one figure",
    "compare": "put finished runs into one table, sorted by perplexity, and one plot",
    "ablate": "train the variants of a configuration, then compare them in one table and one plot",
    "study": "train several models on the same text in two stages, and report which wins where",
    "info": "say what is installed here, and which backend runs each kernel operation and why",
}
# What these say can be lost, what they compute is in a folder.
RESULTS_IN_FILES = ("train", "eval", "ablate", "study", "convert", "plot")
EXAMPLES = """\
  smt train                                    the standard library's source, in less than 5 minutes on 2 cores
  smt train --text my_novels/ --minutes 30     your own text, for longer
  smt eval results/stdlib/20260101_120000      everything that smt eval measures, on the run's held-out documents
  smt generate --model FOLDER --prompt TEXT    continue a text
  smt compare results/stdlib/*                 every run of an experiment in one table
  smt ablate --grid stride=8,16,32             one run for each stride, and their table and plot"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        the exit code: 0; 1 after an error; 2 where the command line itself cannot be read, or is empty; 128 and the signal's
        number after Ctrl-C (130), SIGTERM (143) or SIGHUP (129).
    """
    started = time.perf_counter()
    sleep_while_waiting()
    use_huge_pages()
    keep_freed_memory()
    no_bars_unless_watched()
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or [""]
    with standard_streams(results_in_files=name in RESULTS_IN_FILES):
        return _reported(name, rest, started)


def _reported(name: str, rest: list[str], started: float) -> int:
    """Run a command; what goes wrong is said in a line."""
    try:
        with warnings.catch_warnings(), signals_as_interrupts():
            warnings.showwarning = _show_warning
            code = _run(name, rest, started)
        sys.stdout.flush()
        return code
    except Interrupted as interrupt:
        by = "" if interrupt.signal == signal.SIGINT else f" by {interrupt.signal.name}"
        print(f"smt: interrupted{by}" + (f"; {interrupt.advice}" if interrupt.advice else ""), file=sys.stderr)
        return 128 + interrupt.signal
    except KeyboardInterrupt:
        print("smt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        return 1
    except Exception as error:
        if "--debug" in rest:
            raise
        print(f"smt: error: {_message(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _run(name: str, arguments: list[str], started: float) -> int:
    if name in ("", "-h", "--help"):
        print(_help())
        return 0 if name else 2
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}; did you mean {nearest(name, COMMANDS)!r}? See smt --help")
    return importlib.import_module(f"smt.cli.{name}").run(parser_of(name).parse_args(arguments), started)


def parser_of(name: str) -> Parser:
    """What reads the arguments of a command."""
    command, about = importlib.import_module(f"smt.cli.{name}"), COMMANDS[name]
    parser = Parser(f"smt {name}", f"{about[0].upper()}{about[1:]}.", command.EXAMPLES)
    command.add_options(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _message(error: Exception) -> str:
    if str(error) and isinstance(error, (ValueError, TypeError, OSError, ImportError)):  # these say what is wrong by themselves
        return str(error)
    return f"{type(error).__name__}: {error}; --debug shows where"


def _help() -> str:
    commands = "\n".join(f"  {name:<10}{about}" for name, about in COMMANDS.items())
    return (
        "usage: smt COMMAND [options]\n\nTrain, evaluate and compare Stride Memory Transformers.\n\n"
        f"commands:\n{commands}\n\nsmt COMMAND --help shows the options of a command, with examples.\n\nexamples:\n{EXAMPLES}"
    )


def _show_warning(
    message: Warning | str, category: type, filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    print(f"smt: warning: {message}", file=sys.stderr)
