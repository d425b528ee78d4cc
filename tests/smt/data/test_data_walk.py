"""Rows walk along whole documents: every target once, state reset exactly at their ends, resumable, and shared by processes."""

import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splits import in_memory
from torch.utils.data import DataLoader

from smt.data.documents import Document
from smt.data.parts import Parts
from smt.data.store import tokenise
from smt.data.tokenizer import Tokenizer
from smt.data.walk import IGNORE_INDEX, WAITING, Batch, DocumentWalk

LENGTHS = (2, 3, 9, 10, 11, 20, 21, 22, 57, 100)
MODES = pytest.mark.parametrize("together", [False, True], ids=["at-once", "together"])


def numbered(lengths=LENGTHS):
    """Documents of tokens that occur nowhere else."""
    starts = np.cumsum([0, *lengths])
    return [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]


def targets_of(batches):
    return torch.cat([batch.targets[batch.valid] for batch in batches])


def equal(one, other):
    return one.lane == other.lane and all(
        getattr(one, name).equal(getattr(other, name)) for name in vars(one) if name != "lane"
    )


def some_walks(test):
    """The promise for any lengths, sizes and order, however busy the machine is."""
    walks = given(
        lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12),
        batch_size=st.integers(1, 4),
        length=st.integers(1, 15),
        lanes=st.integers(1, 3),
        shuffle=st.booleans(),
        together=st.booleans(),
        epochs=st.integers(1, 2),
    )
    return settings(max_examples=40, deadline=None)(walks(test))


class TestOneEpoch:
    @some_walks
    def test_every_token_but_the_first_is_a_target_exactly_once(self, lengths, epochs, **sizes):
        documents = numbered(lengths)
        got = targets_of(DocumentWalk(documents, epochs=epochs, **sizes))
        once = torch.from_numpy(np.concatenate([document[1:] for document in documents]))
        assert got.sort().values.equal(once.repeat_interleave(epochs))

    @some_walks
    def test_each_row_reads_its_documents_from_the_first_token_to_the_last_with_one_reset(self, lengths, epochs, **sizes):
        documents = numbered(lengths)
        reading: dict[tuple[int, int], list[int]] = {}
        finished = []
        for batch in DocumentWalk(documents, epochs=epochs, **sizes):
            for row in range(sizes["batch_size"]):
                valid, document, key = batch.valid[row], batch.documents[row].item(), (batch.lane, row)
                if document == WAITING:
                    assert not valid.any() and not batch.reset[row] and key not in reading
                    continue
                assert batch.reset[row].item() == (key not in reading) == (batch.positions[row].item() == 0)
                read = reading.setdefault(key, [])
                assert batch.positions[row] == len(read)
                read += batch.input_ids[row][valid].tolist()
                if len(read) == len(documents[document]) - 1:
                    assert read == documents[document][:-1].tolist()
                    finished.append(document)
                    del reading[key]
        assert not reading and sorted(finished) == sorted(list(range(len(lengths))) * epochs)

    @some_walks
    def test_steps_stand_at_the_left_and_padding_is_masked(self, lengths, **sizes):
        for batch in DocumentWalk(numbered(lengths), **sizes):
            assert batch.input_ids.shape == batch.targets.shape == batch.valid.shape
            assert batch.input_ids.shape[0] == sizes["batch_size"] and batch.input_ids.shape[1] <= sizes["length"]
            assert (batch.valid.int().diff(dim=1) <= 0).all() and batch.valid.any(dim=0).all()
            assert (batch.targets == batch.input_ids + 1)[batch.valid].all()
            assert (batch.targets == IGNORE_INDEX).equal(~batch.valid) and not batch.input_ids[~batch.valid].any()
            assert batch.n_targets == batch.n_steps == batch.valid.sum()

    @some_walks
    def test_of_tokens_that_are_counted_and_of_no_other_each_is_a_target_once(self, lengths, epochs, **sizes):
        documents = numbered(lengths)
        counted = [document % 3 == 0 for document in documents]
        got, n_steps = [], 0
        whole = DocumentWalk(documents, epochs=epochs, **sizes)
        for batch, same in zip(DocumentWalk(documents, counted=counted, epochs=epochs, **sizes), whole, strict=True):
            assert batch.input_ids.equal(same.input_ids) and batch.valid.equal(same.valid)
            assert batch.targets.equal(same.targets.masked_fill(same.targets % 3 != 0, IGNORE_INDEX))
            got.append(batch.targets[batch.targets != IGNORE_INDEX])
            assert batch.n_targets == len(got[-1]) and batch.n_steps == same.n_targets
            n_steps += batch.n_steps
        once = torch.tensor([token for document in documents for token in document[1:].tolist() if token % 3 == 0])
        assert torch.cat(got).sort().values.equal(once.repeat_interleave(epochs))
        assert n_steps == epochs * sum(length - 1 for length in lengths)

    def test_a_row_is_padded_only_where_its_document_ends(self):
        documents = numbered()
        for batch in DocumentWalk(documents, batch_size=3, length=8, epochs=1):
            for row in batch.reading.nonzero()[:, 0].tolist():
                left = len(documents[batch.documents[row]]) - 1 - batch.positions[row]
                assert batch.valid[row].sum() == min(left, batch.valid.shape[1])

    def test_without_an_order_the_longest_come_first(self):
        first = next(iter(DocumentWalk(numbered(), batch_size=3, length=8, epochs=1, shuffle=False)))
        assert first.documents.tolist() == [9, 8, 7]

    def test_rows_together_begin_together_and_others_at_once(self):
        begin_apart = []
        for together in (True, False):
            batches = DocumentWalk(numbered(), batch_size=3, length=8, epochs=1, together=together)
            resets = [batch.reset[batch.reading] for batch in batches]
            begin_apart.append(any(reset.any() and not reset.all() for reset in resets))
        assert begin_apart == [False, True]

    def test_no_row_waits_while_there_are_documents(self):
        batches = DocumentWalk(numbered([20] * 5 + [7] * 30), batch_size=4, length=8, lanes=2)
        for _, batch in zip(range(100), batches, strict=False):
            assert batch.reading.all()


