"""What we load from: GPT-2 and Mamba-1, by the names and sizes in their configurations.

GPT-2's names are Hugging Face's. Mamba's are Hugging Face's (``-hf``) or those of the original state-spaces checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smt.config import SMTConfig
from smt.pretrained.sources import Source

# Fields of a configuration that change what the weights mean, with the values that they must have here.
_GPT2_MEANING: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
_MAMBA_MEANING: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "layer_norm_epsilon": (1e-5,),
    "use_bias": (False,),
    "use_conv_bias": (True,),
}
_ORIGINAL_MAMBA_MEANING: dict[str, tuple[Any, ...]] = {
    "rms_norm": (True,),
    "attn_layer_idx": ([], None),
    "d_intermediate": (0,),
    "ssm_cfg.layer": ("Mamba1",),
    "ssm_cfg.bias": (False,),
    "ssm_cfg.conv_bias": (True,),
}
# Our field -> their name of it.
_GPT2_SIZES = {"d_model": "n_embd", "transformer_n_layers": "n_layer", "transformer_n_heads": "n_head"}
_MAMBA_SIZES = {
    "d_model": "hidden_size",
    "ssm_n_layers": "num_hidden_layers",
    "ssm_d_state": "state_size",
    "ssm_d_conv": "conv_kernel",
    "ssm_expand_factor": "expand",
    "ssm_dt_rank": "time_step_rank",
}
_ORIGINAL_MAMBA_SIZES = {
    "d_model": "d_model",
    "ssm_n_layers": "n_layer",
    "ssm_d_state": "ssm_cfg.d_state",
    "ssm_d_conv": "ssm_cfg.d_conv",
    "ssm_expand_factor": "ssm_cfg.expand",
    "ssm_dt_rank": "ssm_cfg.dt_rank",
}
# What both kinds of Mamba leave out of a configuration.
_MAMBA_DEFAULTS = {"ssm_d_state": 16, "ssm_d_conv": 4, "ssm_expand_factor": 2, "ssm_dt_rank": "auto"}


@dataclass(frozen=True)
class Pretrained:
    """A source read as one of the two families.

    Attributes:
        title: what it is and where it came from, for messages.
        sizes: our field -> their name of it, and their value.
        tensors: weights under their names without the prefix of a model with a head.
        embedding: the name of the token embedding.
    """

    title: str
    sizes: dict[str, tuple[str, int]]
    tensors: dict[str, Tensor]
    embedding: str

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, which may be padded beyond the vocabulary of the configuration."""
        return self.sizes["vocab_size"][1]


def read_gpt2(source: Source) -> Pretrained:
    """A source as GPT-2.

    Raises:
        ValueError: another kind of model, or a form of GPT-2 that the decoder does not compute.
    """
    title = f"GPT-2 from {source.origin}"
    fields = source.config
    if fields.get("model_type", "gpt2") != "gpt2" or "n_embd" not in fields:
        raise ValueError(f"{source.origin} is not a GPT-2: its config has {_kind(fields)}")
    _check_meaning(title, fields, _GPT2_MEANING)
    inner = fields.get("n_inner") or 4 * fields["n_embd"]
    if inner != 4 * fields["n_embd"]:
        raise ValueError(f"{title} has n_inner = {inner}, the decoder needs 4 * n_embd = {4 * fields['n_embd']}")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in source.tensors.items()}
    if "wpe.weight" not in tensors:
        raise ValueError(f"{title} lacks wpe.weight, its positions")
    sizes = {ours: (theirs, _size(title, fields, theirs)) for ours, theirs in _GPT2_SIZES.items()}
    return _pretrained(title, sizes, tensors, "wte.weight")


def read_mamba(source: Source) -> Pretrained:
    """A source as Mamba-1.

    Raises:
        ValueError: another kind of model, or a form of Mamba that the memory does not compute.
    """
    title, fields = f"Mamba from {source.origin}", source.config
    original = "model_type" not in fields and "d_model" in fields
    if not original and fields.get("model_type") != "mamba":
        raise ValueError(f"{source.origin} is not a Mamba-1: its config has {_kind(fields)}")
    if original:
        fields = {**fields, **{f"ssm_cfg.{name}": value for name, value in (fields.get("ssm_cfg") or {}).items()}}
    _check_meaning(title, fields, _ORIGINAL_MAMBA_MEANING if original else _MAMBA_MEANING)
    sizes = {}
    for ours, theirs in (_ORIGINAL_MAMBA_SIZES if original else _MAMBA_SIZES).items():
        sizes[ours] = theirs, _size(title, fields, theirs, _MAMBA_DEFAULTS.get(ours))
    tensors = {name.removeprefix("backbone."): tensor for name, tensor in source.tensors.items()}
    return _pretrained(title, sizes, tensors, "embedding.weight" if "embedding.weight" in tensors else "embeddings.weight")


READERS = {"gpt2": read_gpt2, "mamba": read_mamba}


def check_sizes(pretrained: Pretrained, config: SMTConfig, *, first_layers: str | None) -> None:
    """Raise ValueError, with all names and sizes that differ, unless the weights fit a model with ``config``.

    Args:
        first_layers: the field of a depth that may be smaller in the model.
    """
    mine = {**config.to_dict(), "ssm_dt_rank": config.dt_rank}
    wrong = []
    for ours, (theirs, value) in pretrained.sizes.items():
        if ours == "vocab_size" or value == mine[ours] or (ours == first_layers and value > mine[ours]):
            continue
        hint = "; first_layers=True takes the first ones" if ours.endswith("n_layers") and value > mine[ours] else ""
        wrong.append(f"{theirs} = {value} but {ours} = {mine[ours]}{hint}")
    if "transformer_n_heads" in pretrained.sizes and config.n_kv_heads != config.transformer_n_heads:
        wrong.append(f"as many key/value heads as query heads but transformer_n_kv_heads = {config.n_kv_heads}")
    if wrong:
        raise ValueError(f"{pretrained.title} does not fit the model: " + "; ".join(wrong))


def _pretrained(title: str, sizes: dict[str, tuple[str, int]], tensors: dict[str, Tensor], embedding: str) -> Pretrained:
    if embedding not in tensors:
        raise ValueError(f"{title} lacks {embedding}, its token embedding")
    return Pretrained(title, {**sizes, "vocab_size": ("vocab_size", tensors[embedding].shape[0])}, tensors, embedding)


def _kind(fields: dict[str, Any]) -> str:
    return f"model_type = {fields['model_type']!r}" if "model_type" in fields else f"the fields {', '.join(list(fields)[:5])}"


def _size(title: str, fields: dict[str, Any], name: str, default: Any = None) -> int:
    value = fields.get(name, default)
    if name.endswith("rank") and value == "auto":
        value = -(-(fields["hidden_size"] if "hidden_size" in fields else fields["d_model"]) // 16)
    if not isinstance(value, int):
        raise ValueError(f"{title} must have an integer {name} in its config, got {value!r}")
    return value


def _check_meaning(title: str, fields: dict[str, Any], expected: dict[str, tuple[Any, ...]]) -> None:
    wrong = [
        f"{name} = {fields[name]!r} instead of {' or '.join(map(repr, allowed))}"
        for name, allowed in expected.items()
        if name in fields and fields[name] not in allowed
    ]
    if wrong:
        raise ValueError(f"{title} computes something else than this model: " + "; ".join(wrong))
