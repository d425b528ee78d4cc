"""Generation of a batch: every row as if it were alone, each until its own end."""

import pytest
import torch
import torch.nn.functional as F

from smt import SMTConfig, StrideMemoryTransformer
from smt.baselines import FullAttentionGPT2
from smt.model.generation import generate, sample

VOCAB = 37
ENCODINGS = ["token", "stride", "stream"]


def build(**switches):
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=VOCAB, d_model=16, d_k=16, transformer_n_layers=2, transformer_n_heads=2, ssm_n_layers=2, ssm_d_state=4,
        initializer_range=0.3, n_ssm_outputs=4, m_input_tokens=9, stride=3,
    )  # fmt: skip
    return StrideMemoryTransformer(SMTConfig(**{**sizes, **switches})).eval()


def prompts(lengths):
    """Left-padded prompts, their mask, and each alone."""
    alone = [torch.randint(VOCAB, (length,)) for length in lengths]
    ids = torch.full((len(lengths), max(lengths)), 5)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(alone):
        ids[row, -len(prompt) :] = prompt
        mask[row, -len(prompt) :] = 1
    return ids, mask, alone


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_padded_prompts_continue_as_each_does_alone(encoding):
    model = build(encoding=encoding)
    ids, mask, alone = prompts([3, 17, 1, 8])
    together = model.generate(ids, 20, attention_mask=mask, temperature=0)
    assert torch.equal(together[:, : ids.shape[1]], ids)
    for row, prompt in enumerate(alone):
        expected = model.generate(prompt[None], 20, temperature=0)[0, len(prompt) :]
        assert torch.equal(together[row, ids.shape[1] :], expected)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_row_ends_at_its_end_token_and_the_others_go_on(encoding):
    model = build(encoding=encoding)
    ids, mask, _ = prompts([3, 17, 1, 8])
    endless = model.generate(ids, 30, attention_mask=mask, temperature=0)[:, ids.shape[1] :]
    ends = [int(endless[1, 4]), int(endless[3, 11])]
    pad = next(token for token in range(VOCAB) if token not in ends)
    output = model.generate(ids, 30, attention_mask=mask, temperature=0, eos_token_id=ends, pad_token_id=pad)
    for row, tokens in enumerate(endless.tolist()):
        stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        length = output.shape[1] - ids.shape[1]
        expected = tokens[: min(stop, length)] + [pad] * (length - stop)
        assert output[row, ids.shape[1] :].tolist() == expected


def test_generation_stops_when_all_rows_have_ended():
    model = build()
    ids = torch.randint(VOCAB, (1, 10))
    first = int(model.generate(ids, 1, temperature=0)[0, -1])
    assert model.generate(ids, 30, temperature=0, eos_token_id=first).shape == (1, 11)
    several = list(range(VOCAB))
    assert model.generate(ids.repeat(2, 1), 30, eos_token_id=several).shape == (2, 11)


def test_rows_behind_their_end_are_padded_with_the_first_end_token_unless_told_otherwise():
    class NoState:
        def rows(self, rows):
            return self

    def successor(tokens, state, mask):
        return F.one_hot(tokens[:, -1].long() + 1, VOCAB), NoState()

    ids = torch.tensor([[1], [3]], dtype=torch.int32)
    for options, padding in (({}, 9), ({"pad_token_id": 0}, 0)):
        output = generate(successor, ids, 5, vocab_size=VOCAB, temperature=0, eos_token_id=[9, 4], **options)
        assert output.tolist() == [[1, 2, 3, 4], [3, 4, padding, padding]] and output.dtype == torch.int64
    assert torch.equal(generate(successor, ids, 0, vocab_size=VOCAB), ids.long())


def test_streaming_yields_the_tokens_of_generate_as_they_are_drawn():
    model = build().train()
    ids, mask, _ = prompts([4, 9])
    tokens = model.stream(ids, 12, attention_mask=mask, temperature=0)
    first = next(tokens)
    assert model.training, "between two tokens the model is as it was"
    streamed = torch.stack([first, *tokens], dim=1)
    assert torch.equal(streamed, model.generate(ids, 12, attention_mask=mask, temperature=0)[:, 9:])
    assert model.training and not streamed.requires_grad


