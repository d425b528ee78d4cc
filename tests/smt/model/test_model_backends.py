"""The whole model gives the same numbers on every backend, forward and backward, and trains compiled on each."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from smt import SMTConfig, StrideMemoryTransformer
from smt_kernels import last_choice, use_backend
from smt_kernels.backends import TRITON_LIMITS

ENCODINGS = ["token", "stride", "stream"]
LENGTH = 40  # four writes of stride 8 in groups of two, and windows whose halves are partly empty
SHORT = 18  # two writes: every token has a window of its own, which takes the interpreter long


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


def on(backend, switches):
    marks = [pytest.mark.triton] if backend == "triton" else []
    return pytest.param(switches, backend, id="-".join(map(str, [*switches.values(), backend])), marks=marks)


FROM_THE_WINDOW, FROM_TOKENS = {"pool_source": "window"}, {"pool_source": "tokens", "empty_slots": "zero"}


def loss_and_gradients(model, ids):
    loss, aux = model.loss(ids)
    return [loss.detach(), aux.state.slots.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize(
    ("model", "backend"),
    [
        *(on("blocked", {"encoding": name, **switches}) for name in ENCODINGS for switches in (FROM_THE_WINDOW, FROM_TOKENS)),
        on("triton", {"encoding": "token", **FROM_THE_WINDOW}),
        on("triton", {"encoding": "stride", **FROM_TOKENS}),
        on("triton", {"encoding": "stream", **FROM_THE_WINDOW}),
    ],
    indirect=["model"],
)
def test_every_backend_gives_the_loss_and_gradients_of_the_reference(model, backend, device):
    ids = torch.randint(61, (2, SHORT if model.config.encoding == "token" else LENGTH), device=device)
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


@pytest.mark.parametrize(
    ("model", "backend"),
    [on(backend, {"encoding": name}) for backend in ("blocked", "triton") for name in ENCODINGS],
    indirect=["model"],
)
def test_every_backend_continues_several_rows_from_one_token_as_the_reference_does(model, backend, device):
    """Pieces of which each row has a single window, or a part of one, and single steps."""
    ids = torch.randint(61, (3, 14), device=device)

    def logits():
        with torch.no_grad():
            found, aux = model(ids[:, :1])
            parts = [found]
            for start, stop in ((1, 3), (3, 12), (12, 13), (13, 14)):
                found, aux = model(ids[:, start:stop], aux.state)
                parts.append(found)
        return torch.cat(parts, dim=1)

    with use_backend("reference"):
        expected = logits()
    with use_backend(backend):
        torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-5)


# The compiler sees the same operators on either backend (test_operators.py).
@pytest.mark.parametrize(
    ("model", "backend"),
    [*(on("blocked", {"encoding": name}) for name in ENCODINGS), on("triton", {"encoding": "stream"})],
    indirect=["model"],
)
def test_a_training_step_compiles_whole_on_every_backend(model, backend, device):
    ids = torch.randint(61, (1, 20), device=device)
    parameters = list(model.parameters())
    with use_backend(backend):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        loss, _ = compiled(ids, targets=F.pad(ids[:, 1:], (0, 1), value=-100))
        got = torch.autograd.grad(loss, parameters)
        want = torch.autograd.grad(model.loss(ids)[0], parameters)
    for (name, _), actual, expected in zip(model.named_parameters(), got, want, strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.cuda
@pytest.mark.native
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("model", [{"encoding": name} for name in ENCODINGS], ids=ENCODINGS, indirect=True)
def test_training_steps_repeat_bit_for_bit_on_cuda(model, dtype, device):
    ids = torch.randint(61, (8, 4 * LENGTH), device=device)  # every token often: its gradient is a sum
    with torch.autocast(device, dtype, enabled=dtype is not None):
        first, second = loss_and_gradients(model, ids), loss_and_gradients(model, ids)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.triton(launches=False)
def test_every_operation_has_a_kernel():
    operations = {"window_attention", "stream_attention", "attention_pool", "attention_pool_sequence", "stride_write"}
    operations |= {"stride_memory"}
    assert operations <= set(TRITON_LIMITS)
