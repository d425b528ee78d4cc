"""What the documents that this study comes from expect, beside what was measured."""

from __future__ import annotations

import math

from smt.study.cell import ORPO, TRAINING
from smt.study.figures import Study, at, over_seeds
from smt.study.tables import table

# Their table is marked "expected": nothing in it was measured.
PERPLEXITIES = (5, 15)
# Their sizes, as in ``configs/hymba.yaml``: steps, rows and their tokens; and parameters.
TOKENS, PARAMETERS = 4000 * 16 * 256, 51e6
# Nats per character that models of this size reach on such text, and what each token of its vocabulary spells.
NATS_PER_CHARACTER = 1.47


def expected_table(study: Study) -> str:
    """The documents' figures and ours."""
    found = [
        figure.mean
        for stage in (TRAINING, ORPO)
        for model in study["models"]
        if (figure := over_seeds(study, model, stage, at("held_out", "perplexity"))) is not None
    ]
    held_out = study["text"]["held_out"]
    per_token = held_out["bytes"] / held_out["tokens"]
    measured = f"{min(found):,.0f} to {max(found):,.0f}" if found else "-"
    owners = {row["kv_sharing"]: (row["layers"], row["owners"]) for row in study["sharing"]["documents"]}
    (layers, pairs), (_, runs) = owners["pairs"], owners["runs"]
    trained = study["stages"][TRAINING]
    tokens = trained["steps"] * trained["batch_size"] * trained["chunk_length"]
    parameters = max(model["parameters"] for model in study["models"].values())
    rows = [
        ["tokens to train on", f"{TOKENS / 1e6:.1f} million", f"{tokens / 1e6:.2g} million"],
        ["parameters", f"{PARAMETERS / 1e6:.0f} million", f"{parameters / 1e6:.2g} million"],
        ["perplexity per token", f"{PERPLEXITIES[0]} to {PERPLEXITIES[1]}", measured],
        [
            f"the same at {NATS_PER_CHARACTER} nats per character, {per_token:.2f} bytes per token",
            "-",
            f"{math.exp(NATS_PER_CHARACTER * per_token):,.0f}",
        ],
        ["fewer layers with keys and values, local ones in pairs", "1.67x", f"{layers}/{pairs} = {layers / pairs:.2f}x"],
        [
            "the same, if all layers went in pairs, global ones too",
            "1.88x",
            f"{layers}/{-(-layers // 2)} = {layers / -(-layers // 2):.2f}x; global layers share with none",
        ],
        ["the same, as their code shares: whole runs", "-", f"{layers}/{runs} = {layers / runs:.2f}x"],
    ]
    return table(["", "the documents expect", "here"], rows)
