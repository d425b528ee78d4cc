"""Every model is scored through one interface: each token of a document once, exactly as the model itself would have it."""

import pytest
import torch
import torch.nn.functional as F
from transformers import MambaConfig
from transformers.modeling_outputs import CausalLMOutput

from smt import SMTConfig, StrideMemoryTransformer
from smt.baselines.gpt2 import build_gpt2
from smt.evaluation.scorer import CausalLMScorer, SMTScorer, windows

SIZES = dict(
    vocab_size=40, d_model=16, d_k=8, dropout=0.0, n_ssm_outputs=3, m_input_tokens=6, stride=2, write_group=2,
    transformer_n_layers=2, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4, initializer_range=0.3,
)  # fmt: skip


def documents(lengths=(5, 30, 23, 2, 12)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, SIZES["vocab_size"], (length,), generator=generator) for length in lengths]


def expected(logits, document):
    log_probs = F.log_softmax(logits, dim=-1).gather(1, document[1:, None])[:, 0]
    return log_probs, logits.argmax(-1) == document[1:]


@pytest.mark.parametrize("encoding", ["token", "stride", "stream"])
@pytest.mark.parametrize("sizes", [(1, 7), (3, 100), (4, 8)], ids="B{0[0]}-T{0[1]}".format)
def test_scores_of_a_chunked_batch_are_those_of_whole_documents(encoding, sizes):
    torch.manual_seed(0)
    model = StrideMemoryTransformer(SMTConfig(encoding=encoding, **SIZES)).double()
    batch_size, length = sizes
    scores = SMTScorer(model, batch_size=batch_size, length=length).score(documents())
    for document, score in zip(documents(), scores, strict=True):
        log_probs, greedy = expected(model(document[None, :-1])[0][0], document)
        assert torch.allclose(score.log_probs, log_probs, rtol=1e-9, atol=1e-9)
        assert torch.equal(score.greedy, greedy)


def test_the_head_in_parts_gives_what_it_gives_at_once(monkeypatch):
    torch.manual_seed(0)
    model = StrideMemoryTransformer(SMTConfig(**SIZES)).double()
    whole = SMTScorer(model).score(documents())
    monkeypatch.setattr("smt.evaluation.scorer.CHUNK_ELEMENTS", 7 * SIZES["vocab_size"])
    for parts, score in zip(SMTScorer(model).score(documents()), whole, strict=True):
        assert torch.allclose(parts.log_probs, score.log_probs, rtol=1e-12)


def test_a_hugging_face_model_scores_as_its_own_loss():
    torch.manual_seed(0)
    gpt2 = build_gpt2(SMTConfig(**SIZES), n_positions=32).double().eval()
    for document, score in zip(documents(), CausalLMScorer(gpt2).score(documents()), strict=True):
        loss = gpt2(document[None], labels=document[None]).loss
        # Hugging Face takes the loss of fp64 logits in fp32.
        assert -score.log_probs.mean().item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("elements", [1, 2**24], ids=["one-by-one", "together"])
def test_a_document_beyond_the_context_is_read_in_windows_that_score_each_token_once(elements, monkeypatch):
    monkeypatch.setattr("smt.evaluation.scorer.CHUNK_ELEMENTS", elements)
    torch.manual_seed(0)
    gpt2 = build_gpt2(SMTConfig(**SIZES), n_positions=8).double().eval()
    for document, score in zip(documents(), CausalLMScorer(gpt2).score(documents()), strict=True):
        for start, first, stop in windows(len(document) - 1, 8):
            log_probs, greedy = expected(gpt2(document[None, start:stop]).logits[0], document[start : stop + 1])
            assert torch.allclose(score.log_probs[first:stop], log_probs[first - start :], rtol=1e-9, atol=1e-9)
            assert torch.equal(score.greedy[first:stop], greedy[first - start :])


def test_a_model_that_names_no_context_reads_no_whole_book(monkeypatch):
    monkeypatch.setattr("smt.evaluation.scorer.UNNAMED_CONTEXT", 8)
    read = []

    class Endless(torch.nn.Module):
        """A model without a longest context, as a Mamba is: every token equally likely."""

        config, device = MambaConfig(vocab_size=SIZES["vocab_size"]), torch.device("cpu")

        def forward(self, ids, use_cache):
            read.append(ids.shape[1])
            return CausalLMOutput(logits=torch.zeros(*ids.shape, SIZES["vocab_size"]))

    for score in CausalLMScorer(Endless()).score(documents()):
        torch.testing.assert_close(score.log_probs.exp(), torch.full_like(score.log_probs, 1 / SIZES["vocab_size"]))
    assert max(read) == 8


def test_the_head_is_in_full_precision_where_the_model_is_not(monkeypatch):
    torch.manual_seed(0)
    model = StrideMemoryTransformer(SMTConfig(**SIZES))
    exact = SMTScorer(model).score(documents())

    def in_full_precision(input_ids, state):
        with torch.autocast("cpu", enabled=False):
            hidden, aux = model.encode(input_ids, state)
        return hidden, aux.state

    monkeypatch.setattr("smt.evaluation.scorer.precision", lambda device: torch.autocast("cpu", torch.bfloat16))
    for score, expected in zip(SMTScorer(model, in_full_precision).score(documents()), exact, strict=True):
        torch.testing.assert_close(score.log_probs, expected.log_probs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 12, 13, 50], ids="T{}".format)
@pytest.mark.parametrize("context", [2, 7, 8, 50], ids="C{}".format)
def test_windows_score_every_step_once_with_half_a_window_before_it(length, context):
    pieces = windows(length, context)
    assert [step for _, first, stop in pieces for step in range(first, stop)] == list(range(length))
    for start, first, stop in pieces:
        assert stop - start <= context
        assert start == 0 or first - start >= context // 2


@pytest.mark.parametrize("context", [1, 33])
def test_a_context_that_the_model_does_not_take_is_refused(context):
    with pytest.raises(ValueError, match=rf"context must lie in 2\.\.32 for this model, got {context}"):
        CausalLMScorer(build_gpt2(SMTConfig(**SIZES), n_positions=32), context)


def test_scoring_leaves_the_model_in_training_mode():
    model = StrideMemoryTransformer(SMTConfig(**SIZES)).train()
    SMTScorer(model).score(documents())
    assert model.training
