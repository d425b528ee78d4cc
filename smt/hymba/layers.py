"""One layer, x += mixer(RMSNorm(x)); x += SwiGLU(RMSNorm(x)), whose mixer is attention, Mamba, or both side by side.

Side by side (the paper's equations 1 to 3) one projection gives both their inputs, of which each forms its output y:

    [q k v u z] = W_in x;   y = W_out (RMSNorm_1(attention(q, k, v)) + RMSNorm_2(ssm(u, z))) / 2

with the weights of both norms as the learned scales. No projection has a bias, but for those that are Mamba's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smt.hymba.config import HymbaConfig
from smt.model.mamba import MambaMixer, SelectiveMixer
from smt.model.rms_norm import RMSNorm

NORM_EPS = 1e-6

# Heads of queries, keys and values (B, T, H + H_kv + H_v, D) -> what the queries attended to, (B, T, H, P, D).
Attend = Callable[[Tensor], Tensor]
# What an SSM carries: the last inputs of its convolution (B, E, C - 1) and its states (B, E, N); None where there is no SSM.
SSMState = tuple[Tensor | None, Tensor | None]
# What ``stride_write`` takes of an SSM besides; None where there is none.
SSMWeights = dict[str, Tensor] | None


class AttentionMixer(nn.Module):
    """Projections around attention, which is the caller's business."""

    def __init__(self, config: HymbaConfig, index: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.in_proj = nn.Linear(config.d_model, sum(config.head_counts(index)) * config.head_dim, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> heads of queries, keys and values."""
        return self.in_proj(x).unflatten(-1, (-1, self.head_dim))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return self.out_proj(attend(self.heads(x)).flatten(2))

    @torch.no_grad()
    def initialise(self, std: float, residual_std: float) -> None:
        """As ``SelectiveMixer.initialise``."""
        nn.init.normal_(self.in_proj.weight, std=std)
        nn.init.normal_(self.out_proj.weight, std=residual_std)


class ParallelMixer(SelectiveMixer):
    """Attention and an SSM on the same input, each normalised with a learned scale, and their mean projected."""

    def __init__(self, config: HymbaConfig, index: int) -> None:
        n_heads, width = sum(config.head_counts(index)), config.ssm_d_inner
        super().__init__(config, n_heads * config.head_dim + 2 * width)
        self.head_dim, self.n_heads = config.head_dim, n_heads
        self.norm_1 = RMSNorm(width, eps=NORM_EPS)
        self.norm_2 = RMSNorm(width, eps=NORM_EPS)

    def heads(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> heads of queries, keys and values."""
        return self._project(x)[0]

    def forward(
        self, x: Tensor, attend: Attend, state: SSMState, weights: dict[str, Tensor], gate: Tensor | None = None
    ) -> tuple[Tensor, SSMState]:
        """x (B, T, d) and the SSM's state -> (B, T, d) and the state after T steps."""
        heads, u, z = self._project(x)
        attended = attend(heads).flatten(2)
        scanned, *state = self.scan(u, z, *state, weights, gate)
        return self.out_proj((self.norm_1(attended) + self.norm_2(scanned)) / 2), tuple(state)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, u, z = self.in_proj(x).split([self.n_heads * self.head_dim, self.d_inner, self.d_inner], dim=-1)
        return heads.unflatten(-1, (-1, self.head_dim)), u, z


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) W_up x)."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        self.gate_and_up = nn.Linear(config.d_model, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class HymbaLayer(nn.Module):
    """A mixer and an MLP, each behind a norm and added to its input.

    Args:
        config: sizes.
        index: which of its layers.
    """

    def __init__(self, config: HymbaConfig, index: int) -> None:
        super().__init__()
        plan, self.name = config.layers()[index], f"layers.{index}.mixer"
        self.norm_1 = RMSNorm(config.d_model, eps=NORM_EPS)
        if plan.attention is None:
            self.mixer = MambaMixer(config)
        else:
            self.n_heads = config.head_counts(index)
            self.mixer = (ParallelMixer if plan.mamba else AttentionMixer)(config, index)
        self.norm_2 = RMSNorm(config.d_model, eps=NORM_EPS)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def prepare(self) -> SSMWeights:
        """The weights of its SSM, formed once for a pass; errors as ``SelectiveMixer.prepare``."""
        return self.mixer.prepare(self.name) if isinstance(self.mixer, SelectiveMixer) else None

    def forward(
        self, x: Tensor, attend: Attend, state: SSMState, weights: SSMWeights, gate: Tensor | None = None
    ) -> tuple[Tensor, SSMState]:
        """Run the layer, which leaves attention itself to its caller.

        Args:
            x: (B, T, d).
            attend: not called in a layer without attention.
            state: of the SSM before.
            weights: what ``prepare`` gave.
            gate: (B, T), which entries the SSM takes; None: all.

        Returns:
            (B, T, d), and the SSM's state after.
        """
        mixed, state = self._mix(self.norm_1(x), attend, state, weights, gate)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.norm_2(x))), state

    def _mix(
        self, x: Tensor, attend: Attend, state: SSMState, weights: SSMWeights, gate: Tensor | None
    ) -> tuple[Tensor, SSMState]:
        if isinstance(self.mixer, AttentionMixer):
            return self.mixer(x, attend), state
        if isinstance(self.mixer, ParallelMixer):
            return self.mixer(x, attend, state, weights, gate)
        mixed, *state = self.mixer(x, *state, weights, gate)
        return mixed, tuple(state)

    def initialise(self, std: float, n_layers: int) -> None:
        """Fresh weights as in GPT-2 and Mamba: normal, those whose output is added to x scaled by 1 / sqrt(2 layers)."""
        residual_std = std / math.sqrt(2 * n_layers)
        self.mixer.initialise(std, residual_std)
        nn.init.normal_(self.mlp.gate_and_up.weight, std=std)
        nn.init.normal_(self.mlp.down.weight, std=residual_std)