def test_ends_and_padding_leave_the_prompt_as_it_is():
    ids, mask, _ = prompts([4, 9])
    output = build().generate(ids, 5, attention_mask=mask, eos_token_id=5)  # the padding of the prompts is an end token
    assert torch.equal(output[:, :9], ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_token_id": VOCAB}, "eos_token_id must lie in 0..vocab_size - 1 = 0..36, got 37"),
        ({"pad_token_id": -1}, "pad_token_id must lie in 0..vocab_size - 1 = 0..36, got -1"),
        ({"attention_mask": torch.tensor([[1, 1], [0, 0]])}, r"must have a token, rows \[1\] have none"),
        ({"attention_mask": torch.tensor([[1, 0], [1, 1]])}, "left padding"),
        ({"temperature": -1.0}, "temperature must be 0, or finite and at least 1e-06, got -1.0"),
    ],
    ids=["end", "padding", "empty row", "right padding", "temperature"],
)
def test_bad_options_are_explained_before_anything_runs(options, message):
    with pytest.raises(ValueError, match=message):
        build().stream(torch.ones(2, 2, dtype=torch.long), 3, **options)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("text", TypeError, "input_ids must be an int64 or int32 tensor, got str"),
        ([[1, 2]], TypeError, "input_ids must be an int64 or int32 tensor, got list"),
        (torch.ones(2), TypeError, "input_ids must be an int64 or int32 tensor, got torch.float32"),
        (torch.ones(2, dtype=torch.long), ValueError, r"input_ids must have shape \(B, T\) with B, T >= 1, got \(2,\)"),
    ],
    ids=["text", "list", "float", "row"],
)
@pytest.mark.parametrize("call", ["generate", "loss"])
def test_prompts_that_are_no_rows_of_tokens_are_explained(call, given, error, message):
    model = build()
    with pytest.raises(error, match=message):
        model.loss(given) if call == "loss" else model.generate(given, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -2}, "max_new_tokens must be at least 0, got -2"),
        ({"temperature": -1.0}, "temperature must be 0, or finite and at least 1e-06, got -1.0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 2.0}, r"top_p must lie in \(0, 1\], got 2.0"),
    ],
)
def test_the_gpt2_of_comparisons_explains_bad_options_as_ours_does(options, message):
    config = SMTConfig(d_model=16, vocab_size=VOCAB, transformer_n_layers=1, transformer_n_heads=2)
    for model in (FullAttentionGPT2(config, context=4), build()):
        with pytest.raises(ValueError, match=message):
            model.generate(torch.ones(1, 2, dtype=torch.long), **{"max_new_tokens": 1, **options})


def test_tokens_are_drawn_with_their_probabilities():
    n = 20_000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -float("inf")])
    probability = logits.softmax(dim=-1)
    drawn = sample(logits.expand(n, -1), 1.0, None, None, torch.Generator().manual_seed(1))
    share = torch.bincount(drawn[:, 0], minlength=5) / n
    assert (abs(share - probability) <= 5 * (probability * (1 - probability) / n).sqrt()).all()  # 5 standard errors


def test_only_the_most_likely_tokens_are_drawn_from():
    def drawn(logits, top_k=None, top_p=None):
        return set(sample(torch.tensor(logits).expand(500, -1), 1.0, top_k, top_p, None).flatten().tolist())

    assert drawn([0.0, -0.1, -0.2], top_k=2) == {0, 1} and drawn([0.0, -0.1, -0.2], top_k=3) == {0, 1, 2}
    assert len(drawn([0.0, 0.0], top_p=0.5)) == 1, "one of two equal tokens has half of the probability"
    assert drawn([0.0, 0.0], top_p=0.51) == drawn([0.0, 0.0], top_p=1.0) == {0, 1}


def test_low_precision_draws_as_its_logits_in_fp32_do():
    logits = torch.randn(200, VOCAB).bfloat16()
    low, full = (sample(each, 0.9, 30, 0.95, torch.Generator().manual_seed(1)) for each in (logits, logits.float()))
    assert torch.equal(low, full)


def test_a_waiting_time_of_zero_draws_no_impossible_token(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda tensor, generator: tensor.zero_())
    assert sample(torch.tensor([[-float("inf"), 0.0]]), 1.0, None, None, None).tolist() == [[1]]


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_refused(temperature):
    with pytest.raises(ValueError, match="logits must be numbers, the model gives nan"):
        sample(torch.tensor([[0.0, float("nan")]]), temperature, None, None, None)


def test_a_model_that_refuses_a_prompt_is_left_in_training_mode():
    model = build().train()
    with pytest.raises(ValueError, match="input_ids must lie in"):
        model.generate(torch.full((1, 3), VOCAB), 4)
    assert model.training


def test_a_model_that_is_in_evaluation_mode_is_not_put_into_it_for_every_token(monkeypatch):
    model = build()
    for name in ("train", "eval"):
        monkeypatch.setattr(model, name, lambda *arguments: pytest.fail("a walk through all modules"))
    assert model.generate(torch.ones(1, 3, dtype=torch.long), 4).shape == (1, 7)


def test_parts_that_do_not_train_do_not_train_after_it():
    model = build().train()
    model.decoder.eval()
    model.generate(torch.ones(1, 3, dtype=torch.long), 2)
    assert model.training and model.memory.training and not model.decoder.training and not model.decoder.blocks[0].training
