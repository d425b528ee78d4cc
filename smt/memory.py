"""The memory: every S steps pool the window into one vector, run one step of the SSM, and its output is the newest slot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smt.config import SMTConfig
from smt.mamba import MambaStack
from smt_kernels import WindowSpec, attention_pool_sequence


@dataclass(frozen=True)
class Written:
    """What a run of writes produced.

    Attributes:
        slots: (B, K, d) the new slots, oldest first.
        conv, ssm: the states of the Mamba layers after the last write.
        weights: (B, K, W) pooling weights before dropout, slots first; None when not asked for.
    """

    slots: Tensor
    conv: tuple[Tensor, ...]
    ssm: tuple[Tensor, ...]
    weights: Tensor | None


class AttentionPooling(nn.Module):
    """Learned weights of the entries of a window, queried by the window's own mean."""

    def __init__(self, config: SMTConfig) -> None:
        super().__init__()
        self.w_q = nn.Linear(config.d_model, config.d_k, bias=False)
        self.w_k = nn.Linear(config.d_model, config.d_k, bias=False)
        self.dropout = config.dropout
        self.normalise = config.pooling_norm

    def forward(
        self, tokens: Tensor, slots: Tensor | None, *, window: WindowSpec, first_step: int, first_slot: int, writes: range, group: int
    ) -> tuple[Tensor, Tensor]:
        """tokens (B, T, d) from ``first_step`` on, slots (B, K, d) from ``first_slot`` on -> pooled (B, len(writes), d), weights."""
        dropout_mask = None
        if self.training and self.dropout > 0:
            size = window.n_tokens + (0 if slots is None else window.n_memory)
            dropout_mask = F.dropout(tokens.new_ones(tokens.shape[0], len(writes), size), self.dropout)
        return attention_pool_sequence(
            tokens,
            slots,
            self.w_q.weight,
            self.w_k.weight,
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
            nn.init.normal_(linear.weight, std=self.config.initializer_range)
        self.ssm.initialise(self.config.initializer_range)

    @torch.no_grad()
    def match_scale(self, embedding: Tensor) -> None:
        """Give slots the root mean square of ``embedding`` (V, d): memory and tokens must be of one scale to be pooled together."""
        self.ssm.norm_f.weight.fill_(embedding.float().square().mean().sqrt().item())

    def forward(
        self,
        tokens: Tensor,
        slots: Tensor,
        conv: tuple[Tensor, ...],
        ssm: tuple[Tensor, ...],
        *,
        first_step: int,
        first_slot: int,
        writes: range,
        return_weights: bool = False,
    ) -> Written:
        """Make ``writes``, group by group.

        Args:
            tokens: (B, T, d) embeddings of the steps from ``first_step`` on, at least up to the last write's.
            slots: (B, K, d) the slots before the first write, from ``first_slot`` on.
            conv, ssm: the Mamba layers' states before the first write.
            writes: indices of the writes to make.
        """
        pools_slots = self.config.pool_source == "window" and self.config.n_ssm_outputs > 0
        new_slots, all_weights = [], []
        for group, span, span_step in self._spans(tokens, first_step, writes, pools_slots):
            pooled, weights = self.pooling(
                span,
                slots if pools_slots and slots.shape[1] else None,
                window=self.config.window,
                first_step=span_step,
                first_slot=first_slot,
                writes=group,
                group=self.config.write_group,
            )
            written, conv, ssm = self.ssm(pooled, conv, ssm)
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

    def _spans(self, tokens: Tensor, first_step: int, writes: range, pools_slots: bool) -> Iterator[tuple[range, Tensor, int]]:
        """Per group of writes: the writes, the tokens (B, L, d) that they pool, and the step of the first of these."""
        if not writes:
            return
        if not pools_slots:
            yield writes, tokens, first_step
            return
        window, size = self.config.window, self.config.write_group
        first_group, last_group = writes.start // size, (writes.stop - 1) // size
        # One overlapping view of all groups, so that the backward pass adds the groups' token gradients in one pass;
        # slicing per group would build a gradient of the whole sequence for every group.
        length = (size - 1) * self.config.stride + window.n_tokens
        start = window.visible_tokens(window.write_step(first_group * size))[0]
        stop = window.write_step(last_group * size + size - 1) + 1
        padded = F.pad(tokens, (0, 0, first_step - start, stop - first_step - tokens.shape[1]))
        spans = padded.unfold(1, length, size * self.config.stride).unbind(1)  # each (B, d, length)
        for index, span in zip(range(first_group, last_group + 1), spans, strict=True):
            group = range(max(writes.start, index * size), min(writes.stop, (index + 1) * size))
            span_step = start + (index - first_group) * size * self.config.stride
            skip = max(0, first_step - span_step)  # steps before the first that exists
            end = window.write_step(group.stop - 1) + 1 - span_step
            yield group, span[..., skip:end].transpose(1, 2), span_step + skip
