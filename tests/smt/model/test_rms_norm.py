"""RMSNorm is PyTorch's own, of two dtypes as well."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from smt.model.rms_norm import RMSNorm


class Calls(TorchDispatchMode):
    """The operations inside the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "prim":
            self.names.append(function._schema.name.partition("::")[2])
        return function(*args, **(kwargs or {}))


def test_it_compiles_whole():
    norm, x = RMSNorm(6, eps=1e-5), torch.randn(2, 3, 6)
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), norm(x))


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
