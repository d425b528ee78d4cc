"""Texts packed into one row: each gives what it gives alone, in value, gradient, memory and state."""

import pytest
import torch
from small_model import ENCODINGS, VOCAB, build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smt.model import parallel

LENGTHS = [5, 1, 40, 17, 18, 2]


def packed(lengths):
    """Texts, all of them in one row, and where each begins."""
    texts = [torch.randint(VOCAB, (1, length)) for length in lengths]
    return texts, torch.cat(texts, dim=1), torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("empty_slots", ["mask", "zero"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_packed_texts_give_the_logits_loss_and_gradients_of_each_alone(encoding, empty_slots):
    model = build(encoding=encoding, empty_slots=empty_slots).double()
    texts, row, bounds = packed(LENGTHS)
    logits, aux = model(row, cu_seqlens=bounds, return_weights=True)
    alone = [model(text, return_weights=True) for text in texts]
    torch.testing.assert_close(logits, torch.cat([of_text for of_text, _ in alone], dim=1))
    assert aux.state.steps == tuple(LENGTHS) and aux.n_tokens == sum(LENGTHS)
    assert aux.writes == tuple(of_text.writes[0] for _, of_text in alone) and len(aux.writes[2]) > 8
    for weights, (_, of_text) in zip(aux.attention_weights, alone, strict=True):
        torch.testing.assert_close(weights[: of_text.n_writes], of_text.attention_weights[0])

    parameters = list(model.parameters())
    loss = model.loss(row, cu_seqlens=bounds)[0]
    expected = sum(model.loss(text)[0] * (text.shape[1] - 1) for text in texts) / sum(length - 1 for length in LENGTHS)
    torch.testing.assert_close(loss, expected)
    gradients = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True)
    for mine, theirs in gradients:
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_packed_texts_go_on_packed_or_as_rows(encoding):
    model = build(encoding=encoding).double()
    texts, row, bounds = packed(LENGTHS)
    more, next_row, next_bounds = packed([1, 7, 3, 1, 30, 1])
    token = torch.randint(VOCAB, (6, 1))
    with torch.no_grad():
        state = model(row, cu_seqlens=bounds)[1].state
        logits, aux = model(next_row, state, cu_seqlens=next_bounds.tolist())
        last, _ = model(next_row, state, cu_seqlens=next_bounds, last_only=True)
        then, _ = model(token, aux.state)
        whole = [model(torch.cat([*parts, t[None]], dim=1))[0] for *parts, t in zip(texts, more, token, strict=True)]
    expected = [of_text[:, length:-1] for of_text, length in zip(whole, LENGTHS, strict=True)]
    torch.testing.assert_close(logits, torch.cat(expected, dim=1))
    torch.testing.assert_close(last, torch.cat([of_text[:, -1:] for of_text in expected]))
    torch.testing.assert_close(then, torch.cat([of_text[:, -1:] for of_text in whole]))


def test_texts_run_beside_texts_of_less_than_twice_their_length(monkeypatch):
    shapes, encode = [], parallel.encode_chunk

    def seen(memory, decoder, embedded, *arguments, **options):
        shapes.append(tuple(embedded.shape[:2]))
        return encode(memory, decoder, embedded, *arguments, **options)

    monkeypatch.setattr("smt.model.batch.encode_chunk", seen)
    _, row, bounds = packed([70, 9, 100, 8, 3, 15])
    build()(row, cu_seqlens=bounds)
    assert sorted(shapes) == [(1, 3), (2, 100), (3, 15)]
    shapes.clear()
    _, row, bounds = packed([12, 12])
    build()(row, cu_seqlens=bounds)
    assert shapes == [(2, 12)]


def test_one_long_text_pads_no_other():
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.append(max([x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)], default=0))
            return out

    model = build(n_ssm_outputs=1, m_input_tokens=3, stride=3)
    _, row, bounds = packed([3] * 100 + [200])
    with Sizes():
        model.loss(row, cu_seqlens=bounds)[0].backward()
    assert max(largest) < 100 * 200 * 16 / 4, "no tensor holds the texts padded to the longest, of width 16"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_bounds_are_integers_of_any_kind_and_shape(dtype):
    model = build()
    texts, row, bounds = packed([5, 15])
    last, _ = model(row, cu_seqlens=bounds[None].to(dtype), last_only=True)
    torch.testing.assert_close(last, torch.cat([model(text)[0][:, -1:] for text in texts]))


def test_bounds_of_numpy_are_integers():
    _, row, bounds = packed([5, 15])
    assert build()(row, cu_seqlens=bounds.numpy())[1].state.steps == (5, 15)


def test_packed_texts_and_padded_rows_are_mapped_over():
    model = build(dropout=0.0).double()
    _, row, bounds = packed([5, 15])
    rows = torch.stack([row, row.flip(1)])

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row,), {"targets": row, "cu_seqlens": bounds.tolist()})[0]

    parameters = dict(model.named_parameters())
    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, rows)
    for number, one in enumerate(rows):
        expected = torch.func.grad(loss)(parameters, one)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name][number], gradient)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cu_seqlens": [0, 2]}, ValueError, r"cu_seqlens must rise from 0 to T = 4, .* got \(0, 2\)"),
        ({"cu_seqlens": [1, 4]}, ValueError, "cu_seqlens must rise from 0"),
        ({"cu_seqlens": torch.tensor([0, 2, 2, 4])}, ValueError, "cu_seqlens must rise from 0"),
        ({"cu_seqlens": []}, ValueError, "cu_seqlens must rise from 0"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, TypeError, "cu_seqlens must be integers"),
        ({"cu_seqlens": torch.tensor([False, True])}, TypeError, "cu_seqlens must be integers"),
        ({"cu_seqlens": [0, 4], "attention_mask": torch.ones(1, 4)}, ValueError, "attention_mask must be None beside cu_seq"),
        ({"cu_seqlens": [0, 4], "input_ids": torch.ones(2, 4).long()}, ValueError, r"must have shape \(1, T\) beside cu_seq"),
    ],
    ids=["short", "late", "empty text", "none", "float", "bool", "mask", "rows"],
)
def test_what_tells_no_texts_is_explained(options, error, message):
    model = build()
    with pytest.raises(error, match=message):
        model(**{"input_ids": torch.ones(1, 4, dtype=torch.long), **options})
    if "attention_mask" not in options:
        with pytest.raises(error, match=message):
            model.loss(**{"input_ids": torch.ones(1, 4, dtype=torch.long), **options})


def test_a_state_has_a_row_for_every_text():
    model = build()
    state = model(torch.ones(1, 4, dtype=torch.long))[1].state
    with pytest.raises(ValueError, match=r"state .* 1"):
        model(torch.ones(1, 4, dtype=torch.long), state, cu_seqlens=[0, 2, 4])
