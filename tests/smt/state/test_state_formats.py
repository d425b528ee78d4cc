"""A state goes on in a model of another number format, in another mode, and in every format that PyTorch can be asked for."""

import pytest
import torch

from smt import SMTConfig, StrideMemoryTransformer
from smt.state.state import SMTState

ENCODINGS = ["token", "stride", "stream"]


def build(encoding="stream", dtype=torch.float32):
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=37, d_model=16, d_k=8, transformer_n_layers=1, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4,
        initializer_range=0.3, n_ssm_outputs=4, m_input_tokens=9, stride=3, encoding=encoding,
    )  # fmt: skip
    return StrideMemoryTransformer(SMTConfig(**sizes)).to(dtype).eval()


@pytest.mark.parametrize("overwrite", [False, True], ids=["value", "overwrite"])
@pytest.mark.parametrize("n_new", [1, 5])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_state_of_another_dtype_goes_on_in_that_of_the_model(encoding, n_new, overwrite):
    model, ids = build(encoding), torch.randint(37, (2, 30))
    with torch.no_grad():
        state = build(encoding, torch.float64)(ids[:, :23])[1].state
        logits, aux = model(ids[:, 23 : 23 + n_new], state, overwrite_state=overwrite)
        expected = model(ids[:, : 23 + n_new])[0][:, 23:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert {tensor.dtype for tensor in aux.state.tensors().values()} == {torch.float32}


@pytest.mark.parametrize("overwrite", [False, True], ids=["value", "overwrite"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_state_of_inference_mode_goes_on_outside_of_it(encoding, overwrite):
    model, ids = build(encoding), torch.randint(37, (2, 30))
    with torch.inference_mode():
        state = model(ids[:, :23])[1].state
    with torch.no_grad():
        expected = model(ids)[0][:, 23:]
        one, aux = model(ids[:, 23:24], state, overwrite_state=overwrite)
        rest, _ = model(ids[:, 24:], aux.state)
    torch.testing.assert_close(torch.cat([one, rest], dim=1), expected, rtol=1e-4, atol=1e-4)
    loss, _ = model.loss(ids[:, 23:], state=state)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_ssm_state_stays_in_fp32_at_least():
    _, aux = build()(torch.randint(37, (1, 9)))
    low = aux.state.to(torch.bfloat16)
    assert low.tokens.dtype == torch.bfloat16 and low.ssm.dtype == torch.float32
    assert torch.equal(low.ssm, aux.state.ssm)
    assert aux.state.to(torch.float64).ssm.dtype == torch.float64


def test_a_copy_that_is_asked_for_shares_nothing_with_its_state():
    state = build()(torch.randint(37, (1, 9)))[1].state.detach()
    for name, tensor in state.to("cpu", copy=True).tensors().items():
        assert tensor.data_ptr() != state.tensors()[name].data_ptr(), name
    assert state.to(torch.float32).ssm.data_ptr() == state.ssm.data_ptr()


def test_keys_and_values_of_autocast_keep_their_dtype_when_the_model_changes_its_own():
    state = SMTState.initial(build().config, 1, device="cpu", dtype=torch.float32, attention_dtype=torch.bfloat16)
    changed = state.in_dtype(torch.float64)
    assert {changed.kv_tokens.dtype, changed.kv_slots.dtype} == {torch.bfloat16} and changed.tokens.dtype == torch.float64
    alike = SMTState.initial(build().config, 1, device="cpu", dtype=torch.float32).in_dtype(torch.float64)
    assert {tensor.dtype for tensor in alike.tensors().values()} == {torch.float64}


@pytest.mark.parametrize("autocast_first", [True, False])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_state_keeps_its_dtypes_when_autocast_begins_or_ends_between_two_pieces(encoding, autocast_first):
    model, ids, formats = build(encoding), torch.randint(37, (2, 30)), []
    state, mask = None, torch.ones_like(ids)
    mask[1, :4] = 0  # so that rows run apart, and are put together in the tensors of the state
    for piece, enabled in ((slice(0, 20), autocast_first), (slice(20, 30), not autocast_first), (slice(0, 7), True)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            state = model(ids[:, piece], state, attention_mask=mask[:, piece])[1].state
        formats.append({name: tensor.dtype for name, tensor in state.tensors().items()})
    assert formats[0] == formats[1] == formats[2]
    of_keys = torch.bfloat16 if autocast_first else torch.float32
    assert formats[0]["kv_slots"] == of_keys and formats[0]["tokens"] == formats[0]["ssm"] == torch.float32


def test_a_model_in_low_precision_decays_its_states_as_before():
    model, low = build(), build().to(torch.bfloat16)
    formats = {name: parameter.dtype for name, parameter in low.named_parameters()}
    assert {dtype for name, dtype in formats.items() if not name.endswith("A_log")} == {torch.bfloat16}
    name = "memory.ssm.layers.0.mixer.A_log"
    assert formats[name] == torch.float32 and torch.equal(low.get_parameter(name), model.get_parameter(name))
    assert low.half().get_parameter(name).dtype == torch.float32 and low.double().get_parameter(name).dtype == torch.float64
    logits, aux = low.to(torch.bfloat16)(torch.randint(37, (1, 20)))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all() and aux.state.ssm.dtype == torch.float32


def test_states_compare_by_identity():
    state = SMTState.initial(build().config, 2, device="cpu", dtype=torch.float32)
    assert state == state and state != state.clone() and state in [state.clone(), state]
    assert len({state, state.clone()}) == 2


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_model_built_in_fp64_is_in_fp64_throughout(encoding):
    torch.set_default_dtype(torch.float64)
    try:
        model, ids = build(encoding, torch.float64), torch.randint(37, (2, 20))
        loss, aux = model.loss(ids)
        loss.backward()
        with torch.no_grad():
            model(ids[:, :1], aux.state.detach())
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64} == {loss.dtype}
    assert {tensor.dtype for tensor in aux.state.tensors().values()} == {torch.float64}
