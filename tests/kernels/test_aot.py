"""Compiling ahead of time says what it cannot do. What the kernels compile to is held by ``test_kernel_budgets.py``."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from smt_kernels.testing.aot import compile_ahead
from smt_kernels.testing.cases import make_case

pytestmark = pytest.mark.triton(launches=False)


def test_a_call_that_cannot_compile_says_why():
    call = make_case("window_attention", "forward", 64, torch.bfloat16, "meta").call
    broken = dataclasses.replace(call, arguments=call.arguments | {"scale": "a word"})
    with pytest.raises(RuntimeError, match="compiling ahead of time failed"):
        compile_ahead([broken], ["sm_80"])


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="target must be one of sm_80, sm_90, sm_100, gfx942, got 'sm_75'"):
        compile_ahead([], ["sm_75"])
