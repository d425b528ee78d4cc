"""Predicted times: what counted bytes and FLOPs would take at a GPU's peaks, beside full attention at its least. Not measured.

    time = sum over launches of max(bytes / (bandwidth * share), FLOPs / peak) + launch time
    share = min(1, (occupancy / 50 %)^(1/3))

Bytes are those requested, as if nothing were found in a cache. Too few warps do not keep the memory busy: the share is a fit to
four launches on an H200, whose copies reach 88 % and whose large products 81 % of the data sheet, which stands for all cards.
What it misses, and by how much, is in docs/results.md: kernels that have few programs, or spill, take longer. Full attention is
taken at its best: each tensor moved once, each visible pair multiplied once, one launch per direction, every byte in time.
Peaks are those of NVIDIA's data sheets (A100, 2021; H100, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

from smt_kernels.testing.audit import Row

LAUNCH_SECONDS = 2e-6  # inside a CUDA graph; the host takes longer, but not while a device is busy
COPY_SHARE, PRODUCT_SHARE = 0.88, 0.81  # of the peaks, reached by a copy and by a product of 8,192^3
BUSY_OCCUPANCY = 0.5  # from which on all of the bandwidth is used
LENGTH, BATCH, HEADS = 4096, 8, 12
# The width of the model over the size of an operation without heads: pooling works at that width, a write at twice that.
MODEL_WIDTH = {"attention_pool": 1.0, "attention_pool_sequence": 1.0, "stride_write": 0.5}
# Of the size of a vocabulary, which says nothing of the width.
OF_VOCABULARY = ("linear_cross_entropy",)


@dataclass(frozen=True)
class GPU:
    """Peaks: bytes per second of memory, FLOPs per second on dense matrices by dtype.

    ``fp32`` is that of ordinary units, ``tf32x3`` that of fp32 as three products of tf32 on matrix units.
    """

    name: str
    bandwidth: float
    flops: dict[str, float]


# By target, because the counts of a target are those of its launch settings.
GPUS = {
    "sm_80": GPU("A100 SXM 80 GB", 2.039e12, {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12, "tf32x3": 156e12 / 3}),
    "sm_90": GPU("H100 SXM", 3.35e12, {"bf16": 989e12, "fp16": 989e12, "fp32": 66.9e12, "tf32x3": 495e12 / 3}),
}


def predicted_seconds(row: Row) -> float | None:
    """The call of ``row`` for a batch of 8 sequences of 4,096 (8 rows in decoding) and 12 heads; None without a GPU's data."""
    gpu = GPUS.get(row.key.target)
    if gpu is None:
        return None
    positions = BATCH if row.decoding else BATCH * LENGTH
    heads = HEADS if row.key.operation not in (*MODEL_WIDTH, *OF_VOCABULARY) else 1
    share = positions * heads / (row.tokens * row.heads)
    return sum(
        _seconds(
            gpu,
            "tf32x3" if row.key.dtype == "fp32" and kernel.matrix_instructions else row.key.dtype,
            share * launch.bytes / bandwidth_share(kernel.occupancy),
            share * launch.dot_flops,
        )
        for kernel, launch in zip(row.kernels, row.count.traffic.launches, strict=True)
    )


def bandwidth_share(occupancy: float) -> float:
    """How much of what a copy reaches a kernel of that occupancy does."""
    return min(1.0, (occupancy / BUSY_OCCUPANCY) ** (1 / 3))


def full_attention_seconds(row: Row) -> float | None:
    """Causal attention over 4,096 tokens, or one query over as many keys in decoding, of the width that ``row`` belongs to.

    None without a GPU's data, and beside the loss, which belongs to no width.
    """
    gpu = GPUS.get(row.key.target)
    if gpu is None or row.key.operation in OF_VOCABULARY:
        return None
    width = MODEL_WIDTH.get(row.key.operation, HEADS) * row.key.size
    itemsize = 4 if row.key.dtype == "fp32" else 2
    backward = row.key.direction == "backward"
    if row.decoding:
        tensors, pairs = 2, LENGTH
    else:
        # q, k, v, out forward; with dout, dq, dk and dv backward.
        tensors, pairs = 8 if backward else 4, LENGTH * (LENGTH + 1) // 2
    bytes_moved = tensors * BATCH * LENGTH * width * itemsize
    return _seconds(gpu, row.key.dtype, bytes_moved, (5 if backward else 2) * 2 * width * pairs * BATCH)


def _seconds(gpu: GPU, dtype: str, n_bytes: float, flops: float) -> float:
    memory, products = COPY_SHARE * gpu.bandwidth, PRODUCT_SHARE * gpu.flops[dtype]
    return max(n_bytes / memory, flops / products) + LAUNCH_SECONDS
