"""The tables and plots that README and docs show, made from results that are committed: no figure is typed there.

    python benchmarks/bench_window.py --full --sections attention --max-seconds 40 --json benchmarks/results/attention_cpu.json
    python benchmarks/publish.py

A page holds a table between ``<!-- made by benchmarks/publish.py: NAME -->`` and ``<!-- end -->``; NAME is one of ``TABLES``.
Measured figures come from ``benchmarks/results``, those of studies from ``benchmarks/studies``, claims are counted anew, and
budgets of kernels are those of ``kernel_budgets.yaml``. ``tests/test_documents.py`` fails where a page is behind its source.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import claims
import publish_card
import publish_study
import yaml
from committed import ROOT, VARIANTS, found, over_seeds, read, runs, study
from names import CACHE, FLEX, FULL, GPT2, MAMBA, POOLS_TOKENS, STATIC_CACHE, STREAM, STREAM_ATTENTION, STRIDE, TOKEN

from smt.evaluation.statistics import Estimate, mean_difference
from smt.experiments.settings import BOUNDS, STUDY_FOLDER
from smt.training.settings import RunConfig

BLOCK = re.compile(r"(<!-- made by benchmarks/publish\.py: ([\w ]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def speed_table() -> str:
    """What is true today, one line each: the table of the README."""
    attention, training, decoding = (read(name)["rows"] for name in ("attention_cpu", "training_cpu", "decoding_cpu"))
    lines = [*_header("two CPU cores, fp32", "against", "short", "longer", "longest")]

    def add(what: str, against: str, rows: list[dict], task: str, case: str, lengths: tuple[int, ...]) -> None:
        cells = [f"{_times(found(rows, task, case, length)['ratio'])} at {length:,}" for length in lengths]
        lines.append(_line(what, against, *cells))

    for what, task in (("attention, forward", "Forward:"), ("forward and backward", "Forward and backward")):
        add(what, "full causal attention", attention, task, STREAM_ATTENTION, (1024, 4096, 16384))
    pairs = [[found(attention, "Forward:", of, length) for of in (FLEX, STREAM_ATTENTION)] for length in (1024, 4096, 16384)]
    cells = [f"{_times(_ratio(*pair))} at {pair[0]['length']:,}" for pair in pairs]
    lines.insert(-1, _line("attention, forward", "FlexAttention, the same mask", *cells))
    for name, case in (("`stream`", STREAM), ("`stride`", STRIDE)):
        add(f"training step, {name}", "GPT-2", training, "Training", case, (512, 2048, 8192))
    contexts = (1024, 4096, 65536)
    for name, case in (("KV cache", CACHE), ("static KV cache", STATIC_CACHE)):
        pairs = [[found(decoding, "Decoding", of, context) for of in (case, STREAM)] for context in contexts]
        cells = [f"{_times(_ratio(*pair))} at {context:,}" for pair, context in zip(pairs, contexts, strict=True)]
        lines.append(_line("decoding a token, `stream`", f"GPT-2, {name}", *cells))
    carried = [f"{_mib(ours)}, not {_mib(theirs)}" for theirs, ours in pairs]
    lines.append(_line("state, in place of a KV cache", "GPT-2, KV cache", *carried))
    cells, losses = over_seeds("memory"), _losses_by_seed("groups")
    tokens, time, layer = (
        _difference(cells[cell]["difference"])
        for cell in (("equal_tokens", "stream"), ("equal_time", "stream"), ("equal_tokens", "no_writes_3_layers"))
    )
    memory = mean_difference(losses["group_8"], losses["no_writes"])
    n_seeds = cells["equal_tokens", "stream"]["loss"].n_samples
    of_seeds = (f"equal_time,seed_{seed},stream" for seed in range(1, n_seeds + 1))
    of_documents = [study("memory")["differences"][run]["standard_error"] for run in of_seeds]
    return "\n".join(
        [
            *lines,
            "",
            "Loss with memory minus loss without, on source code, in nats per token (below 0 is better): "
            f"**{_difference(memory)}** with the default's window ({memory.n_samples} seeds); with 8 slots and 32 tokens "
            f"**{tokens}** after equal tokens (a third layer in the decoder alone: {layer}), **{time}** after equal time "
            f"({n_seeds} seeds; over a seed's documents ± {min(of_documents):.3f} to {max(of_documents):.3f}). "
            "±: one standard error over seeds.",
        ]
    )


def attention_table() -> str:
    """Attention alone."""
    rows = read("attention_cpu")["rows"]
    columns = ("length", "SDPA forward", "FlexAttention, the same mask", "`stream_attention`", "ratio to each")
    lines = [*_header(*columns, "SDPA forward + backward", "`stream_attention`", "ratio", "limit")]
    for length in sorted({row["length"] for row in rows}):
        cells = [f"{length:,}"]
        for task in ("Forward:", "Forward and backward"):
            full, flex, ours = (found(rows, task, case, length) for case in (FULL, FLEX, STREAM_ATTENTION))
            ratios = _times(ours.get("ratio")), _times(_ratio(flex, ours))
            if task == "Forward:":
                cells += [_seconds(full), _seconds(flex), _seconds(ours), ", ".join(ratio for ratio in ratios if ratio)]
            else:
                cells += [_seconds(full), _seconds(ours), ratios[0]]
        lines.append(_line(*cells, _times(found(rows, "Forward:", STREAM_ATTENTION, length)["flop_limit"])))
    return "\n".join([*lines, "", _measured_on("attention_cpu")])


def training_table() -> str:
    """Training steps."""
    rows = read("training_cpu")["rows"]
    cases = {STRIDE: "`stride`", STREAM: "`stream`", POOLS_TOKENS: '`stream`, `pool_source="tokens"`'}
    lines = [*_header("length", "GPT-2", *cases.values())]
    for length in sorted({row["length"] for row in rows}):
        ours = [found(rows, "Training", case, length) for case in cases]
        cells = [_seconds(row) + _in_brackets(row.get("ratio")) for row in ours]
        lines.append(_line(f"{length:,}", _seconds(found(rows, "Training", GPT2, length)), *cells))
    return "\n".join([*lines, "", _measured_on("training_cpu")])


def decoding_table() -> str:
    """Decoding."""
    rows = [row for row in read("decoding_cpu")["rows"] if row["task"].startswith("Decoding")]
    names = ("context", "batch", "GPT-2, default cache", "GPT-2, static cache", "Mamba", "`stream`", "`stride`", "`token`")
    lines = [*_header(*names, "KV cache of GPT-2", "state of `stream`")]
    for length, batch in sorted({(row["length"], row["batch"]) for row in rows}, key=lambda pair: pair[::-1]):
        of = {row["case"]: row for row in rows if (row["length"], row["batch"]) == (length, batch)}
        times = [_per_token(of[case]) for case in (CACHE, STATIC_CACHE, MAMBA, STREAM, STRIDE, TOKEN)]
        times[3] += _in_brackets(*(_ratio(of[case], of[STREAM]) for case in (CACHE, STATIC_CACHE)))
        lines.append(_line(f"{length:,}", str(batch), *times, _mib(of[CACHE]), _mib(of[STREAM])))
    return "\n".join([*lines, "", _measured_on("decoding_cpu")])


def stdlib_sentence() -> str:
    """The default run."""
    results = read("stdlib")["results"]
    minutes, seconds = divmod(round(results["seconds"]), 60)
    return (
        f"`smt train` ends at **{results['val_bits_per_byte']:.2f} bits per byte** on held-out packages after "
        f"{results['steps']:,} steps, {minutes} min {seconds} s in all, at {results['tokens_per_second']:,.0f} tokens/s "
        f"({_measured_on('stdlib')[:-1]}); faster machines take more steps."
    )


def study_table(name: str) -> str:
    """A study with budgets: a line for each variant, and for each budget its loss and what it loses to no writes."""
    means, of_runs, settings = over_seeds(name), runs(name), _settings(name)
    budgets, variants = settings["budgets"], settings["variants"]
    usual = RunConfig.from_yaml(settings["base"]).training.learning_rate
    rates = {variant: fields.get("learning_rate", usual) for variant, fields in variants.items()}
    own_rates = len({*rates.values()}) > 1
    columns = ["", "parameters", *["learning rate"] * own_rates]
    for bounds in budgets.values():
        shown = " ".join(f"{value:,} {unit}" for unit, value in bounds.items() if unit in BOUNDS)
        columns += [shown, "to *no writes*", *["steps then"] * ("minutes" in bounds)]
    lines = [*_header(*columns)]
    for variant, title in VARIANTS.items():
        if variant not in variants:
            continue
        cells = [*[f"{rates[variant]:g}"] * own_rates]
        for budget, bounds in budgets.items():
            figures = means[budget, variant]
            rows = [row for label, row in of_runs.items() if (label[0], label[-1]) == (budget, variant)]
            cells += [f"{figures['loss'].mean:.3f}", _difference(figures["difference"])]
            cells += [f"{statistics.fmean(row['steps'] for row in rows):,.0f}"] * ("minutes" in bounds)
        lines.append(_line(title, f"{rows[0]['parameters']:,}", *cells))
    return "\n".join(lines)


def rates_table(name: str) -> str:
    """A study whose budgets are learning rates and which has one seed: the loss of each variant at each; not all were run."""
    losses = {(label[0], label[-1]): row["best_loss"] for label, row in runs(name).items()}
    budgets = _settings(name)["budgets"]
    lines = [*_header("", *(f"{bounds['learning_rate']:g}" for bounds in budgets.values()))]
    for variant, title in VARIANTS.items():
        of_rates = [losses.get((budget, variant)) for budget in budgets]
        if any(of_rates):
            lines.append(_line(title, *("-" if loss is None else f"{loss:.3f}" for loss in of_rates)))
    return "\n".join(lines)


def seeds_table(name: str) -> str:
    """A study with seeds alone: the loss of each variant with each seed, and what it loses to two others of the same seed."""
    losses, seeds = _losses_by_seed(name), _settings(name)["seeds"]
    controls = {"group_8": "groups of 8", "no_writes": "*no writes*"}
    lines = [*_header("", *(f"seed {seed}" for seed in seeds), "mean", *(f"to {title}" for title in controls.values()))]
    for variant, of_seeds in losses.items():
        more = []
        for control in controls:
            more_than = mean_difference(of_seeds, losses[control])
            more.append("-" if variant == control else f"{more_than.mean:+.4f} ± {more_than.standard_error:.4f}")
        lines.append(_line(VARIANTS[variant], *(f"{loss:.3f}" for loss in (*of_seeds, statistics.fmean(of_seeds))), *more))
    return "\n".join(lines)


def _settings(name: str) -> dict[str, Any]:
    """The file of a packaged study."""
    return yaml.safe_load((STUDY_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def _losses_by_seed(name: str) -> dict[str, list[float]]:
    """The losses of every variant that a study without budgets has with all seeds."""
    of_runs, seeds = runs(name), _settings(name)["seeds"]
    return {
        variant: [of_runs[f"seed_{seed}", variant]["best_loss"] for seed in seeds]
        for variant in VARIANTS
        if all((f"seed_{seed}", variant) in of_runs for seed in seeds)
    }


def recall_table() -> str:
    """When trainings of the recall task had learned it, by encoding and seed."""
    rows = read("recall_cpu")["rows"]
    seeds = sorted({row["seed"] for row in rows})
    steps = {(row["encoding"], row["seed"]): row["steps"] if row["learned"] else "never" for row in rows}
    encodings = sorted({row["encoding"] for row in rows})
    lines = [_line(f"`{name}`", *(str(steps[name, seed]) for seed in seeds)) for name in encodings]
    return "\n".join([*_header("seed", *map(str, seeds)), *lines, "", _measured_on("recall_cpu")])


def budgets_table(operation: str) -> str:
    """What the calls of an operation may take, and where they may take more."""
    budgets = yaml.safe_load((ROOT / "benchmarks" / "kernel_budgets.yaml").read_text(encoding="utf-8"))
    lines = [*_header("call", "launches", "bytes over the least", "FLOPs over the useful")]
    for call, figures in budgets["calls"].items():
        if call.split()[0] == operation:
            lines.append(_line(call, *(_budget(figures.get(name)) for name in ("launches", "bytes", "flops"))))
    notes = []
    for entry in budgets["exceeded"]:
        if entry["call"].split()[0] == operation:
            where = f" at size {', '.join(map(str, entry['sizes']))}" if "sizes" in entry else ""
            where += f" on {', '.join(entry['targets'])}" if "targets" in entry else ""
            notes.append(f"- {entry['call']}{where}: {entry['figure']} {entry['keeps']}: {entry['because']}.")
    return "\n".join([*lines, *(["", "What exceeds them today:", "", *notes] if notes else [])])


TABLES: dict[str, Callable[..., str]] = {
    "speed": speed_table,
    "card_speed": publish_card.speed_table,
    "card": publish_card.report,
    "attention": attention_table,
    "training": training_table,
    "decoding": decoding_table,
    "stdlib": stdlib_sentence,
    "study": study_table,
    "rates": rates_table,
    "seeds": seeds_table,
    "recall": recall_table,
    "comparison": publish_study.section,
    "budgets": budgets_table,
    "claims": claims.as_markdown,
}


def pages() -> list[Path]:
    """README and docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """A page with its tables made anew."""

    def fill(match: re.Match) -> str:
        name, *arguments = match[2].split()
        return f"{match[1]}\n{TABLES[name](*arguments)}\n\n{match[3]}"

    return BLOCK.sub(fill, text)


