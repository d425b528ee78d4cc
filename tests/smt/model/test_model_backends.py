"""The whole model gives the same numbers on every backend, forward and backward, and trains compiled on each."""

from __future__ import annotations

import copy

import pytest
import torch

from smt import SMTConfig, StrideMemoryTransformer
from smt_kernels import last_choice, use_backend
from smt_kernels.backends import TRITON_LIMITS

TRITON = pytest.param("triton", marks=pytest.mark.triton)
BACKENDS = ["blocked", TRITON]
ENCODINGS = ["token", "stride", "stream"]
LENGTH = 40  # four writes of stride 8 in groups of two, and windows whose halves are partly empty


@pytest.fixture
def model(request, device):
    """A small model with every switch that reaches a kernel: grouped query heads, dropout off, groups of writes."""
    torch.manual_seed(5)
    config = SMTConfig(
        vocab_size=61,
        d_model=32,
        d_k=16,
        n_ssm_outputs=3,
        m_input_tokens=12,
        stride=8,
        write_group=2,
        transformer_n_layers=2,
        transformer_n_heads=2,
        transformer_n_kv_heads=1,
        ssm_n_layers=1,
        ssm_d_state=4,
        dropout=0.0,
        initializer_range=0.1,
        **request.param,
    )
    return StrideMemoryTransformer(config).to(device)


def every_encoding(*options):
    return pytest.mark.parametrize(
        "model",
        [{"encoding": encoding, **chosen} for encoding in ENCODINGS for chosen in options or [{}]],
        ids=lambda chosen: "-".join(map(str, chosen.values())),
        indirect=True,
    )


def loss_and_gradients(model, ids):
    loss, aux = model.loss(ids)
    return [loss.detach(), aux.state.slots.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("backend", BACKENDS)
@every_encoding({"pool_source": "window"}, {"pool_source": "tokens", "empty_slots": "zero"})
def test_every_backend_gives_the_loss_and_gradients_of_the_reference(model, backend, device):
    ids = torch.randint(61, (2, LENGTH), device=device)
    exact_model = copy.deepcopy(model).double()
    with use_backend("reference"):
        exact = loss_and_gradients(exact_model, ids)
        plain = loss_and_gradients(model, ids)
    with use_backend(backend):
        actual = loss_and_gradients(model, ids)
    attention = "stream_attention" if model.config.encoding == "stream" else "window_attention"
    ran = {name: last_choice(name).backend for name in (attention, "stride_memory")}
    assert set(ran.values()) == {backend}, ran
    assert relative_error(actual, exact) <= 2 * relative_error(plain, exact)


def relative_error(results, exact):
    """Of loss, slots and all gradients as one vector each: in a single number of them either side may be right by luck.

    Even a gradient that is a thousandth of the whole would stand out if it were wrong: errors are below a millionth.
    """
    errors = []
    for part in (slice(0, 1), slice(1, 2), slice(2, None)):
        got, want = (torch.cat([tensor.double().flatten() for tensor in side[part]]) for side in (results, exact))
        errors.append((got - want).norm() / want.norm())
    return torch.stack(errors).norm().item()


@pytest.mark.parametrize("backend", BACKENDS)
@every_encoding()
def test_a_training_step_compiles_whole_on_every_backend(model, backend, device):
    ids = torch.randint(61, (1, 20), device=device)
    parameters = list(model.parameters())
    with use_backend(backend):
        torch._dynamo.reset()
        compiled = torch.compile(lambda ids: model.loss(ids)[0], fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(ids), parameters)
        want = torch.autograd.grad(model.loss(ids)[0], parameters)
    for (name, _), actual, expected in zip(model.named_parameters(), got, want, strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.triton
def test_every_operation_has_a_kernel():
    operations = {"window_attention", "stream_attention", "attention_pool", "attention_pool_sequence", "stride_write"}
    operations |= {"stride_memory"}
    assert operations <= set(TRITON_LIMITS)
