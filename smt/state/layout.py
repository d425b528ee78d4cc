"""What a state holds: its tensors by name, with their shapes, and how many of their entries exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from smt.config import SMTConfig
from smt_kernels.window import Index


class Shape(NamedTuple):
    """The shape of a tensor that holds all layers and rows of a kind: (*layers, B, *row)."""

    layers: tuple[int, ...]
    row: tuple[int, ...]

    def of(self, batch_size: int) -> tuple[int, ...]:
        """With ``batch_size`` rows."""
        return (*self.layers, batch_size, *self.row)


# Which dimension of each tensor counts the rows.
ROWS = {"tokens": 0, "slots": 0, "conv": 1, "ssm": 1, "kv_tokens": 2, "kv_slots": 2}
KEYS_AND_VALUES = ("kv_tokens", "kv_slots")


def state_shapes(config: SMTConfig) -> dict[str, Shape]:
    """The shape of every tensor of a state, by the names of ``SMTState.tensors``."""
    memory, decoder = (config.ssm_n_layers,), (config.transformer_n_layers, 2)
    heads = config.n_kv_heads, config.head_dim
    return {
        "tokens": Shape((), (config.m_input_tokens, config.d_model)),
        "slots": Shape((), (config.n_state_slots, config.d_model)),
        "conv": Shape(memory, (config.ssm_d_inner, config.ssm_d_conv - 1)),
        "ssm": Shape(memory, (config.ssm_d_inner, config.ssm_d_state)),
        "kv_tokens": Shape(decoder, (0 if config.encoding == "token" else config.m_input_tokens, *heads)),
        "kv_slots": Shape(decoder, (config.n_ssm_outputs, *heads)),
    }


def without_entries(shape: Shape) -> Shape:
    """The shape of keys and values that have not been formed: no entry of any row."""
    return shape._replace(row=(0, *shape.row[1:]))


def misfit(config: SMTConfig, n_rows: int, tensors: Mapping[str, Tensor]) -> str | None:
    """What keeps ``tensors`` from being those of a state of ``n_rows`` rows, in words; None: nothing."""
    shapes = state_shapes(config)
    for name in sorted(tensors.keys() ^ shapes.keys()):
        return f"{'has an unknown' if name in tensors else 'lacks the'} tensor {name!r}"
    if config.encoding != "stream" and not any(tensors[name].numel() for name in KEYS_AND_VALUES):
        shapes |= {name: without_entries(shapes[name]) for name in KEYS_AND_VALUES}
    for name, shape in shapes.items():
        expected = shape.of(n_rows)
        if tuple(tensors[name].shape) != expected:
            return f"must have {name!r} of shape {expected}, got {tuple(tensors[name].shape)}"
        if not tensors[name].is_floating_point():
            return f"must have {name!r} of a floating dtype, got {tensors[name].dtype}"
    return None


def existing(config: SMTConfig, step: Index) -> tuple[Index, Index]:
    """How many tokens and slots of a state exist after ``step`` steps."""
    none = step * 0
    n_slots = config.window.writes_made(step) if config.writes else none
    if config.empty_slots == "zero":  # the entries before the first are there, as zeros
        step, n_slots = none + config.m_input_tokens, n_slots + config.n_ssm_outputs * config.writes
    return at_most(config.m_input_tokens, step), at_most(config.n_state_slots, n_slots)


def seen(config: SMTConfig, step: Index) -> tuple[Index, Index]:
    """How many tokens and slots of the window of ``step`` exist."""
    return existing(config, step + 1)[0], at_most(config.n_ssm_outputs, existing(config, step)[1])


def at_most(limit: int, value: Index) -> Index:
    """``value``, or ``limit`` where it is above."""
    return value.clamp(max=limit) if isinstance(value, Tensor) else min(limit, value)
