"""Preference pairs from a file of JSON lines to batches: which tokens, which are left out and named, which are held out."""

import gzip
import json
from itertools import islice

import pytest
import torch

from smt.data.documents import Document
from smt.data.pair_walk import PairWalk, pair_batch
from smt.data.pairs import Pair, read_pairs, write_pairs
from smt.data.tokenizer import Tokenizer
from smt.data.walk import IGNORE_INDEX

GOOD = [{"prompt": f"{index}? ", "chosen": "yes", "rejected": "no"} for index in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([Document("a", "yes no " * 9)], 260)


def written(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def all_of(pairs):
    return [*pairs.train, *pairs.held_out]


def test_rows_begin_and_end_as_documents_do(tokenizer, tmp_path):
    pairs = read_pairs(written(tmp_path / "a.jsonl", GOOD), tokenizer, 100)
    end, (yes, no) = tokenizer.end_of_document, (tokenizer.encode(word).tolist() for word in ("yes", "no"))
    expected = [Pair([end, *tokenizer.encode(line["prompt"]).tolist()], [*yes, end], [*no, end]) for line in GOOD]
    assert sorted(all_of(pairs)) == sorted(expected) and 1 <= len(pairs.held_out) < 10
    assert pairs.n_targets == sum(len(pair.prompt) + len(pair.chosen) - 1 for pair in pairs.train)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert all_of(read_pairs(packed, tokenizer, 100)) == all_of(pairs)


def test_no_prompt_is_both_trained_on_and_held_out(tokenizer, tmp_path):
    lines = [{"prompt": f"{index % 5}", "chosen": f"yes {index}", "rejected": "no"} for index in range(50)]
    pairs = read_pairs(written(tmp_path / "a.jsonl", lines), tokenizer, 100)
    held_out = {tuple(pair.prompt) for pair in pairs.held_out}
    assert held_out and not held_out & {tuple(pair.prompt) for pair in pairs.train}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "cut', "lines that are not JSON"),
        ("[1]", "lines without texts in prompt, chosen, rejected"),
        ({"prompt": "a", "chosen": "b"}, "lines without texts in prompt, chosen, rejected"),
        ({"prompt": "a", "chosen": 1, "rejected": "b"}, "lines without texts in prompt, chosen, rejected"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "pairs with an empty completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "pairs whose completions are the same"),
        ('{"prompt": "half \\ud800", "chosen": "a", "rejected": "b"}', "lines with half a surrogate pair"),
        (
            {"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": []},
            "lines with messages instead of texts: no chat template is applied here",
        ),
        ({**GOOD[0], "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, "lines with tokens of another tokenizer"),
    ],
    ids=["cut", "list", "missing", "number", "empty", "same", "surrogate", "messages", "tokens"],
)
def test_a_line_that_is_no_pair_is_left_out_by_its_number(line, reason, tokenizer, tmp_path):
    pairs = read_pairs(written(tmp_path / "a.jsonl", [GOOD[0], "", line, GOOD[1]]), tokenizer, 100)
    assert len(all_of(pairs)) == 2 and pairs.left_out.names == {reason: ["a.jsonl:3"]}
    assert f"left out: 1 {reason} (a.jsonl:3)" in pairs.describe()


@pytest.mark.parametrize("ids", [[], [260], [-1], [True], "12", None])
def test_tokens_that_are_none_are_left_out(ids, tokenizer, tmp_path):
    line = {**GOOD[0], "prompt_ids": ids, "chosen_ids": [2], "rejected_ids": [3], "tokenizer": tokenizer.hash}
    pairs = read_pairs(written(tmp_path / "a.jsonl", [*GOOD[:2], line]), tokenizer, 100)
    assert list(pairs.left_out.names) == ["lines without tokens in prompt_ids, chosen_ids, rejected_ids"]


def test_pairs_of_tokens_come_back_as_they_were(tokenizer, tmp_path):
    """Whose text would have other tokens: bytes that are no UTF-8, and pieces that no encoder cuts so."""
    pairs = [Pair([200, 201], [130 + index], [131, 132]) for index in range(2, 6)]
    pairs = [Pair([index, *pair.prompt], pair.chosen, pair.rejected) for index, pair in enumerate(pairs, start=50)]
    write_pairs(tmp_path / "a.jsonl", pairs, tokenizer)
    assert sorted(all_of(read_pairs(tmp_path / "a.jsonl", tokenizer, 100))) == pairs


def test_a_pair_that_is_too_long_loses_its_prompts_left_and_only_then_of_its_completions(tokenizer, tmp_path):
    def line(prompt, chosen, rejected):
        ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "tokenizer": tokenizer.hash}
        return {"prompt": str(prompt), "chosen": "", "rejected": "", **ids}

    fits, long, longer = ([1, 2, 3], [4], [5, 6]), ([1, 2, 3, 4], [5], [6, 7]), ([1, 2], [3, 4], [5, 6, 7, 8, 9])
    pairs = read_pairs(written(tmp_path / "a.jsonl", [line(*pair) for pair in (fits, long, longer)]), tokenizer, 4)
    assert sorted(all_of(pairs)) == sorted([fits, ([2, 3, 4], [5], [6, 7]), ([2], [3, 4], [5, 6, 7, 8])])
    assert (pairs.n_cut_prompts, pairs.n_cut_completions) == (2, 1)
    assert "prompts cut on the left: 2; completions cut on the right: 1" in pairs.describe()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "pairs must be a file of JSON lines, .* is none"),
        ([], "holds none: nothing there"),
        (["no", "none"], "holds none: 2 lines that are not JSON .a.jsonl:1, a.jsonl:2."),
        ([GOOD[0], GOOD[0]], "pairs must have two prompts or more"),
    ],
    ids=["missing", "empty", "no pairs", "one prompt"],
)
def test_a_file_without_pairs_is_refused(lines, message, tokenizer, tmp_path):
    if lines is not None:
        written(tmp_path / "a.jsonl", lines)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / "a.jsonl", tokenizer, 100)


