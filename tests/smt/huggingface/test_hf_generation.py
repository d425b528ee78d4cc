"""``SMTForCausalLM.generate`` gives the tokens of plain loops over full forward passes of each prompt alone."""

import string

import pytest
import torch
from hf_models import ENCODINGS, VOCAB, build, padded
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from smt import SMTCache

NEW = 14
LENGTHS = [3, 17, 1, 8]


@torch.no_grad()
def next_logits(model, ids):
    """What follows ids (T,), from one pass over all of them."""
    return model.model(ids[None])[0][0, -1].float()


def greedy(model, prompt, n_new=NEW):
    for _ in range(n_new):
        prompt = torch.cat([prompt, next_logits(model, prompt).argmax()[None]])
    return prompt[-n_new:]


def sampled(model, prompts, temperature, top_k, seed):
    torch.manual_seed(seed)
    for _ in range(NEW):
        logits = torch.stack([next_logits(model, prompt) for prompt in prompts]) / temperature
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
        tokens = torch.multinomial(logits.softmax(dim=-1), 1)
        prompts = [torch.cat([prompt, token]) for prompt, token in zip(prompts, tokens, strict=True)]
    return torch.stack([prompt[-NEW:] for prompt in prompts])


def beams(model, prompt, width):
    """The ``width`` likeliest continuations that a search of that width finds, best first."""
    kept = [(0.0, prompt)]
    for _ in range(NEW):
        longer = []
        with torch.no_grad():
            of_all = model.model(torch.stack([ids for _, ids in kept]))[0][:, -1].float().log_softmax(dim=-1)
        for (score, ids), log_probs in zip(kept, of_all, strict=True):
            longer += [(score + float(log_probs[token]), ids, token) for token in range(VOCAB)]
        best = sorted(longer, key=lambda candidate: -candidate[0])[:width]
        kept = [(score, torch.cat([ids, torch.tensor([token])])) for score, ids, token in best]
    return torch.stack([ids[-NEW:] for _, ids in kept])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_greedy_tokens_are_those_of_full_passes_with_a_cache_and_without(encoding):
    model = build(encoding=encoding)
    ids, mask, alone = padded(LENGTHS)
    expected = torch.cat([ids, torch.stack([greedy(model, prompt) for prompt in alone])], dim=1)
    for use_cache in (True, False):
        output = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=use_cache)
        assert torch.equal(output, expected), use_cache


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_sampling_with_a_seed_gives_the_tokens_of_full_passes(encoding):
    model = build(encoding=encoding)
    ids, mask, alone = padded(LENGTHS)
    torch.manual_seed(11)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=True, temperature=0.8, top_k=12, top_p=1.0)
    assert torch.equal(output[:, ids.shape[1] :], sampled(model, alone, 0.8, 12, seed=11))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_beams_are_those_of_a_search_over_full_passes(encoding):
    model = build(encoding=encoding)
    ids, mask, alone = padded([3, 17])
    output = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, num_beams=3, num_return_sequences=2)
    for row, prompt in enumerate(alone):
        assert torch.equal(output[2 * row : 2 * row + 2, ids.shape[1] :], beams(model, prompt, 3)[:2])


def test_a_prompt_taken_in_pieces_continues_the_same():
    model = build()
    ids, mask, _ = padded([23, 31])
    options = dict(attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(ids, prefill_chunk_size=7, **options), model.generate(ids, **options))


def test_a_conversation_goes_on_from_its_state():
    model = build()
    cache = SMTCache()
    first = torch.randint(VOCAB, (2, 10))
    answered = model.generate(first, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    whole = torch.cat([answered, torch.randint(VOCAB, (2, 5))], dim=1)
    again = model.generate(whole, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    for row in range(2):
        assert torch.equal(again[row, whole.shape[1] :], greedy(model, whole[row]))


def test_several_new_tokens_at_once_continue_a_state():
    model = build()
    ids = torch.randint(VOCAB, (2, 30))
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :11]).past_key_values
        pieces = [model(ids[:, start:stop], past_key_values=cache).logits for start, stop in ((11, 12), (12, 26), (26, 30))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole[:, 11:])
    assert cache.get_seq_length() == 30 and cache.state.steps == (30, 30)


def test_several_sequences_of_one_prompt_are_drawn_apart():
    model = build()
    ids, mask, _ = padded([4, 9])
    output = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=True, num_return_sequences=3)
    assert output.shape == (6, 9 + NEW)
    assert len({tuple(row) for row in output[:3].tolist()}) == 3


def test_rows_stop_at_their_end_token_and_are_padded():
    model = build()
    ids, mask, alone = padded(LENGTHS)
    endless = [greedy(model, prompt).tolist() for prompt in alone]
    end = endless[1][5]
    output = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=0)
    for row, tokens in zip(output[:, ids.shape[1] :].tolist(), endless, strict=True):
        stop = tokens.index(end) + 1 if end in tokens else NEW
        assert row == (tokens[:stop] + [0] * NEW)[: len(row)]


