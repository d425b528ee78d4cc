"""Carried state: pieces and single steps give what one forward pass gives."""

import dataclasses

import pytest
import torch

from smt import SMTConfig, SMTState, StrideMemoryTransformer

VOCAB = 37


def build(**switches):
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=VOCAB, d_model=16, d_k=16, transformer_n_layers=2, transformer_n_heads=2, ssm_n_layers=2, ssm_d_state=4,
        initializer_range=0.3,
    )  # fmt: skip
    return StrideMemoryTransformer(SMTConfig(**{**sizes, **switches})).eval()


def in_pieces(model, ids, sizes):
    state, logits, steps, weights = None, [], [], []
    for piece in ids.split(sizes, dim=1):
        out, aux = model(piece, state=state, return_weights=True)
        state = aux.state
        logits.append(out)
        steps += aux.write_steps
        weights.append(aux.attention_weights)
    return torch.cat(logits, dim=1), steps, torch.cat(weights, dim=1), state


def assert_same(model, ids, sizes):
    with torch.no_grad():
        whole, aux = model(ids, return_weights=True)
        pieces, steps, weights, state = in_pieces(model, ids, sizes)
    assert steps == aux.write_steps
    torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(weights, aux.attention_weights, atol=1e-5, rtol=0)
    assert state.steps == aux.state.steps
    torch.testing.assert_close(state.slots, aux.state.slots, atol=1e-4, rtol=0)
    assert whole.std() > 0.05, "logits that do not vary would agree with anything"


def random_sizes(length, generator):
    sizes = []
    while sum(sizes) < length:
        sizes.append(min(int(torch.randint(1, 48, (), generator=generator)), length - sum(sizes)))
    return sizes


# Other windows, strides and modes: test_decoding.py.
@pytest.mark.parametrize(("stride", "write_group"), [(16, 8), (4, 1)])
@pytest.mark.parametrize("encoding", ["token", "stride", "stream"])
def test_pieces_and_single_steps_equal_one_pass(encoding, stride, write_group):
    model = build(encoding=encoding, stride=stride, write_group=write_group)
    generator = torch.Generator().manual_seed(stride * 10 + write_group)
    for length in (1, 2, 17, 66, 200):
        ids = torch.randint(VOCAB, (2, length), generator=generator)
        assert_same(model, ids, random_sizes(length, generator))
    assert_same(model, ids[:, :70], [1] * 70)


@pytest.mark.parametrize("encoding", ["token", "stride", "stream"])
def test_a_state_is_a_value(encoding):
    model = build(encoding=encoding)
    ids = torch.randint(VOCAB, (2, 60))
    with torch.no_grad():
        state = model(ids[:, :33])[1].state
        before = state.clone().tensors()
        first, _ = model(ids[:, 33:], state=state)
        second, _ = model(ids[:, 33:], state=state)
    assert torch.equal(first, second)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())
    assert state.steps == (33, 33)


def test_detach_cuts_the_gradient_and_keeps_the_values():
    model = build(encoding="stream")
    ids = torch.randint(VOCAB, (1, 80))
    state = model(ids[:, :40])[1].state
    assert state.slots.requires_grad and state.kv_tokens.requires_grad
    cut = state.detach()
    assert not any(tensor.requires_grad for tensor in cut.tensors().values())
    assert torch.equal(model(ids[:, 40:], state=state)[0], model(ids[:, 40:], state=cut)[0])


def test_gradients_flow_through_a_carried_state():
    model = build(encoding="stream").double()
    ids = torch.randint(VOCAB, (1, 90))
    targets = torch.cat([torch.full((1, 50), -100), torch.randint(VOCAB, (1, 40))], dim=1)

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.parameters()))

    whole = gradients(model.loss(ids, targets)[0])
    _, aux = model(ids[:, :50])
    pieces = gradients(model.loss(ids[:, 50:], targets[:, 50:], state=aux.state)[0])
    for expected, actual in zip(whole, pieces, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-8)


def test_joined_states_are_the_rows_of_their_states():
    model = build(encoding="stream")
    ids = torch.randint(VOCAB, (3, 70))
    with torch.no_grad():
        states = [model(ids[row : row + 1, : 20 + 7 * row])[1].state for row in range(3)]
        joined = SMTState.join(states)
        logits, _ = model(torch.stack([ids[row, 20 + 7 * row] for row in range(3)])[:, None], joined)
        whole, _ = model(ids)
    assert joined.steps == (20, 27, 34)
    torch.testing.assert_close(logits[:, 0], torch.stack([whole[row, 20 + 7 * row] for row in range(3)]), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="join needs at least one state"):
        SMTState.join([])


def test_a_state_moves_to_another_device_and_the_model_says_when_it_is_elsewhere():
    model = build(encoding="stream")
    state = model(torch.randint(VOCAB, (2, 9)))[1].state.to("meta")
    assert {tensor.device.type for tensor in (*state.tensors().values(), state.device_steps)} == {"meta"}
    with pytest.raises(ValueError, match="state must be on the model's device cpu, got meta"):
        model(torch.randint(VOCAB, (2, 9)), state=state)


