"""Truncated backpropagation through time: chunks change what gradients reach, never what the loss is."""

import pytest
import torch

from smt import SMTConfig, StrideMemoryTransformer
from smt.data.walk import DocumentWalk
from smt.state.carried import CarriedStates
from smt.training.objective import ChunkLoss

CHUNK = 12


@pytest.fixture(params=["token", "stride", "stream"])
def model(request):
    torch.manual_seed(0)
    config = SMTConfig(
        vocab_size=40, d_model=16, d_k=8, dropout=0.0, n_ssm_outputs=3, m_input_tokens=6, stride=2, write_group=2,
        transformer_n_layers=2, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4, encoding=request.param,
        initializer_range=0.3,
    )  # fmt: skip
    return StrideMemoryTransformer(config).double()


def documents(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (length,), generator=generator) for length in lengths]


def trained_on(model, texts, length):
    """Sum of nats, and its gradients, of texts walked in chunks of ``length``."""
    objective, states, total = ChunkLoss(model), CarriedStates(), 0.0
    for batch in DocumentWalk(texts, batch_size=2, length=length, epochs=1, shuffle=False, together=True):
        reading, state = states.continued(batch)
        loss, state = objective(reading.input_ids, reading.targets, state)
        states.keep(batch, state)
        nats = loss * reading.n_targets
        nats.backward()
        total += nats.item()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return total, gradients


def test_chunks_cost_what_whole_documents_cost(model):
    texts = documents(50, 43, 37, 29)
    whole, _ = trained_on(model, texts, 1000)
    chunked, _ = trained_on(model, texts, CHUNK)
    assert chunked == pytest.approx(whole, rel=1e-12)


def test_where_nothing_crosses_a_chunk_gradients_are_those_of_full_backpropagation(model):
    texts = documents(*[CHUNK + 1] * 4)
    _, whole = trained_on(model, texts, 1000)
    _, chunked = trained_on(model, texts, CHUNK)
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-9, atol=1e-12)


def test_where_memory_crosses_a_chunk_its_gradient_ends_there(model):
    texts = documents(50, 50)
    _, whole = trained_on(model, texts, 1000)
    _, chunked = trained_on(model, texts, CHUNK)
    difference = chunked["memory.pooling.w_q.weight"] - whole["memory.pooling.w_q.weight"]
    assert difference.norm() > 0.01 * whole["memory.pooling.w_q.weight"].norm()
