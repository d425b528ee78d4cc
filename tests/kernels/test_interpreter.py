"""The mended interpreter has a GPU's semantics, and traffic counts are exact and find what they are there to find."""

from __future__ import annotations

import gc

import pytest
import torch

pytestmark = [pytest.mark.triton, pytest.mark.interpreter]


@pytest.fixture
def kernels():
    import toy_kernels

    return toy_kernels


@pytest.fixture
def count_traffic():
    from smt_kernels.testing.traffic import count_traffic

    return count_traffic


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_dot_is_the_fp32_dot_of_the_values(kernels, dtype):
    x, y = torch.randn(2, 32, 32).to(dtype)
    out = torch.full((32, 32), float("nan"))
    kernels.dot[(1,)](x, y, out, N=32)
    exact = x.double() @ y.double()
    bound = 32 * torch.finfo(torch.float32).eps * (x.double().abs() @ y.double().abs())
    assert ((out - exact).abs() <= bound).all()


def test_casts_to_bfloat16_round_to_nearest_even(kernels):
    ties = torch.arange(64, dtype=torch.int32) * 0x8000 + 0x3F80_0000
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 1e-40])
    values = torch.cat([ties.view(torch.float32), -ties.view(torch.float32), special, torch.randn(120) * 1e3])
    out = torch.zeros(256, dtype=torch.bfloat16)
    kernels.cast[(1,)](values, out, N=256)
    torch.testing.assert_close(out, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit(), values.bfloat16().signbit() & ~values.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_casts_from_bfloat16_keep_the_value(kernels, dtype):
    values = torch.randn(64).bfloat16()
    out = torch.zeros(64, dtype=dtype)
    kernels.cast[(1,)](values, out, N=64)
    assert torch.equal(out, values.to(dtype))


def test_bfloat16_arithmetic_is_rounded_arithmetic_of_the_values(kernels):
    x, y = torch.randn(2, 64).bfloat16()
    sums, products, differences = (torch.zeros(64, dtype=torch.bfloat16) for _ in range(3))
    smaller = torch.zeros(64, dtype=torch.int32)
    kernels.arithmetic[(1,)](x, y, sums, products, differences, smaller, N=64)
    assert torch.equal(sums, x + y)
    assert torch.equal(products, x * y)
    assert torch.equal(differences, x - 1)
    assert torch.equal(smaller.bool(), x < y)


def test_a_reduction_over_bfloat16_is_refused(kernels):
    with pytest.raises(Exception, match="cast to fp32 before it"):
        kernels.row_sum[(1,)](torch.ones(16, dtype=torch.bfloat16), torch.zeros(1), N=16)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_custom_scans_and_reductions_combine_in_order(kernels, reverse):
    a, b = torch.rand(2, 8, 4)
    out, last = torch.zeros(8, 4), torch.zeros(4)
    kernels.linear_recurrence[(1,)](a, b, out, last, T=8, N=4, REVERSE=reverse)

    def recurrence(a, b):
        states = [b[0]]
        for t in range(1, 8):
            states.append(a[t] * states[-1] + b[t])
        return torch.stack(states)

    expected = recurrence(a.flip(0), b.flip(0)).flip(0) if reverse else recurrence(a, b)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, recurrence(a, b)[-1])


def test_scalar_conditions_compared_or_loaded_are_masks(kernels):
    flag, length = torch.tensor([True]), 3
    for flag[0] in (True, False):
        out = torch.zeros(16)
        kernels.fill_where[(1,)](flag, out, length, N=16)
        assert out.tolist() == ([1.0] * 8 + [2.0] * 8 if flag else [0.0] * 8 + [2.0] * 8)


@pytest.mark.parametrize("axis", [0, 1])
def test_sums_add_pairs_in_either_direction(kernels, axis):
    x = torch.ones(1024, 4)
    x[0] = 2**24  # from here on 1 is half of the distance between numbers: each addition that this term meets may lose it
    x = x if axis == 0 else x.T.contiguous()
    out = torch.zeros(4)
    kernels.sum_over[(1,)](x, out, *x.shape, AXIS=axis)
    assert ((out.double() - x.double().sum(axis)).abs() <= 32).all()


def test_the_language_is_patched_once_per_launch_and_module(kernels, monkeypatch):
    from triton.runtime import interpreter

    patched, patch = [], interpreter._patch_lang
    monkeypatch.setattr(interpreter, "_patch_lang", lambda function: patched.append(function.__module__) or patch(function))
    out = torch.zeros(4)
    for _ in range(2):
        patched.clear()
        kernels.doubled_often[(4,)](torch.ones(4), out, TIMES=3)
        assert out.tolist() == [8.0] * 4
        assert patched == ["toy_kernels"] * 2  # for the kernel, and for all that it calls


def test_traffic_counts_the_bytes_of_unmasked_lanes_and_the_flops_of_dots(kernels, count_traffic):
    x, out = torch.zeros(2, 20, dtype=torch.float16)
    with count_traffic() as traffic:
        kernels.add_one[(2,)](x, out, 20, BLOCK=16)
    assert traffic.read == {"x": 40} and traffic.written == {"out": 40} and traffic.bytes == 80
    assert [launch.grid for launch in traffic.launches] == [(2,)] and not traffic.raced
    with count_traffic() as traffic:
        kernels.dot[(1,)](torch.ones(16, 16), torch.ones(16, 16), torch.ones(16, 16), N=16)
    assert traffic.dot_flops == 2 * 16**3 and [launch.grid for launch in traffic.launches] == [(1,)]


def test_no_later_tensor_starts_where_one_given_to_a_kernel_was(kernels, count_traffic):
    with count_traffic() as traffic:
        for _ in range(4):
            kernels.add_one[(1,)](torch.zeros(16), torch.zeros(16), 16, BLOCK=16)
            gc.collect()  # the interpreter leaves them in cycles of references
        later = [torch.zeros(16) for _ in range(16)]
    assert len(traffic.addresses) == 8 and not traffic.addresses & {tensor.data_ptr() for tensor in later}


@pytest.mark.parametrize("shift", [-1, 1], ids=["before", "after"])
def test_an_access_outside_its_tensor_is_an_error(kernels, count_traffic, shift):
    buffer = torch.zeros(34)
    with pytest.raises(Exception, match="read outside 'x'"), count_traffic():
        kernels.add_one[(2,)](buffer[1:33], torch.zeros(32), 32, BLOCK=16, SHIFT=shift)


def test_an_access_to_the_gap_between_rows_is_an_error(kernels, count_traffic):
    every_other = torch.zeros(64).view(32, 2)[:, 0]
    with pytest.raises(Exception, match="read outside 'x'"), count_traffic():
        kernels.add_one[(1,)](every_other, torch.zeros(16), 16, BLOCK=16)


def test_a_race_between_programs_is_found(kernels, count_traffic):
    with count_traffic() as traffic:
        kernels.shifted_in_place[(2,)](torch.zeros(33), BLOCK=16)
    assert traffic.raced == {"x": 4}


def test_atomics_are_counted(kernels, count_traffic):
    with count_traffic() as traffic:
        kernels.total[(2,)](torch.ones(32), torch.zeros(1), BLOCK=16)
    assert traffic.atomics == 2
