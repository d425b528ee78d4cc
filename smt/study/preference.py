"""Stage 2: what a model of stage 1 prefers, before and after it has been trained on pairs of its own making."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from smt.baselines import RunModel
from smt.data.pairs import read_pairs, write_pairs
from smt.data.tokenized import TokenizedCorpus
from smt.data.tokenizer import Tokenizer
from smt.evaluation.preference import evaluate_pairs
from smt.runtime.precision import precision
from smt.training.corpus_pairs import corpus_pairs
from smt.training.objective import PairLogProbabilities
from smt.training.second_stage import SECOND_STAGE, staged
from smt.training.settings import RunConfig

PAIRS_FILE, HELD_OUT_FILE = "pairs.jsonl", "held_out_pairs.jsonl"
# Prompts that are continued together: a GPU takes as long for many as for few.
TOGETHER = {"cpu": 32, "cuda": 512}


def make_pairs(folder: Path, model: RunModel, text: TokenizedCorpus, settings: dict[str, Any], seed: int) -> None:
    """Leave pairs to train on and pairs to measure on in ``folder``: true continuations against the model's own.

    The former are of training documents, the latter of held-out ones.
    """
    sizes = {name: settings[name] for name in ("prompt_length", "completion_length")}
    sizes["batch_size"] = TOGETHER[model.embedding.weight.device.type]
    for name, documents, count in (
        (PAIRS_FILE, text.train, settings["n_pairs"]),
        (HELD_OUT_FILE, text.validation, settings["n_held_out_pairs"]),
    ):
        if not (folder / name).is_file():
            pairs = corpus_pairs(model, documents, count, seed=seed, **sizes)
            write_pairs(folder / name, pairs, text.tokenizer)


def second_stage(run: Path, pairs: Path, seed: int, fields: dict[str, Any]) -> RunConfig:
    """The run that goes on from the weights of ``run``."""
    begins = {"stage": SECOND_STAGE, "init_from": {"checkpoint": str(run)}, "pairs": str(pairs), "seed": seed}
    return staged(SECOND_STAGE, {**begins, "experiment": SECOND_STAGE, **fields})


def preferences(
    model: RunModel, tokenizer: Tokenizer, pairs: Path, *, length: int, batch_size: int, strength: float
) -> dict[str, Any]:
    """How a model tells all pairs of a file apart; ``length`` and ``strength`` as in the runs of stage 2."""
    read = read_pairs(pairs, tokenizer, length)
    every = [*read.train, *read.held_out]
    with precision(model.embedding.weight.device):
        return asdict(evaluate_pairs(PairLogProbabilities(model), every, batch_size=batch_size, strength=strength))
