"""Results that are committed: measured rows in ``benchmarks/results``, what ablations left in ``benchmarks/studies``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smt.evaluation.statistics import Estimate

ROOT = Path(__file__).resolve().parents[1]
RESULTS, STUDIES = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "studies"

# Variants of the studies in words.
VARIANTS = {
    "stream": "memory (`stream`)",
    "stream_pools_tokens": 'memory, `pool_source="tokens"`',
    "stride": "memory, `stride`",
    "token": "memory, `token`",
    "open_gates": "memory, open gates",
    "no_readout": "memory without readout",
    **{f"group_{size}": f"memory, groups of {size}" for size in (1, 8, 16, 32, 64)},
    "pools_tokens": 'memory, `pool_source="tokens"`',
    "silent_slots": "silent slots",
    "no_writes": "*no writes*",
    "no_writes_3_layers": "no writes, three layers",
    "silent_slots_window_of_112": "silent slots, window of 112",
    "sliding_window_of_40": "sliding window of 40, three layers",
    "gpt2_context_of_512": "GPT-2, full attention to 512",
}


def read(name: str) -> dict[str, Any]:
    """A result file by its name, without suffix."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def found(rows: list[dict], task: str, case: str, length: int, batch: int = 1) -> dict[str, Any]:
    """The row of one case at one length, of the task that begins with ``task``.

    Raises:
        ValueError: there is not exactly one.
    """
    wanted = (case, length, batch)
    matching = [row for row in rows if row["task"].startswith(task) and (row["case"], row["length"], row["batch"]) == wanted]
    if len(matching) != 1:
        raise ValueError(f"results must hold {task!r}, {case!r} at {length:,} once, got {len(matching)} rows")
    return matching[0]


def study(name: str) -> dict[str, Any]:
    """What ``smt ablate`` left of a study, its ``ablation_results.json``."""
    return json.loads((STUDIES / f"{name}.json").read_text(encoding="utf-8"))


def runs(name: str) -> dict[tuple[str, ...], dict[str, Any]]:
    """The row of each run of a study, by the parts of its label: the budget where there are several, the seed, the variant."""
    return {tuple(row["run"].split(",")): row for row in study(name)["runs"]}


def over_seeds(name: str) -> dict[tuple[str, ...], dict[str, Estimate | None]]:
    """The ``loss`` of each variant of a study and its ``difference`` to the control, over seeds, by budget and variant."""
    return {
        tuple(found["name"].split(",")): {
            figure: None if found[figure] is None else Estimate(**found[figure]) for figure in ("loss", "difference")
        }
        for found in study(name)["over_seeds"]
    }
