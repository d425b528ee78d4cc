"""The tables of a study, made from its JSON alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smt.runtime.tables import markdown
from smt.study.cell import EQUAL_TIME, ORPO, TRAINING
from smt.study.figures import NAMES, Study, at, best, listed, over_seeds, scaled
from smt.study.measure import BATCH_SIZES, LONG

LOSS, CARRIED_LOSS = at("held_out", "loss"), at("carried", "loss")
KIB, MIB = 1024, 1024**2
CSV_COLUMNS = {
    "model": at("model"),
    "seed": at("seed"),
    "stage": at("stage"),
    "parameters": at("parameters"),
    "steps": at("steps"),
    "train_tokens": at("train_tokens"),
    "training_seconds": at("training_seconds"),
    "val_loss": LOSS,
    "perplexity": at("held_out", "perplexity"),
    "bits_per_byte": at("held_out", "bits_per_byte"),
    "val_loss_memory_carried": CARRIED_LOSS,
    "train_tokens_per_second": at("tokens_per_second"),
    **{f"decode_tokens_per_second_batch_{size}": at("decoding", str(size)) for size in BATCH_SIZES},
    "kept_bytes_measured": at("kept", "measured"),
    "kept_bytes_counted": at("kept", "counted"),
    f"kept_bytes_counted_at_{LONG}": at("kept", f"counted_at_{LONG}"),
    "peak_bytes": at("peak_bytes"),
    "reward_accuracy_before": at("preference", "before", "accuracy"),
    "reward_accuracy_after": at("preference", "after", "accuracy"),
    "log_odds_margin_before": at("preference", "before", "margin"),
    "log_odds_margin_after": at("preference", "after", "margin"),
}
# Where a model can win: in words, the stage, what is compared, whether less is better, and how it is shown.
CONTESTS: dict[str, tuple[str, Callable[..., Any], bool, Callable[[float], str]]] = {
    "loss after equal tokens": (TRAINING, LOSS, True, "{:.3f}".format),
    "loss after equal time": (EQUAL_TIME, LOSS, True, "{:.3f}".format),
    "loss after ORPO": (ORPO, LOSS, True, "{:.3f}".format),
    "training speed (tokens/s)": (TRAINING, at("tokens_per_second"), False, "{:,.0f}".format),
    **{
        f"decoding speed, batch {size} (tokens/s)": (TRAINING, at("decoding", str(size)), False, "{:,.0f}".format)
        for size in BATCH_SIZES
    },
    f"least kept at {LONG:,} tokens (KiB)": (TRAINING, scaled(KIB, "kept", f"counted_at_{LONG}"), True, "{:,.0f}".format),
    "peak memory in training (MiB)": (TRAINING, scaled(MIB, "peak_bytes"), True, "{:,.0f}".format),
}


def results_csv(study: Study) -> str:
    """Every run, unrounded."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for run in study["runs"]:
        writer.writerow([find(run) for find in CSV_COLUMNS.values()])
    return file.getvalue()


def quality_table(study: Study, stage: str = TRAINING) -> str:
    """What each model has learned after equal tokens, or after ``stage``, and how long it trained."""
    rows = []
    for model, of_model in study["models"].items():
        rows.append(
            [
                NAMES[model],
                *_layers(of_model["config"]),
                f"{of_model['parameters']:,}",
                f"{of_model['embedding'] / of_model['parameters']:.0%}",
                text_of(study, model, stage, at("steps"), "{:,.0f}".format),
                text_of(study, model, stage, at("training_seconds"), "{:,.0f}".format),
                text_of(study, model, stage, LOSS, "{:.3f}".format),
                text_of(study, model, stage, at("held_out", "perplexity"), "{:,.1f}".format),
                text_of(study, model, stage, at("held_out", "bits_per_byte"), "{:.3f}".format),
            ]
        )
    header = ["model", "layers", "MLP", "parameters", "embedding", "steps", "seconds"]
    return table([*header, "validation loss", "perplexity per token", "bits per byte"], rows)


def carried_table(study: Study) -> str:
    """Ours with its memory carried through whole documents, beside every piece read anew; empty where it is not there."""
    rows = []
    for model in study["models"]:
        for stage, name in ((TRAINING, "stage 1"), (ORPO, "stage 2")):
            if over_seeds(study, model, stage, CARRIED_LOSS) is not None:
                losses = [text_of(study, model, stage, find, "{:.3f}".format) for find in (LOSS, CARRIED_LOSS)]
                rows.append([NAMES[model], name, *losses])
    return table(["model", "after", "every piece anew", "memory carried through whole documents"], rows) if rows else ""


def rates_table(study: Study) -> str:
    """Held-out losses by learning rate, and which was chosen; empty where none were tried."""
    tried, rates = study["learning_rates"], study["settings"]["learning_rates"]
    rows = []
    for model, losses in tried.items():
        by_rate = [losses.get(f"{rate:g}") for rate in rates]
        shown = ["failed" if loss is None else f"{loss:.3f}" for loss in by_rate]
        rows.append([NAMES[model], *shown, min(losses, key=losses.__getitem__)])
    return table(["model", *(f"{rate:g}" for rate in rates), "chosen"], rows) if rows else ""


