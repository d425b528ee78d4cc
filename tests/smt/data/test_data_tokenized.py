"""From settings to tokens: what was done before is reused, and what was left out is told."""

import pytest
from splits import in_memory

from smt.data import tokenized
from smt.data.documents import Document, Documents
from smt.data.parts import Parts
from smt.data.settings import DataConfig
from smt.data.tokenized import tokenize_corpus
from smt.data.tokenizer import Tokenizer


def documents(texts):
    return [Document(f"{index}", text) for index, text in enumerate(texts)]


def refuse(*arguments):
    raise AssertionError("it was done again")


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(5):
        (folder / f"{index}.txt").write_text(" ".join(f"word{(index + j) % 7}" for j in range(20 + 9 * index)))
    (folder / "short.txt").write_text("short")
    (folder / "empty.txt").write_text("")
    return folder


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_second_time_nothing_is_trained_or_tokenised(kind, texts, tmp_path, monkeypatch):
    settings = DataConfig(text=str(texts), tokenizer=kind, cache=str(tmp_path / "cache"))
    first = tokenize_corpus(settings, 280)
    monkeypatch.setattr(Tokenizer, "train", refuse)
    monkeypatch.setattr(Tokenizer, "encode_documents", refuse)
    again = tokenize_corpus(settings, 280)
    assert again.tokenizer.hash == first.tokenizer.hash and again.train.folder == first.train.folder


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", ""), ("tokenizer.json", "{}"), ("tokenizer_config.json", "{")]
)
def test_a_damaged_tokenizer_is_named_and_one_of_the_cache_is_trained_again(name, content, texts, tmp_path):
    settings = DataConfig(text=str(texts), cache=str(tmp_path / "cache"))
    first = tokenize_corpus(settings, 280)
    (folder,) = (path for path in (tmp_path / "cache" / "tokenizers").iterdir() if path.is_dir())
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        Tokenizer.load(folder)
    with pytest.warns(UserWarning, match=rf"{name}.*: it is made again"):
        again = tokenize_corpus(settings, 280)
    assert again.tokenizer.hash == first.tokenizer.hash


def test_a_changed_file_is_tokenised_again(texts, tmp_path):
    settings = DataConfig(text=str(texts), cache=str(tmp_path / "cache"))
    before = tokenize_corpus(settings, 280)
    (texts / "3.txt").write_text("another text, as long as it needs to be")
    assert tokenize_corpus(settings, 280).train.folder != before.train.folder


def test_it_says_what_there_is_and_what_was_left_out(texts, tmp_path):
    corpus = tokenize_corpus(DataConfig(text=str(texts), cache=str(tmp_path / "cache")), 280)
    train, validation = corpus.train, corpus.validation
    assert len(train) + len(validation) == 6
    assert corpus.describe() == (
        f"{texts}: training {len(train)} documents, 0.00 MB, {train.n_targets:,} tokens; "
        f"held out {len(validation)} documents, 0.00 MB, {validation.n_targets:,} tokens; "
        f"left out: 1 empty ({train.left_out_file})"
    )


def test_it_says_how_many_tokens_the_loss_counts_where_they_are_few(tmp_path):
    recall = {"pairs": 1, "length": 20, "longest": 10, "documents": 7}
    corpus = tokenize_corpus(DataConfig(source="recall", recall=recall, cache=str(tmp_path)), 300)
    assert len(corpus.train) == 7 and corpus.train.n_targets < 7 * 5  # an answer is a word of less than five tokens
    steps = sum(corpus.train.lengths) - 7
    expected = (
        f"recall: training 7 documents, {steps:,} tokens, of which the loss counts {corpus.train.n_targets:,}; held out 64"
    )
    assert expected in corpus.describe()


def test_documents_shorter_than_a_window_are_counted_in_a_warning(texts, tmp_path):
    corpus = tokenize_corpus(DataConfig(text=str(texts), cache=str(tmp_path / "cache")), 280)
    shortest, n = min(corpus.train.lengths) - 1, len(corpus.train)
    assert corpus.warning(shortest) is None
    assert corpus.warning(shortest + 1) == f"1 of {n} training documents are shorter than one window of {shortest + 1} tokens"


@pytest.mark.parametrize("rows", [4, 8, 64])
def test_rows_without_a_document_are_told_and_how_to_give_them_one(rows, tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(f"word{j % 7}" for j in range(300)))
    corpus = tokenize_corpus(DataConfig(text=str(tmp_path), cache=str(tmp_path / "cache")), 280)
    (steps,) = [length - 1 for length in corpus.train.lengths]
    said = corpus.idle_rows(rows, None)
    assert said.startswith(f"{rows - 1} of {rows} rows are idle: there are 1 documents to train on; --part_length ")
    advised = int(said.split()[-7])
    assert len(Parts(corpus.train, advised)) >= rows > len(Parts(corpus.train, advised + 1))
    assert corpus.idle_rows(rows, advised) is None and corpus.idle_rows(1, None) is None
    assert "--part_length" not in corpus.idle_rows(steps + 1, None)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(texts, tmp_path):
    Tokenizer.train(documents(["text " * 9]), 258).save(tmp_path)
    settings = DataConfig(text=str(texts), tokenizer=str(tmp_path), cache=str(tmp_path / "cache"))
    assert tokenize_corpus(settings, 258).tokenizer.vocab_size == 258
    with pytest.raises(ValueError, match=r"vocab_size must be at least 258 for the tokenizer .*, got 257"):
        tokenize_corpus(settings, 257)


def test_a_test_split_is_not_tokenised(tmp_path, monkeypatch):
    splits = [*(in_memory(documents([text])) for text in ("train " * 9, "validation")), Documents(refuse, "test")]
    monkeypatch.setattr(tokenized, "read_corpus", lambda settings: tokenized.Corpus("three", *splits))
    corpus = tokenize_corpus(DataConfig(cache=str(tmp_path)), 280)
    assert (corpus.train.n_bytes, corpus.validation.n_bytes) == ([54], [10])


def test_a_tokenizer_is_trained_on_training_documents_alone(tmp_path, monkeypatch):
    splits = [in_memory(documents([f"{word} " * 50])) for word in ("train", "hidden", "unseen")]
    monkeypatch.setattr(tokenized, "read_corpus", lambda settings: tokenized.Corpus("three", *splits))
    tokenizer = tokenize_corpus(DataConfig(cache=str(tmp_path)), 300).tokenizer
    sizes = [len(tokenizer.encode(word)) for word in ("train", "hidden", "unseen")]
    assert sizes == [1, 6, 6]


def test_one_cache_keeps_tokenizers_of_all_sizes_and_kinds_apart(texts, tmp_path):
    asked = [("bpe", 260), ("bpe", 258), ("unigram", 258)]
    of_cache = {"text": str(texts), "cache": str(tmp_path / "cache")}
    found = [tokenize_corpus(DataConfig(tokenizer=kind, **of_cache), size) for kind, size in asked]
    assert [corpus.tokenizer.vocab_size for corpus in found[:2]] == [260, 258]
    assert len({corpus.tokenizer.hash for corpus in found}) == len({corpus.train.folder for corpus in found}) == 3
    again = tokenize_corpus(DataConfig(**of_cache), 260)
    assert again.tokenizer.hash == found[0].tokenizer.hash