def test_rows_are_chosen_reordered_and_repeated():
    model = build(encoding="stream")
    ids = torch.randint(VOCAB, (3, 70))
    index = torch.tensor([2, 0, 2])
    with torch.no_grad():
        state = model(ids[:, :50])[1].state.rows(index)
        chosen, _ = model(ids[index, 50:], state=state)
        whole, _ = model(ids)
    torch.testing.assert_close(chosen, whole[index, 50:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("encoding", ["token", "stride", "stream"])
def test_the_size_of_a_state_is_known_and_constant(encoding, dtype):
    model = build(encoding=encoding).to(dtype)
    ids = torch.randint(VOCAB, (2, 400))
    with torch.no_grad():
        states = [model(ids[:, :length])[1].state for length in (1, 17, 65, 400)]
        states.append(model(ids[:, :1], states[-1])[1].state)
    expected = SMTState.size_in_bytes(model.config, 2, dtype)
    for state in (*states, SMTState.initial(model.config, 2, device="cpu", dtype=dtype)):
        assert state.n_bytes() == expected
        # Nothing larger is kept alive behind a view either.
        assert sum(tensor.untyped_storage().nbytes() for tensor in state.tensors().values()) == expected


@pytest.mark.parametrize("encoding", ["token", "stride", "stream"])
def test_a_state_keeps_its_dtypes_under_autocast(encoding):
    model = build(encoding=encoding)
    ids = torch.randint(VOCAB, (2, 40))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        whole, _ = model(ids)
        logits, aux = model(ids[:, :30])
        for step in range(30, 40):
            logits, aux = model(ids[:, step : step + 1], aux.state)
    float32, bfloat16 = torch.float32, torch.bfloat16
    for name, tensor in aux.state.tensors().items():
        assert tensor.dtype == (bfloat16 if name.startswith("kv") else float32), name
    assert aux.state.n_bytes() == SMTState.size_in_bytes(model.config, 2, float32, bfloat16)
    assert (logits[:, -1] - whole[:, -1]).abs().max() < 0.1 * whole.std()
    with torch.no_grad():
        model(ids[:, :1], aux.state)  # and it goes on without autocast


@pytest.mark.parametrize("encoding", ["token", "stride"])
def test_what_training_leaves_has_no_keys_and_single_steps_form_them(encoding, tmp_path):
    model = build(encoding=encoding)
    ids = torch.randint(VOCAB, (3, 80))
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[1, :7] = mask[2, :31] = 0
    state = model(ids[:, :40], attention_mask=mask)[1].state.detach()
    assert not state.has_keys and state.kv_slots.numel() == state.kv_tokens.numel() == 0
    state.save(tmp_path / "state")
    assert SMTState.load(tmp_path / "state").kv_slots.shape == state.kv_slots.shape
    with torch.no_grad():
        formed = model(ids[:, :40], attention_mask=mask)[1].state
        assert formed.has_keys and not SMTState.join([formed, state]).has_keys
        taken = torch.tensor([[1], [1], [0]])  # the row that takes nothing has its keys formed as well
        first, aux = model(ids[:, 40:41], state, attention_mask=taken)
        expected, of_formed = model(ids[:, 40:41], formed, attention_mask=taken)
        torch.testing.assert_close(first[:2], expected[:2], rtol=1e-5, atol=1e-5)
        for step in range(41, 60):
            following, aux = model(ids[:, step : step + 1], aux.state)
            expected, of_formed = model(ids[:, step : step + 1], of_formed.state)
            torch.testing.assert_close(following, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encoding", ["token", "stride"])
def test_single_steps_form_the_keys_of_tokens_where_there_are_no_slots(encoding):
    model = build(encoding=encoding, n_ssm_outputs=0)
    ids = torch.randint(VOCAB, (2, 41))
    state = model(ids[:, :40])[1].state.detach()
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, 40:], state)[0], model(ids)[0][:, 40:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("encoding", ["token", "stride", "stream"])
def test_a_piece_without_a_write_leaves_a_state_that_may_be_overwritten_alone(encoding):
    model = build(encoding=encoding)
    ids = torch.randint(VOCAB, (2, 60))
    with torch.no_grad():
        before = model(ids[:, :40])[1].state
        kept = before.clone()
        state = model(ids[:, 40:44], before)[1].state
        for step in range(44, 50):
            state = model(ids[:, step : step + 1], state, overwrite_state=True)[1].state
    assert all(torch.equal(tensor, kept.tensors()[name]) for name, tensor in before.tensors().items())


# What a state is made of: sizes of its tensors, where its entries lie, and what they were made with.
OTHERS = dict(
    d_model=32, transformer_n_layers=1, transformer_n_heads=4, transformer_n_kv_heads=1, rope_theta=500.0, n_ssm_outputs=14,
    m_input_tokens=49, stride=10, encoding="stride", empty_slots="zero", pool_source="tokens", write_group=4, writes=False,
    ssm_n_layers=1, ssm_d_state=8, ssm_d_conv=3, ssm_expand_factor=1,
)  # fmt: skip


@pytest.mark.parametrize(("field", "value"), OTHERS.items(), ids=OTHERS)
def test_a_state_of_another_config_is_refused(field, value):
    config = build(encoding="stream").config
    state = SMTState.initial(config, 2, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match=f"state belongs to a model with {field} = "):
        build(**{"encoding": "stream", field: value})(torch.randint(VOCAB, (2, 9)), state=state)
    state.check(dataclasses.replace(config, vocab_size=50, dropout=0.3, slot_gate="closed"), 2)  # which change no state


def test_a_state_of_another_batch_size_is_refused():
    model = build(encoding="stride")
    state = model(torch.randint(VOCAB, (2, 9)))[1].state
    with pytest.raises(ValueError, match="state has 2 rows, input_ids has 3"):
        model(torch.randint(VOCAB, (3, 9)), state=state)
