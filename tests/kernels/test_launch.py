"""The launch tables have settings for every kernel, architecture, dtype and head size, and say what they do not hold."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

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
    [
        ((8, 0), "ampere"),
        ((8, 9), "ampere"),
        ((9, 0), "hopper"),
        ((10, 3), "blackwell"),
        ((11, 0), "blackwell"),
        ((12, 0), "ampere"),
    ],
)
def test_capabilities_fall_into_the_family_with_their_instructions(capability, family, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(launch, "compute_capability", lambda device: capability)
    assert launch.architecture_family(torch.device("cuda", 0)) == family
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert launch.architecture_family(torch.device("cuda", 0)) == "cdna"


def test_the_compiler_takes_the_capability_of_a_device_for_a_constant():
    assert vars(launch.compute_capability) == vars(torch.compiler.assume_constant_result(lambda: None))


class Compiled:
    """What a launch leaves behind: it can be launched again without its compiler."""

    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append((grid, arguments))


class Kernel:
    """As Triton's jit functions: a grid gives what launches, and launching returns what was compiled."""

    def __init__(self):
        self.compilations, self.calls = [], []
        self.device_caches, self.pre_run_hooks = {}, []
        self.arg_names = ["x", "strides", "n", "width", "BLOCK"]
        self.params = [SimpleNamespace(name=name, do_not_specialize=name == "n") for name in self.arg_names]

    def __getitem__(self, grid):
        def run(*arguments, **named):
            self.compilations.append((grid, arguments, named))
            return Compiled(self.calls)

        return run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_calls", {})
    return Kernel()


def launched(kernel, x, n=5, **changes):
    named = {"BLOCK": 64, "n": n, "width": 16, "num_warps": 4} | changes
    launch.launch(kernel, (3,), torch.device("cuda", 0), x, x.stride(), **named)


def test_a_second_launch_calls_what_the_first_one_compiled_with_its_arguments_in_order(kernel):
    first, second = torch.zeros(2, 4), torch.ones(2, 4)
    launched(kernel, first)
    launched(kernel, second, n=7)
    assert [grid for grid, _, _ in kernel.compilations] == [(3,)]
    ((grid, (x, *others)),) = kernel.calls
    assert grid == (3, 1, 1) and x is second and others == [(4, 1), 7, 16, 64]


@pytest.mark.parametrize(
    "change",
    [
        {"width": 1},
        {"BLOCK": 32},
        {"num_warps": 8},
        {"num_stages": 2},
        {"width": None},
        {"n": 2**31},
        {"n": -(2**31) - 1},
        {"n": True},
        {"x": torch.zeros(2, 4).half()},
        {"x": torch.zeros(4, 2).T},
        {"x": torch.zeros(9)[1:].view(2, 4)},
    ],
    ids=[
        "a size",
        "a block",
        "an option",
        "one more option",
        "no size",
        "64 bits",
        "64 bits below zero",
        "a bool",
        "a dtype",
        "strides",
        "an alignment",
    ],
)
def test_whatever_code_may_depend_on_is_compiled_anew(kernel, change):
    x = torch.zeros(2, 4)
    launched(kernel, x)
    launched(kernel, **{"x": x} | change)
    assert len(kernel.compilations) == 2 and not kernel.calls


def test_rocm_decides_by_itself_what_code_depends_on(kernel, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for _ in range(2):
        launched(kernel, torch.zeros(2, 4))
    assert len(kernel.compilations) == 2 and not kernel.calls


def test_each_device_has_its_own_code_and_is_the_current_one_of_its_launches(kernel, monkeypatch):
    current = [0]

    @contextlib.contextmanager
    def device(chosen):
        current.append(chosen.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    seen, launch_compiled = [], launch._launch_compiled
    monkeypatch.setattr(launch, "_launch_compiled", lambda *args: seen.append(current[-1]) or launch_compiled(*args))
    x = torch.zeros(2, 4)
    for index in (0, 1, 0, 1):
        launch.launch(kernel, (3,), torch.device("cuda", index), x, x.stride(), BLOCK=64, n=5, width=16)
    assert seen == [0, 1, 0, 1] and len(kernel.compilations) == len(kernel.calls) == 2 and current == [0]


def test_a_kernel_with_hooks_is_launched_with_them(kernel):
    kernel.pre_run_hooks.append(lambda *arguments, **named: None)
    for _ in range(2):
        launched(kernel, torch.zeros(2, 4))
    assert len(kernel.compilations) == 2 and not kernel.calls


def test_what_is_remembered_of_launches_does_not_grow_for_ever(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_MOST_COMPILED", 2)
    for width in range(1, 6):
        launched(kernel, torch.zeros(2, 4), width=width)
    (calls,) = launch._calls.values()
    assert len(kernel.compilations) == 5 and len(calls.compiled) <= 2


@pytest.mark.triton(launches=False)
def test_the_installed_triton_has_what_launches_rely_on():
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    def function(x, n, BLOCK):
        pass

    jitted = JITFunction(function, do_not_specialize=["n"])
    assert hasattr(jitted, "device_caches") and jitted.arg_names == ["x", "n", "BLOCK"] and not jitted.pre_run_hooks
    assert [parameter.name for parameter in jitted.params if parameter.do_not_specialize] == ["n"]
    assert callable(CompiledKernel.__getitem__)
