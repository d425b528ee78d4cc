"""The launch table has settings for every kernel, architecture, dtype and head size, and says what it does not hold."""

from __future__ import annotations

import pytest
import torch

from smt_kernels import launch
from smt_kernels.window_attention.settings import TABLE

KERNELS = ("window_attention_forward", "window_attention_backward")


@pytest.mark.parametrize("size, padded", [(1, 16), (16, 16), (17, 32), (40, 64), (64, 64), (65, 128), (256, 256)])
def test_blocks_are_the_next_power_of_two_that_a_dot_takes(size, padded):
    assert launch.padded_size(size) == padded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", launch.FAMILIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_head_size_has_settings_whose_chunks_fit_it(kernel, family, dtype, monkeypatch):
    monkeypatch.setattr(launch, "architecture_family", lambda device: family)
    for head_dim in range(1, 257):
        settings = launch.head_settings(TABLE, kernel, head_dim, dtype, torch.device("cpu"))
        assert launch.padded_size(head_dim) % settings.head_chunk == 0
        assert settings.query_block in (16, 32, 64) and settings.num_warps in (4, 8)


def test_a_longer_head_is_refused():
    with pytest.raises(ValueError, match="head size must be at most 256 for window_attention_forward, got 257"):
        launch.head_settings(TABLE, "window_attention_forward", 257, torch.bfloat16, torch.device("cpu"))


def test_registers_are_limited_only_where_the_table_says_so():
    assert "maxnreg" not in launch.LaunchSettings(num_warps=4, head_chunk=64).options
    assert launch.LaunchSettings(num_warps=8, head_chunk=64, max_registers=128).options["maxnreg"] == 128


@pytest.mark.parametrize(
    "capability, family",
    [((8, 0), "ampere"), ((8, 9), "ampere"), ((9, 0), "hopper"), ((10, 3), "blackwell"), ((12, 0), "ampere")],
)
def test_capabilities_fall_into_the_family_with_their_instructions(capability, family, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launch.architecture_family(torch.device("cuda", 0)) == family
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert launch.architecture_family(torch.device("cuda", 0)) == "cdna"
