"""Stream attention and its decoding step compile for every architecture, on the matrix units and without spills."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smt_kernels import WindowSpec
from smt_kernels.testing.aot import TARGETS, Call, KernelReport, compile_ahead

pytestmark = pytest.mark.triton

HEAD_DIMS = (64, 128)
DIRECTIONS = ("forward", "backward", "decode")


def call(direction: str, head_dim: int) -> Call:
    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    n_batch, length, n_slots, heads = 2, 4096, 255, 12
    if direction == "decode":
        arguments = {"q": tensor(n_batch, heads, head_dim)} | {name: tensor(n_batch, 50, heads, head_dim) for name in "kv"}
        arguments |= {name: tensor(n_batch, 15, heads, head_dim) for name in ("memory_k", "memory_v")}
        arguments |= {name: tensor(n_batch, dtype=torch.int32) for name in ("n_tokens", "n_slots")}
        return Call("smt_kernels.stream_attention_decode.kernels:forward", arguments | {"scale": head_dim**-0.5})
    arguments = {name: tensor(n_batch, length, heads, head_dim) for name in "qkv"}
    arguments |= {name: tensor(n_batch, n_slots, heads, head_dim) for name in ("memory_k", "memory_v")}
    arguments |= {"window": WindowSpec(), "scale": head_dim**-0.5, "first_step": 0, "first_slot": 0}
    if direction == "backward":
        lse = tensor(n_batch, heads, length, dtype=torch.float32)
        arguments |= {"grad_out": arguments["q"], "out": arguments["q"], "lse": lse}
    return Call(f"smt_kernels.stream_attention.kernels:{direction}", arguments)


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, int, str], list[KernelReport]]:
    """The kernels of every direction, head size and target."""
    found: dict[tuple[str, int, str], list[KernelReport]] = {}
    for head_dim in HEAD_DIMS:
        calls = {direction: call(direction, head_dim) for direction in DIRECTIONS}
        directions = {x.function: direction for direction, x in calls.items()}
        for report in compile_ahead(list(calls.values())):
            found.setdefault((directions[report.function], head_dim, report.target), []).append(report)
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids="D{}".format)
@pytest.mark.parametrize("direction", DIRECTIONS)
class TestWindowOf15And50:
    def test_every_kernel_multiplies_on_the_matrix_units(self, reports, direction, head_dim, target):
        for report in reports[direction, head_dim, target]:
            assert report.target == target and sum(report.matrix_instructions.values()) > 0, report

    def test_no_kernel_spills_registers(self, reports, direction, head_dim, target):
        for report in reports[direction, head_dim, target]:
            assert report.spills == 0, report

    def test_shared_memory_fits_the_smallest_chip_of_the_family(self, reports, direction, head_dim, target):
        for report in reports[direction, head_dim, target]:
            assert 0 < report.shared_bytes <= report.shared_limit, report