def main(arguments: list[str] | None = None) -> int:
    """Fill the pages and draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--no-plots", action="store_true", help="tables alone")
    options = parser.parse_args(arguments)
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            page.write_text(filled(text), encoding="utf-8")
            print(page.relative_to(ROOT))
    if not options.no_plots:
        from publish_plots import draw_memory, draw_memory_by_position, draw_speed

        draw_speed()
        draw_memory()
        draw_memory_by_position()
        publish_study.draw_studies()
    return 0


def _measured_on(name: str) -> str:
    described = read(name)["environment"]
    threads = f"{described['threads']} thread{'s' * (described['threads'] != 1)}"
    return f"{described['processor']}, {threads}, PyTorch {described['torch']}, {described['date']}."


def _difference(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.mean:+.3f} ± {estimate.standard_error:.3f}"


def _seconds(row: dict[str, Any]) -> str:
    if row.get("not_measured"):
        return "not run"
    seconds = row["seconds"]
    shown = f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
    calls = row.get("repeats") or 0
    return shown + {1: " (one call)", 2: " (two calls)"}.get(calls, "")


def _per_token(row: dict[str, Any]) -> str:
    seconds = row.get("seconds_per_token")
    return "not run" if seconds is None else f"{1e3 * seconds:.3g} ms"


def _ratio(theirs: dict[str, Any], ours: dict[str, Any]) -> float | None:
    seconds = theirs.get("seconds"), ours.get("seconds")
    return None if None in seconds else seconds[0] / seconds[1]


def _in_brackets(*ratios: float | None) -> str:
    known = [_times(ratio) for ratio in ratios if ratio is not None]
    return f" ({', '.join(known)})" if known else ""


def _mib(row: dict[str, Any]) -> str:
    if row.get("state_bytes") is None:
        return "not made"
    mib = row["state_bytes"] / 2**20
    return f"{mib:.2g} MiB" if mib < 10 else f"{mib:,.0f} MiB"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:,.{0 if ratio >= 10 else 2}f}x"


def _budget(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _header(*names: str) -> tuple[str, str]:
    return _line(*names), "|" + "---|" * len(names)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
