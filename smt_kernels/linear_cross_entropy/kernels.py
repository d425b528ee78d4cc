"""Loss and gradients of a linear head with a Triton kernel between the products: logits become their gradient in place.

    m_i = max_v z_iv,   l_i = sum_v exp(z_iv - m_i),   loss_i = m_i - z_i,target + ln l_i,
    G_iv = exp(z_iv - m_i) / l_i - [v = target_i]

A program has one row. It reads it once for m and l, and once more, from its end to its start, to write G: of what it has read
last, most is still in the cache. As many programs run at a time as have rows that fit into the cache of second level.

The matrix library is several times slower where rows are not aligned, as they are not with GPT-2's 50,257 classes. So the
vocabulary is padded to a multiple of 64: the weight is copied once per call, into the dtype of hidden where it has another.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.launch import compiler_options, launch, power_of_two
from smt_kernels.linear_cross_entropy.chunks import backward, loss_and_gradients
from smt_kernels.tiles import LN_2, LOG2_E

__all__ = ["backward", "forward", "softmax_step"]

# Bytes of the logits of one chunk. More rows make better products and add less often to the gradient of the weight.
CHUNK_BYTES = 400 * 2**20
ALIGNMENT = 64
LONGEST_BLOCK = 4096
ELEMENTS_OF_WARP = 256


@triton.jit(do_not_specialize=["n_classes", "ignore_index"])
def _softmax_kernel(
    logits, targets, losses, n_classes, n_columns, ignore_index, WANTS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The loss of one row of logits, and their gradient in their place; zeros in the padding, and all over if it is ignored."""
    i_row = tl.program_id(0).to(tl.int64)
    p_row = logits + i_row * n_columns
    i_target = tl.load(targets + i_row)
    counts = i_target != ignore_index
    # A target that is no class has no logit: the loss shows it.
    is_class = (i_target >= 0) & (i_target < n_classes)
    z_target = tl.load(p_row + i_target, mask=is_class, other=float("nan")).to(tl.float32)

    z_max = tl.max(tl.full([BLOCK], float("-inf"), dtype=tl.float32), axis=0)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    n_blocks = tl.cdiv(n_columns, BLOCK)
    for i_block in tl.range(0, n_blocks, num_stages=3):
        o_class = i_block * BLOCK + tl.arange(0, BLOCK)
        # Columns are aligned, classes are not: a mask by these would make every load one of single elements.
        b_z = tl.load(p_row + o_class, mask=o_class < n_columns, other=0.0).to(tl.float32)  # [BLOCK]
        b_z = tl.where(o_class < n_classes, b_z, float("-inf"))
        z_new_max = tl.maximum(z_max, tl.max(b_z, axis=0))
        b_sum = b_sum * tl.exp2((z_max - z_new_max) * LOG2_E) + tl.exp2((b_z - z_new_max) * LOG2_E)  # [BLOCK]
        z_max = z_new_max
    total = tl.sum(b_sum, axis=0)
    loss = z_max - z_target + tl.log2(total) * LN_2
    tl.store(losses + i_row, tl.where(counts, loss, 0.0))

    if WANTS_GRADIENT:
        i_target = i_target.to(tl.int32)
        share = 1.0 / total
        for i_turn in range(0, n_blocks):
            o_class = (n_blocks - 1 - i_turn) * BLOCK + tl.arange(0, BLOCK)
            b_z = tl.load(p_row + o_class, mask=o_class < n_columns, other=0.0).to(tl.float32)  # [BLOCK]
            b_p = tl.exp2((b_z - z_max) * LOG2_E) * share  # [BLOCK]
            b_grad = tl.where(o_class == i_target, b_p - 1.0, b_p)  # [BLOCK]
            b_grad = tl.where((o_class < n_classes) & counts, b_grad, 0.0)
            tl.store(p_row + o_class, b_grad.to(logits.dtype.element_ty), mask=o_class < n_columns)


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns what ``chunks.loss_and_gradients`` does; arguments as in the package docstring."""
    n_classes = len(weight)

    def step(logits: Tensor, target: Tensor, losses: Tensor, wants_gradient: bool) -> Tensor:
        softmax_step(logits, target, losses, n_classes, ignore_index, wants_gradient)
        return logits

    padded = _padded(weight, hidden)
    n_rows = _rows_of_chunk(len(hidden), len(padded) * hidden.dtype.itemsize)
    wanted = wants_hidden, wants_weight
    *results, of_weight = loss_and_gradients(hidden, padded, targets.contiguous(), ignore_index, *wanted, n_rows, step)
    return *results, of_weight[:n_classes]


def softmax_step(
    logits: Tensor, targets: Tensor, losses: Tensor, n_classes: int, ignore_index: int, wants_gradient: bool
) -> None:
    """Write the losses (N,) of logits (N, C) in float32, and over the logits their gradient, if it is wanted.

    Args:
        logits: rows of C columns, of which the first ``n_classes`` are classes; contiguous.
    """
    n_columns = logits.shape[1]
    block = min(LONGEST_BLOCK, power_of_two(n_columns))
    launch(
        _softmax_kernel,
        (len(logits),),
        logits.device,
        *(logits, targets, losses, n_classes, n_columns, ignore_index),
        WANTS_GRADIENT=wants_gradient,
        BLOCK=block,
        **compiler_options(max(1, block // ELEMENTS_OF_WARP), num_stages=1),
    )


def _padded(weight: Tensor, hidden: Tensor) -> Tensor:
    """weight in the dtype of hidden, with zeros below up to a multiple of ``ALIGNMENT``; itself where it is that already."""
    n_classes = len(weight)
    n_columns = -(-n_classes // ALIGNMENT) * ALIGNMENT
    if n_columns == n_classes:
        return weight.to(hidden.dtype)
    padded = hidden.new_empty(n_columns, weight.shape[1])
    padded[:n_classes].copy_(weight)
    padded[n_classes:].zero_()
    return padded


def _rows_of_chunk(n_rows: int, row_bytes: int) -> int:
    """Rows of chunks of equal size, up to the alignment, each of at most ``CHUNK_BYTES``."""
    n_chunks = -(-n_rows * row_bytes // CHUNK_BYTES)
    return -(-n_rows // (n_chunks * ALIGNMENT)) * ALIGNMENT