PAIRS = [Pair([index + 1], [10] * (1 + index % 3), [20, 21]) for index in range(7)]


def test_a_batch_has_the_chosen_rows_first_and_padding_on_the_right():
    batch = pair_batch([Pair([1, 2], [3], [4, 5]), Pair([6], [7, 8], [9])])
    none = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[1, 2, 0], [6, 7, 0], [1, 2, 4], [6, 0, 0]]
    assert batch.targets.tolist() == [[2, 3, none], [7, 8, none], [2, 4, 5], [9, none, none]]
    assert batch.completion.int().tolist() == [[0, 1, 0], [1, 1, 0], [0, 1, 1], [1, 0, 0]]
    assert (batch.n_pairs, batch.n_targets, batch.n_steps) == (2, 4, 8)
    wide = batch.widened(5)
    assert wide.targets.shape == wide.input_ids.shape == wide.completion.shape == (4, 5)
    assert (wide.n_targets, wide.n_steps) == (4, 8) and torch.equal(wide.completion[:, :3], batch.completion)


def drawn(walk, n_batches):
    """First tokens of the pairs of so many batches."""
    batches = islice(walk, n_batches)
    return [token for batch in batches for token in batch.input_ids[: batch.n_pairs, 0].tolist()]


def test_every_pair_comes_once_in_an_epoch_and_epochs_differ():
    tokens = drawn(PairWalk(PAIRS, batch_size=2, seed=3), 7)
    assert sorted(tokens[:7]) == sorted(tokens[7:]) == list(range(1, 8)) and tokens[:7] != tokens[7:]
    assert tokens == drawn(PairWalk(PAIRS, batch_size=2, seed=3), 7) != drawn(PairWalk(PAIRS, batch_size=2, seed=4), 7)


def test_a_walk_goes_on_where_another_stood_and_ranks_share_a_batch():
    whole = drawn(PairWalk(PAIRS, batch_size=4), 6)
    walk = PairWalk(PAIRS, batch_size=4)
    first = drawn(walk, 2)
    ranks = [PairWalk(PAIRS, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(walk.state_dict())
    halves = [drawn(rank, 4) for rank in ranks]
    rest = [token for start in range(0, 8, 2) for half in halves for token in half[start : start + 2]]
    assert first + rest == whole


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"pairs": PAIRS[:-1]}, "a walk with hash_of_pairs = "),
        ({"batch_size": 3}, "a walk with pairs_of_all_processes = 2, this one has 3"),
        ({"seed": 1}, "a walk with seed = 0, this one has 1"),
    ],
    ids=["pairs", "size", "seed"],
)
def test_the_state_of_another_walk_is_refused(other, message):
    options = {"pairs": PAIRS, "batch_size": 2, **other}
    with pytest.raises(ValueError, match=message):
        PairWalk(**options).load_state_dict(PairWalk(PAIRS, batch_size=2).state_dict())
