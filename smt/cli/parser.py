"""How every command reads its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from smt.runtime.fields import expand_home, nearest

# Begins the ``dest`` of an option that is a field of a run: see ``smt.cli.run_fields``.
FIELD = "field_"


class UsageError(ValueError):
    """A command line that cannot be read: an option that does not exist or lacks its value."""


class Parser(argparse.ArgumentParser):
    """Arguments of one command. What is wrong with them is raised, where argparse would print it and exit.

    An option is declared, and shown, with underscores, as fields are in files; with hyphens it is the same option. One that is
    declared without a type takes a ``name``.
    """

    def __init__(self, program: str, about: str, examples: str) -> None:
        super().__init__(
            prog=program,
            description=about,
            epilog=f"examples:\n{examples}",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        self.register("type", None, name)

    def parse_args(self, arguments: Sequence[str], namespace: Any = None) -> argparse.Namespace:
        """Read ``arguments``.

        Raises:
            UsageError: what cannot be read, with the nearest option that exists.
        """
        options, unknown = self.parse_known_args([*self._as_declared(arguments)], namespace)
        if unknown:
            raise UsageError(self._about(unknown[0]))
        return options

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong."""
        raise UsageError(f"{message}; see {self.prog} --help")

    @property
    def _names(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def _as_declared(self, arguments: Sequence[str]) -> Iterator[str]:
        """The arguments, with every option that exists in the spelling that argparse knows."""
        declared = {name.replace("_", "-"): name for name in self._names}
        for argument in arguments:
            option, equals, value = argument.partition("=")
            yield declared.get(option.replace("_", "-"), option) + equals + value

    def _about(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected argument {argument!r}; settings are given as --name value"
        return f"there is no option {argument!r}; did you mean {nearest(argument.split('=')[0], self._names)!r}?"


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help that lists the fields of a run once, in their groups, and not in its first lines, too."""

    def add_usage(self, usage: str | None, actions: Iterable[argparse.Action], *others: Any, **options: Any) -> None:
        super().add_usage(usage, [action for action in actions if not action.dest.startswith(FIELD)], *others, **options)


def name(argument: str) -> str:
    """The name of a thing or the path of a file, with ``~`` expanded where the shell has not done it."""
    if not argument:
        raise argparse.ArgumentTypeError("must not be empty")
    return expand_home(argument)


def text(argument: str) -> str:
    """Text, which may be empty, exactly as it came."""
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:  # halves of surrogate pairs stand for bytes that are not UTF-8
        raise argparse.ArgumentTypeError("must be UTF-8 text") from None
    return argument


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option ``--device``."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
