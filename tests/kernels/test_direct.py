"""An operation called straight computes what its operator does, and gives way to it where operators are observed."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from smt_kernels.direct import direct

calls: list[str] = []


def double(x: torch.Tensor, factor: float) -> torch.Tensor:
    calls.append("compute")
    return x * factor


operator = torch.library.custom_op("smt_kernels_tests::double", double, mutates_args=(), schema="(Tensor x, float f) -> Tensor")
operator.register_fake(lambda x, factor: torch.empty_like(x))


def setup_context(ctx, inputs, output):
    ctx.factor = inputs[1]


def gradients(ctx, grad):
    return grad * ctx.factor, None


operator.register_autograd(gradients, setup_context=setup_context)


class Seen(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def call():
    def observed_operator(*inputs):
        calls.append("operator")
        return operator(*inputs)

    calls.clear()
    return direct(observed_operator, double, setup_context, gradients)


def test_it_computes_the_operation_and_its_gradient_without_the_operator(call):
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(call(x, 3.0), 3 * x)
    assert torch.autograd.gradcheck(lambda x: call(x, 3.0), (x,))
    assert set(calls) == {"compute"}


def test_dispatch_modes_see_the_operator(call):
    with Seen() as seen:
        call(torch.ones(2), 3.0)
    assert "operator" in calls and "smt_kernels_tests.double.default" in seen.names


def test_fake_tensors_never_reach_the_implementation(call):
    with FakeTensorMode():
        assert call(torch.ones(2), 3.0).shape == (2,)
    assert calls == ["operator"]


def test_compiled_code_holds_the_operator(call):
    graphs = []

    def backend(graph, _):
        return graphs.append(graph.code) or graph

    compiled = torch.compile(lambda x: call(x, 3.0), fullgraph=True, backend=backend)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))
    assert "smt_kernels_tests.double" in graphs[0]
