"""Window attention compiles for every supported architecture, on the matrix units, without spills, and touches what it must."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smt_kernels.testing.aot import TARGETS, Call, KernelReport, compile_ahead

pytestmark = pytest.mark.triton

HEAD_DIMS = (64, 128)
DIRECTIONS = ("forward", "backward")


def call(direction: str, head_dim: int, window: int = 65) -> Call:
    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    n_windows, heads = 4, 12
    arguments = {name: tensor(n_windows, window, heads, head_dim) for name in ("q", "k", "v")}
    arguments |= {name: tensor(n_windows, dtype=torch.int32) for name in ("valid_memory", "valid_tokens")}
    arguments |= {"n_memory": 15, "scale": head_dim**-0.5}
    if direction == "backward":
        lse = tensor(n_windows, heads, window, dtype=torch.float32)
        arguments |= {"grad_out": arguments["q"], "out": arguments["q"], "lse": lse}
    return Call(f"smt_kernels.window_attention.kernels:{direction}", arguments)


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, int, str], KernelReport]:
    cases = [(direction, head_dim) for direction in DIRECTIONS for head_dim in HEAD_DIMS]
    compiled = compile_ahead([call(*case) for case in cases])
    return {(*case, target): report for (target, case), report in zip(
        [(target, case) for target in TARGETS for case in cases], compiled, strict=True
    )}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids="D{}".format)
@pytest.mark.parametrize("direction", DIRECTIONS)
class TestWindowOf65:
    def test_it_multiplies_on_the_matrix_units(self, reports, direction, head_dim, target):
        report = reports[direction, head_dim, target]
        assert report.target == target and report.kernel == f"_{direction}_kernel"
        assert sum(report.matrix_instructions.values()) > 0, report

    def test_it_spills_no_registers(self, reports, direction, head_dim, target):
        assert reports[direction, head_dim, target].spills == 0, reports[direction, head_dim, target]

    def test_shared_memory_fits_the_smallest_chip_of_the_family(self, reports, direction, head_dim, target):
        report = reports[direction, head_dim, target]
        assert 0 < report.shared_bytes <= report.shared_limit, report

    def test_the_main_block_uses_the_instruction_of_its_generation(self, reports, direction, head_dim, target):
        expected = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}[target]
        assert expected in reports[direction, head_dim, target].matrix_instructions


def test_a_call_that_cannot_compile_says_why():
    broken = Call("smt_kernels.window_attention.kernels:forward", call("forward", 64).arguments | {"scale": "a word"})
    with pytest.raises(RuntimeError, match="compiling ahead of time failed"):
        compile_ahead([broken], ["sm_80"])


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="target must be one of sm_80, sm_90, sm_100, gfx942, got 'sm_75'"):
        compile_ahead([], ["sm_75"])
