"""Where a run's weights come from: fresh ones, a GPT-2 and a Mamba, or a checkpoint (``init_from``).

An embedding means nothing without its vocabulary. So a run reads its text with the tokenizer of its starting point; where that
has none, the run keeps its own, and the embedding starts fresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from smt.baselines import CONFIGS, RunModel, architecture_of, build
from smt.data.tokenizer import TOKENIZER_FILE
from smt.model.checkpoint import CONFIG_FILE, load_weights, read_config
from smt.pretrained.families import READERS
from smt.pretrained.loading import load_parts
from smt.pretrained.sources import open_source
from smt.pretrained.transfer import LoadReport
from smt.training.settings import RunConfig

NO_TOKENIZER = "without a tokenizer.json its tokens are not those of this run"


def fresh_model(config: RunConfig) -> RunModel:
    """A fresh model, the same on every process."""
    torch.manual_seed(config.training.seed)
    model = build(config.architecture, config.model, config.data.chunk_length)
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


class StartingPoint:
    """The weights and the tokenizer that a run begins with.

    Attributes:
        tokenizer: path of the ``tokenizer.json`` that the embedding belongs to; None: the run keeps its own.
        vocab_size: rows of that embedding; None: as many as the run's tokenizer has tokens.
    """

    def __init__(self, init_from: Mapping[str, str], architecture: str = "smt") -> None:
        """Open what ``TrainingConfig.init_from`` names.

        Raises:
            ValueError: as ``open_source``, a checkpoint that is none, or one of another architecture.
        """
        self._sources = {kind: open_source(init_from[kind]) for kind in READERS if kind in init_from}
        self._checkpoint = Path(init_from["checkpoint"]) if "checkpoint" in init_from else None
        self.tokenizer: Path | None = None
        self.vocab_size: int | None = None
        self._embedding: str | None = None
        if self._checkpoint is not None:
            theirs = architecture_of(self._checkpoint)
            if theirs != architecture:
                raise ValueError(f"init_from names a checkpoint of architecture {theirs}, this run is of {architecture}")
            config = read_config(self._checkpoint / CONFIG_FILE, CONFIGS[theirs])
            path = self._checkpoint / TOKENIZER_FILE
            if path.is_file():
                self.tokenizer, self.vocab_size = path, config.vocab_size
        for kind, source in self._sources.items():
            if source.tokenizer is not None:
                self._embedding, self.tokenizer = kind, source.tokenizer
                self.vocab_size = READERS[kind](source).vocab_size
                break

    def adopted_by(self, config: RunConfig) -> RunConfig:
        """The settings of the run, with the tokenizer and the vocabulary that it begins with."""
        if self.tokenizer is None:
            return config
        return replace(
            config,
            model=replace(config.model, vocab_size=self.vocab_size),
            data=replace(config.data, tokenizer=str(self.tokenizer.parent.absolute())),  # a folder may be called bpe
        )

    def load(self, model: RunModel, *, match_scale: bool = False) -> LoadReport | None:
        """Fill ``model``; None where everything is fresh. ``match_scale`` as in ``load_mamba``.

        Raises:
            ValueError: weights that do not fit the model.
        """
        if self._checkpoint is not None:
            embedding = next(name for name, weight in model.named_parameters() if weight is model.embedding.weight)
            skipped = {} if self.tokenizer is not None else {embedding: NO_TOKENIZER}
            loaded = load_weights(model, self._checkpoint, leave=tuple(skipped))
            return LoadReport(f"checkpoint {self._checkpoint}", loaded, skipped, list(skipped))
        if not self._sources:
            return None
        return load_parts(model, self._sources, embedding=self._embedding, match_scale=match_scale)
