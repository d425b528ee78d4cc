"""Attention pooling in Triton: two launches forward, two backward, and the matrix library between them.

    mean (launch);   query = mean W_q^T;   u = query W_k;   weights and pooled (launch)
    du (launch);   dquery = du W_k^T;   dmean = dquery W_q;   dW_q = dquery^T mean;   dW_k = query^T du;   dx (launch)

Since q . (W_k x) = (W_k^T q) . x, keys are never formed, and since windows are read where they lie in the sequence, neither are
windows. Entries must be read by both launches of a direction, as u depends on the mean of all of them. Mean, query, u and their
gradients have the dtype of the entries, which is what matrix units multiply; weights and all sums inside a program are fp32.

Names in the kernels: i_ index, o_ offsets, m_ mask, p_ pointers, b_ block of values, with its shape behind it. P windows and
E entries are taken at a time, CHUNK of WIDTH elements of each; an entry wider than CHUNK is split over the second grid axis:
each program reads the whole width for scores and norms, and writes its own chunk of the results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from smt_kernels import checks
from smt_kernels import launch as launching
from smt_kernels.attention_pool.backward_kernels import entries_backward_kernel, query_backward_kernel
from smt_kernels.attention_pool.forward_kernels import mean_kernel, pool_kernel
from smt_kernels.attention_pool.reference import Inputs, Kept, Timeline
from smt_kernels.attention_pool.strips import Strips, strips_of
from smt_kernels.launch import LaunchSettings, ceil_div, launch, padded_size
from smt_kernels.window import WindowSpec

# Windows of a strip, and entries that are multiplied at a time: the least that a dot takes, as programs hold whole entries.
WINDOWS = ENTRIES = 16
# As many programs keep the multiprocessors of a large GPU at work. On an H100 mean, pool and query_backward took, for 8 rows of
# 8 windows, 63 us with one window a program and 139 with eight; for 32 rows 109 with two, 181 with one and 138 with eight.
PROGRAMS = 128


def forward(inputs: Inputs, window: WindowSpec, timeline: Timeline, normalise: bool) -> tuple[Tensor, Kept]:
    """Returns pooled (B, n_writes, d) and what ``backward`` needs."""
    inputs, timeline = Inputs(*inputs), Timeline(*timeline)  # plain tuples where compiled ahead of time
    strips = strips_of(inputs, window, timeline)
    tokens, (batch, n_writes) = inputs.tokens, strips[:2]
    width, rank = tokens.shape[-1], len(inputs.w_q)
    weights = tokens.new_empty((batch, n_writes, strips.n_memory + strips.n_tokens), dtype=torch.float32)
    pooled, mean, query, u = (tokens.new_empty((batch, n_writes, size)) for size in (width, width, rank, width))
    kept = Kept(weights, mean, query, u)
    pool(inputs, strips, (n_writes, 1), normalise, Kept(*(tensor.flatten(0, 1) for tensor in kept)), pooled.flatten(0, 1))
    return pooled, kept


def pool(inputs: Inputs, strips: Strips, strides_place: tuple[int, int], normalise: bool, kept: Kept, pooled: Tensor) -> None:
    """Fill ``pooled`` (windows, d) and what is kept of each window, which lie at ``strides_place`` of row and window."""
    results = {"strides_place": strides_place, "dropout": _packed(inputs.dropout)}
    _launch(mean_kernel, inputs, strips, normalise, mean=kept.mean, strides_place=strides_place)
    torch.mm(kept.mean, inputs.w_q.T, out=kept.query)
    torch.mm(kept.query, inputs.w_k, out=kept.u)
    results |= {"pooled": pooled, "weights": kept.weights, "scale": len(inputs.w_q) ** -0.5}
    _launch(pool_kernel, inputs, strips, normalise, u=kept.u, **results)


def backward(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    kept: Kept,
    inputs: Inputs,
    window: WindowSpec,
    timeline: Timeline,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens (B, T, d), slots (B, K, d; empty for None), w_q and w_k (d_k, d), each in the dtype of its input."""
    inputs, timeline = Inputs(*inputs), Timeline(*timeline)  # plain tuples where compiled ahead of time
    strips = strips_of(inputs, window, timeline)
    tokens, slots = inputs.tokens, inputs.slots
    kept = Kept(*(tensor.flatten(0, 1) for tensor in kept))
    grads = PoolGradients.empty(kept)
    place = strips.n_windows, 1
    d_tokens = tokens.new_empty(tokens.shape)
    d_slots = d_tokens if slots is None else slots.new_empty(slots.shape)  # without slots, no program takes any
    query_backward(grad_pooled, grad_weights, inputs, strips, place, normalise, kept, grads)
    entries_backward(grad_pooled, inputs, strips, place, normalise, kept, grads, d_tokens, d_slots)
    dw_q, dw_k = projections_backward(kept, grads)
    return d_tokens, tokens.new_empty(0) if slots is None else d_slots, dw_q, dw_k


class PoolGradients(NamedTuple):
    """Of each window: gradients, and what the gradients of entries need besides."""

    weights: Tensor  # (windows, W)
    mean: Tensor  # (windows, d)
    query: Tensor  # (windows, d_k)
    u: Tensor  # (windows, d)
    delta: Tensor  # (windows,), a . dw
    share: Tensor  # (windows,), that of an entry in the mean

    @classmethod
    def empty(cls, kept: Kept) -> PoolGradients:
        return cls(*map(torch.empty_like, kept), *(kept.weights.new_empty(len(kept.weights)) for _ in range(2)))


