"""The memory: every S steps pool the window into one vector, run one step of the SSM, and its output is the newest slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smt.config import SMTConfig
from smt.model.mamba import MambaStack
from smt.model.weights import matrix_of
from smt.runtime.precision import dtype_of_products
from smt_kernels import MemoryWeights, WindowSpec, attention_pool_sequence, stride_memory
from smt_kernels.attention_pool.reference import Timeline
from smt_kernels.stride_memory.reference import groups_of


@dataclass(frozen=True, eq=False)
class Written:
    """What a run of writes produced.

    Attributes:
        slots: (B, K, d) the new slots, oldest first.
        conv, ssm: the states of the Mamba layers after the last write, (L, B, E, C - 1) and (L, B, E, N).
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

    def projections(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The matrices (d_k, d) of query and key, in ``dtype``.

        Raises:
            ValueError: one of the layers does more than a matrix.
        """
        w_q = matrix_of(self.w_q, self.d_model, "memory.pooling.w_q")
        w_k = matrix_of(self.w_k, self.d_model, "memory.pooling.w_k")
        return w_q.to(dtype), w_k.to(dtype)

    def draw_mask(self, like: Tensor, n_writes: int, size: int) -> Tensor | None:
        """The factors (B, K, W) of the weights of ``n_writes`` writes of ``size`` entries; None where there is no dropout."""
        if not self.training or self.dropout == 0:
            return None
        return F.dropout(like.new_ones(like.shape[0], n_writes, size), self.dropout)

    def forward(
        self,
        tokens: Tensor,
        slots: Tensor | None,
        projections: tuple[Tensor, Tensor],
        dropout_mask: Tensor | None,
        *,
        window: WindowSpec,
        timeline: Timeline,
    ) -> tuple[Tensor, Tensor]:
        """tokens (B, T, d) and slots (B, K, d) as ``timeline`` calls them -> pooled (B, n_writes, d), weights.

        ``projections`` are formed, and ``dropout_mask`` is drawn, once for all groups of writes of a pass.
        """
        return attention_pool_sequence(
            tokens,
            slots,
            *projections,
            window=window,
            **timeline._asdict(),
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

    def initialise(self) -> None:
        """Fresh weights."""
        for linear in (self.pooling.w_q, self.pooling.w_k):
            nn.init.normal_(linear.weight, std=self.config.initializer_std)
        self.ssm.initialise(self.config.initializer_std)

    @torch.no_grad()
    def match_scale(self, embedding: Tensor) -> None:
        """Give slots the root mean square of ``embedding`` (V, d): what is pooled together must be of one scale."""
        self.ssm.norm_f.weight.fill_(_scale(embedding))

    @torch.no_grad()
    def has_scale_of(self, embedding: Tensor) -> bool:
        """Whether the scale of slots is that of a fresh memory, or what ``match_scale`` made of ``embedding``; neither was
        trained or came from elsewhere, wherever the weights have been since."""
        weight = self.ssm.norm_f.weight
        return any(torch.equal(weight, torch.full_like(weight, of)) for of in (self.config.initializer_std, _scale(embedding)))

    def forward(
        self,
        tokens: Tensor,
        slots: Tensor,
        conv: Tensor,
        ssm: Tensor,
        *,
        first_step: int,
        writes: range,
        gate: Tensor | None = None,
        return_weights: bool = False,
    ) -> Written:
        """Make ``writes``, group by group.

        Args:
            tokens: (B, T, d) embeddings of the steps from ``first_step`` on, at least up to the last write's.
            slots: (B, K, d) the slots just before the first write.
            conv, ssm: the Mamba layers' states before the first write, (L, B, E, C - 1) and (L, B, E, N).
            writes: indices of the writes to make.
            gate: (B, len(writes)) bool, which of them each row makes; None: all. A row's states are those after its own last
                write, and the slots of writes that it does not make mean nothing.
        """
        size = self.config.window_size
        if writes.stop <= writes.start:  # compilers of torch 2.10 do not know whether a range of numbers that vary is empty
            empty = (tokens.new_zeros(tokens.shape[0], 0, width) for width in (self.config.d_model, size))
            new_slots, weights = empty
            return Written(new_slots, conv, ssm, weights if return_weights else None)
        dtype = dtype_of_products(tokens)
        pools_slots = self.config.pool_source == "window" and self.config.n_ssm_outputs > 0
        tokens, slots = tokens.to(dtype), slots.to(dtype) if pools_slots else None
        n_writes = writes.stop - writes.start  # ``len`` is a number that is fixed to compilers of torch 2.10
        mask = self.pooling.draw_mask(tokens, n_writes, size if pools_slots else self.config.m_input_tokens)
        make = self._fused if isinstance(self.ssm, MambaStack) and self.ssm.is_plain() else self._by_parts
        new_slots, conv, ssm, weights = make(tokens, slots, conv, ssm, first_step, writes, gate, mask)
        return Written(new_slots, conv, ssm, F.pad(weights, (size - weights.shape[-1], 0)) if return_weights else None)

    def _fused(
        self,
        tokens: Tensor,
        slots: Tensor | None,
        conv: Tensor,
        ssm: Tensor,
        first_step: int,
        writes: range,
        gate: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All writes as one operation, which takes the weights of layers that are then not called."""
        w_q, w_k = self.pooling.projections(tokens.dtype)
        return stride_memory(
            tokens,
            slots,
            conv,
            ssm,
            MemoryWeights(w_q=w_q, w_k=w_k, **self.ssm.stacked(tokens.dtype)),
            window=self.config.window,
            first_write=writes.start,
            n_writes=writes.stop - writes.start,
            write_group=self.config.write_group,
            first_step=first_step,
            normalise=self.pooling.normalise,
            gate=gate,
            dropout_mask=mask,
        )

    def _by_parts(
        self,
        tokens: Tensor,
        slots: Tensor | None,
        conv: Tensor,
        ssm: Tensor,
        first_step: int,
        writes: range,
        gate: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same, called module by module: where one is hooked, wrapped or another than it was built as."""
        weights, projections = self.ssm.prepare(), self.pooling.projections(tokens.dtype)
        n_slots, forgotten = None if slots is None else slots.shape[1], 0
        timeline = Timeline(writes.start, len(writes), self.config.write_group, first_step, writes.start - (n_slots or 0))
        new_slots, all_weights = [], []
        for group in groups_of(self.config.window, timeline, n_slots):
            pooled, of_pooling = self.pooling(
                tokens[:, group.tokens],
                None if slots is None else slots[:, group.slots.start - forgotten : group.slots.stop - forgotten],
                projections,
                None if mask is None else mask[:, group.part],
                window=self.config.window,
                timeline=group.timeline,
            )
            written, conv, ssm = self.ssm(pooled, conv, ssm, weights, None if gate is None else gate[:, group.part])
            new_slots.append(written)
            all_weights.append(of_pooling)
            if slots is not None:
                # Pooling never looks further back than the state does.
                slots = torch.cat([slots, written.to(slots.dtype)], dim=1)[:, -self.config.n_state_slots :]
                forgotten = n_slots + group.writes.stop - slots.shape[1]
        return torch.cat(new_slots, dim=1), conv, ssm, torch.cat(all_weights, dim=1)


def _scale(embedding: Tensor) -> float:
    return embedding.float().square().mean().sqrt().item()
