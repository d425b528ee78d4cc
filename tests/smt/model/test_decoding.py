"""Rows of any lengths and at any steps in one batch, token by token or in pieces: each gives what it gives alone."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_model import ENCODINGS, VOCAB, build
from torch.utils._python_dispatch import TorchDispatchMode

from smt import SMTState
from smt.state import layout

LENGTH, ROWS = 48, 3


def left_padded(pieces, extra=0):
    """Token tensors of any lengths as one batch with its mask; padding is random tokens."""
    length = max(1, max(map(len, pieces)) + extra)
    ids = torch.randint(VOCAB, (len(pieces), length))
    mask = torch.zeros(len(pieces), length, dtype=torch.long)
    for row, piece in enumerate(pieces):
        ids[row, length - len(piece) :] = piece
        mask[row, length - len(piece) :] = 1
    return ids, mask


row_lists = st.lists(st.integers(0, 99), min_size=1, max_size=4)
operations = st.one_of(
    st.tuples(st.just("one token each"), st.booleans()),
    st.tuples(
        st.just("pieces"), st.lists(st.sampled_from([0, 0, 1, 1, 1, 2, 5, 11]), min_size=4, max_size=4), st.integers(0, 2)
    ),
    st.tuples(st.just("choose rows"), row_lists),
    st.tuples(st.just("join"), row_lists, row_lists),
    st.tuples(st.just("save and load")),
)


@pytest.mark.parametrize(
    ("encoding", "empty_slots", "pool_source"),
    [
        *(("token", empty, source) for empty, source in (("mask", "window"), ("zero", "tokens"))),
        *(("stride", empty, source) for empty, source in (("mask", "tokens"), ("zero", "window"))),
        *(("stream", empty, source) for empty in ("mask", "zero") for source in ("window", "tokens")),
    ],
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=st.lists(operations, min_size=6, max_size=24))
def test_any_splits_rows_padding_and_reloads_give_what_each_row_gives_alone(
    encoding, empty_slots, pool_source, script, tmp_path_factory
):
    model = build(encoding=encoding, empty_slots=empty_slots, pool_source=pool_source)
    sequences = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(len(script)))
    with torch.no_grad():
        alone = torch.cat([model(row[None])[0] for row in sequences])
        state, rows = None, [(index, 0) for index in range(ROWS)]  # of each row: which sequence it is, and how far it has come
        for name, *arguments in script:
            if name in ("one token each", "pieces"):
                wanted, extra = ([1] * 4, 0) if name == "one token each" else arguments
                wanted = [wanted[i % 4] for i in range(len(rows))]
                pieces = [sequences[which, done : done + count] for (which, done), count in zip(rows, wanted, strict=True)]
                ids, mask = left_padded(pieces, extra)
                overwrite = name == "one token each" and arguments[0]
                logits, aux = model(ids, state, attention_mask=mask, overwrite_state=overwrite)
                for row, piece in enumerate(pieces):
                    which, done = rows[row]
                    expected = alone[which, done : done + len(piece)]
                    torch.testing.assert_close(logits[row, ids.shape[1] - len(piece) :], expected, atol=1e-4, rtol=0)
                rows = [(which, done + len(piece)) for (which, done), piece in zip(rows, pieces, strict=True)]
                state = aux.state
                assert state.steps == tuple(done for _, done in rows) and bool(logits.isfinite().all())
            elif state is None:
                continue
            elif name == "choose rows":
                index = [i % len(rows) for i in arguments[0]]
                state, rows = state.rows(index), [rows[i] for i in index]
            elif name == "join":
                parts = [[i % len(rows) for i in index] for index in arguments]
                state = SMTState.join([state.rows(index) for index in parts])
                rows = [rows[i] for index in parts for i in index][:6]
                state = state.rows(range(len(rows)))
            else:
                path = tmp_path_factory.getbasetemp() / "state.safetensors"
                state.save(path)
                state = SMTState.load(path)
    assert alone.std() > 0.05, "logits that do not vary would agree with anything"


@pytest.mark.parametrize("write_group", [1, 8])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_in_every_write_phase_decode_as_one_batch_in_the_published_window(encoding, write_group):
    model = build(encoding=encoding, n_ssm_outputs=15, m_input_tokens=50, stride=16, write_group=write_group)
    lengths = [1, 5, 17, 40, 52, 66, 81, 130]
    sequences = torch.randint(VOCAB, (len(lengths), 160))
    ids, mask = left_padded([row[:length] for row, length in zip(sequences, lengths, strict=True)])
    with torch.no_grad():
        alone = [model(row[None, : length + 30])[0][0] for row, length in zip(sequences, lengths, strict=True)]
        logits, aux = model(ids, attention_mask=mask)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(logits[row, -length:], alone[row][:length], atol=1e-4, rtol=0)
        for taken in range(30):
            tokens = torch.stack([row[length + taken] for row, length in zip(sequences, lengths, strict=True)])
            logits, aux = model(tokens[:, None], aux.state, overwrite_state=True)
            expected = torch.stack([row[length + taken] for row, length in zip(alone, lengths, strict=True)])
            torch.testing.assert_close(logits[:, 0], expected, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:stride")
@pytest.mark.parametrize(
    "switches",
    [
        dict(n_ssm_outputs=0, write_group=1),
        dict(n_ssm_outputs=1, m_input_tokens=1, stride=1, write_group=5),
        dict(stride=7),
        dict(writes=False),
        dict(writes=False, empty_slots="zero"),
        dict(transformer_n_kv_heads=1, pooling_norm=False),
        dict(transformer_n_layers=1, ssm_d_conv=2),
    ],
    ids=lambda switches: ",".join(f"{name}={value}" for name, value in switches.items()),
)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_single_steps_equal_one_pass_at_the_edges_of_the_configuration(encoding, switches):
    model = build(encoding=encoding, **switches)
    ids = torch.randint(VOCAB, (2, 40))
    with torch.no_grad():
        whole, all_of_it = model(ids, return_weights=True)
        logits, aux = model(ids[:, :1])
        pieces, weights = [logits], []
        for step in range(1, 40):
            logits, aux = model(ids[:, step : step + 1], aux.state, return_weights=True)
            pieces.append(logits)
            weights.append(aux.attention_weights)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat(weights, dim=1), all_of_it.attention_weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_row_without_a_token_or_a_write_keeps_its_memory_bit_for_bit(encoding):
    model = build(encoding=encoding)
    ids, mask = left_padded([torch.randint(VOCAB, (length,)) for length in (9, 8, 20)])
    with torch.no_grad():
        before = model(ids, attention_mask=mask)[1].state
        # Row 0 takes step 9 and writes; row 1 takes step 8 and does not; row 2 takes nothing.
        after = model(ids[:, -1:], before, attention_mask=torch.tensor([[1], [1], [0]]))[1].state
    assert after.steps == (10, 9, 20)
    for name, tensor in after.tensors().items():
        tensor, old = (each.movedim(layout.ROWS[name], 0) for each in (tensor, before.tensors()[name]))
        assert torch.equal(tensor[2], old[2]), name
        if name in ("slots", "conv", "ssm"):
            assert torch.equal(tensor[1], old[1]) and not torch.equal(tensor[0], old[0]), name


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_step_changes_the_state_passed_in_only_when_told_to(encoding):
    model = build(encoding=encoding)
    ids = torch.randint(VOCAB, (2, 9))
    token = torch.randint(VOCAB, (2, 1))
    with torch.no_grad():
        state = model(ids)[1].state
        before = state.clone().tensors()
        kept, aux = model(token, state)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items()) and state.steps == (9, 9)
        rings = state.tokens.data_ptr(), state.slots.data_ptr()
        overwritten, aux = model(token, state, overwrite_state=True)
    assert torch.equal(kept, overwritten)
    assert (aux.state.tokens.data_ptr(), aux.state.slots.data_ptr()) == rings


@pytest.mark.parametrize("pool_source", ["window", "tokens"])
def test_under_autocast_a_single_step_pools_and_writes_in_the_formats_of_a_sequence(pool_source):
    model, ids, seen = build(pool_source=pool_source), torch.randint(VOCAB, (2, 31)), []  # the last step makes a write
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sequence = model(ids, return_weights=True)[1].attention_weights[:, -1]
        state = model(ids[:, :-1])[1].state
        for layer in model.memory.ssm.layers:
            layer.register_forward_hook(lambda layer, given, result: seen.append(result[0].dtype))
        step = model(ids[:, -1:], state, return_weights=True)[1].attention_weights[:, -1]
        assert torch.equal(step.to(sequence.dtype), sequence) and sequence.dtype == torch.bfloat16
        model(ids)
    assert {*seen} == {torch.float32}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_decoding_step_calls_the_same_operations_on_the_same_sizes_at_any_step(encoding):
    class Operations(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
            self.calls.append((str(func), shapes))
            return func(*args, **(kwargs or {}))

    model = build(encoding=encoding)
    config = model.config
    with torch.no_grad():
        state = model(torch.randint(VOCAB, (1, 60)))[1].state
        for phase in range(config.stride):
            calls = []
            for step in (60 + phase, 60 + phase + config.stride * 100_000):
                with Operations() as operations:
                    model(torch.tensor([[1]]), dataclasses.replace(state, steps=(step,), device_steps=torch.tensor([step])))
                calls.append(operations.calls)
            assert len(calls[0]) > 50 and calls[0] == calls[1]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_one_token_at_a_time_passes_gradients_when_they_are_asked_for(encoding):
    model = build(encoding=encoding).double()
    ids = torch.randint(VOCAB, (2, 20))
    targets = torch.cat([torch.full((2, 19), -100), torch.randint(VOCAB, (2, 1))], dim=1)

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.parameters()))

    whole = gradients(model.loss(ids, targets)[0])
    _, aux = model(ids[:, :18])
    _, aux = model(ids[:, 18:19], aux.state)
    steps = gradients(model.loss(ids[:, 19:], targets[:, 19:], aux.state)[0])
    for expected, actual in zip(whole, steps, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gradients_of_left_padded_rows_are_those_of_the_rows_alone(encoding):
    model = build(encoding=encoding).double()
    pieces = [torch.randint(VOCAB, (length,)) for length in (4, 15, 30)]
    ids, mask = left_padded(pieces)
    logits, _ = model(ids, attention_mask=mask)
    together = sum(logits[row, -len(piece) :].square().sum() for row, piece in enumerate(pieces))
    alone = sum(model(piece[None])[0].square().sum() for piece in pieces)
    parameters = list(model.parameters())
    for actual, expected in zip(*(torch.autograd.grad(total, parameters) for total in (together, alone)), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-8)


def test_aux_tells_the_writes_of_each_row():
    model = build()
    ids, mask = left_padded([torch.randint(VOCAB, (length,)) for length in (12, 3, 0)])
    with torch.no_grad():
        _, aux = model(ids, attention_mask=mask, return_weights=True)
        _, alone = model(ids[:1], return_weights=True)
    assert aux.writes == (range(0, 3), range(0, 0), range(0, 0))
    assert aux.write_frequency == 3 / 15
    torch.testing.assert_close(aux.attention_weights[:1], alone.attention_weights)
    assert not aux.attention_weights[1:].any()
    with torch.no_grad():
        _, nothing = model(ids[:, :1], attention_mask=torch.zeros_like(ids[:, :1]))
    assert nothing["n_tokens"] == nothing["write_frequency"] == 0 and nothing.state.steps == (0, 0, 0)
    with pytest.raises(KeyError, match="n_write"):
        nothing["n_write"]
    with pytest.raises(ValueError, match="the rows made different writes"):
        _ = aux.write_steps


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.tensor([[1, 1, 0]]), ValueError, "0 on the left and 1 on the right .* row 0 is not"),
        (torch.tensor([[0, 2, 1]]), ValueError, "row 0 is not"),
        (torch.ones(1, 2, dtype=torch.long), ValueError, r"the shape of input_ids, \(1, 3\), got \(1, 2\)"),
        (torch.ones(1, 3), TypeError, "integers or bool, got torch.float32"),
        ([[1, 1, 1]], TypeError, "got list"),
        (torch.ones(1, 3, dtype=torch.long, device="meta"), ValueError, "on the device of input_ids, cpu, got meta"),
    ],
    ids=["right padding", "not 0 and 1", "shape", "dtype", "list", "device"],
)
def test_a_bad_attention_mask_is_explained(mask, error, message):
    with pytest.raises(error, match=message):
        build()(torch.ones(1, 3, dtype=torch.long), attention_mask=mask)


def last_block(model):
    return model.decoder.blocks[-1]


@pytest.mark.parametrize("part", [lambda model: model.decoder.dropout, last_block], ids=["dropout", "last block"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_hooks_act_on_single_steps_as_on_a_whole_pass(encoding, part):
    model = build(encoding=encoding).double()
    steer = torch.linspace(-1, 1, 16, dtype=torch.float64)
    ids = torch.randint(VOCAB, (2, 24))
    with torch.no_grad():
        plain, _ = model(ids)
        part(model).register_forward_pre_hook(lambda module, inputs: (inputs[0] + steer, *inputs[1:]))
        whole, _ = model(ids)
        state, steps = None, []
        for token in ids.split(1, dim=1):
            logits, aux = model(token, state)
            state = aux.state
            steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
    assert not torch.allclose(whole, plain)


def test_targets_at_padding_do_not_count():
    model = build()
    texts = [torch.randint(VOCAB, (length,)) for length in (20, 5)]
    ids, mask = left_padded(texts)
    loss, _ = model(ids, targets=ids.roll(-1, 1), attention_mask=mask)
    alone = [model(text[None], targets=torch.cat([text[1:], row[:1]])[None])[0] for text, row in zip(texts, ids, strict=True)]
    torch.testing.assert_close(loss, (20 * alone[0] + 5 * alone[1]) / 25)


def test_a_state_of_inference_mode_and_another_dtype_goes_on_in_training():
    model, ids = build(dropout=0.0), torch.randint(VOCAB, (2, 20))
    with torch.inference_mode():
        state = model.bfloat16()(ids)[1].state
    model.float()
    model.loss(ids, state=state)[0].backward()
    with torch.no_grad():
        model(ids[:, :2], state, attention_mask=torch.tensor([[1, 1], [0, 1]]), overwrite_state=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, ids: model(ids, targets=ids.float()), "targets must be a tensor of integers, got torch.float32"),
        (lambda model, ids: model(ids, targets=ids.tolist()), "targets must be a tensor of integers, got list"),
        (lambda model, ids: model(ids, model(ids)[1]), "state must be an SMTState, such as aux.state, got Aux"),
        (lambda model, ids: model(ids)[1].state.to(torch.int32), "a state is of a floating dtype, got torch.int32"),
    ],
    ids=["float targets", "list", "aux", "int state"],
)
def test_what_is_no_target_and_no_state_is_explained(call, message):
    with pytest.raises(TypeError, match=message):
        call(build(), torch.ones(1, 4, dtype=torch.long))


def test_a_state_has_a_row():
    with pytest.raises(ValueError, match="index must name a row"):
        build()(torch.ones(1, 4, dtype=torch.long))[1].state.rows([])


def test_a_state_is_not_made_of_tensors_whose_rows_are_not_its_rows():
    state = build()(torch.ones(3, 4, dtype=torch.long))[1].state
    with pytest.raises(ValueError, match=r"must have 'tokens' of shape \(2, 7, 16\), got \(3, 7, 16\)"):
        SMTState.from_tensors(state.config, (4, 4), state.tensors())
