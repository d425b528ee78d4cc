"""Reading README and docs: their pages, snippets, commands, headings and links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:smt|smt_kernels|benchmarks|tests|docs)/[\w/.]+\.(?:py|yaml|json|md))`")


@dataclass(frozen=True)
class Page:
    """A Markdown file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        """All of it."""
        return self.path.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """What stands outside of fences."""
        return _FENCE.sub("", self.text)

    @property
    def snippets(self) -> list[str]:
        """The Python, in order."""
        return [body for language, body in _FENCE.findall(self.text) if language == "python"]

    @property
    def commands(self) -> list[str]:
        """What a reader is told to type, one command each, without comments."""
        blocks = [body.replace("\\\n", " ") for language, body in _FENCE.findall(self.text) if language == ""]
        lines = [line for block in blocks for line in block.splitlines() if line and _is_command(line)]
        lines += [code for code in re.findall(r"`([^`\n]+)`", self.prose) if _is_command(code) and "..." not in code]
        return [part for line in lines for part in re.split(r" && ", re.split(r"\s+#", line)[0].strip())]

    @property
    def links(self) -> list[str]:
        """Where it points, within the project."""
        return [target for target in _LINK.findall(self.prose) if not re.match(r"[a-z]+:", target)]

    @property
    def paths(self) -> list[str]:
        """Files of the project that it names."""
        return _PATH.findall(self.prose)

    @property
    def anchors(self) -> set[str]:
        """What can be linked to: headings, as GitHub and MkDocs name them, and objects of the API."""
        headings = re.findall(r"^#+ (.+)$", self.prose, flags=re.MULTILINE)
        objects = re.findall(r"^::: (\S+)$", self.prose, flags=re.MULTILINE)
        return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings} | {*objects}


def pages() -> list[Page]:
    """README and docs."""
    return [Page(ROOT / "README.md"), *map(Page, sorted((ROOT / "docs").rglob("*.md")))]


def arguments(command: str) -> list[str]:
    """The words of a command."""
    return shlex.split(command)


def _is_command(line: str) -> bool:
    return line.split()[0] in ("smt", "python", "pip", "pytest", "ruff", "mkdocs", "torchrun", "accelerate") and " " in line
