"""Attention alone: full causal attention, ``stream_attention`` per backend, and compiled FlexAttention with the same window."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from measure import Case, Unavailable
from names import FLEX, FULL
from torch import Tensor

from smt.model.cost import full_attention_ratio
from smt_kernels import WindowSpec, stream_attention
from smt_kernels.backends import TRITON_DTYPES

FLEX_BLOCK = 128
# The reference holds about eight T x (T + K) tensors with their gradients.
REFERENCE_BYTES = 2**31


@dataclass(frozen=True)
class AttentionSizes:
    """What attention runs on: B sequences, H heads of D."""

    batch: int
    n_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    window: WindowSpec

    def inputs(self, length: int, *, requires_grad: bool) -> list[Tensor]:
        """q, k, v (B, T, H, D) and memory_k, memory_v (B, K, H, D), with all slots that the sequence writes."""
        generator = torch.Generator(self.device).manual_seed(length)
        n_slots = self.window.writes_before(length - 1)
        return [
            torch.randn(
                self.batch, rows, self.n_heads, self.head_dim, generator=generator, dtype=self.dtype, device=self.device
            ).requires_grad_(requires_grad)
            for rows in (length, length, length, n_slots, n_slots)
        ]


Attention = Callable[..., Tensor]


def full_attention(q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor) -> Tensor:
    """Every token sees all tokens before it, and no slots."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, *, window: WindowSpec) -> Tensor:
    """The window as a mask over the keys [slots | tokens] of compiled FlexAttention.

    Raises:
        Unavailable: it does not compile here.
    """
    q, k, v = q.transpose(1, 2), torch.cat([memory_k, k], 1).transpose(1, 2), torch.cat([memory_v, v], 1).transpose(1, 2)
    block_mask = flex_block_mask(window, memory_k.shape[1], q.shape[2], q.device)
    try:
        return _compiled_flex_attention()(q, k, v, block_mask=block_mask).transpose(1, 2)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler raises is the reason why there is no row
        raise Unavailable(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}") from error


@lru_cache(maxsize=2)
def flex_block_mask(window: WindowSpec, n_slots: int, length: int, device: torch.device):
    """The BlockMask of ``window`` over [slots | tokens].

    Which blocks hold anything follows from the window's ends, so that no T x (T + K) mask is ever formed.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def visible(batch, head, query, key):
        first_slot, stop_slot = window.visible_slots(query)
        first_token, stop_token = window.visible_tokens(query)
        is_slot = (key < n_slots) & (key >= first_slot) & (key < stop_slot)
        return is_slot | ((key >= n_slots) & (key - n_slots >= first_token) & (key - n_slots < stop_token))

    n_query_blocks, n_key_blocks = -(-length // FLEX_BLOCK), -(-(n_slots + length) // FLEX_BLOCK)
    occupied = torch.zeros(n_query_blocks, n_key_blocks, dtype=torch.bool)
    for block in range(n_query_blocks):
        first, last = block * FLEX_BLOCK, min((block + 1) * FLEX_BLOCK, length) - 1
        slots = max(0, window.visible_slots(first)[0]), window.visible_slots(last)[1]
        tokens = n_slots + max(0, window.visible_tokens(first)[0]), n_slots + window.visible_tokens(last)[1]
        for start, stop in (slots, tokens):
            if start < stop:
                occupied[block, start // FLEX_BLOCK : (stop - 1) // FLEX_BLOCK + 1] = True
    counts = occupied.sum(dim=1, dtype=torch.int32)
    order = torch.argsort(occupied.int(), dim=1, descending=True, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        counts[None, None].to(device),
        order[None, None].to(device),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(length, n_slots + length),
    )


@lru_cache(maxsize=1)
def _compiled_flex_attention():
    from torch.nn.attention import flex_attention as flex

    return torch.compile(flex.flex_attention, dynamic=True)


def attention_cases(sizes: AttentionSizes, *, backward: bool, with_flex: bool) -> list[Case]:
    """The cases of one table, the baseline first."""
    window = sizes.window

    def prepare(attention: Attention, obstacle: Callable[[int], str | None]) -> Callable[[int], Callable[[], object]]:
        def of_length(length: int) -> Callable[[], object]:
            reason = obstacle(length)
            if reason is not None:
                raise Unavailable(reason)
            return _call(attention, sizes.inputs(length, requires_grad=backward), backward)

        return of_length

    cases = [Case(FULL, prepare(full_attention, lambda length: None), cost=lambda length: length**2)]

    def limit(length):
        return full_attention_ratio(length, window.size)

    obstacles = {"blocked": lambda length: None, "triton": triton_obstacle(sizes), "reference": _reference_obstacle(sizes)}
    for backend, obstacle in obstacles.items():
        run = _stream(window, backend)
        cost = (lambda length: length**2) if backend == "reference" else (lambda length: length)
        cases.append(Case(f"stream_attention, {backend}", prepare(run, obstacle), cost=cost, limit=limit))

    def run(*tensors):
        return flex_attention(*tensors, window=window)

    def prepare_flex(length: int) -> Callable[[], object]:
        call = prepare(run, flex_obstacle(sizes, backward, with_flex))(length)
        call()  # compiles
        return call

    cases.append(Case(FLEX, prepare_flex, cost=lambda length: length, limit=limit, calibrate=False))
    return cases


def _stream(window: WindowSpec, backend: str) -> Attention:
    return lambda *tensors: stream_attention(*tensors, window=window, backend=backend)


def _call(attention: Attention, inputs: list[Tensor], backward: bool) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(lambda: attention(*inputs))
    grad_out = torch.randn_like(inputs[0])
    # Full attention has no slots, so no gradients for them.
    return lambda: torch.autograd.grad(attention(*inputs), inputs, grad_out, allow_unused=True)


def triton_obstacle(sizes: AttentionSizes) -> Callable[[int], str | None]:
    def obstacle(length: int) -> str | None:
        if sizes.device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
            return "needs a GPU: Triton's interpreter is never timed"
        if sizes.dtype not in TRITON_DTYPES:
            return f"stream_attention has no Triton kernel for {sizes.dtype}"
        return None

    return obstacle


def _reference_obstacle(sizes: AttentionSizes) -> Callable[[int], str | None]:
    def obstacle(length: int) -> str | None:
        n_keys = length + sizes.window.writes_before(length - 1)
        needed = 8 * sizes.batch * sizes.n_heads * length * n_keys * sizes.dtype.itemsize
        if needed > REFERENCE_BYTES:
            return f"its T x (T + K) tensors need {needed / 2**30:.0f} GiB, more than {REFERENCE_BYTES / 2**30:.0f}"
        return None

    return obstacle


def flex_obstacle(sizes: AttentionSizes, backward: bool, wanted: bool) -> Callable[[int], str | None]:
    def obstacle(length: int) -> str | None:
        if not wanted:
            return "left out of the quick run: it compiles for longer than all else takes"
        if sizes.device.type == "cpu" and backward:
            return "FlexAttention has no backward pass on CPU"
        return None

    return obstacle
