"""What a run reads, its text and its pairs: told, checked, and warned of where it may not be what was meant."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from smt.config import SMTConfig
from smt.data.pairs import TokenizedPairs, read_pairs
from smt.data.settings import DataConfig
from smt.data.tokenized import TokenizedCorpus, tokenize_corpus
from smt.training.run_folder import RunFolder
from smt.training.settings import RunConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def read(config: RunConfig, resumed: Path | None, accelerator: Accelerator) -> tuple[TokenizedCorpus, TokenizedPairs | None]:
    """The text of a run, and its pairs where it has any; one process makes what is not there yet.

    Args:
        resumed: the folder of a run that goes on, with the tokens that it has saved; None: it begins.

    Raises:
        ValueError: text or pairs that cannot be read, a held-out text that is not that with which the run began, or chunks of
            too many kinds for graphs.
    """
    data = config.data if resumed is None else replace(config.data, tokenizer=str(resumed))
    with accelerator.main_process_first():
        text = tokenize_corpus(data, config.model.vocab_size)
    accelerator.print(text.describe(), flush=True)
    changed = None if resumed is None else RunFolder(resumed).check_text(text)
    pairs = None
    if config.data.pairs is not None:
        pairs = read_pairs(config.data.pairs, text.tokenizer, config.data.chunk_length)
        accelerator.print(pairs.describe(), flush=True)
    for warning in filter(None, (*_warnings(config, text, accelerator), changed)):
        if accelerator.is_main_process:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    if config.training.compile == "graphs" and isinstance(config.model, SMTConfig) and pairs is None:
        _check_graphs(config.model, config.data, max(text.train.lengths) - 1)
    return text, pairs


def _warnings(config: RunConfig, text: TokenizedCorpus, accelerator: Accelerator) -> list[str | None]:
    """What the user may not have meant; nothing is wrong with it."""
    if config.training.stage == "orpo":
        return [None if config.training.init_from else "stage orpo begins with fresh weights: nothing is in init_from"]
    rows = config.data.batch_size * accelerator.num_processes
    short = text.warning(config.model.window_size) if isinstance(config.model, SMTConfig) else None
    return [short, text.idle_rows(rows, config.data.part_length)]


def _check_graphs(model: SMTConfig, data: DataConfig, longest: int) -> None:
    """Raise if chunks of documents of ``longest`` steps are of more kinds than PyTorch compiles before it gives up."""
    steps = range(0, min(longest, data.part_length or longest), data.chunk_length)
    kinds = {model.window.canonical_step(step, model.write_group) for step in steps}
    most = torch._dynamo.config.recompile_limit
    if len(kinds) > most:
        raise ValueError(
            f"compile = graphs records at most {most} kinds of chunks, and chunk_length = {data.chunk_length} makes "
            f"{len(kinds)}: take a multiple of stride * write_group = {model.stride * model.write_group}"
        )
