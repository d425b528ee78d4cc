"""What is evaluated: a checkpoint or run of ours, or a causal language model of Hugging Face, each with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smt.baselines import CONFIGS, architecture_of, build
from smt.data.settings import DataConfig
from smt.data.sources import SOURCES
from smt.data.tokenizer import Tokenizer
from smt.evaluation.scorer import CausalLMScorer, Scorer, SMTScorer, WindowScorer
from smt.model.checkpoint import CONFIG_FILE, load_weights, read_config
from smt.model.transformer import StrideMemoryTransformer
from smt.runtime.extras import needs_extra
from smt.runtime.fields import parse
from smt.runtime.files import read_yaml
from smt.runtime.hub import cached_first

NAMES = {"smt": "SMT", "gpt2": "GPT-2", "hymba": "Hymba"}


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer.

    Attributes:
        name: how tables and plots call it.
        scorer: gives the likelihoods of its tokens.
        tokenizer: makes its tokens.
        model: where it is one of ours; None: it is not, and has no memory to look at.
    """

    name: str
    scorer: Scorer
    tokenizer: Tokenizer
    model: StrideMemoryTransformer | None = None


def open_run(folder: str | Path, device: torch.device, **sizes: int) -> Subject:
    """A folder that ``smt train`` or ``save_pretrained`` left.

    Args:
        sizes: of ``SMTScorer``.

    Raises:
        ValueError: no such folder, a file that is missing or damaged, or no tokenizer beside the model.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"run must be a folder that smt train left, {folder} is none")
    architecture = architecture_of(path)
    ours: StrideMemoryTransformer | None = None
    if architecture == "smt":
        model = ours = StrideMemoryTransformer.from_pretrained(path, device=device)
        scorer: Scorer = SMTScorer(ours, **sizes)
    else:
        # Nothing but these weights is read: neither has a memory, and both were trained on chunks.
        context = _values(path).get("data", {}).get("chunk_length")
        if context is None:
            raise ValueError(f"{path / CONFIG_FILE} must name data.chunk_length, the longest chunk of its training")
        model = build(architecture, read_config(path / CONFIG_FILE, CONFIGS[architecture]), context)
        load_weights(model, path)
        model.to(device).eval()
        scorer = WindowScorer(model, model.logits, model.config.vocab_size, context, device)
    try:
        tokenizer = Tokenizer.load(path)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    if tokenizer.vocab_size > model.config.vocab_size:
        most = model.config.vocab_size
        raise ValueError(f"{folder} must have a tokenizer of at most vocab_size = {most} tokens, got {tokenizer.vocab_size}")
    return Subject(NAMES[architecture], scorer, tokenizer, ours)


def open_causal_lm(source: str, device: torch.device, context: int | None = None) -> Subject:
    """A folder or the name on the Hub of a model that ``AutoModelForCausalLM`` reads, with its tokenizer.

    Raises:
        MissingExtraError: transformers is not installed.
        ValueError: neither the cache nor the Hub gives it, or a context that it does not take.
    """
    with needs_extra("train"):
        from transformers import AutoModelForCausalLM
    model = cached_first(
        lambda local: AutoModelForCausalLM.from_pretrained(source, local_files_only=local, dtype=torch.float32),
        f"hf must be a folder with a causal language model or a name on the Hugging Face Hub, got {source!r}:",
    )
    scorer = CausalLMScorer(model.to(device).eval(), context)
    return Subject(Path(source).name, scorer, Tokenizer.pretrained(source))


def data_named(name: str) -> DataConfig:
    """The source of that name, or the file or folder there.

    Raises:
        ValueError: neither.
    """
    if name in SOURCES and name not in ("text", "dataset"):
        return DataConfig(source=name)
    if Path(name).exists():
        return DataConfig(text=name)
    sources = ", ".join(source for source in SOURCES if source not in ("text", "dataset"))
    raise ValueError(f"data must be a file, a folder or one of {sources}, got {name!r}")


def data_of_run(folder: str | Path) -> DataConfig | None:
    """The data that a run was trained on; None for a checkpoint that names none."""
    fields = _values(Path(folder)).get("data")
    return None if fields is None else DataConfig(**{name: parse(DataConfig, name, value) for name, value in fields.items()})


def _values(folder: Path) -> dict[str, Any]:
    """What the configuration in a folder says, unchecked; nothing where there is none."""
    path = folder / CONFIG_FILE
    return read_yaml(path) if path.is_file() else {}
