"""What a state holds: the tensors of one row, their shapes by name, and how many of their entries exist."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from smt.config import SMTConfig


@dataclass(frozen=True, eq=False)
class KeyValues:
    """Keys and values that one decoder layer keeps. What stands at entries that do not exist is never attended.

    Attributes:
        token_k, token_v: in ``stream`` (B, m, H_kv, D), a ring of the last tokens; in ``stride`` (B, m, H_kv, D), the tokens of
            the block's window from its first existing one on; in ``token`` empty, (B, 0, H_kv, D).
        slot_k, slot_v: (B, n, H_kv, D), in ``stream`` a ring; in ``stride`` the slots that the block sees, oldest first; in
            ``token`` the same, right-aligned as in the window.
    """

    token_k: Tensor
    token_v: Tensor
    slot_k: Tensor
    slot_v: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name here. Not by ``vars``: torch.compile follows it through a frozen class from 2.12 on only."""
        return {"token_k": self.token_k, "token_v": self.token_v, "slot_k": self.slot_k, "slot_v": self.slot_v}


def state_shapes(config: SMTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of one row of every tensor of a state, by the names of ``SMTState.tensors``."""
    shapes: dict[str, tuple[int, ...]] = {
        "tokens": (config.m_input_tokens, config.d_model),
        "slots": (config.n_state_slots, config.d_model),
    }
    for index in range(config.ssm_n_layers):
        shapes[f"conv.{index}"] = (config.ssm_d_inner, config.ssm_d_conv - 1)
        shapes[f"ssm.{index}"] = (config.ssm_d_inner, config.ssm_d_state)
    heads = config.n_kv_heads, config.head_dim
    for index in range(config.transformer_n_layers):
        for name in KeyValues.__dataclass_fields__:
            n_tokens = 0 if config.encoding == "token" else config.m_input_tokens
            shapes[f"layers.{index}.{name}"] = (n_tokens if name.startswith("token") else config.n_ssm_outputs, *heads)
    return shapes


def existing(config: SMTConfig, step: int) -> tuple[int, int]:
    """How many tokens and slots of a state exist after ``step`` steps."""
    n_slots = config.window.writes_made(step)
    if config.empty_slots == "zero":  # the entries before the first are there, as zeros
        step, n_slots = config.m_input_tokens, n_slots + config.n_ssm_outputs
    return min(step, config.m_input_tokens), min(n_slots, config.n_state_slots) if config.writes else 0
