"""Every size and switch of a Stride Memory Transformer, validated when it is built."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from smt.runtime.fields import check_above, check_at_least, check_fields, check_fraction, check_known, parse
from smt.runtime.files import read_yaml
from smt_kernels import WindowSpec
from smt_kernels.window_attention import MAX_WINDOW

# Published sizes, by the name that they are published under.
PRESETS: dict[str, dict[str, Any]] = {
    "wikitext": {},
    "pg19": {"n_ssm_outputs": 20, "m_input_tokens": 80, "stride": 25},
    "small": {
        "n_ssm_outputs": 10,
        "m_input_tokens": 30,
        "stride": 10,
        "d_model": 512,
        "transformer_n_layers": 6,
        "transformer_n_heads": 8,
        "ssm_n_layers": 12,
    },
}
PUBLISHED = {
    "encoding": "token",
    "empty_slots": "zero",
    "pool_source": "window",
    "write_group": 1,
    "pooling_norm": False,
    "pooling_dropout": 0.1,
    "slot_gate": "open",
    "slot_readout": False,
}


# GPT-2's standard deviation of fresh weights, and the width that it belongs to.
INITIALIZER_STD, INITIALIZER_WIDTH = 0.02, 768


Config = TypeVar("Config", bound="ModelConfig")


class ModelConfig:
    """What the configurations of all models have: fields as a dictionary, sizes of Mamba, and the scale of fresh weights."""

    d_model: int
    ssm_d_state: int
    ssm_d_conv: int
    ssm_expand_factor: int
    ssm_dt_rank: int | None
    initializer_range: float | None

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """Build from a dictionary; a field that does not exist is refused with the nearest name.

        Raises:
            ValueError: an unknown field.
        """
        check_known(cls, values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as ``from_dict`` takes them."""
        return asdict(self)

    @property
    def ssm_d_inner(self) -> int:
        """Channels of a Mamba block."""
        return self.ssm_expand_factor * self.d_model

    @property
    def dt_rank(self) -> int:
        """Rank of Mamba's time-step projection."""
        return self.ssm_dt_rank or -(-self.d_model // 16)

    @property
    def initializer_std(self) -> float:
        """Standard deviation of fresh weights: ``initializer_range``, or GPT-2's 0.02 at its width of 768, and at others what
        gives as much: the variance of a sum over d terms stays when that of each falls as 1 / d."""
        if self.initializer_range is not None:
            return self.initializer_range
        return INITIALIZER_STD * math.sqrt(INITIALIZER_WIDTH / self.d_model)


@dataclass(frozen=True, kw_only=True)
class SMTConfig(ModelConfig):
    """Configuration of ``StrideMemoryTransformer``; the defaults are the published sizes for WikiText.

    Args:
        vocab_size: tokens in the vocabulary.
        d_model: width of embeddings, slots and hidden states.
        n_ssm_outputs: memory slots in the window, n.
        m_input_tokens: tokens in the window, m; n + m <= 128.
        stride: steps between writes, S; 1 <= S <= m.
        d_k: width of the pooling's queries and keys; None: that of the model, which it then is.
        dropout: probability, on embeddings and residual branches in training (not on attention weights: the fused kernels have
            none).
        pooling_dropout: probability, on pooling weights in training; published: 0.1. Off by default: noise in what is written
            stays in the memory, and with it most seeds did not learn to recall.
        transformer_n_layers: blocks of the decoder.
        transformer_n_heads: query heads of a block.
        transformer_n_kv_heads: key/value heads of a block; None: as many as query heads.
        ssm_n_layers: Mamba layers of the memory.
        ssm_d_state: states of each channel of a Mamba layer.
        ssm_d_conv: width of its convolution.
        ssm_expand_factor: channels of a Mamba layer, as a multiple of ``d_model``.
        ssm_dt_rank: rank of its time-step projection; None: ceil(d_model / 16).
        encoding: when tokens are encoded: each token once, in a ``stream`` whose layers keep keys and values; or a whole window
            for every ``token``, as published, or for every ``stride``, as GPT-2's weights need it.
        empty_slots: ``mask``: entries that do not exist yet are not attended; ``zero``: they are zero vectors.
        pool_source: a write pools the whole ``window`` or only its ``tokens``.
        pooling_norm: divide every pooled entry by its root mean square first.
        write_group: writes whose pooling sees only the slots of earlier groups, so that they run as one scan.
        slot_gate: scales the values of the slots that a head attends to: ``learned`` by each head, nearly closed at first,
            because fresh slots are noise; ``open``: 1, as published; ``closed``: 0, a control whose
            slots take attention and give nothing.
        slot_readout: the newest slot also moves the logits directly, by a matrix that is zero at first (``smt.model.readout``);
            False: slots are only attended to, as published. Closed gates close it too.
        writes: False switches the memory off (the no-writes control): no slot ever exists, whatever ``empty_slots``.
        initializer_range: standard deviation of fresh weights; None: ``initializer_std``, which follows the width.
        rope_theta: base of the rotary frequencies of ``stream``.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of range; the message names the field and its valid range.
    """

    vocab_size: int = 50280
    d_model: int = 768
    n_ssm_outputs: int = 15
    m_input_tokens: int = 50
    stride: int = 16
    d_k: int | None = None
    dropout: float = 0.1
    pooling_dropout: float = 0.0
    transformer_n_layers: int = 12
    transformer_n_heads: int = 12
    transformer_n_kv_heads: int | None = None
    ssm_n_layers: int = 24
    ssm_d_state: int = 16
    ssm_d_conv: int = 4
    ssm_expand_factor: int = 2
    ssm_dt_rank: int | None = None
    encoding: str = "stream"
    empty_slots: str = "mask"
    pool_source: str = "window"
    pooling_norm: bool = True
    write_group: int = 8
    slot_gate: str = "learned"
    slot_readout: bool = True
    writes: bool = True
    initializer_range: float | None = None
    rope_theta: float = 10000.0

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "encoding": ("token", "stride", "stream"),
        "empty_slots": ("mask", "zero"),
        "pool_source": ("window", "tokens"),
        "slot_gate": ("learned", "open", "closed"),
    }

    def __post_init__(self) -> None:
        check_fields(self)
        if self.d_k is None:
            object.__setattr__(self, "d_k", self.d_model)
        integers = [field.name for field in fields(self) if str(field.type).startswith("int")]
        check_at_least(self, 1, *(name for name in integers if name != "n_ssm_outputs"))
        check_at_least(self, 0, "n_ssm_outputs")
        check_at_least(self, 2, "ssm_d_conv")
        check_fraction(self, "dropout", "pooling_dropout", "initializer_range")
        check_above(self, 1, "rope_theta")
        if self.window_size > MAX_WINDOW:
            raise ValueError(f"n_ssm_outputs + m_input_tokens must be at most {MAX_WINDOW}, got {self.window_size}")
        if self.stride > self.m_input_tokens:
            raise ValueError(f"stride must lie in 1..m_input_tokens = 1..{self.m_input_tokens}, got {self.stride}")
        if self.d_model % self.transformer_n_heads:
            raise ValueError(f"transformer_n_heads must divide d_model = {self.d_model}, got {self.transformer_n_heads}")
        if self.transformer_n_heads % self.n_kv_heads:
            raise ValueError(
                f"transformer_n_kv_heads must divide transformer_n_heads = {self.transformer_n_heads}, got {self.n_kv_heads}"
            )
        if self.encoding == "stream" and self.head_dim % 2:
            raise ValueError(
                f"encoding 'stream' rotates pairs, so d_model / transformer_n_heads must be even, got {self.head_dim}"
            )
        usual = max(1, self.m_input_tokens // 3)
        if not usual <= 2 * self.stride <= 4 * usual:
            warnings.warn(
                f"stride = {self.stride} is far from m_input_tokens // 3 = {usual}: every token is pooled about "
                f"{self.coverage:.1f} times instead of about 3 times",
                stacklevel=3,
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> SMTConfig:
        """A named configuration as published: ``wikitext``, ``pg19`` or ``small``, with fields overridden."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def published(cls, **overrides: Any) -> SMTConfig:
        """Every switch as published: ``token``, ``zero``, groups of 1, no pooling norm, open gates, no readout."""
        return cls.from_dict({**PUBLISHED, **overrides})

    @classmethod
    def from_yaml(cls, path: str | Path) -> SMTConfig:
        """Read a YAML file of fields.

        Raises:
            ValueError: damaged, not a mapping, or an unknown field.
        """
        given = read_yaml(Path(path), "a mapping of SMTConfig fields")
        return cls.from_dict({name: parse(cls, name, value) for name, value in given.items()})

    def to_yaml(self, path: str | Path) -> None:
        """Write all fields as YAML."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @property
    def window(self) -> WindowSpec:
        """Who sees whom."""
        return WindowSpec(self.n_ssm_outputs, self.m_input_tokens, self.stride)

    @property
    def window_size(self) -> int:
        """Entries in the window, W = n + m."""
        return self.n_ssm_outputs + self.m_input_tokens

    @property
    def reads_out(self) -> bool:
        """Whether the newest slot moves the logits directly."""
        return self.slot_readout and self.n_ssm_outputs > 0 and self.slot_gate != "closed"

    @property
    def write_frequency(self) -> float:
        """Writes per step, 1 / S."""
        return 1.0 / self.stride

    @property
    def coverage(self) -> float:
        """How many writes pool each token, m / S."""
        return self.m_input_tokens / self.stride

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.d_model // self.transformer_n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads."""
        return self.transformer_n_kv_heads or self.transformer_n_heads

    @property
    def n_state_slots(self) -> int:
        """Slots that the state carries: pooling looks back n slots from the start of a group of writes."""
        return self.n_ssm_outputs + self.write_group - 1

    def summary(self) -> str:
        """A few lines that describe the configuration."""
        return "\n".join(
            [
                f"Stride Memory Transformer, encoding {self.encoding!r}",
                f"  window       {self.window_size} = {self.n_ssm_outputs} slots + {self.m_input_tokens} tokens, "
                f"empty slots {self.empty_slots!r}",
                f"  writes       one every {self.stride} steps ({self.write_frequency:.2%}), in groups of {self.write_group}, "
                f"pooling the {self.pool_source!r}; each token is pooled {self.coverage:.1f} times"
                + ("" if self.writes else " (switched off)"),
                f"  slots        gates {self.slot_gate!r}, "
                + ("the newest read out to the head" if self.reads_out else "no readout"),
                f"  transformer  {self.transformer_n_layers} layers, width {self.d_model}, {self.transformer_n_heads} heads of "
                f"{self.head_dim} ({self.n_kv_heads} for keys and values)",
                f"  memory       {self.ssm_n_layers} Mamba layers, state {self.ssm_d_state}, conv {self.ssm_d_conv}, "
                f"expand {self.ssm_expand_factor}",
                f"  vocabulary   {self.vocab_size}, embedding tied to the head",
            ]
        )
