"""The cache: decoding gives what a whole forward pass gives, in bytes that a formula tells."""

import pytest
import torch
from models import LAYOUTS, SIZES, configuration, model_of

from smt.hymba import HymbaConfig, cache_bytes

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def tokens(*shape):
    return torch.randint(SIZES["vocab_size"], shape)


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_decoding_equals_forward_alone_and_in_batches_of_different_lengths(name):
    model, ids, counts = model_of(configuration(name)), tokens(3, 15), torch.tensor([2, 7, 5])
    whole = model(ids)["logits"]
    alone = model.new_cache(1)
    steps = [model(ids[:1, t : t + 1], cache=alone)["logits"] for t in range(15)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:1], **CLOSE)
    assert alone.lengths == (15,)
    cache, rows = model.new_cache(3, 4), torch.arange(3)
    prompts = ids[:, :7].masked_fill(torch.arange(7) >= counts[:, None], 0)
    first = model(prompts, n_valid=counts, cache=cache)["logits"]
    for row, count in enumerate(counts.tolist()):
        torch.testing.assert_close(first[row, :count], whole[row, :count], **CLOSE)
    for step in range(8):  # past the end of every ring
        at = counts + step
        torch.testing.assert_close(model(ids[rows, at][:, None], cache=cache)["logits"][:, 0], whole[rows, at], **CLOSE)
    assert cache.lengths == (10, 15, 13) and cache.device_lengths.tolist() == [10, 15, 13]