class TestOrder:
    @staticmethod
    def first_documents(n_epochs=1, **options):
        batches = DocumentWalk(numbered(), batch_size=3, length=8, epochs=n_epochs, **options)
        return [document for batch in batches for document in batch.documents[batch.reset].tolist()]

    def test_the_seed_fixes_it_and_other_seeds_and_epochs_have_another(self):
        assert self.first_documents(seed=1) == self.first_documents(seed=1) != self.first_documents(seed=2)
        two = self.first_documents(2, seed=1, lanes=1)
        assert two[:10] == self.first_documents(seed=1) != two[10:]
        assert self.first_documents(2, seed=1)[10:] != self.first_documents(seed=2)

    def test_documents_that_are_read_together_are_of_similar_length(self):
        lengths = list(range(2, 402))
        batches = DocumentWalk(numbered(lengths), batch_size=4, length=1000, epochs=1, together=True)
        spread = [(batch.valid.sum(1).max() - batch.valid.sum(1).min()).item() for batch in batches]
        assert len(spread) == 100 and max(spread) < 32

    def test_rows_that_begin_together_are_of_similar_length_where_the_rows_do_not_divide_the_documents(self):
        """Neither a group that is not full nor the next epoch shifts the groups behind it."""
        batches = list(DocumentWalk(numbered(range(2, 404)), batch_size=4, length=1000, epochs=2, together=True))
        spread = [(steps.max() - steps.min()).item() for b in batches for steps in [b.valid[b.reading].sum(1)]]
        assert len(batches) == 2 * 101 and max(spread) < 32
        assert [index for index, batch in enumerate(batches) if not batch.reading.all()] == [100, 201]

    def test_other_documents_are_read_together_in_every_epoch(self):
        batches = list(DocumentWalk(numbered([9] * 40), batch_size=4, length=8, epochs=2, together=True))
        groups = [frozenset(batch.documents.tolist()) for batch in batches]
        assert len(groups) == 20 and len(set(groups)) > 15

    def test_lanes_take_turns(self):
        lanes = [
            batch.lane for _, batch in zip(range(12), DocumentWalk(numbered(), batch_size=2, length=5, lanes=3), strict=False)
        ]
        assert lanes == [0, 1, 2] * 4

    def test_a_walk_that_has_ended_begins_again(self):
        walk = DocumentWalk(numbered(), batch_size=3, length=8, epochs=1)
        assert all(map(equal, list(walk), list(walk)))


