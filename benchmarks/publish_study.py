"""What a comparative study has found, for the page in docs: made from its ``study.json``, kept in ``benchmarks/results``.

smt study --config hymba_cpu && cp results/hymba_cpu/study.json benchmarks/results/hymba_cpu.json
python benchmarks/publish.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from committed import RESULTS, ROOT

from smt.study.plots import plot_results, plot_stages
from smt.study.report import report

PICTURES = ROOT / "docs" / "pictures"
STUDIES = ("hymba_cpu", "hymba")
# A study without results says how it is run.
COMMANDS = {"hymba_cpu_quick": "smt study --quick"}
DRAWN = {"results": plot_results, "stages": plot_stages}
CAPTIONS = {"results": "Loss, speed and memory of each model", "stages": "Stage 1, and what stage 2 changes"}


def section(name: str, *heading: str) -> str:
    """The report of a study below a heading of the page, and its pictures; or the part below one ``heading`` of it alone."""
    if not _file(name).is_file():
        return f"Not measured yet: `{COMMANDS.get(name, f'smt study --config {name}')}`."
    body = report(_study(name)).split("\n", 1)[1].strip()
    if heading:
        return re.search(rf"^## {' '.join(heading)}\n\n(.*?)(?=\n\n## |\Z)", body, flags=re.DOTALL | re.MULTILINE)[1]
    pictures = "\n\n".join(f"![{CAPTIONS[kind]}](pictures/{picture(name, kind).name})" for kind in DRAWN)
    return f"{re.sub('^## ', '### ', body, flags=re.MULTILINE)}\n\n{pictures}"


def draw_studies() -> None:
    """The pictures of every study that has results and is shown whole."""
    for name in STUDIES:
        if _file(name).is_file():
            for kind, draw in DRAWN.items():
                draw(_study(name), picture(name, kind))


def picture(name: str, kind: str) -> Path:
    """Where a picture of a study is kept."""
    return PICTURES / f"{name}_{kind}.png"


def _file(name: str) -> Path:
    return RESULTS / f"{name}.json"


def _study(name: str) -> dict[str, Any]:
    return json.loads(_file(name).read_text(encoding="utf-8"))
