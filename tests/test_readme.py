"""Every Python snippet of the README runs as it stands, in order, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_the_readme_shows_python():
    assert len(SNIPPETS) >= 3


def test_every_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for number, snippet in enumerate(SNIPPETS, 1):
        exec(compile(snippet, f"README snippet {number}", "exec"), namespace)