@pytest.mark.parametrize(("name", "window"), [("local", 1), ("hybrid", 4), ("parallel", 4), ("parallel-no-metas", 3)])
@torch.no_grad()
def test_pieces_of_any_length_equal_the_whole_and_end_where_their_rows_do(name, window):
    model, ids = model_of(configuration(name, sliding_window=window)), tokens(2, 16)
    whole, cache = model(ids)["logits"], model.new_cache(2)
    pieces = [model(piece, cache=cache)["logits"] for piece in ids[:, :11].split([2, 1, 6, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole[:, :11], **CLOSE)
    # A row that takes nothing, beside one that does, is where it was.
    model(ids[:, 11:14], n_valid=torch.tensor([3, 0]), cache=cache)
    step = torch.stack([ids[0, 14:15], ids[1, 11:12]])
    after = model(step, cache=cache)["logits"][:, 0]
    torch.testing.assert_close(after, torch.stack([whole[0, 14], whole[1, 11]]), **CLOSE)


@pytest.mark.parametrize("n_tokens", [1, 3], ids=["step", "piece"])
def test_a_cache_of_inference_mode_goes_on_outside_of_it(n_tokens):
    model, ids = model_of(configuration("parallel")), tokens(2, 9)
    with torch.inference_mode():
        cache = model.new_cache(2)
        model(ids[:, :6], cache=cache)
    with torch.no_grad():
        after = [model(piece, cache=cache)["logits"] for piece in ids[:, 6:].split(n_tokens, dim=1)]
        torch.testing.assert_close(torch.cat(after, dim=1), model(ids)["logits"][:, 6:], **CLOSE)


@torch.no_grad()
def test_rows_are_copied_in_any_order_and_go_their_own_ways():
    model, ids = model_of(configuration("parallel")), tokens(2, 9)
    whole, cache = model(ids)["logits"], model.new_cache(2, 9)
    model(ids[:, :8], n_valid=torch.tensor([6, 8]), cache=cache)
    taken, copied = cache.rows(torch.tensor([1, 0, 1])), cache.clone()
    assert taken.lengths == (8, 6, 8)
    model(tokens(2, 1), cache=copied)
    logits = model(torch.stack([ids[1, 8:], ids[0, 6:7], ids[1, 8:]]), cache=taken)["logits"][:, 0]
    torch.testing.assert_close(logits, whole[[1, 0, 1], [8, 6, 8]], **CLOSE)
    torch.testing.assert_close(model(ids[[0, 1], [6, 8]][:, None], cache=cache)["logits"][:, 0], whole[[0, 1], [6, 8]], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_bytes_of_the_cache_are_those_of_the_formula(name, dtype):
    config = configuration(name)
    model = model_of(config, dtype)
    cache = model.new_cache(3, 9)
    assert cache.nbytes == cache_bytes(config, 9, 3, dtype.itemsize)
    model(tokens(3, 8), n_valid=torch.tensor([8, 2, 5]), cache=cache)
    model(tokens(3, 1), cache=cache)
    assert cache.nbytes == cache_bytes(config, 9, 3, dtype.itemsize)
    model(tokens(3, 1), cache=cache)  # the longest row holds ten now, and room doubles
    assert cache.nbytes == cache_bytes(config, 18, 3, dtype.itemsize)


def test_sharing_saves_what_the_documents_say_and_what_their_code_does():
    """Where all layers keep as much, as with one window for all, a layer's share of the bytes is its share of the layers."""
    shares = {}
    for layout, kv_sharing in [("parallel", "pairs"), ("parallel", "runs"), ("local", "pairs")]:
        sizes = [
            cache_bytes(HymbaConfig(layout=layout, kv_sharing=sharing), n_tokens=128)
            - cache_bytes(HymbaConfig(layout=layout, kv_sharing=sharing, n_kv_heads=1), n_tokens=128)
            for sharing in ("none", kv_sharing)
        ]
        shares[layout, kv_sharing] = sizes[0] / sizes[1]
    assert shares == {("parallel", "pairs"): 15 / 9, ("parallel", "runs"): 15 / 5, ("local", "pairs"): 15 / 8}


@pytest.mark.parametrize("name", ["mamba", "hybrid", "parallel", "parallel-no-metas"])
def test_greedy_continuations_of_a_batch_are_those_alone_and_those_of_whole_passes(name):
    model, ids = model_of(configuration(name)).train(), tokens(3, 6)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    batch = model.generate(ids, 7, attention_mask=mask, temperature=0)
    assert batch.shape == (3, 13) and model.training and torch.equal(batch[:, :6], ids)
    model.eval()
    for row, padding in enumerate((4, 0, 1)):
        alone = ids[row : row + 1, padding:]
        assert torch.equal(model.generate(alone, 7, temperature=0)[0], batch[row, padding:])
    for _ in range(7):
        alone = torch.cat([alone, model(alone)["logits"][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(alone[0], batch[2, 1:])


def test_rows_that_have_ended_are_padded_and_the_others_go_on():
    model, ids = model_of(configuration("parallel")), tokens(4, 5)
    free = model.generate(ids, 8, temperature=0)
    end = int(free[1, 6])
    ended = model.generate(ids, 8, temperature=0, eos_token_id=end, pad_token_id=0)
    for row in range(4):
        new = free[row, 5:].tolist()
        length = new.index(end) + 1 if end in new else 8
        expected = (new[:length] + [0] * 8)[: ended.shape[1] - 5]
        assert ended[row, 5:].tolist() == expected


def test_samples_follow_the_generator_and_the_most_likely_tokens():
    model, ids = model_of(configuration("hybrid")), tokens(2, 4)

    def draw(seed, **options):
        return model.generate(ids, 6, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(3, top_k=1), model.generate(ids, 6, temperature=0))
    assert [piece.shape for piece in model.stream(ids, 2, top_p=0.5)] == [(2,), (2,)]
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        model.generate(ids, 6, top_k=0)
    with pytest.raises(TypeError, match="input_ids must be an int64 or int32 tensor, got str"):
        model.generate("To be", 6)


def test_what_a_cache_does_not_take_is_named():
    model = model_of(configuration("parallel"))
    other = model_of(configuration("parallel", n_layers=3)).new_cache(2)
    ragged = model.new_cache(2)
    with torch.no_grad():
        model(tokens(2, 3), n_valid=torch.tensor([1, 3]), cache=ragged)
    fresh, both, one = model.new_cache(2), torch.tensor([2, 2]), torch.tensor([1, 0])
    for error, message, ids, call in [
        (TypeError, "cache must be a HymbaCache, which new_cache makes, got tuple", tokens(2, 1), {"cache": ()}),
        (ValueError, "cache must be of a model of this configuration", tokens(2, 1), {"cache": other}),
        (ValueError, "cache must be of as many rows as input_ids, 3, got 2", tokens(3, 1), {"cache": ragged}),
        (ValueError, "take one token each, got 2 and n_valid", tokens(2, 2), {"cache": ragged, "n_valid": both}),
        (ValueError, r"take one token each, got 1 and n_valid \(1, 0\)", tokens(2, 1), {"cache": ragged, "n_valid": one}),
        (TypeError, "n_valid must be an int64 or int32 tensor, got list", tokens(2, 2), {"cache": fresh, "n_valid": [1, 2]}),
        (ValueError, r"n_valid must have shape \(B=2,\), got \(1,\)", tokens(2, 2), {"cache": fresh, "n_valid": both[:1]}),
        (ValueError, r"n_valid must lie in 0\.\.T = 0\.\.1, got \(2, 2\)", tokens(2, 1), {"cache": fresh, "n_valid": both}),
    ]:  # fmt: skip
        with torch.no_grad(), pytest.raises(error, match=message):
            model(ids, **call)
    with pytest.raises(ValueError, match="a cache keeps no gradients and knows no dropout"):
        model(tokens(2, 1), cache=ragged)
    with torch.no_grad(), pytest.raises(ValueError, match="a cache keeps no gradients and knows no dropout"):
        model.train()(tokens(2, 1), cache=ragged)
    with pytest.raises(ValueError, match="batch_size must be at least 1 and n_tokens at least 0, got 0 and 0"):
        model.new_cache(0)
