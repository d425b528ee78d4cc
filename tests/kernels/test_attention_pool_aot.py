"""Attention pooling compiles for every supported architecture, on the matrix units, without spills, within shared memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smt_kernels import WindowSpec
from smt_kernels.testing.aot import TARGETS, Call, KernelReport, compile_ahead

pytestmark = pytest.mark.triton

WIDTHS = (256, 768)
KERNELS = ("mean_kernel", "pool_kernel", "query_backward_kernel", "entries_backward_kernel")


def calls(width: int, *, of_windows: bool = False) -> list[Call]:
    """Forward and backward over a sequence with slots, or over single windows, some of whose entries do not exist."""

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = (32,) if of_windows else (4, 32)
    inputs = {"w_q": tensor(width, width), "w_k": tensor(width, width), "dropout_mask": tensor(*rows, 65), "normalise": True}
    if of_windows:
        inputs |= {"windows": tensor(32, 65, width), "exists": tensor(32, 65, dtype=torch.bool)}
    else:
        inputs |= {"tokens": tensor(4, 600, width), "slots": tensor(4, 40, width)}
        inputs |= {"window": WindowSpec(), "timeline": (0, 32, 8, 0, 0)}
    kept = {name: tensor(*rows, width) for name in ("grad_pooled", "mean", "query", "u")}
    kept |= {"weights": tensor(*rows, 65, dtype=torch.float32), "grad_weights": None}
    name = "" if of_windows else "_sequence"
    module = "smt_kernels.attention_pool.kernels"
    return [Call(f"{module}:forward{name}", inputs), Call(f"{module}:backward{name}", inputs | kept)]


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, int, str], KernelReport]:
    compiled = compile_ahead([call for width in WIDTHS for call in calls(width)])
    cases = [(kernel, width, target) for target in TARGETS for width in WIDTHS for kernel in KERNELS]
    return dict(zip(cases, compiled, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", WIDTHS, ids="d{}".format)
@pytest.mark.parametrize("kernel", KERNELS)
class TestSequence:
    def test_it_multiplies_on_the_matrix_units(self, reports, kernel, width, target):
        report = reports[kernel, width, target]
        assert (report.kernel, report.target) == (kernel, target)
        assert sum(report.matrix_instructions.values()) > 0, report

    def test_it_spills_no_registers(self, reports, kernel, width, target):
        assert reports[kernel, width, target].spills == 0, reports[kernel, width, target]

    def test_shared_memory_fits_the_smallest_chip_of_the_family(self, reports, kernel, width, target):
        report = reports[kernel, width, target]
        assert 0 < report.shared_bytes <= report.shared_limit, report


def test_single_windows_spill_no_registers():
    for report in compile_ahead(calls(256, of_windows=True), ["sm_90"]):
        assert report.spills == 0 and 0 < report.shared_bytes <= report.shared_limit, report
