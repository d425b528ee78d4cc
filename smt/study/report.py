"""The files that a study leaves, all made from its JSON: the report of one page, and the details behind it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from smt.runtime.files import text_writer, write_files
from smt.runtime.pictures import draw_all
from smt.study import plots
from smt.study.cell import EQUAL_TIME, ORPO, TRAINING
from smt.study.expected import expected_table
from smt.study.figures import NAMES, STAGE_NAMES, Study
from smt.study.paired_test import SIGNIFICANCE
from smt.study.settings import CARRIED
from smt.study.tables import (
    carried_table,
    orpo_table,
    quality_table,
    rates_table,
    results_csv,
    sharing_table,
    speed_table,
    winners,
    winners_table,
)

REPORT_FILE = "report.md"


def save_report(study: Study, folder: Path) -> list[Path]:
    """Write every file but ``study.json``; the paths of what could be written."""
    texts = {
        "ablation_results.csv": results_csv(study),
        "generation_samples.txt": samples(study),
        "detailed_metrics.txt": details(study),
        REPORT_FILE: report(study),
    }
    write_files({folder / name: text_writer(text) for name, text in texts.items()})
    drawn = {
        "ablation_results.png": partial(plots.plot_results, study),
        "training_stages_comparison.png": partial(plots.plot_stages, study),
        "report.png": partial(plots.plot_report, study, conditions(study), winners(study)),
    }
    return [*(folder / name for name in texts), *draw_all(folder, drawn)]


def conditions(study: Study) -> list[str]:
    """What must be known to read the tables, one sentence each."""
    settings, text, where = study["settings"], study["text"], study["environment"]
    first, second = study["stages"][TRAINING], study["stages"][ORPO]
    length, held_out, seeds = first["chunk_length"], text["held_out"], settings["seeds"]
    spread = (
        "; ± is the sample standard deviation over them. Two models are significantly different where a paired t-test over "
        f"them gives p < {SIGNIFICANCE}, not corrected for the number of models."
    )
    lines = [
        _named(seeds) + (spread if len(seeds) > 1 else " alone: no spread."),
        f"{text['source']}: {text['training']['tokens']:,} tokens of {_documents(text['training'])} to train on, "
        f"{held_out['tokens']:,} of {_documents(held_out)} held out whole. The vocabulary of {text['vocabulary']:,} tokens was "
        "learned from the former.",
        f"Stage 1: {first['steps']:,} steps of {first['batch_size']} x {length} tokens, the same in the same order for every "
        f"model, at {_rate(study, first['learning_rate'])}.",
        f"Every {length} tokens are read as if nothing came before, in training and in evaluation, by all models alike.",
    ]
    if CARRIED in settings["models"]:
        part = settings["carried"].get("part_length")
        whole = f"parts of {part:,} tokens" if part else "whole documents"
        lines.append(
            f"{NAMES[CARRIED]}, is trained otherwise: on as many tokens in another order, {length} after {length} of {whole}, "
            "through which it carries its memory."
        )
    if second is not None:
        lines.append(
            f"Stage 2: ORPO, {second['steps']:,} steps of {second['batch_size']} pairs at {second['learning_rate']:g}. A pair "
            f"is the true continuation of {settings['prompt_length']} tokens of a training document and the model's own, of "
            f"{settings['completion_length']} tokens each; reward accuracy and margin are of pairs of held-out documents."
        )
    lines.append(
        f"{where['date']}, {where['processor']}, {where['cores']} cores, device {where['device']}, PyTorch {where['torch']}, "
        f"Python {where['python']}, revision {where['revision']}. Decoding is timed over "
        f"{settings['decode_tokens']} tokens behind {settings['context']}, and peak memory is that of "
        + ("tensors on the GPU." if where["device"] != "cpu" else "the process, Python and libraries included.")
    )
    return lines


def _named(seeds: Sequence[int]) -> str:
    return f"Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _rate(study: Study, of_all: float) -> str:
    settings = study["settings"]
    if not study["learning_rates"]:
        return f"a learning rate of {of_all:g} for all"
    rates = ", ".join(f"{rate:g}" for rate in settings["learning_rates"])
    seeds = _named(settings["learning_rate_seeds"]).lower()
    return f"the learning rate of {rates} that gave it the lowest mean held-out loss with {seeds}"


def _documents(of: dict[str, int]) -> str:
    return f"{of['documents']} document" + "s" * (of["documents"] != 1)


def report(study: Study) -> str:
    """The page, as Markdown."""
    parts = [
        "# Hymba and its relatives, and SMT",
        f"```\n{study['command']}\n```",
        "\n".join(f"- {line}" for line in conditions(study)),
        "## Which model wins where",
        winners_table(study),
        "## Equal tokens",
        quality_table(study),
    ]
    if carried := carried_table(study):
        parts += [
            "SMT alone is also evaluated with its memory carried:",
            carried,
        ]
    if timed := sorted({run["seed"] for run in study["runs"] if run["stage"] == EQUAL_TIME}):
        parts += [
            "## Equal time",
            f"{_named(timed)}: trained anew, for as many steps as should take the time of the middle one of all models, "
            "each with its whole schedule.",
            quality_table(study, EQUAL_TIME),
        ]
    if rates := rates_table(study):
        seeds = _named(study["settings"]["learning_rate_seeds"]).lower()
        parts += [
            "## Learning rates",
            f"Mean held-out loss after stage 1 with {seeds}, read as the model is trained:",
            rates,
        ]
    parts += [
        "## Stage 2: ORPO",
        orpo_table(study),
        "## Speed and memory",
        speed_table(study),
        "## Sharing of keys and values",
        "In the configuration of the documents, 15 layers with attention in each; global layers share with none:",
        sharing_table(study, "documents"),
    ]
    if own := sharing_table(study, "own"):
        parts += ["In this study, layout `parallel`, as a running model keeps them:", own]
    parts += ["## What the documents expect", expected_table(study)]
    if study["failures"]:
        parts += ["## What failed", "\n".join(f"- {label}: {error}" for label, error in study["failures"].items())]
    return "\n\n".join(parts) + "\n"


def samples(study: Study) -> str:
    """How each model goes on, after each stage."""
    lines = []
    for run in study["runs"]:
        if "sample" in run:
            lines += [
                f"=== {NAMES[run['model']]}, seed {run['seed']}, {STAGE_NAMES[run['stage']]} ===",
                f"{run['sample']['prompt']}>>>{run['sample']['continuation']}",
                "",
            ]
    return "\n".join(lines)


def details(study: Study) -> str:
    """Everything that was measured, run by run, but for curves and samples."""
    lines = [study["command"], *conditions(study), ""]
    for name, model in study["models"].items():
        lines += [f"{name}: {json.dumps(model)}"]
    for run in study["runs"]:
        lines += ["", f"=== {NAMES[run['model']]}, seed {run['seed']}, {STAGE_NAMES[run['stage']]} ==="]
        told = {name: value for name, value in run.items() if name not in ("model", "seed", "stage", "curve", "sample")}
        for name, value in told.items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            lines += [f"{f'{name} {key}'.strip():<32}{_plain(item)}" for key, item in inner]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
