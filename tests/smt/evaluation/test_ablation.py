"""Ablations hinder the memory and nothing else, and mean the same however a document is cut into chunks."""

import pytest
import torch

from smt import SMTConfig, StrideMemoryTransformer
from smt.evaluation.ablation import FrozenWrites, ablate, slot_reach, without_writes, zeroed_slots
from smt.evaluation.scorer import SMTScorer

SIZES = dict(
    vocab_size=40, d_model=16, d_k=8, dropout=0.0, n_ssm_outputs=3, m_input_tokens=6, stride=2, write_group=2,
    transformer_n_layers=2, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4, initializer_range=0.3,
)  # fmt: skip
ENCODINGS = ["token", "stride", "stream"]
REACH = 3 * 2 + 6


def build(encoding, **switches):
    torch.manual_seed(0)
    return StrideMemoryTransformer(SMTConfig(encoding=encoding, **{**SIZES, **switches})).double().eval()


def tokens(rows=2, length=40):
    return torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(3))


def documents():
    return [tokens(1, length)[0] for length in (40, 31, 12)]


def nats(scores):
    return -sum(score.log_probs.sum().item() for score in scores)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_without_writes_the_weights_are_those_of_a_model_that_never_writes(encoding):
    model = build(encoding)
    control = without_writes(model)
    fresh = build(encoding, writes=False)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(control(tokens())[0], fresh(tokens())[0])
    assert control.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert control(tokens())[1].n_writes == 0


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zeroed_slots_are_there_and_zero_and_change_the_logits_once_there_is_one(encoding):
    model = build(encoding)
    whole = model(tokens())[0]
    with zeroed_slots(model):
        zeroed, aux = model(tokens())
    absent = without_writes(model)(tokens())[0]
    first = SIZES["stride"] + 1  # sees the first write
    assert aux.n_writes > 0 and not aux.state.slots.any()
    assert torch.allclose(zeroed[:, :first], whole[:, :first])
    for other in (whole, absent):
        assert ((zeroed - other)[:, first:].abs().amax(-1) > 1e-6).all()
    assert torch.equal(model(tokens())[0], whole)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("after", [7, 8, 12], ids="after{}".format)
def test_frozen_logits_are_those_of_the_model_until_the_next_write_is_missed(encoding, after):
    model = build(encoding)
    with torch.no_grad():
        whole = model.encode(tokens())[0]
        frozen, _ = FrozenWrites(model, after)(tokens(), None)
    missed = model.config.window.write_step(model.config.window.writes_made(after))
    assert torch.allclose(frozen[:, : missed + 1], whole[:, : missed + 1], rtol=1e-9, atol=1e-9)
    assert ((frozen - whole)[:, missed + 1 :].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("encoding", ["token", "stride"])
def test_frozen_logits_depend_on_the_window_and_the_tokens_before_the_freeze_alone(encoding):
    model, after = build(encoding), 8
    ids = tokens()
    other = ids.clone()
    other[:, after:25] = (other[:, after:25] + 1) % SIZES["vocab_size"]  # 25 + 6 tokens on, no window holds these
    frozen = FrozenWrites(model, after)
    with torch.no_grad():
        mine, theirs = frozen(ids, None)[0], frozen(other, None)[0]
        whole_mine, whole_theirs = model.encode(ids)[0], model.encode(other)[0]
    assert torch.allclose(mine[:, 31:], theirs[:, 31:], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(whole_mine[:, 31:], whole_theirs[:, 31:])
    early = ids.clone()
    early[:, :4] = (early[:, :4] + 1) % SIZES["vocab_size"]
    with torch.no_grad():
        assert not torch.allclose(mine[:, 31:], frozen(early, None)[0][:, 31:])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("length", [1, 5, 16], ids="T{}".format)
def test_frozen_chunks_give_what_the_whole_gives(encoding, length):
    model = build(encoding)
    frozen = FrozenWrites(model, REACH)
    with torch.no_grad():
        whole, _ = frozen(tokens(), None)
        state, pieces = None, []
        for piece in tokens().split(length, dim=1):
            hidden, state = frozen(piece, state)
            pieces.append(hidden)
    assert torch.allclose(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-9)


def test_freezing_before_the_window_is_full_of_slots_is_refused():
    with pytest.raises(ValueError, match="after must be at least 7, when all 3 slots exist, got 6"):
        FrozenWrites(build("stride"), 6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_losses_of_all_spans_add_up_to_the_scores_of_each_variant(encoding):
    model = build(encoding)
    sizes = {"batch_size": 2, "length": 9}
    whole = SMTScorer(model, **sizes).score(documents())
    results = ablate(model, documents(), whole, **sizes)
    assert list(results) == ["whole", "slots zeroed", f"frozen after {REACH}", "no writes"]
    assert slot_reach(model.config) == REACH
    for result in results.values():
        spans = [result.window, result.slots, result.beyond]
        assert sum(span.nats * span.n_tokens for span in spans) == pytest.approx(result.all.nats * result.all.n_tokens)
    assert results["whole"].all.nats * results["whole"].all.n_tokens == pytest.approx(nats(whole))
    fresh = SMTScorer(without_writes(model)).score(documents())
    assert results["no writes"].all.nats * results["no writes"].all.n_tokens == pytest.approx(nats(fresh))
    # Of 39, 30 and 11 targets of documents: those with 1 to 6 tokens before them, 7 to 12, and more.
    counts = [results["whole"].window.n_tokens, results["whole"].slots.n_tokens, results["whole"].beyond.n_tokens]
    assert counts == [3 * 6, 2 * 6 + 5, 27 + 18]
    assert results[f"frozen after {REACH}"].window == results["whole"].window
    assert results[f"frozen after {REACH}"].beyond.nats != pytest.approx(results["whole"].beyond.nats)


def test_the_initial_state_of_a_frozen_run_is_the_models():
    model = build("stream", empty_slots="zero")
    with torch.no_grad():
        frozen, state = FrozenWrites(model, REACH)(tokens()[:, :REACH], None)
        assert torch.allclose(frozen, model.encode(tokens()[:, :REACH], model.initial_state(2))[0])
    assert state.state.step == REACH
