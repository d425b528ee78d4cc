"""Pretrained models become one Stride Memory Transformer, and that a checkpoint (``smt convert``)."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from smt.config import SMTConfig
from smt.data.tokenizer import TOKENIZER_FILES
from smt.model.checkpoint import read_fields, save_model
from smt.model.transformer import StrideMemoryTransformer
from smt.pretrained.families import READERS
from smt.pretrained.loading import GPT2_ENCODING, config_of, load_parts
from smt.pretrained.sources import open_source
from smt.pretrained.transfer import LoadReport
from smt.runtime.fields import parse
from smt.runtime.files import check_folder, write_files


def convert(
    out: str | Path,
    *,
    gpt2: Any = None,
    mamba: Any = None,
    config: str | Path | None = None,
    fields: Mapping[str, Any] | None = None,
    embedding: str | None = None,
    match_scale: bool = False,
    first_layers: bool = False,
    seed: int = 42,
) -> tuple[SMTConfig, LoadReport]:
    """Write a checkpoint with the weights of a GPT-2, a Mamba or both, and what is fresh beside them.

    Args:
        out: the folder to write, new or empty.
        gpt2, mamba: sources (``smt.pretrained.sources``).
        config: YAML file of the model (``smt.model.checkpoint.read_config``); None: the sources' sizes. Where it names no
            encoding, that for a GPT-2 is ``stride``.
        fields: of ``SMTConfig``, which win over either; values may be text.
        embedding: whose token embedding is loaded, ``gpt2``, ``mamba`` or ``none``, and whose ``tokenizer.json`` comes
            along; None: the first source's.
        match_scale, first_layers: as in ``smt.pretrained.loading``.
        seed: of the fresh weights.

    Raises:
        ValueError: no source, a folder that is not empty, a source or a configuration that does not fit.
    """
    out, fields = Path(out), dict(fields or {})
    given = {kind: source for kind, source in (("gpt2", gpt2), ("mamba", mamba)) if source is not None}
    if not given:
        raise ValueError("convert needs a source: gpt2, mamba or both")
    if match_scale and mamba is None:
        raise ValueError("match_scale gives the output of a mamba another scale, got it without one")
    embedding = next(iter(given)) if embedding is None else embedding
    if embedding not in (*given, "none"):
        raise ValueError(f"embedding must be one of {', '.join((*given, 'none'))}, got {embedding!r}")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"out must be a new or an empty folder, {out} is not")
    known = {field.name for field in dataclasses.fields(SMTConfig)}  # from_dict refuses others
    check_folder(out)
    fields = {name: parse(SMTConfig, name, value) if name in known else value for name, value in fields.items()}
    sources = {kind: open_source(source) for kind, source in given.items()}
    if config is not None:
        encoding = {} if gpt2 is None else {"encoding": GPT2_ENCODING}
        model_config = SMTConfig.from_dict({**encoding, **read_fields(config), **fields})
    else:
        vocabulary = {"vocab_size": READERS[embedding](sources[embedding]).vocab_size} if embedding in sources else {}
        model_config = config_of(**sources, **{**vocabulary, **fields})

    torch.manual_seed(seed)
    model = StrideMemoryTransformer(model_config)
    report = load_parts(model, sources, embedding=embedding, match_scale=match_scale, first_layers=first_layers)
    tokenizer = sources[embedding].tokenizer if embedding in sources else None
    if tokenizer is not None:
        out.mkdir(parents=True, exist_ok=True)
        files = [file for name in TOKENIZER_FILES if (file := tokenizer.with_name(name)).is_file()]
        write_files({out / file.name: functools.partial(shutil.copyfile, file) for file in files})
    save_model(model, out)
    return model_config, report
