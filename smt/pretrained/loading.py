"""Pretrained weights: GPT-2 into decoder and embedding, Mamba-1 into the memory, each reported by name.

Everything is checked before the first parameter changes: a refused source leaves the model as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from smt.config import SMTConfig
from smt.pretrained.families import READERS, Pretrained, check_sizes, read_gpt2, read_mamba
from smt.pretrained.sources import Source, open_source
from smt.pretrained.transfer import LoadReport, Transfer

_GPT2_BLOCK = {
    "ln_1": "norm_1",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.proj",
    "ln_2": "norm_2",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
}
GPT2_HEAD_DIM = 64  # of every published GPT-2
GPT2_ENCODING = "stride"  # of a model for its weights that is told nothing else
_MAMBA_LAYER = (
    *("norm.weight", "mixer.A_log", "mixer.D", "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.in_proj.weight"),
    *("mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.dt_proj.bias", "mixer.out_proj.weight"),
)


def load_gpt2(model: nn.Module, source: Any, *, embedding: bool | None = None, first_layers: bool = False) -> LoadReport:
    """Load GPT-2's blocks, final norm, first W positions and token embedding.

    A memory that has the scale of the old embedding, neither trained nor loaded, gets that of the new one (``docs/model.md``).

    Args:
        model: a ``StrideMemoryTransformer``.
        source: a ``GPT2Model`` or one with a head, or a local folder or hub name of one (``smt.pretrained.sources``).
        embedding: load the token embedding too; None: if the vocabularies have the same size, else warn and skip it.
        first_layers: of a deeper GPT-2 take the first layers; otherwise depths must agree.

    Raises:
        TypeError: a source of another type.
        ValueError: another kind of model, sizes that do not fit, tensors that are missing, or a model with
            ``encoding="stream"``, whose positions are not GPT-2's.
    """
    config = model.config
    if config.encoding == "stream":
        raise ValueError("encoding 'stream' has rotary positions and cannot take GPT-2's; use encoding 'stride' or 'token'")
    gpt2 = read_gpt2(open_source(source))
    check_sizes(gpt2, config, first_layers="transformer_n_layers" if first_layers else None)
    n_positions = gpt2.tensors["wpe.weight"].shape[0]
    if n_positions < config.window_size:
        raise ValueError(f"{gpt2.title} has n_positions = {n_positions}, the window needs {config.window_size}")
    refused = _refused_embedding(gpt2, config, embedding)

    follows_embedding = model.memory.has_scale_of(model.embedding.weight)
    transfer = Transfer(model, gpt2)
    transfer.take("wpe.weight", "decoder.positions", lambda tensor: tensor[: config.window_size])
    transfer.take_module("ln_f", "decoder.norm")
    for index in range(config.transformer_n_layers):
        for theirs, ours in _GPT2_BLOCK.items():
            transpose = torch.t if ".c_" in theirs else None  # GPT-2's Conv1D stores (in, out)
            transfer.take_module(f"h.{index}.{theirs}", f"decoder.blocks.{index}.{ours}", transpose)
    if refused is None:
        transfer.take("wte.weight", "embedding.weight")
    else:
        transfer.skip("wte.weight", refused)
    if n_positions > config.window_size:
        transfer.skipped[f"wpe.weight[{config.window_size}:]"] = "positions beyond the window"
    for name in transfer.rest(r"h\.\d+\.attn\.(masked_)?bias"):
        transfer.skip(name, "a causal mask, not a weight")
    transfer.leave_deeper_layers("h", config.transformer_n_layers)
    report = transfer.finish()
    if refused is None and follows_embedding:
        model.memory.match_scale(model.embedding.weight)
    return report


def load_mamba(
    model: nn.Module,
    source: Any,
    *,
    embedding: bool | None = False,
    match_scale: bool = False,
    first_layers: bool = False,
) -> LoadReport:
    """Load a Mamba's layers and final norm into the memory.

    Args:
        model: a ``StrideMemoryTransformer``.
        source: a ``MambaModel`` or one with a head, or a local folder or hub name of one, in Hugging Face's or in the original
            names (``smt.pretrained.sources``).
        embedding: load its token embedding too; None: if the vocabularies have the same size, else warn and skip it.
        match_scale: set the final norm's weight to the root mean square of the model's embedding instead of the loaded
            weight, so that slots and embeddings have one scale.
        first_layers: of a deeper Mamba take the first layers; otherwise depths must agree.

    Raises:
        TypeError: a source of another type.
        ValueError: another kind of model, sizes that do not fit, or tensors that are missing.
    """
    config = model.config
    mamba = read_mamba(open_source(source))
    check_sizes(mamba, config, first_layers="ssm_n_layers" if first_layers else None)
    refused = _refused_embedding(mamba, config, embedding)

    transfer = Transfer(model, mamba)
    for index in range(config.ssm_n_layers):
        for name in _MAMBA_LAYER:
            transfer.take(f"layers.{index}.{name}", f"memory.ssm.layers.{index}.{name}")
    if match_scale:
        transfer.skip("norm_f.weight", "match_scale=True")
    else:
        transfer.take("norm_f.weight", "memory.ssm.norm_f.weight")
    if refused is None:
        transfer.take(mamba.embedding, "embedding.weight")
    else:
        transfer.skip(mamba.embedding, refused)
    transfer.leave_deeper_layers("layers", config.ssm_n_layers)
    report = transfer.finish()
    if match_scale:
        model.memory.match_scale(model.embedding.weight)
    return report


def load_parts(
    model: nn.Module,
    sources: Mapping[str, Source],
    *,
    embedding: str | None,
    match_scale: bool = False,
    first_layers: bool = False,
) -> LoadReport:
    """Load a GPT-2, a Mamba or both into a model.

    Args:
        model: a ``StrideMemoryTransformer``.
        sources: by ``gpt2`` and ``mamba``.
        embedding: the one whose token embedding is loaded, if any.
        match_scale, first_layers: as in ``load_gpt2`` and ``load_mamba``.

    Raises:
        ValueError: as in ``load_gpt2`` and ``load_mamba``.
    """
    reports = []
    if "gpt2" in sources:
        reports.append(load_gpt2(model, sources["gpt2"], embedding=embedding == "gpt2", first_layers=first_layers))
    if "mamba" in sources:
        reports.append(
            load_mamba(
                model, sources["mamba"], embedding=embedding == "mamba", match_scale=match_scale, first_layers=first_layers
            )
        )
    return sum(reports[1:], reports[0])


def config_of(*, gpt2: Any = None, mamba: Any = None, **fields: Any) -> SMTConfig:
    """The configuration of a model that takes these sources whole; of a GPT-2 with the encoding ``stride``.

    Args:
        gpt2, mamba: sources as the loaders take them. The vocabulary is GPT-2's if it is given; if it is not, heads are as
            wide as GPT-2's.
        fields: of ``SMTConfig``, which win over the sources' sizes.

    Raises:
        ValueError: sources of different widths, or fields that do not fit together.
    """
    given = {kind: source for kind, source in (("gpt2", gpt2), ("mamba", mamba)) if source is not None}
    found = [READERS[kind](open_source(source)) for kind, source in given.items()]
    values: dict[str, Any] = {}
    for pretrained in reversed(found):  # the first wins
        values.update({ours: value for ours, (_, value) in pretrained.sizes.items()})
    if gpt2 is not None:
        values["encoding"] = GPT2_ENCODING
    if gpt2 is None and mamba is not None and values["d_model"] % GPT2_HEAD_DIM == 0:
        values["transformer_n_heads"] = values["d_model"] // GPT2_HEAD_DIM
    values.update(fields)
    for pretrained in found:
        theirs, width = pretrained.sizes["d_model"]
        if width != values["d_model"]:
            raise ValueError(f"{pretrained.title} has {theirs} = {width}, but d_model = {values['d_model']}: one width for all")
    return SMTConfig.from_dict(values)


def _refused_embedding(pretrained: Pretrained, config: SMTConfig, wanted: bool | None) -> str | None:
    """Why the token embedding is not loaded; None: it is."""
    if wanted is False:
        return "embedding=False"
    if pretrained.vocab_size == config.vocab_size:
        return None
    reason = (
        f"its vocabulary has {pretrained.vocab_size} tokens, the model {config.vocab_size}; a number means another token in "
        f"another vocabulary, so build the model with vocab_size={pretrained.vocab_size} to load it"
    )
    if wanted:
        raise ValueError(f"the token embedding of {pretrained.title} cannot be loaded: {reason}")
    warnings.warn(f"the token embedding of {pretrained.title} was not loaded: {reason}", stacklevel=4)
    return reason
