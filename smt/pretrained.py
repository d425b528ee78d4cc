"""Loading Hugging Face GPT-2 and Mamba weights into the decoder and the memory."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from smt.model import StrideMemoryTransformer


@dataclass
class LoadReport:
    """What a loader did, by parameter name of the model.

    Attributes:
        loaded: parameters that were filled.
        skipped: source tensors that were not used, and why.
        fresh: parameters of the model that keep their values.
    """

    loaded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)


@torch.no_grad()
def load_gpt2(model: StrideMemoryTransformer, source: Any, *, embedding: bool | None = None) -> LoadReport:
    """Load GPT-2's blocks, final norm, first W positions and token embedding.

    A memory whose SSM has not been loaded is rescaled to the new embedding's root mean square (DESIGN 2.1).

    Args:
        source: a ``GPT2Model`` or ``GPT2LMHeadModel``, or a local folder or hub name of one.
        embedding: load the token embedding too; None: if the vocabularies have the same size, else warn and skip it.

    Raises:
        TypeError: another kind of source.
        ValueError: sizes that do not fit, or a model with ``encoding="stream"``, whose positions are not GPT-2's.
    """
    config = model.config
    if config.encoding == "stream":
        raise ValueError("encoding 'stream' has rotary positions and cannot take GPT-2's; use encoding 'stride' or 'token'")
    gpt2 = _transformer(source, "GPT2Model", "transformer")
    theirs = {
        "n_embd": (gpt2.config.n_embd, "d_model", config.d_model),
        "n_layer": (gpt2.config.n_layer, "transformer_n_layers", config.transformer_n_layers),
        "n_head": (gpt2.config.n_head, "transformer_n_heads", config.transformer_n_heads),
        "n_inner": (gpt2.config.n_inner or 4 * gpt2.config.n_embd, "4 * d_model", 4 * config.d_model),
        "n_head (keys and values)": (gpt2.config.n_head, "transformer_n_kv_heads", config.n_kv_heads),
    }
    _check_sizes("GPT-2", theirs)
    if gpt2.config.n_positions < config.window_size:
        raise ValueError(f"GPT-2 has n_positions = {gpt2.config.n_positions}, the window needs {config.window_size}")
    same_vocabulary = gpt2.config.vocab_size == config.vocab_size
    if embedding and not same_vocabulary:
        raise ValueError(f"GPT-2 has vocab_size = {gpt2.config.vocab_size}, the model {config.vocab_size}")

    report = LoadReport()
    into = _Into(model, report)
    into.copy("decoder.positions", gpt2.wpe.weight[: config.window_size])
    for index, block in enumerate(gpt2.h):
        prefix = f"decoder.blocks.{index}."
        into.copy_module(prefix + "norm_1", block.ln_1)
        into.copy_module(prefix + "norm_2", block.ln_2)
        for name, conv in _projections(block).items():
            into.copy(f"{prefix}{name}.weight", conv.weight.T)  # GPT-2's Conv1D stores (in, out)
            into.copy(f"{prefix}{name}.bias", conv.bias)
    into.copy_module("decoder.norm", gpt2.ln_f)
    if same_vocabulary and embedding is not False:
        into.copy("embedding.weight", gpt2.wte.weight)
        if not model.memory.ssm_is_loaded:
            model.memory.match_scale(model.embedding.weight)
    else:
        reason = "embedding=False"
        if not same_vocabulary:
            reason = f"its vocabulary has {gpt2.config.vocab_size} tokens, the model {config.vocab_size}"
        report.skipped["wte.weight"] = reason
        if embedding is None:
            warnings.warn(f"GPT-2's token embedding was not loaded: {reason}", stacklevel=3)
    if gpt2.config.n_positions > config.window_size:
        report.skipped[f"wpe.weight[{config.window_size}:]"] = "positions beyond the window"
    return into.finish()


@torch.no_grad()
def load_mamba(
    model: StrideMemoryTransformer, source: Any, *, embedding: bool = False, match_scale: bool = False
) -> LoadReport:
    """Load a Mamba's layers and final norm into the memory.

    Args:
        source: a ``MambaModel`` or ``MambaForCausalLM``, or a local folder or hub name of one.
        embedding: load its token embedding too.
        match_scale: set the final norm's weight to the root mean square of the model's embedding instead of the loaded
            weight, so that slots and embeddings have one scale.

    Raises:
        TypeError: another kind of source.
        ValueError: sizes that do not fit.
    """
    config = model.config
    mamba = _transformer(source, "MambaModel", "backbone")
    theirs = {
        "hidden_size": (mamba.config.hidden_size, "d_model", config.d_model),
        "num_hidden_layers": (mamba.config.num_hidden_layers, "ssm_n_layers", config.ssm_n_layers),
        "state_size": (mamba.config.state_size, "ssm_d_state", config.ssm_d_state),
        "conv_kernel": (mamba.config.conv_kernel, "ssm_d_conv", config.ssm_d_conv),
        "intermediate_size": (mamba.config.intermediate_size, "ssm_expand_factor * d_model", config.ssm_d_inner),
        "time_step_rank": (mamba.config.time_step_rank, "ssm_dt_rank", config.dt_rank),
    }
    if embedding:
        theirs["vocab_size"] = (mamba.config.vocab_size, "vocab_size", config.vocab_size)
    _check_sizes("Mamba", theirs)
    if mamba.config.use_bias or not mamba.config.use_conv_bias:
        raise ValueError(
            "Mamba must have use_bias=False and use_conv_bias=True, "
            f"got {mamba.config.use_bias} and {mamba.config.use_conv_bias}"
        )

    report = LoadReport()
    into = _Into(model, report)
    for name, tensor in mamba.state_dict().items():
        if name.startswith("embeddings."):
            if embedding:
                into.copy("embedding.weight", tensor)
            else:
                report.skipped[name] = "embedding=False"
        else:
            into.copy(f"memory.ssm.{name}", tensor)
    model.memory.ssm_is_loaded = True
    if match_scale:
        model.memory.match_scale(model.embedding.weight)
    return into.finish()


class _Into:
    """Copies tensors into a model's parameters by name and keeps the books."""

    def __init__(self, model: nn.Module, report: LoadReport) -> None:
        self.parameters, self.report = dict(model.named_parameters()), report

    def copy(self, name: str, tensor: Tensor) -> None:
        parameter = self.parameters[name]
        if parameter.shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, the source {tuple(tensor.shape)}")
        parameter.copy_(tensor)
        self.report.loaded.append(name)

    def copy_module(self, name: str, module: nn.Module) -> None:
        for part, tensor in module.named_parameters():
            self.copy(f"{name}.{part}", tensor)

    def finish(self) -> LoadReport:
        loaded = set(self.report.loaded)
        self.report.fresh = [name for name in self.parameters if name not in loaded]
        return self.report


def _projections(block: nn.Module) -> dict[str, nn.Module]:
    """Our names of a GPT-2 block's projections."""
    attention, mlp = block.attn, block.mlp
    return {"attention.qkv": attention.c_attn, "attention.proj": attention.c_proj, "up": mlp.c_fc, "down": mlp.c_proj}


def _transformer(source: Any, class_name: str, head_attribute: str) -> nn.Module:
    """The bare Hugging Face model inside ``source``, loaded first if it is a folder or a hub name."""
    if isinstance(source, str | Path):
        import transformers

        return getattr(transformers, class_name).from_pretrained(source)
    bare = getattr(source, head_attribute, source)
    if type(bare).__name__ != class_name:
        kinds = f"a {class_name}, one with a language-model head, a folder or a hub name"
        raise TypeError(f"source must be {kinds}, got {type(source).__name__}")
    return bare


def _check_sizes(kind: str, sizes: dict[str, tuple[int, str, int]]) -> None:
    wrong = [f"{name} = {theirs} but {mine} = {ours}" for name, (theirs, mine, ours) in sizes.items() if theirs != ours]
    if wrong:
        raise ValueError(f"this {kind} does not fit the model: " + "; ".join(wrong))
