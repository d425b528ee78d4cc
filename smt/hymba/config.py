"""Every size of a Hymba or one of its relatives, and what each of its layers is made of."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, NamedTuple

from smt.config import ModelConfig
from smt.runtime.fields import check_above, check_at_least, check_fields, check_fraction


class ArchType(str, Enum):
    """How attention and Mamba share the layers."""

    MAMBA = "mamba"
    GLOBAL = "global"
    LOCAL = "local"
    HYBRID_50_50 = "hybrid_50_50"
    HYBRID = "hybrid"
    PARALLEL = "parallel"


# "study" is the configuration of the documents that this project grew from, the others are of the paper's table 11.
PAPER = {"layout": "parallel", "n_meta_tokens": 128, "sliding_window": 1024, "kv_sharing": "pairs", "vocab_size": 32001}
PRESETS: dict[str, dict[str, Any]] = {
    "study": {},
    "125m": {**PAPER, "n_layers": 24, "d_model": 512, "n_heads": 8, "n_kv_heads": 4, "d_mlp": 1664},
    "350m": {**PAPER, "n_layers": 32, "d_model": 768, "n_heads": 12, "n_kv_heads": 4, "d_mlp": 2432},
}


class LayerPlan(NamedTuple):
    """What mixes the tokens in a layer, before its MLP.

    Attributes:
        attention: ``global``, ``local`` (the sliding window), or None.
        mamba: whether an SSM does; beside attention it is the paper's parallel block.
        kv_source: the layer whose keys and values attention reads, itself if it is no other's; None without attention.
    """

    attention: str | None
    mamba: bool
    kv_source: int | None


@dataclass(frozen=True, kw_only=True)
class HymbaConfig(ModelConfig):
    """Configuration of ``Hymba``; the defaults are those of the study in the source documents.

    Args:
        layout: what the layers are made of. ``mamba``: an SSM in every one; ``global`` and ``local``: attention in every one;
            ``hybrid_50_50``: global attention and an SSM, alternating; ``hybrid``: global attention in the layers
            ``global_layers``, local attention and an SSM alternating between them; ``parallel``: attention and an SSM side by
            side in every layer, as in the paper, with global attention in ``global_layers`` and local attention elsewhere.
        vocab_size: tokens in the vocabulary.
        d_model: width of embeddings and hidden states.
        n_layers: layers, each of a mixer and an MLP.
        n_heads: query heads.
        n_kv_heads: key/value heads; None: as many as query heads.
        d_mlp: width of the SwiGLU MLP; None: 8/3 of ``d_model``, rounded up to a multiple of 64.
        sliding_window: tokens that local attention sees, the query's own among them.
        global_layers: which layers of ``hybrid`` and ``parallel`` see everything; none: the first, the middle and the last.
        kv_sharing: which local layers read the keys and values of the one before: every second (``pairs``), all of a run
            without a global layer (``runs``), or no one (``none``). Only Mamba may lie between them.
        n_meta_tokens: learned vectors before every sequence, which go through every layer and are seen from everywhere.
        dropout: probability, on embeddings and residual branches in training.
        ssm_d_state: states of each channel of an SSM.
        ssm_d_conv: width of its convolution.
        ssm_expand_factor: its channels, as a multiple of ``d_model``.
        ssm_dt_rank: rank of its time-step projection; None: ceil(d_model / 16).
        initializer_range: standard deviation of fresh weights; None: 0.02 at a width of 768, and as much output at others.
        rope_theta: base of the rotary frequencies.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of range; the message names the field and its valid range.
    """

    layout: str = "parallel"
    vocab_size: int = 4000
    d_model: int = 512
    n_layers: int = 15
    n_heads: int = 8
    n_kv_heads: int | None = 4
    d_mlp: int | None = None
    sliding_window: int = 128
    global_layers: tuple[int, ...] = ()
    kv_sharing: str = "pairs"
    n_meta_tokens: int = 64
    dropout: float = 0.1
    ssm_d_state: int = 16
    ssm_d_conv: int = 4
    ssm_expand_factor: int = 2
    ssm_dt_rank: int | None = None
    initializer_range: float | None = None
    rope_theta: float = 10000.0

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "layout": tuple(layout.value for layout in ArchType),
        "kv_sharing": ("none", "pairs", "runs"),
    }

    def __post_init__(self) -> None:
        if isinstance(self.layout, ArchType):
            object.__setattr__(self, "layout", self.layout.value)
        if isinstance(self.global_layers, list):  # as JSON and YAML have it
            object.__setattr__(self, "global_layers", tuple(self.global_layers))
        check_fields(self)
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_mlp", "sliding_window")
        check_at_least(self, 1, *sizes, "ssm_d_state", "ssm_expand_factor", "ssm_dt_rank")
        check_at_least(self, 0, "n_meta_tokens")
        check_at_least(self, 2, "ssm_d_conv")
        check_fraction(self, "dropout", "initializer_range")
        check_above(self, 1, "rope_theta")
        if self.d_model % self.n_heads or self.head_dim % 2:
            raise ValueError(f"n_heads must divide d_model = {self.d_model} into even widths, got {self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads = {self.n_heads}, got {self.n_kv_heads}")
        for index in self.global_layers:
            if not 0 <= index < self.n_layers:
                raise ValueError(f"global_layers must lie in 0..n_layers - 1 = 0..{self.n_layers - 1}, got {index}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> HymbaConfig:
        """``study``, the configuration of the source documents, or ``125m`` or ``350m`` of the paper, fields overridden."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls.from_dict({**PRESETS[name], **overrides})

    def layers(self) -> tuple[LayerPlan, ...]:
        """What each layer is made of."""
        kinds = [self._kind(index) for index in range(self.n_layers)]
        sources: dict[int, int] = {index: index for index, (attention, _) in enumerate(kinds) if attention}
        for first, *others in self.get_kv_sharing_groups():
            sources.update(dict.fromkeys(others, first))
        return tuple(LayerPlan(attention, mamba, sources.get(index)) for index, (attention, mamba) in enumerate(kinds))

    def get_kv_sharing_groups(self) -> list[list[int]]:
        """The groups of two or more layers that share keys and values, which the first of each group makes."""
        runs: list[list[int]] = [[]]
        for index in range(self.n_layers):
            attention, _ = self._kind(index)
            if attention == "local":
                runs[-1].append(index)
            elif attention == "global":
                runs.append([])
        length = {"none": 1, "pairs": 2, "runs": self.n_layers}[self.kv_sharing]
        groups = [run[start : start + length] for run in runs for start in range(0, len(run), length)]
        return [group for group in groups if len(group) > 1]

    def head_counts(self, index: int) -> tuple[int, int, int]:
        """Query, key and value heads that a layer with attention projects, of width ``head_dim`` each.

        Beside an SSM the values of a head are as wide as the SSM's channels allow: ``ssm_expand_factor`` value heads to a key
        head. A layer that reads another's keys and values has none of its own.
        """
        plan = self.layers()[index]
        if plan.attention is None:
            raise ValueError(f"layer {index} has no attention in the layout {self.layout}")
        if plan.kv_source != index:
            return self.n_heads, 0, 0
        return self.n_heads, self.kv_heads, self.kv_heads * (self.ssm_expand_factor if plan.mamba else 1)

    def _kind(self, index: int) -> tuple[str | None, bool]:
        """The kind of attention in a layer, and whether it has an SSM."""
        everywhere = self.global_layers or (0, (self.n_layers - 1) // 2, self.n_layers - 1)
        reach = "global" if index in everywhere else "local"
        match ArchType(self.layout):
            case ArchType.MAMBA:
                return None, True
            case ArchType.GLOBAL:
                return "global", False
            case ArchType.LOCAL:
                return "local", False
            case ArchType.HYBRID_50_50:
                return ("global", False) if index % 2 == 0 else (None, True)
            case ArchType.HYBRID:
                return (reach, False) if reach == "global" or index % 2 == 0 else (None, True)
            case ArchType.PARALLEL:
                return reach, True

    @property
    def head_dim(self) -> int:
        """Width of a query and key head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def mlp_width(self) -> int:
        """Width of the MLP."""
        return self.d_mlp or -(-8 * self.d_model // (3 * 64)) * 64
