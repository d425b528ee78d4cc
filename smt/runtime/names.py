"""Names are data: a run, a study or a model may be called anything, and every place that shows a name shows just that."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Of a list in a message.
NAMES_SHOWN = 3


def shown(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def in_one_line(name: str) -> str:
    """For a table: what cannot be seen or breaks the line, such as a line break, is shown as U+FFFD."""
    return "".join(character if character.isprintable() else "\ufffd" for character in name)


def in_markdown(name: str) -> str:
    """For Markdown, whose marks are escaped; an underscore inside a word is none."""
    return re.sub(r"([\\`*|<>\[\]$~])", r"\\\1", in_one_line(name))


def in_plot(name: str) -> str:
    """For matplotlib, which reads mathematics between dollars and leaves out of a legend what begins with an underscore."""
    name = in_one_line(name).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name
