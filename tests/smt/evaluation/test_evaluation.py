"""Loss, perplexity and bits per byte count every token of whole documents once, with memory carried through them."""

import math

import pytest
import torch

from smt import SMTConfig, StrideMemoryTransformer
from smt.data.pairs import Pair
from smt.data.walk import DocumentWalk
from smt.evaluation.perplexity import Evaluation, evaluate
from smt.evaluation.pooling import pooling_weights
from smt.evaluation.preference import evaluate_pairs
from smt.evaluation.scorer import SMTScorer
from smt.training.objective import ChunkLoss, PairLogProbabilities

SIZES = dict(
    vocab_size=40, d_model=16, d_k=8, dropout=0.0, n_ssm_outputs=3, m_input_tokens=6, stride=2, write_group=2,
    transformer_n_layers=2, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4,
)  # fmt: skip


@pytest.fixture(params=["token", "stride", "stream"])
def model(request):
    torch.manual_seed(0)
    model = StrideMemoryTransformer(SMTConfig(encoding=request.param, initializer_range=0.3, **SIZES))
    return model.double()


def documents(lengths=(5, 30, 23, 12)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, SIZES["vocab_size"], (length,), generator=generator) for length in lengths]


def walk(documents, **sizes):
    return DocumentWalk(documents, epochs=1, shuffle=False, together=True, **sizes)


def test_bits_per_byte_by_hand():
    # Four tokens of probabilities 1/2, 1/4, 1/8 and 1/4 spell two bytes: 1 + 2 + 3 + 2 bits over 2 bytes.
    nats = -sum(math.log(p) for p in (1 / 2, 1 / 4, 1 / 8, 1 / 4))
    evaluation = Evaluation(nats=nats, n_targets=4, n_bytes=2)
    assert evaluation.bits_per_byte == pytest.approx(4.0)
    assert evaluation.loss == pytest.approx(2 * math.log(2))
    assert evaluation.perplexity == pytest.approx(4.0)


def test_perplexity_of_a_hopeless_model_is_infinite():
    assert Evaluation(nats=1e6, n_targets=1, n_bytes=1).perplexity == math.inf


@pytest.mark.parametrize("length", [7, 100], ids="T{}".format)
@pytest.mark.parametrize("batch_size", [1, 3], ids="B{}".format)
def test_batches_with_carried_state_cost_what_whole_documents_cost(model, batch_size, length):
    whole = 0.0
    for document in documents():
        logits = model(document[None, :-1])[0][0]
        whole += torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum").item()
    evaluation = evaluate(ChunkLoss(model), walk(documents(), batch_size=batch_size, length=length), n_bytes=100)
    assert evaluation.nats == pytest.approx(whole, rel=1e-9)
    assert evaluation.n_targets == sum(len(document) - 1 for document in documents())


def test_forgetting_the_state_between_chunks_would_be_noticed(model):
    pieces = [document[start : start + 8] for document in documents() for start in range(0, len(document) - 1, 7)]
    carried = evaluate(ChunkLoss(model), walk(documents(), batch_size=1, length=7), n_bytes=1)
    forgotten = evaluate(ChunkLoss(model), walk(pieces, batch_size=1, length=7), n_bytes=1)
    assert carried.n_targets == forgotten.n_targets
    assert abs(carried.nats - forgotten.nats) > 1e-3 * carried.nats


def test_nothing_is_dropped_in_an_evaluation():
    torch.manual_seed(0)
    model = StrideMemoryTransformer(SMTConfig(**{**SIZES, "dropout": 0.5, "pooling_dropout": 0.5}, initializer_range=0.3))
    plain = StrideMemoryTransformer(SMTConfig(**SIZES, initializer_range=0.3))
    plain.load_state_dict(model.state_dict())
    sizes = {"batch_size": 2, "length": 8}
    found, expected = (evaluate(ChunkLoss(each), walk(documents(), **sizes), n_bytes=1) for each in (model.train(), plain))
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    for mine, theirs in zip(*(SMTScorer(each, **sizes).score(documents()) for each in (model, plain)), strict=True):
        torch.testing.assert_close(mine.log_probs, theirs.log_probs)
    for mine, theirs in zip(*(pooling_weights(each, documents(), **sizes) for each in (model, plain)), strict=True):
        torch.testing.assert_close(mine, theirs)
    pairs = [Pair([1, 2], [3, 4], [5]), Pair([6], [7], [8, 9, 10])]
    of_pairs = [evaluate_pairs(PairLogProbabilities(each), pairs, batch_size=2, strength=1.0) for each in (model, plain)]
    assert of_pairs[0].loss == pytest.approx(of_pairs[1].loss, rel=1e-5)
    assert model.training


def test_evaluating_leaves_the_model_in_training_mode_and_without_gradients(model):
    model.train()
    evaluate(ChunkLoss(model), walk(documents(), batch_size=2, length=8), n_bytes=1)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_that_begin_documents_apart_are_refused(model):
    batches = DocumentWalk(documents(), epochs=1, shuffle=False, batch_size=2, length=7)
    with pytest.raises(ValueError, match="must begin their documents together; walk with together=True"):
        evaluate(ChunkLoss(model), batches, n_bytes=1)


def test_nothing_to_evaluate_is_an_error(model):
    with pytest.raises(ValueError, match="an evaluation needs text, got 0 targets"):
        evaluate(ChunkLoss(model), [], n_bytes=0)