class TestResuming:
    @MODES
    @pytest.mark.parametrize("n_before", [0, 1, 7, 30, 61])
    def test_it_goes_on_with_the_same_batches(self, together, n_before):
        def make():
            return DocumentWalk(numbered(), batch_size=3, length=5, lanes=2, seed=3, together=together)

        walk = make()
        batches = iter(walk)
        for _ in range(n_before):
            next(batches)
        saved = json.loads(json.dumps(walk.state_dict()))
        expected = [next(batches) for _ in range(40)]
        resumed = make()
        resumed.load_state_dict(saved)
        for batch, got in zip(expected, resumed, strict=False):
            assert equal(batch, got)

    def test_it_can_go_on_with_another_number_of_processes(self):
        one = DocumentWalk(numbered(), batch_size=4, length=5, seed=3)
        batches = iter(one)
        for _ in range(9):
            next(batches)
        two = [DocumentWalk(numbered(), batch_size=2, length=5, seed=3, rank=rank, world_size=2) for rank in range(2)]
        for walk in two:
            walk.load_state_dict(one.state_dict())
        for whole, *parts in zip((next(batches) for _ in range(20)), *two, strict=False):
            assert torch.cat([part.input_ids for part in parts]).equal(whole.input_ids)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"length": 6}, "a walk with length = 5, this one has 6"),
            ({"seed": 1}, "a walk with seed = 0, this one has 1"),
            ({"batch_size": 4}, "a walk with rows_of_all_processes = 3, this one has 4"),
            ({"documents": numbered(LENGTHS[:-1])}, "a walk with n_documents = 10, this one has 9"),
            ({"documents": numbered((*LENGTHS[:-1], 99))}, "a walk with n_steps = 245, this one has 244"),
            ({"lanes": 2}, "a walk with lanes = 1, this one has 2"),
            ({"epochs": 2}, "a walk with epochs = None, this one has 2"),
            ({"shuffle": False}, "a walk with shuffle = True, this one has False"),
            ({"together": True}, "a walk with together = False, this one has True"),
        ],
        ids=["length", "seed", "rows", "documents", "steps", "lanes", "epochs", "shuffle", "together"],
    )
    def test_the_state_of_another_walk_is_refused(self, other, message):
        saved = DocumentWalk(numbered(), batch_size=3, length=5).state_dict()
        options = {"documents": numbered(), "batch_size": 3, "length": 5, **other}
        with pytest.raises(ValueError, match=message):
            DocumentWalk(options.pop("documents"), **options).load_state_dict(saved)


