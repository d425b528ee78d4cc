"""The memory: every S steps pool the window into one vector, run one step of the SSM, and its output is the newest slot."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smt.config import SMTConfig
from smt.model.mamba import MambaStack
from smt.model.weights import matrix_and_bias
from smt_kernels import WindowSpec, attention_pool_sequence


@dataclass(frozen=True, eq=False)
class Written:
    """What a run of writes produced.

    Attributes:
        slots: (B, K, d) the new slots, oldest first.
        conv, ssm: (M, B, E, C - 1) and (M, B, E, N), the states of the Mamba layers after the last write.
        weights: (B, K, W) pooling weights before dropout, slots first; None when not asked for.
    """

    slots: Tensor
    conv: Tensor
    ssm: Tensor
    weights: Tensor | None


class AttentionPooling(nn.Module):
    """Learned weights of the entries of a window, queried by the window's own mean."""

    def __init__(self, config: SMTConfig) -> None:
        super().__init__()
        self.w_q = nn.Linear(config.d_model, config.d_k, bias=False)
        self.w_k = nn.Linear(config.d_model, config.d_k, bias=False)
        self.d_model = config.d_model
        self.dropout = config.pooling_dropout
        self.normalise = config.pooling_norm

    def projections(self) -> tuple[Tensor, Tensor]:
        """The matrices (d_k, d) of query and key.

        Raises:
            ValueError: one of the layers does more than a matrix.
        """
        w_q, _ = matrix_and_bias(self.w_q, self.d_model, "memory.pooling.w_q")
        w_k, _ = matrix_and_bias(self.w_k, self.d_model, "memory.pooling.w_k")
        return w_q, w_k

    def forward(
        self,
        tokens: Tensor,
        slots: Tensor | None,
        projections: tuple[Tensor, Tensor],
        *,
        window: WindowSpec,
        first_step: int,
        first_slot: int,
        writes: range,
        group: int,
    ) -> tuple[Tensor, Tensor]:
        """tokens (B, T, d) from ``first_step``, slots (B, K, d) from ``first_slot`` -> pooled (B, len(writes), d), weights.

        ``projections`` are formed once for all groups of writes of a pass.
        """
        dropout_mask = None
        if self.training and self.dropout > 0:
            size = window.n_tokens + (0 if slots is None else window.n_memory)
            dropout_mask = F.dropout(tokens.new_ones(tokens.shape[0], len(writes), size), self.dropout)
        return attention_pool_sequence(
            tokens,
            slots,
            *projections,
            window=window,
            first_write=writes.start,
            n_writes=len(writes),
            write_group=group,
            first_step=first_step,
            first_slot=first_slot,
            normalise=self.normalise,
            dropout_mask=dropout_mask,
        )


class StrideMemory(nn.Module):
    """Attention pooling and the SSM that turns each pooled window into a slot."""

    def __init__(self, config: SMTConfig) -> None:
        super().__init__()
        self.config = config
        self.pooling = AttentionPooling(config)
        self.ssm = MambaStack(config)
        self.ssm_is_loaded = False  # whether the SSM's weights, with the scale of their output, came from elsewhere

    def initialise(self) -> None:
        """Fresh weights."""
        for linear in (self.pooling.w_q, self.pooling.w_k):
            nn.init.normal_(linear.weight, std=self.config.initializer_std)
        self.ssm.initialise(self.config.initializer_std)

    @torch.no_grad()
    def match_scale(self, embedding: Tensor) -> None:
        """Give slots the root mean square of ``embedding`` (V, d): what is pooled together must be of one scale."""
        self.ssm.norm_f.weight.fill_(embedding.float().square().mean().sqrt().item())

    def forward(
        self,
        tokens: Tensor,
        slots: Tensor,
        conv: Tensor,
        ssm: Tensor,
        *,
        first_step: int,
        first_slot: int,
        writes: range,
        gate: Tensor | None = None,
        return_weights: bool = False,
    ) -> Written:
        """Make ``writes``, group by group.

        Args:
            tokens: (B, T, d) embeddings of the steps from ``first_step`` on, at least up to the last write's.
            slots: (B, K, d) the slots before the first write, from ``first_slot`` on.
            conv, ssm: (M, B, E, C - 1) and (M, B, E, N), the Mamba layers' states before the first write.
            writes: indices of the writes to make.
            gate: (B, len(writes)) bool, which of them each row makes; None: all. A row's states are those after its own last
                write, and the slots of writes that it does not make mean nothing.
        """
        pools_slots = self.config.pool_source == "window" and self.config.n_ssm_outputs > 0
        groups = self._groups(writes) if pools_slots else [writes] if writes else []
        ranges = [self._pooled_tokens(group, first_step) for group in groups]
        parameters, projections = self.ssm.prepare(), self.pooling.projections()
        new_slots, all_weights = [], []
        for group, (start, _), span in zip(groups, ranges, _Spans.apply(tokens, ranges), strict=True):
            pooled, weights = self.pooling(
                span,
                slots if pools_slots and slots.shape[1] else None,
                projections,
                window=self.config.window,
                first_step=first_step + start,
                first_slot=first_slot,
                writes=group,
                group=self.config.write_group,
            )
            of_group = None if gate is None else gate[:, group.start - writes.start : group.stop - writes.start]
            written, conv, ssm = self.ssm(pooled, conv, ssm, parameters, of_group)
            new_slots.append(written)
            if return_weights:
                all_weights.append(F.pad(weights, (self.config.window_size - weights.shape[-1], 0)))
            if pools_slots:
                # Pooling never looks further back than the state does.
                excess = max(0, slots.shape[1] + len(group) - self.config.n_state_slots)
                slots = torch.cat([slots, written], dim=1)[:, excess:]
                first_slot += excess
        empty = tokens.new_zeros(tokens.shape[0], 0, self.config.d_model)
        empty_weights = tokens.new_zeros(tokens.shape[0], 0, self.config.window_size)
        return Written(
            slots=torch.cat(new_slots, dim=1) if new_slots else empty,
            conv=conv,
            ssm=ssm,
            weights=(torch.cat(all_weights, dim=1) if all_weights else empty_weights) if return_weights else None,
        )

    def _groups(self, writes: range) -> list[range]:
        """``writes`` cut where a group ends."""
        size = self.config.write_group
        cuts = [writes.start, *range(writes.start // size * size + size, writes.stop, size), writes.stop]
        return [range(start, stop) for start, stop in pairwise(cuts) if start < stop]

    def _pooled_tokens(self, writes: range, first_step: int) -> tuple[int, int]:
        """The tokens [start, stop) that ``writes`` pool, counted from ``first_step``, of those that exist."""
        window = self.config.window
        start, _ = window.visible_tokens(window.write_step(writes.start))
        return max(start - first_step, 0), window.write_step(writes[-1]) + 1 - first_step


class _Spans(torch.autograd.Function):
    """Overlapping slices of a sequence, whose gradients are added into one buffer.

    Plain slices would each build a gradient of the whole sequence: quadratic in its length.
    """

    @staticmethod
    def forward(ctx, sequence: Tensor, ranges: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.ranges = sequence.shape, ranges
        return tuple(sequence[:, start:stop].clone() for start, stop in ranges)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].new_zeros(ctx.shape)
        for (start, stop), grad in zip(ctx.ranges, grads, strict=True):
            total[:, start:stop] += grad
        return total, None