def speed_table(study: Study) -> str:
    """Speed and memory."""
    rows = []
    for model, of_model in study["models"].items():

        def shown(find: Callable[..., Any], show: Callable[[float], str], model: str = model) -> str:
            return text_of(study, model, TRAINING, find, show)

        rows.append(
            [
                NAMES[model],
                shown(at("tokens_per_second"), "{:,.0f}".format),
                *(shown(at("decoding", str(size)), "{:,.0f}".format) for size in BATCH_SIZES),
                shown(scaled(KIB, "kept", "measured"), "{:,.1f}".format),
                shown(scaled(KIB, "kept", "counted"), "{:,.1f}".format),
                f"{of_model[f'bytes_at_{LONG}'] / KIB:,.1f}",
                shown(scaled(MIB, "peak_bytes"), "{:,.0f}".format),
            ]
        )
    context = study["settings"]["context"]
    header = ["model", "training (tokens/s)", *(f"decoding, batch {size} (tokens/s)" for size in BATCH_SIZES)]
    header += [f"kept at {context} tokens, measured (KiB)", "counted (KiB)", f"counted at {LONG:,} (KiB)"]
    return table([*header, "peak memory in training (MiB)"], rows)


def orpo_table(study: Study) -> str:
    """What stage 2 changes: held-out loss, and how the model tells true continuations from its own."""
    rows = []
    for model in study["models"]:
        losses = [text_of(study, model, stage, LOSS, "{:.3f}".format) for stage in (TRAINING, ORPO)]
        of_pairs = [
            text_of(study, model, ORPO, at("preference", when, name), show)
            for name, show in (("accuracy", "{:.1%}".format), ("margin", "{:.3f}".format))
            for when in ("before", "after")
        ]
        rows.append([NAMES[model], *losses, *of_pairs])
    header = ["model", "loss before", "loss after", "reward accuracy before", "after", "log odds margin before", "after"]
    return table(header, rows)


def winners_table(study: Study) -> str:
    """Which model wins where."""
    rows, several = [], len(study["settings"]["seeds"]) > 1
    for name, (stage, find, lowest, show) in CONTESTS.items():
        found = best(study, stage, find, lowest=lowest)
        if found is not None:
            alike = "one seed" if found.alike is None else listed(found.alike) or "-"
            rows.append([name, NAMES[found.model], found.figure.text(show), *[alike] * several])
    return table(["", "best", "its figure", *["not significantly different"] * several], rows)


def winners(study: Study) -> list[str]:
    """Which model wins where, a line each."""
    lines = []
    for name, (stage, find, lowest, show) in CONTESTS.items():
        found = best(study, stage, find, lowest=lowest)
        if found is not None:
            others = f"; not significantly different: {listed(found.alike)}" if found.alike else ""
            lines.append(f"{name}: {NAMES[found.model]}, {found.figure.text(show)}{others}")
    return lines


def sharing_table(study: Study, which: str) -> str:
    """What sharing of keys and values saves, in the configuration of the ``documents`` or in the study's ``own``."""
    rows, found = [], study["sharing"][which]
    if not found:
        return ""
    for row in found:
        layers, owners = row["layers"], row["owners"]
        measured = "-" if row["measured"] is None else f"{row['measured'] / KIB:,.1f}"
        whole = found[0][f"counted_at_{LONG}"]
        rows.append(
            [
                row["kv_sharing"],
                f"{layers}/{owners} = {layers / owners:.2f}x",
                measured,
                f"{row['counted'] / KIB:,.1f}",
                f"{row[f'counted_at_{LONG}'] / KIB:,.1f}",
                f"{whole / row[f'counted_at_{LONG}']:.2f}x",
            ]
        )
    at_context = f"at {found[0]['tokens']} tokens"
    header = ["sharing", "layers / those that make keys and values", f"kept {at_context}, measured (KiB)", "counted (KiB)"]
    return table([*header, f"counted at {LONG:,} (KiB)", "less in bytes"], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns but the first are flush right."""
    return markdown([header, *rows], range(1, len(header)))


def _layers(config: Mapping[str, Any]) -> tuple[str, str]:
    """How many layers a model has, and the width of their MLPs."""
    if "ssm_n_layers" in config:  # ours, whose decoder is GPT-2's
        return f"{config['transformer_n_layers']} + {config['ssm_n_layers']} Mamba", f"{4 * config['d_model']:,}"
    return f"{config['n_layers']}", f"{config['d_mlp']:,}"


def text_of(study: Study, model: str, stage: str, find: Callable[..., Any], show: Callable[[float], str]) -> str:
    """A figure of a model after a stage, over the seeds, as ``show`` writes it; a dash where there is none."""
    figure = over_seeds(study, model, stage, find)
    return "-" if figure is None else figure.text(show)