class TestProcesses:
    @MODES
    @pytest.mark.parametrize("epochs", [1, 2])
    def test_two_with_b_rows_read_what_one_with_2b_rows_reads(self, together, epochs):
        options = dict(length=8, lanes=2, epochs=epochs, together=together)
        whole = list(DocumentWalk(numbered(), batch_size=6, **options))
        ranks = [list(DocumentWalk(numbered(), batch_size=3, rank=rank, world_size=2, **options)) for rank in range(2)]
        assert len(whole) == len(ranks[0]) == len(ranks[1])
        for batch, *parts in zip(whole, *ranks, strict=True):
            joined = {n: torch.cat([getattr(part, n) for part in parts]) for n in vars(batch) if n != "lane"}
            assert equal(batch, Batch(batch.lane, **joined))

    def test_a_loader_hands_on_its_batches_with_and_without_a_worker(self):
        def make():
            return DocumentWalk(numbered(), batch_size=3, length=8, epochs=1)

        for num_workers in (0, 1):
            loaded = list(DataLoader(make(), batch_size=None, num_workers=num_workers))
            assert all(map(equal, loaded, make())) and loaded

    def test_several_workers_that_would_repeat_each_other_are_refused(self, monkeypatch):
        monkeypatch.setattr("smt.data.walk.get_worker_info", lambda: SimpleNamespace(num_workers=2))
        with pytest.raises(ValueError, match="num_workers must be 0 or 1, got 2"):
            next(iter(DocumentWalk(numbered(), batch_size=3, length=8)))

    def test_a_store_is_walked_like_the_tokens_it_holds(self, tmp_path):
        texts = [Document(f"{index}", "some text " * (3 * index + 1)) for index in range(6)]
        tokenizer = Tokenizer.train(texts, 270)
        store = tokenise(in_memory(texts), tokenizer, tmp_path)
        tensors = [torch.tensor(tokens) for _, tokens, _ in tokenizer.encode_documents(texts)]
        walks = (DocumentWalk(documents, batch_size=2, length=7, epochs=2) for documents in (store, tensors))
        assert all(map(equal, *map(list, walks)))


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"length": 0}, "length must be at least 1, got 0"),
            ({"lanes": -1}, "lanes must be at least 1, got -1"),
            ({"epochs": 0}, "epochs must be at least 1, got 0"),
            ({"rank": 2, "world_size": 2}, r"rank must lie in 0..world_size - 1 = 0..1, got 2"),
            ({"documents": []}, "documents must be one or more, each of at least 2 tokens, got 0"),
            ({"documents": numbered([5, 1])}, "each of at least 2 tokens, got 2, one of 1"),
            ({"counted": []}, "counted must be given for each of 10 documents, got 0"),
        ],
        ids=["batch_size", "length", "lanes", "epochs", "rank", "none", "without-target", "counted"],
    )
    def test_it_is_refused(self, options, message):
        options = {"documents": numbered(), "batch_size": 2, "length": 8, **options}
        with pytest.raises(ValueError, match=message):
            DocumentWalk(options.pop("documents"), **options)


@pytest.mark.parametrize("length", [1, 4, 9, 100])
def test_parts_of_documents_have_every_target_once_and_in_order(length):
    texts = [torch.arange(count) + 100 * count for count in (2, 10, 11, 37)]
    parts = Parts(texts, length)
    targets = [token for part in parts for token in part[1:].tolist()]
    assert targets == [token for text in texts for token in text[1:].tolist()]
    assert max(len(part) - 1 for part in parts) <= length and min(len(part) for part in parts) >= 2
    starts = {text[0].item(): text for text in texts}
    for before, part in pairwise(parts):
        assert part[0] == before[-1] or part[0].item() in starts


def test_batches_are_made_on_the_cpu_whatever_the_default_device():
    documents = [torch.arange(length) for length in (5, 9, 7)]
    options = dict(batch_size=2, length=4, epochs=1, seed=3)
    expected = list(DocumentWalk(documents, **options))
    with torch.device("meta"):
        batches = list(DocumentWalk(documents, **options))
    assert len(batches) == len(expected)
    for mine, theirs in zip(batches, expected, strict=True):
        assert torch.equal(mine.input_ids, theirs.input_ids) and torch.equal(mine.documents, theirs.documents)


def test_batches_compare_by_identity():
    (batch,) = DocumentWalk([torch.arange(5)], batch_size=1, length=9, epochs=1)
    assert batch == batch and batch in [batch]