def test_streamers_processors_and_stopping_criteria_see_every_token():
    class Tokens(BaseStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    class Even(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.masked_fill(torch.arange(VOCAB) % 2 == 1, float("-inf"))

    class Long(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 20)

    streamer = Tokens()
    output = build().generate(
        torch.randint(VOCAB, (1, 10)), max_new_tokens=NEW, do_sample=True, streamer=streamer,
        logits_processor=LogitsProcessorList([Even()]), stopping_criteria=[Long()],
    )  # fmt: skip
    assert output.shape == (1, 20) and not (output[:, 10:] % 2).any()
    assert streamer.seen == output[0].tolist() and streamer.ended


def test_a_text_ends_with_the_string_that_it_is_to_stop_at():
    letters = f"{string.ascii_lowercase}{string.digits}_"
    spelling = Tokenizer(BPE({letter: token for token, letter in enumerate(letters)}, []))
    spelling.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling)
    model, ids = build(), torch.randint(VOCAB, (1, 4))
    options = dict(max_new_tokens=NEW, do_sample=False, tokenizer=tokenizer)
    free = model.generate(ids, **options)[0].tolist()
    stopped = model.generate(ids, stop_strings=[letters[free[6]]], **options)[0].tolist()
    assert stopped == free[: free.index(free[6], 4) + 1]
    assert model.generate(ids, num_beams=2, **options).shape == (1, 4 + NEW)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache_implementation": "static"}, ValueError, "cache_implementation must be None, got 'static'"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, ValueError, "padded on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, ValueError, "row 0 has 2 stretches of ones"),
        ({"prompt_lookup_num_tokens": 2}, ValueError, "stateful"),
    ],
    ids=["cache", "right", "hole", "assisted"],
)
def test_what_a_state_cannot_do_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        build().generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3, **options)


def test_a_cache_of_a_state_has_the_columns_of_its_longest_row():
    model = build()
    ids, mask, _ = padded([4, 9])
    with torch.no_grad():
        state = model.model.encode(ids, attention_mask=mask)[1].state
        cache = SMTCache(state)
        assert cache.get_seq_length() == 9
        token = torch.tensor([[1], [2]])
        logits = model(token, attention_mask=torch.cat([mask, torch.ones_like(token)], dim=1), past_key_values=cache).logits
        assert torch.equal(logits, model.model(token, state)[0]) and cache.get_seq_length() == 10


def test_a_cache_is_changed_in_place_but_not_while_gradients_need_what_it_was():
    model = build()
    ids, mask, alone = padded([4, 9])
    more, parameters = torch.randint(VOCAB, (2, 5)), list(model.parameters())
    with torch.no_grad():
        cache = model(ids, attention_mask=mask).past_key_values
        before = cache.state.tokens.data_ptr()
        model(more[:, :1], past_key_values=cache)
    assert cache.state.tokens.data_ptr() == before
    first = model(ids, attention_mask=mask)
    kept = first.past_key_values.state.clone()
    state = first.past_key_values.state
    second = model(more, past_key_values=first.past_key_values).logits
    assert all(torch.equal(tensor, kept.tensors()[name]) for name, tensor in state.tensors().items())
    expected = sum(
        model(torch.cat([prompt, row])[None]).logits[:, -5:].square().sum() for prompt, row in zip(alone, more, strict=True)
    )
    for mine, theirs in zip(
        torch.autograd.grad(second.square().sum(), parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_decoding_step_is_given_no_mask():
    model, ids = build(), torch.randint(VOCAB, (2, 6))
    with torch.no_grad():
        cache = model(ids).past_key_values
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    inputs = model.prepare_inputs_for_generation(
        longer, next_sequence_length=1, cache_position=torch.tensor([6]), attention_mask=torch.ones_like(longer), cache=cache
    )
    assert inputs["input_ids"].shape == (2, 1) and inputs["attention_mask"] is None


def test_a_cache_reorders_repeats_and_refuses_to_be_cut():
    model = build()
    ids, mask, _ = padded([4, 9])
    cache = model(ids, attention_mask=mask).past_key_values
    assert cache.get_seq_length() == 9 and cache.state.steps == (4, 9)
    cache.batch_repeat_interleave(2)
    assert cache.state.steps == (4, 4, 9, 9)
    cache.reorder_cache(torch.tensor([3, 0]))
    assert cache.state.steps == (9, 4)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.state.steps == (4,)
    with pytest.raises(ValueError, match="cannot be cut"):
        cache.crop(2)
    cache.reset()
    assert cache.state is None and cache.get_seq_length() == 0


def test_going_on_from_a_row_that_ended_before_others_is_refused():
    model, ids = build(), torch.randint(1, VOCAB, (2, 4))
    cache = SMTCache()
    model(torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], 1), past_key_values=cache, use_cache=True)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:7] = 0  # padding behind the end of the second row
    with pytest.raises(ValueError, match=r"attention_mask has 5 tokens of row 1 .* has taken 7"):
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)
    assert cache.n_columns == 7


def test_a_state_that_has_taken_the_whole_prompt_does_not_take_it_again():
    model, ids = build(), torch.randint(1, VOCAB, (1, 6))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises((ValueError, IndexError), match=r"column behind the 6|out of bounds"):  # older releases by themselves
        model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert cache.n_columns == 6


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="pages keys and values"):
        build().init_continuous_batching()


def test_another_model_s_cache_is_refused():
    with pytest.raises(TypeError, match="must be an SMTCache, got tuple"):
        build().generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=1, past_key_values=())
