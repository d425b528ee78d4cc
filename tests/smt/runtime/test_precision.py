"""Which number format a device computes in."""

import pytest
import torch

from smt.runtime import precision


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_before_ampere_compute_in_full_precision(capability, expected, monkeypatch):
    monkeypatch.setattr(precision, "_capability", lambda device: capability)
    assert precision.has_bfloat16(torch.device("cuda")) is expected
    assert not precision.has_bfloat16(torch.device("cpu"))


def test_tensors_without_values_are_multiplied_in_their_own_format():
    nothing = torch.zeros(1, device="meta")
    with precision.precision(nothing.device), torch.autocast("cpu", torch.bfloat16):
        assert precision.dtype_of_products(nothing) == torch.float32


def test_products_are_in_the_format_of_autocast_but_for_fp64():
    low, wide = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert precision.dtype_of_products(low) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert (precision.dtype_of_products(low), precision.dtype_of_products(wide)) == (torch.bfloat16, torch.float64)
