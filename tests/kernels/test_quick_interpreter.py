"""What the mended interpreter looks up is what Triton makes anew, and it leaves out only what is not looked at."""

from __future__ import annotations

import dataclasses

import pytest

pytestmark = [pytest.mark.triton, pytest.mark.interpreter]


def attributes(value: object) -> dict[str, object]:
    """All but the handle, with types and shapes by what they say."""
    return {name: str(part) for name, part in vars(value).items() if name != "handle"}


@pytest.mark.parametrize("shape", [[4], [4, 8], "constexpr"], ids=repr)
@pytest.mark.parametrize("element", ["float32", "bfloat16", "int1", "pointer", "constant pointer"])
def test_types_and_values_are_those_of_triton_the_first_time_and_again(element, shape):
    import triton.language as tl
    from triton.runtime import interpreter

    from smt_kernels.testing import quick_interpreter

    pointers = {"pointer": tl.pointer_type(tl.float16), "constant pointer": tl.pointer_type(tl.float16, const=True)}
    scalar = pointers.get(element) or getattr(tl, element)
    shape = tl.tuple([tl.constexpr(2), tl.constexpr(16)]) if shape == "constexpr" else shape
    block = object.__new__(tl.block_type)
    quick_interpreter.ORIGINALS["block"](block, scalar, shape)
    for type in (block, scalar):
        value = object.__new__(tl.tensor)
        quick_interpreter.ORIGINALS["tensor"](value, None, type)
        for handle in ("first", "second"):
            again = tl.block_type(scalar, shape) if type is block else type
            assert again == type and attributes(again) == attributes(type)
            made = tl.tensor(handle, again)
            assert made.handle == handle and made.type is again and attributes(made) == attributes(value)
            assert interpreter._get_np_dtype(again) == quick_interpreter.ORIGINALS["np_dtype"](type)


def test_types_differ_as_they_did():
    import triton.language as tl

    assert tl.float32 != tl.int32 and tl.float32 == tl.dtype("fp32") and tl.float32 != "fp32"
    assert tl.block_type(tl.float32, [4]) != tl.block_type(tl.float32, [8]) != tl.block_type(tl.int32, [8])
    for shape, message in (([], "0d block_type"), ([3], "power of 2")):
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=message):
                tl.block_type(tl.float32, shape)


def test_sums_of_integers_are_checked_where_that_is_looked_at(monkeypatch):
    import torch
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import interpreter_builder

    @triton.jit
    def double(x):
        tl.store(x, tl.load(x) + tl.load(x))

    options, x = interpreter_builder.options, torch.tensor([2**30], dtype=torch.int32)
    assert not options.debug and not options.sanitize_overflow
    double[(1,)](x)
    assert x.item() == -(2**31)
    monkeypatch.setattr(interpreter_builder, "options", dataclasses.replace(options, sanitize_overflow=True))
    double[(1,)](x.fill_(2**30))  # the interpreter's own options: what is computed twice is not looked at
    assert x.item() == -(2**31)
