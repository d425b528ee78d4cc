"""RMSNorm as one node of the graph is PyTorch's own, and leaves to it what has a kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from smt.model.rms_norm import RMSNorm
from smt_kernels.testing.budget import assert_within_budget


class Calls(TorchDispatchMode):
    """The operations inside the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "prim":
            self.names.append(function._schema.name.partition("::")[2])
        return function(*args, **(kwargs or {}))


def fresh(dtype: torch.dtype = torch.float64) -> tuple[RMSNorm, torch.Tensor]:
    norm = RMSNorm(6, eps=1e-5, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    return norm, torch.randn(2, 3, 6, dtype=dtype, requires_grad=True)


def results(function, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    return {"y": y.detach()} | dict(zip(("dx", "dw"), torch.autograd.grad(y, inputs, torch.cos(y.detach())), strict=True))


def test_gradients_match_finite_differences():
    norm, x = fresh()
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,)), (x, norm.weight)
    )


def test_it_errs_at_most_twice_as_much_as_that_of_pytorch():
    norm, x = fresh(torch.float32)

    def theirs(x, weight):
        return F.rms_norm(x, (6,), weight, norm.eps)

    def ours(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    inputs = x, norm.weight
    in_double = [t.double() for t in inputs]
    assert_within_budget(results(ours, *inputs), lambda: results(theirs, *in_double), results(theirs, *inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_is_left_to_pytorch(dtype):
    norm, x = fresh(dtype)
    assert torch.equal(norm(x), F.rms_norm(x, (6,), norm.weight, norm.eps))


def test_it_compiles_whole():
    norm, x = fresh(torch.float32)
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), norm(x))


def test_a_single_vector_has_gradients():
    norm, x = RMSNorm(5, eps=1e-5).double(), torch.randn(5, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(norm(x).square().sum(), [x, norm.weight])
    want = torch.autograd.grad(norm(x[None]).square().sum(), [x, norm.weight])
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("of_x", "of_weight"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_two_dtypes_are_no_chain_of_operations_on_a_gpu(of_x, of_weight):
    norm = RMSNorm(6, eps=1e-5, dtype=of_weight)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 6).to(of_x)
    expected = F.rms_norm(x.double(), (6,), norm.weight.double(), norm.eps)
    assert norm(x).dtype == of_x
    torch.testing.assert_close(norm(x).double(), expected, rtol=torch.finfo(of_x).eps, atol=1e-7)
    with FakeTensorMode():
        on_gpu, calls = RMSNorm(6, eps=1e-5, dtype=of_weight, device="cuda"), Calls()
        with calls:
            assert on_gpu(torch.empty(3, 6, dtype=of_x, device="cuda")).dtype == of_x
    assert sorted(set(calls.names) - {"empty", "detach", "promote_types"}) == ["_fused_rms_norm", "_to_copy"]
    assert calls.names.count("_to_copy") <= 2
