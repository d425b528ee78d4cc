"""Documents stay whole, in order and apart: from files to the chunks that a model reads."""

import pytest
import torch

from smt.data.batches import draw_batches, evaluation_chunks, training_chunks, walk
from smt.data.documents import Document, read_text
from smt.data.stdlib import HELD_OUT_PACKAGES, LEFT_OUT_FOLDERS, read_stdlib
from smt.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from smt.loss import IGNORE_INDEX

LENGTHS = (2, 3, 9, 10, 11, 20, 21, 22, 57, 100)


def numbered(lengths=LENGTHS):
    """Documents of tokens that occur nowhere else."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]


@pytest.fixture(scope="module")
def stdlib():
    return read_stdlib()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([Document("a", "def f(x):\n    return x + 1\n" * 20)], 270)


class TestStandardLibrary:
    def test_held_out_packages_are_whole_and_disjoint_from_training(self, stdlib):
        top = lambda part: {document.name.split("/")[0] for document in part}  # noqa: E731
        assert top(stdlib.validation) <= set(HELD_OUT_PACKAGES)
        assert {"email", "http", "json"} <= top(stdlib.validation)
        assert not top(stdlib.train) & set(HELD_OUT_PACKAGES)
        assert not {document.text for document in stdlib.train} & {document.text for document in stdlib.validation}

    def test_held_out_documents_do_not_resemble_training_ones(self, stdlib):
        long_lines = lambda part: [line for d in part for line in map(str.strip, d.text.splitlines()) if len(line) >= 20]  # noqa: E731
        seen, held_out = set(long_lines(stdlib.train)), long_lines(stdlib.validation)
        assert sum(line in seen for line in held_out) < 0.1 * len(held_out)

    def test_share_held_out_is_a_few_percent(self, stdlib):
        held_out, trained = (sum(d.n_bytes for d in part) for part in (stdlib.validation, stdlib.train))
        assert 0.04 < held_out / (held_out + trained) < 0.09

    def test_leaves_out_tests_and_installed_packages_and_is_sorted(self, stdlib):
        names = [document.name for document in stdlib.train]
        assert names == sorted(names, key=lambda name: name.split("/"))
        assert not any(LEFT_OUT_FOLDERS.intersection(name.split("/")) for name in names)

    def test_a_folder_without_source_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"no source of Python's standard library in .*--text PATH"):
            read_stdlib(tmp_path)


class TestLocalText:
    def test_folder_holds_out_whole_files_and_counts_what_it_leaves_out(self, tmp_path):
        for index in range(25):
            (tmp_path / f"{index:02}.txt").write_text(f"text {index}")
        (tmp_path / "empty.txt").write_text(" \n")
        (tmp_path / "image.bin").write_bytes(b"\xff\xfe\xfa")
        (tmp_path / ".hidden").write_text("hidden")
        corpus = read_text(tmp_path)
        assert [d.name for d in corpus.validation] == ["19.txt"]
        assert len(corpus.train) == 24
        assert corpus.skipped == {"empty": 1, "not UTF-8": 1}
        assert "1 empty" in corpus.describe() and "1 not UTF-8" in corpus.describe()

    def test_two_files_hold_out_the_last(self, tmp_path):
        for name in "ab":
            (tmp_path / name).write_text(f"text {name}")
        corpus = read_text(tmp_path)
        assert ([d.name for d in corpus.train], [d.name for d in corpus.validation]) == (["a"], ["b"])

    def test_single_file_holds_out_its_end(self, tmp_path):
        (tmp_path / "a.txt").write_text("0123456789" * 10)
        corpus = read_text(tmp_path / "a.txt")
        assert corpus.train[0].text + corpus.validation[0].text == "0123456789" * 10
        assert len(corpus.validation[0].text) == 5

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "does not exist"), (b"\xff\xfe\xfa", "not UTF-8"), (b"", "empty"), (b"short", "characters")],
    )
    def test_unusable_text_is_refused(self, tmp_path, content, message):
        path = tmp_path / "text"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_text(path)


class TestTokenizer:
    @pytest.mark.parametrize("text", ["def g(y):\n\treturn y", "Größe → ∑ 🙂", "\r\n \x00", END_OF_DOCUMENT], ids=repr)
    def test_any_text_survives_a_round_trip_without_ending_its_document(self, tokenizer, text):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.end_of_document not in tokens

    def test_saved_and_loaded_it_encodes_the_same(self, tokenizer, tmp_path):
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = Tokenizer.load(tmp_path / "tokenizer.json")
        text = f"return x\n{END_OF_DOCUMENT}"
        assert loaded.encode(text).equal(tokenizer.encode(text))
        assert loaded.vocab_size == tokenizer.vocab_size

    def test_documents_stand_between_two_ends(self, tokenizer):
        (tokens,) = tokenizer.encode_documents([Document("a", "return")])
        end = tokenizer.end_of_document
        assert tokens[0] == tokens[-1] == end
        assert tokens[1:-1].equal(tokenizer.encode("return"))

    def test_a_vocabulary_without_room_for_bytes_is_refused(self):
        with pytest.raises(ValueError, match=r"vocab_size must be at least 257.*got 256"):
            Tokenizer.train([Document("a", "text")], 256)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no tokenizer at"):
            Tokenizer.load(tmp_path / "tokenizer.json")


class TestBatches:
    @pytest.mark.parametrize("length", [1, 7, 10, 1000], ids="T{}".format)
    @pytest.mark.parametrize("batch_size", [1, 3, 100], ids="B{}".format)
    def test_every_token_but_the_first_is_a_target_exactly_once(self, batch_size, length):
        documents = numbered()
        chunks = list(evaluation_chunks(documents, batch_size=batch_size, length=length))
        targets = torch.cat([chunk.targets[chunk.targets != IGNORE_INDEX] for chunk in chunks])
        assert targets.sort().values.equal(torch.cat([document[1:] for document in documents]))
        assert sum(chunk.n_targets for chunk in chunks) == len(targets)

    @pytest.mark.parametrize("length", [1, 7, 10, 1000], ids="T{}".format)
    def test_rows_followed_through_the_chunks_spell_their_documents(self, length):
        documents = numbered()
        rows, read = [], [[] for _ in documents]
        for chunk in walk(documents, length):
            rows = list(range(len(documents))) if chunk.first else rows if chunk.rows is None else [rows[i] for i in chunk.rows]
            for row, index in enumerate(rows):
                there = chunk.targets[row] != IGNORE_INDEX
                assert (chunk.targets[row][there] == chunk.input_ids[row][there] + 1).all()
                read[index] += chunk.input_ids[row][there].tolist()
        assert read == [document[:-1].tolist() for document in documents]

    def test_only_the_last_chunk_of_a_document_is_padded(self):
        length = 8
        padding = sum((chunk.targets == IGNORE_INDEX).sum().item() for chunk in walk(numbered(), length))
        assert padding <= sum(-(len(document) - 1) % length for document in numbered())

    def test_an_epoch_reads_every_document_once_in_an_order_that_the_seed_fixes(self):
        orders = []
        for seed in (1, 1, 2):
            batches = draw_batches(numbered(), 3, torch.Generator().manual_seed(seed))
            orders.append([document[0].item() for batch in batches for document in batch])
        assert sorted(orders[0]) == [document[0].item() for document in numbered()]
        assert orders[0] == orders[1] != orders[2]

    def test_lanes_take_turns_and_each_walks_its_documents_in_order(self):
        documents, lanes = numbered(), 3
        chunks = training_chunks(documents, batch_size=2, length=5, lanes=lanes, seed=0)
        last: dict[int, torch.Tensor] = {}
        seen = []
        for index in range(60):  # more than an epoch
            chunk = next(chunks)
            assert chunk.lane == index % lanes
            if not chunk.first:
                before = last[chunk.lane] if chunk.rows is None else last[chunk.lane][chunk.rows]
                assert before[:, -1].equal(chunk.input_ids[:, 0])
            last[chunk.lane] = chunk.targets
            seen.append(chunk.targets[chunk.targets != IGNORE_INDEX])
        assert set(torch.cat(seen).tolist()) == set(torch.cat([document[1:] for document in documents]).tolist())
