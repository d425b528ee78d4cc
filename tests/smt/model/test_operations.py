"""How many operations a training step gives to its device, and that none of them waits for the host, counted without a GPU.

Fake tensors know shapes alone, so sizes are those of GPT-2 small. What would run is told by a dispatch mode: operations of our
own count as one each, views and allocations as none.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from smt import SMTConfig, StrideMemoryTransformer
from smt.model.generation import sample
from smt.model.rotary import rotation
from smt.state.state import SMTState
from smt_kernels import checks, use_backend

ENCODINGS = ["token", "stride", "stream"]
ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view")
# How a list of numbers comes to a device, and how a number comes back from it.
HOST = ("lift_fresh", "lift_fresh_copy", "_local_scalar_dense", "nonzero", "is_nonzero")


class Operations(TorchDispatchMode):
    """The names of the operations inside the block, of those that come from the host or go there, and all dtypes of results."""

    def __init__(self):
        super().__init__()
        self.names, self.of_host, self.dtypes = [], [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name in HOST:
            self.of_host.append(name)
        elif not func.is_view and name not in ALLOCATIONS and func.namespace != "prim":
            self.names.append(name)
        results = out if isinstance(out, tuple | list) else [out]
        self.dtypes |= {each.dtype for each in results if isinstance(each, torch.Tensor)}
        return out


def training_steps(monkeypatch, batch, length, n_steps, **switches):
    """The operations of several training steps, forward and backward, without the head, on the state carried."""
    config = SMTConfig(vocab_size=64, dropout=0.0, **{"encoding": "stream", "ssm_n_layers": 1, **switches})
    # What reads tokens and counts where they are on a CPU.
    monkeypatch.setattr(StrideMemoryTransformer, "_check", lambda *arguments: None)
    monkeypatch.setattr(checks, "counts", lambda *arguments, **settings: None)
    rotation(torch.arange(1), config.head_dim, config.rope_theta, torch.float32)  # makes a table, once per device
    steps, state = [], None
    with FakeTensorMode(allow_non_fake_inputs=True), use_backend("triton"):
        model = StrideMemoryTransformer(config)
        ids = torch.randint(64, (batch, length))
        for _ in range(n_steps):
            with Operations() as operations:
                hidden, aux = model.encode(ids, state)
                hidden.sum().backward()
            state = aux.state.detach()
            model.zero_grad()
            steps.append(operations)
    return steps


@pytest.mark.triton
@pytest.mark.interpreter
def test_a_layer_of_a_training_step_is_forty_operations_at_most(monkeypatch):
    two, four = (training_steps(monkeypatch, 8, 4096, 3, writes=False, transformer_n_layers=n_layers) for n_layers in (2, 4))
    per_layer = [(len(more.names) - len(less.names)) / 2 for less, more in zip(two, four, strict=True)]
    assert per_layer[0] <= 36, "dropout, where there is some, is two more of each sublayer"
    assert per_layer[1:] == per_layer[1:2] * 2 and per_layer[1] <= 40, "and keys and values go behind those that are held"
    once = [len(less.names) - 2 * layers for less, layers in zip(two, per_layer, strict=True)]
    assert max(once) <= 60, "what is done once for all layers"


@pytest.mark.triton
@pytest.mark.interpreter
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_training_step_needs_nothing_of_the_host_no_double_precision_and_no_sums_by_index(encoding, monkeypatch):
    sizes = dict(transformer_n_layers=2, d_model=128, transformer_n_heads=2, d_k=64)
    for operations in training_steps(monkeypatch, 2, 100, 3, encoding=encoding, **sizes):
        assert len(operations.names) > 100 and operations.of_host == []
        assert torch.float64 not in operations.dtypes
        # On a GPU these add in any order: two runs would differ in the last bits.
        assert not {name for name in operations.names if name.startswith(("index_add", "index_put", "scatter_add"))}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_single_steps_of_rows_that_go_together_need_nothing_of_the_host(encoding, monkeypatch):
    torch.manual_seed(3)
    sizes = dict(vocab_size=37, d_model=16, d_k=8, transformer_n_layers=1, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4)
    model = StrideMemoryTransformer(
        SMTConfig(**sizes, n_ssm_outputs=2, m_input_tokens=6, stride=3, write_group=2, encoding=encoding)
    ).eval()
    monkeypatch.setattr(StrideMemoryTransformer, "_check", lambda *arguments: None)
    with torch.no_grad():
        state = model(torch.randint(37, (2, 20)))[1].state
        for _ in range(3 * 2):
            with Operations() as operations:
                state = model(torch.tensor([[1], [2]]), state, overwrite_state=True)[1].state
            assert operations.of_host == ["lift_fresh"], "of the tokens here"
            assert torch.float64 not in operations.dtypes


def test_choosing_rows_sends_their_numbers_to_the_device_once_and_drawing_a_token_reads_nothing_back():
    with FakeTensorMode():
        state = SMTState.initial(SMTConfig(vocab_size=37), 3, device="cuda", dtype=torch.float32)
        with Operations() as operations:
            assert state.rows([2, 0]).steps == (0, 0)
        assert operations.names.count("_to_copy") == 1 and "_local_scalar_dense" not in operations.of_host
        logits = torch.empty(2, 37, device="cuda")
        with Operations() as operations:
            assert sample(logits, 0.8, 5, 0.9, None).shape == (2, 1)
        assert "exponential_" in operations.names and operations.of_host == [] and "_to_copy" not in operations.names
