"""Kernels reach what lies farther apart than 32 bits count, forward and backward, in any dimension."""

from __future__ import annotations

import functools
import mmap

import pytest
import torch
from torch import Tensor

from smt_kernels import (
    WindowSpec,
    attention_pool_sequence,
    stream_attention,
    stream_attention_decode,
    stride_write,
    window_attention,
)

pytestmark = [pytest.mark.triton, pytest.mark.interpreter]

APART = 2**30  # three entries lie across 2^31, the first offset that 32 bits do not hold


@functools.cache
def memory() -> mmap.mmap:
    """4 GiB of addresses, of which only what is written takes memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(-1, 2 * (2 * APART + 2**20), flags=flags)


def far(x: Tensor, dim: int, place: int) -> Tensor:
    """The same values, those of ``dim`` far apart."""
    strides = [APART if i == dim else stride for i, stride in enumerate(x.stride())]
    return torch.frombuffer(memory(), dtype=torch.float16).as_strided(x.shape, strides, 2**12 * place).copy_(x)


def random(*shape: int) -> Tensor:
    return torch.rand(shape).half()


def attention(**lengths: int) -> dict[str, Tensor]:
    return {name: random(3, length, 2 if name == "q" else 1, 16) for name, length in lengths.items()}


def windows() -> tuple:
    return functools.partial(window_attention, n_memory=1), attention(q=3, k=3, v=3), {}


def stream() -> tuple:
    inputs = attention(q=3, k=3, v=3, memory_k=3, memory_v=3)
    return functools.partial(stream_attention, window=WindowSpec(3, 4, 2), first_step=9, first_slot=2), inputs, {}


def decode() -> tuple:
    inputs = attention(q=1, k=3, v=3, memory_k=3, memory_v=3)
    counts = torch.full((3,), 3, dtype=torch.int32)
    call = functools.partial(stream_attention_decode, n_tokens=counts, n_slots=counts)
    return call, {name: x for name, x in inputs.items() if name != "q"}, {"q": inputs["q"][:, 0]}


def pool() -> tuple:
    call = functools.partial(attention_pool_sequence, window=WindowSpec(3, 1, 1), first_write=2, n_writes=1, first_step=1)
    call = functools.partial(call, first_slot=-1)
    return call, {"tokens": random(3, 3, 16), "slots": random(3, 3, 16)}, {"w_q": random(4, 16), "w_k": random(4, 16)}


def writes(n_writes: int) -> tuple:
    shapes = {"conv_state": (3, 16, 3), "ssm_state": (3, 16, 4), "conv_weight": (16, 4), "conv_bias": (16,), "a": (16, 4)}
    shapes |= {"x_proj_weight": (10, 16), "dt_proj_weight": (16, 2), "dt_proj_bias": (16,), "d": (16,)}
    others = {name: random(*shape) for name, shape in shapes.items()}
    others["a"].neg_()
    return stride_write, {"x": random(3, n_writes, 16), "z": random(3, n_writes, 16)}, others


CALLS = {
    "window_attention": windows,
    "stream_attention": stream,
    "stream_attention_decode": decode,
    "attention_pool_sequence": pool,
    "stride_write": functools.partial(writes, 3),
}
CASES = [(name, dim) for name in CALLS for dim in (0, 1)] + [("a single write", 0)]


@pytest.mark.parametrize(("name", "dim"), CASES)
def test_offsets_may_need_64_bits(name, dim):
    function, moved, others = {"a single write": functools.partial(writes, 1), **CALLS}[name]()
    differentiable = name != "stream_attention_decode"

    def results(tensors: dict[str, Tensor], place: int | None) -> list[Tensor]:
        inputs = {key: x.detach().requires_grad_(differentiable) for key, x in {**tensors, **others}.items()}
        out = function(**inputs, backend="triton")
        out = out[0] if isinstance(out, tuple) else out
        if not differentiable:
            return [out]
        grad = torch.linspace(-1, 1, out.numel()).half().view_as(out)
        grad = grad if place is None or out.shape[dim] == 1 else far(grad, dim, place)
        return [out.detach(), *torch.autograd.grad(out, list(inputs.values()), grad)]

    apart = {key: far(x, dim, place) for place, (key, x) in enumerate(moved.items())}
    for found, expected in zip(results(apart, len(apart)), results(moved, None), strict=True):
        assert torch.equal(found, expected)
