"""How every command reads its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from smt.runtime.fields import nearest


class UsageError(ValueError):
    """A command line that cannot be read: an option that does not exist or lacks its value."""


class Parser(argparse.ArgumentParser):
    """Arguments of one command. What is wrong with them is raised, where argparse would print it and exit."""

    def __init__(self, program: str, about: str, examples: str) -> None:
        super().__init__(
            prog=program,
            description=about,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, arguments: Sequence[str], namespace: Any = None) -> argparse.Namespace:
        """Read ``arguments``.

        Raises:
            UsageError: what cannot be read, with the nearest option that exists.
        """
        options, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            raise UsageError(self._about(unknown[0]))
        return options

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong."""
        raise UsageError(f"{message}; see {self.prog} --help")

    def _about(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected argument {argument!r}; settings are given as --name value"
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        return f"there is no option {argument!r}; did you mean {nearest(argument.split('=')[0], known)!r}?"


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option ``--device``."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
