"""The operations on every backend that runs natively here, with pytest-benchmark: ``pytest benchmarks``.

Small sizes, for watching one operation while it changes; ``bench_window.py`` is the comparison with full attention.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from smt_kernels import (
    MemoryWeights,
    WindowSpec,
    attention_pool,
    attention_pool_sequence,
    linear_cross_entropy,
    stream_attention,
    stride_memory,
    stride_write,
    window_attention,
)
from smt_kernels.backends import TRITON_LIMITS

WINDOW = WindowSpec()
LENGTH, HEADS, HEAD_DIM, WIDTH = 512, 4, 64, 256
WINDOWS, INNER, STATES, CONV, RANK = 16, 512, 16, 4, 16
VOCABULARY = 4001
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def window_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    tensors = [normal(WINDOWS, WINDOW.size, HEADS, HEAD_DIM) for _ in range(3)]
    return lambda *inputs, **named: window_attention(*inputs, n_memory=WINDOW.n_memory, **named), tensors


def stream_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    rows = LENGTH, LENGTH, LENGTH, *[WINDOW.writes_before(LENGTH - 1)] * 2
    tensors = [normal(1, count, HEADS, HEAD_DIM) for count in rows]
    return lambda *inputs, **named: stream_attention(*inputs, window=WINDOW, **named), tensors


def pool_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    tensors = [normal(WINDOWS, WINDOW.size, WIDTH), normal(WIDTH, WIDTH), normal(WIDTH, WIDTH)]
    return lambda *inputs, **named: attention_pool(*inputs, n_memory=WINDOW.n_memory, **named)[0], tensors


def pool_sequence_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    tensors = [normal(1, LENGTH, WIDTH), normal(WIDTH, WIDTH), normal(WIDTH, WIDTH)]

    def pool(tokens: Tensor, w_q: Tensor, w_k: Tensor, **named: str) -> Tensor:
        n_writes = WINDOW.writes_made(LENGTH)
        return attention_pool_sequence(tokens, None, w_q, w_k, window=WINDOW, first_write=0, n_writes=n_writes, **named)[0]

    return pool, tensors


def write_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    weights = {
        "conv_weight": normal(INNER, CONV),
        "conv_bias": normal(INNER),
        "x_proj_weight": normal(RANK + 2 * STATES, INNER) * INNER**-0.5,
        "dt_proj_weight": normal(INNER, RANK) * RANK**-0.5,
        "dt_proj_bias": normal(INNER),
        "a": -normal(INNER, STATES).exp(),
        "d": normal(INNER),
    }
    inputs_and_states = [normal(1, 8, INNER), normal(1, 8, INNER), normal(1, INNER, CONV - 1), normal(1, INNER, STATES)]

    def write(u: Tensor, z: Tensor, conv: Tensor, ssm: Tensor, *values: Tensor, **named: str) -> Tensor:
        return stride_write(u, z, conv, ssm, **dict(zip(weights, values, strict=True)), **named)[0]

    return write, [*inputs_and_states, *weights.values()]


def loss_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    targets = torch.randint(VOCABULARY, (LENGTH,), device=DEVICE)
    return lambda *inputs, **named: linear_cross_entropy(*inputs, targets, **named), [
        normal(LENGTH, WIDTH),
        normal(VOCABULARY, WIDTH) * WIDTH**-0.5,
    ]


def memory_case() -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Four layers, groups of eight writes."""
    layers, n_writes = 4, WINDOW.writes_made(LENGTH)
    weights = MemoryWeights(
        w_q=normal(WIDTH, WIDTH) * WIDTH**-0.5,
        w_k=normal(WIDTH, WIDTH) * WIDTH**-0.5,
        norm=normal(layers, WIDTH),
        in_proj=normal(layers, 2 * INNER, WIDTH) * WIDTH**-0.5,
        conv_weight=normal(layers, INNER, CONV),
        conv_bias=normal(layers, INNER),
        x_proj=normal(layers, RANK + 2 * STATES, INNER) * INNER**-0.5,
        dt_proj=normal(layers, INNER, RANK) * RANK**-0.5,
        dt_bias=normal(layers, INNER),
        a=-normal(layers, INNER, STATES).exp(),
        d=normal(layers, INNER),
        out_proj=normal(layers, WIDTH, INNER) * INNER**-0.5,
        norm_f=normal(WIDTH),
    )
    states = [normal(layers, 1, INNER, CONV - 1), normal(layers, 1, INNER, STATES)]
    no_slots = normal(1, 0, WIDTH)

    def write(tokens: Tensor, conv: Tensor, ssm: Tensor, *values: Tensor, **named: str) -> Tensor:
        settings = {"window": WINDOW, "first_write": 0, "n_writes": n_writes, "write_group": 8}
        return stride_memory(tokens, no_slots, conv, ssm, MemoryWeights(*values), **settings, **named).slots

    return write, [normal(1, LENGTH, WIDTH), *states, *weights]


CASES = {
    "window_attention": window_case,
    "stream_attention": stream_case,
    "attention_pool": pool_case,
    "attention_pool_sequence": pool_sequence_case,
    "linear_cross_entropy": loss_case,
    "stride_write": write_case,
    "stride_memory": memory_case,
}


def native_backends(operation: str) -> list[str]:
    """Never the interpreter: its times say nothing."""
    kernel = operation.removesuffix("_sequence")
    on_gpu = DEVICE.type == "cuda" and kernel in TRITON_LIMITS and os.environ.get("TRITON_INTERPRET") != "1"
    return ["blocked", "reference", *(["triton"] if on_gpu else [])]


@pytest.mark.parametrize("direction", ["forward", "forward-backward"])
@pytest.mark.parametrize(
    ("operation", "backend"), [(operation, backend) for operation in CASES for backend in native_backends(operation)]
)
def test_operation(benchmark, operation, backend, direction):
    torch.manual_seed(0)
    compute, tensors = CASES[operation]()
    benchmark.group = f"{operation}, {direction}"
    backward = direction == "forward-backward"
    if backward:
        tensors = [tensor.requires_grad_() for tensor in tensors]
        grad_out = torch.randn_like(compute(*tensors, backend=backend))

    def run() -> object:
        if backward:
            result = torch.autograd.grad(compute(*tensors, backend=backend), tensors, grad_out)
        else:
            with torch.no_grad():
                result = compute(*tensors, backend=backend)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    result = benchmark.pedantic(run, rounds=10, warmup_rounds=2)
    assert all(torch.isfinite(part).all() for part in (result if backward else (result,)))