def query_backward(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    inputs: Inputs,
    strips: Strips,
    strides_place: tuple[int, int],
    normalise: bool,
    kept: Kept,
    grads: PoolGradients,
) -> None:
    """Fill ``grads`` from those of pooled (B, n_writes, d; any strides) and of the weights (windows, W)."""
    named = _of_windows(grad_pooled, inputs, strides_place, kept, grads)
    more = {"grad_weights": _packed(grad_weights), "mean": kept.mean, "du": grads.u}
    _launch(query_backward_kernel, inputs, strips, normalise, **named, **more)
    torch.mm(grads.u, inputs.w_k.T, out=grads.query)
    torch.mm(grads.query, inputs.w_q, out=grads.mean)


def entries_backward(
    grad_pooled: Tensor,
    inputs: Inputs,
    strips: Strips,
    strides_place: tuple[int, int],
    normalise: bool,
    kept: Kept,
    grads: PoolGradients,
    d_tokens: Tensor,
    d_slots: Tensor,
    *,
    adds: bool = False,
) -> None:
    """Fill, or with ``adds`` add to, d_tokens (B, T, d) and d_slots (B, K, d): those of the entries that ``strips`` holds."""
    named = _of_windows(grad_pooled, inputs, strides_place, kept, grads)
    named |= {"u": kept.u, "d_mean": grads.mean, "d_tokens": d_tokens, "d_slots": d_slots, "ADDS": adds}
    named |= {"strides_d_tokens": d_tokens.stride()[:2], "strides_d_slots": d_slots.stride()[:2]}
    _launch(entries_backward_kernel, inputs, strips, normalise, **named)


def projections_backward(kept: Kept, grads: PoolGradients) -> tuple[Tensor, Tensor]:
    """The gradients of w_q and w_k from those of all windows."""
    return grads.query.mT @ kept.mean, kept.query.mT @ grads.u


def _of_windows(
    grad_pooled: Tensor, inputs: Inputs, strides_place: tuple[int, int], kept: Kept, grads: PoolGradients
) -> dict[str, object]:
    """What both backward launches take."""
    return {
        "grad_pooled": grad_pooled,
        "strides_grad": grad_pooled.stride()[:2],
        "strides_place": strides_place,
        "weights": kept.weights,
        "d_weights": grads.weights,
        "delta": grads.delta,
        "share": grads.share,
        "dropout": _packed(inputs.dropout),
        "scale": len(inputs.w_q) ** -0.5,
    }


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _launch(kernel: triton.JITFunction, inputs: Inputs, strips: Strips, normalise: bool, **named: object) -> None:
    tokens, slots, exists = inputs.tokens, inputs.slots, inputs.exists
    width = tokens.shape[-1]
    name = "entries_added" if named.get("ADDS") else kernel.fn.__name__
    settings = pool_settings(name, width, tokens.dtype, tokens.device)
    (slots,) = checks.unit_stride(tokens if slots is None else slots)
    if kernel is entries_backward_kernel:
        blocks = ceil_div(strips.held_tokens, ENTRIES) + ceil_div(strips.held_slots, ENTRIES)
    else:
        of_strip = windows_of_strip(strips.n_rows, strips.n_windows, tokens.device)
        blocks, named = ceil_div(strips.n_windows, of_strip), named | {"windows_of_strip": of_strip}
    launch(
        kernel,
        (strips.n_rows * blocks, ceil_div(width, settings.head_chunk)),
        tokens.device,
        tokens=tokens,
        slots=slots,
        exists=_packed(exists),
        strides_tokens=tokens.stride()[:2],
        strides_slots=slots.stride()[:2],
        stride_exists=0 if exists is None or len(exists) == 1 else exists.shape[1],
        **dict(zip(strips._fields[1:], strips[1:], strict=True)),
        **named,
        NORMALISE=normalise,
        WIDTH=width,
        CHUNK=settings.head_chunk,
        P=WINDOWS,
        E=ENTRIES,
        **settings.options,
    )


def windows_of_strip(n_rows: int, n_windows: int, device: torch.device) -> int:
    """How many windows a program owns: the most, up to ``WINDOWS``, that leave ``PROGRAMS`` programs, or else one.

    More share more entries, and fewer leave more programs that each walk over fewer entries: 80 for one window of 65, 192 for
    eight. A number of the call alone, not of the device, so that GPUs of one architecture compute the same bits; the
    interpreter runs one program after the other.
    """
    if device.type == "cpu":
        return WINDOWS
    most = n_rows * n_windows // PROGRAMS
    return min(WINDOWS, 1 << (most.bit_length() - 1)) if most else 1


def pool_settings(kernel: str, width: int, dtype: torch.dtype, device: torch.device) -> LaunchSettings:
    """Settings of ``kernel`` for entries of ``width`` in ``dtype`` on ``device``: a rule in place of a table, for W = 65.

    An entry longer than the longest chunk is read by several programs, whole by each. The longest is 1,024 in half precision,
    512 where two sums have to be held, entries are added to, or shared memory is small (CDNA), and 256 in fp32, whose products
    take more registers. To ask for the next block of entries in advance (``num_stages``) gained nothing on an
    H100, and cost ``pool_kernel`` a fifth.
    """
    if dtype.itemsize == 4:
        longest = 256
    elif kernel in ("query_backward_kernel", "entries_added") or launching.architecture_family(device) == "cdna":
        longest = 512
    else:
        longest = 1024
    chunk = min(padded_size(width), longest)
    return LaunchSettings(num_warps=4 if chunk <= 128 else 8, head_chunk=chunk)
