"""The launch tables have settings for every kernel, architecture, dtype and head size, and say what they do not hold."""

from __future__ import annotations

import pytest
import torch

from smt_kernels import launch
from smt_kernels.stream_attention import settings as stream
from smt_kernels.stream_attention_decode import settings as decode
from smt_kernels.window_attention import settings as window

TABLES = {name: module.TABLE for module in (window, stream, decode) for name, *_ in module.TABLE}


def test_every_kernel_of_the_tabled_operations_is_known():
    forms = {"window_attention": ("forward", "backward"), "stream_attention": ("forward", "forward_grouped", "steps", "slots")}
    expected = {f"{operation}_{form}" for operation, kernels in forms.items() for form in kernels}
    assert set(TABLES) == expected | {"stream_attention_decode"}


@pytest.mark.parametrize("size, padded", [(1, 16), (16, 16), (17, 32), (40, 64), (64, 64), (65, 128), (256, 256)])
def test_blocks_are_the_next_power_of_two_that_a_dot_takes(size, padded):
    assert launch.padded_size(size) == padded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", launch.FAMILIES)
@pytest.mark.parametrize("kernel", TABLES)
def test_every_head_size_has_settings_whose_chunks_fit_it(kernel, family, dtype, monkeypatch):
    monkeypatch.setattr(launch, "architecture_family", lambda device: family)
    for head_dim in range(1, 257):
        settings = launch.head_settings(TABLES[kernel], kernel, head_dim, dtype, torch.device("cpu"))
        assert launch.padded_size(head_dim) % settings.head_chunk == 0
        assert settings.query_block in (16, 32, 64, 128) and settings.key_block in (16, 32, 64)
        assert settings.num_warps in (4, 8)


@pytest.mark.parametrize("kernel", TABLES)
def test_a_table_holds_nothing_but_known_families_and_sizes(kernel):
    keys = {key for key in TABLES[kernel] if key[0] == kernel}
    assert keys == {(kernel, family, size) for family in launch.FAMILIES for size in (2, 4)}
    assert all(len(TABLES[kernel][key]) == len(launch.HEADS) for key in keys)


@pytest.mark.parametrize("kernel", TABLES)
def test_a_longer_head_is_refused(kernel):
    with pytest.raises(ValueError, match=f"head size must be at most 256 for {kernel}, got 257"):
        launch.head_settings(TABLES[kernel], kernel, 257, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize(
    "capability, family",
    [((8, 0), "ampere"), ((8, 9), "ampere"), ((9, 0), "hopper"), ((10, 3), "blackwell"), ((12, 0), "ampere")],
)
def test_capabilities_fall_into_the_family_with_their_instructions(capability, family, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(launch, "compute_capability", lambda device: capability)
    assert launch.architecture_family(torch.device("cuda", 0)) == family
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert launch.architecture_family(torch.device("cuda", 0)) == "cdna"
