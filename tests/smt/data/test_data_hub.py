"""WikiText, PG-19 and other data sets through ``datasets``, from local copies and without a network."""

import datasets
import pytest

from smt.data.documents import LeftOut
from smt.data.settings import DataConfig
from smt.data.sources import read_corpus
from smt.data.wikitext import articles

LINES = [
    "",
    " = One = \n",
    "",
    " text of one \n",
    " = = Section = = \n",
    " more \n",
    "",
    "",
    " = Two = \n",
    "",
    " text of two \n",
]
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(split):
    return [line.replace("text", f"{split} text") for line in LINES]


def save_to_disk(folder):
    parts = {split: datasets.Dataset.from_dict({"text": rows(split)}) for split in SPLITS}
    datasets.DatasetDict(parts).save_to_disk(str(folder))


def save_as_parquet(folder):
    """As on the Hub: a folder per configuration."""
    (folder / "wikitext-2-raw-v1").mkdir(parents=True)
    for split in SPLITS:
        datasets.Dataset.from_dict({"text": rows(split)}).to_parquet(
            folder / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet"
        )


def save_as_published(folder):
    folder.mkdir()
    for split, short in zip(SPLITS, ("train", "valid", "test"), strict=True):
        (folder / f"wiki.{short}.raw").write_text("".join(line if line else " \n" for line in rows(split)))


class TestArticles:
    def test_an_article_is_all_lines_from_its_title_to_the_next(self):
        one, two = articles(LINES)
        assert (one.name, two.name) == ("One", "Two")
        assert one.text == " = One = \n\n text of one \n = = Section = = \n more \n\n\n"
        assert two.text == " = Two = \n\n text of two \n"

    @pytest.mark.parametrize(
        "line", [" = = Section = = \n", " = = = Part = = = \n", " a = b \n", " = x = y \n"], ids=lambda line: line.strip()
    )
    def test_a_line_that_is_not_a_title_begins_no_article(self, line):
        assert len(list(articles([*LINES, "", line, "", " text \n"]))) == 2

    def test_a_line_like_a_title_inside_a_text_begins_no_article(self):
        assert len(list(articles([*LINES, " = 6 = \n", " text \n", "", " = 7 = \n", " text \n"]))) == 2

    def test_line_ends_may_be_missing_and_no_line_is_lost(self):
        bare = [line.removesuffix("\n") for line in LINES]
        assert [d.text for d in articles(bare)] == [d.text for d in articles(LINES)]
        lines = [" before \n", *LINES, "", " = Last = \n"]
        assert "".join(d.text for d in articles(lines)) == "".join(line or "\n" for line in lines)


class TestWikiText:
    @pytest.mark.parametrize("save", [save_to_disk, save_as_parquet, save_as_published], ids=lambda save: save.__name__)
    def test_a_local_copy_in_each_layout_gives_the_articles_of_each_split(self, save, tmp_path):
        save(tmp_path / "copy")
        corpus = read_corpus(DataConfig(source="wikitext2", dataset=str(tmp_path / "copy")))
        for split in SPLITS:
            documents = list(getattr(corpus, split))
            assert [document.name for document in documents] == ["One", "Two"]
            assert f" {split} text of two \n" in documents[1].text

    @pytest.mark.parametrize("save", [save_to_disk, save_as_parquet, save_as_published], ids=lambda save: save.__name__)
    def test_the_name_of_a_copy_is_no_pattern(self, save, tmp_path):
        folder = tmp_path / "a [copy] 100% 'of' *.raw: ~x?"
        save(folder)
        corpus = read_corpus(DataConfig(source="wikitext2", dataset=str(folder)))
        assert [[d.name for d in getattr(corpus, split)] for split in SPLITS] == [["One", "Two"]] * 3

    def test_a_mark_of_byte_order_is_no_text(self, tmp_path):
        save_as_published(tmp_path / "copy")
        for file in (tmp_path / "copy").iterdir():
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        corpus = read_corpus(DataConfig(source="wikitext2", dataset=str(tmp_path / "copy")))
        assert [document.name for document in corpus.train] == ["One", "Two"]

    def test_equal_copies_have_equal_hashes_and_splits_have_not(self, tmp_path):
        save_to_disk(tmp_path / "copy")
        settings = DataConfig(source="wikitext2", dataset=str(tmp_path / "copy"))
        first, again = read_corpus(settings), read_corpus(settings)
        assert first.train.hash == again.train.hash
        assert len({first.train.hash, first.validation.hash, first.test.hash}) == 3


class TestBooks:
    def test_each_row_of_pg19_is_a_book_under_its_title(self, tmp_path):
        columns = {"short_book_title": ["A", "B", "C"], "text": ["a" * 9, "", "c" * 9]}
        parts = {split: datasets.Dataset.from_dict(columns) for split in SPLITS}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "copy"))
        corpus = read_corpus(DataConfig(source="pg19", dataset=str(tmp_path / "copy")))
        skipped = LeftOut()
        assert [(d.name, d.text) for d in corpus.train.read(skipped)] == [("0 A", "a" * 9), ("2 C", "c" * 9)]
        assert skipped == {"empty": 1}

    def test_the_first_release_of_pg19_is_a_file_per_book(self, tmp_path):
        for split in SPLITS:
            (tmp_path / split).mkdir()
            for index in range(3):
                (tmp_path / split / f"{index}.txt").write_text(f"{split}\n\nbook {index}\n")
        corpus = read_corpus(DataConfig(source="pg19", dataset=str(tmp_path)))
        assert [d.text for d in corpus.test] == [f"test\n\nbook {index}\n" for index in range(3)]

    def test_without_a_validation_split_whole_documents_are_held_out(self, tmp_path):
        datasets.Dataset.from_dict({"body": [f"text {i}" for i in range(30)]}).save_to_disk(str(tmp_path / "copy"))
        corpus = read_corpus(DataConfig(source="dataset", dataset=str(tmp_path / "copy"), text_field="body"))
        trained, held_out = ({d.text for d in part} for part in (corpus.train, corpus.validation))
        assert trained | held_out == {f"text {i}" for i in range(30)} and not trained & held_out and held_out

    def test_shakespeare_can_be_another_data_set(self, tmp_path):
        (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
        (tmp_path / "validation.jsonl").write_text('{"text": "two"}\n')
        corpus = read_corpus(DataConfig(source="shakespeare", dataset=str(tmp_path)))
        assert ([d.text for d in corpus.train], [d.text for d in corpus.validation]) == (["one"], ["two"])

    def test_a_column_that_is_not_there_is_refused(self, tmp_path):
        datasets.Dataset.from_dict({"body": ["text"] * 3}).save_to_disk(str(tmp_path / "copy"))
        with pytest.raises(ValueError, match=r"text_field must be a column of the data set \(body\), got 'text'"):
            read_corpus(DataConfig(source="dataset", dataset=str(tmp_path / "copy")))


class TestWithoutNetwork:
    @pytest.mark.parametrize(
        ("values", "named"),
        [
            ({"source": "wikitext2"}, "'Salesforce/wikitext', configuration 'wikitext-2-raw-v1'"),
            ({"source": "wikitext103"}, "'Salesforce/wikitext', configuration 'wikitext-103-raw-v1'"),
            ({"source": "pg19"}, "'emozilla/pg19'"),
            ({"source": "dataset", "dataset": "no/such"}, "'no/such'"),
        ],
        ids=["wikitext2", "wikitext103", "pg19", "dataset"],
    )
    def test_what_could_not_be_reached_is_said_with_what_was_tried_and_what_to_do(self, values, named):
        with pytest.raises(ValueError) as error:
            read_corpus(DataConfig(**values))
        message = str(error.value)
        for phrase in (named, "no local folder", "Hub", "cache", "--dataset PATH", "--source stdlib", "--text PATH"):
            assert phrase in message
        assert "\n" not in message

    def test_a_missing_package_says_how_to_install_it(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "datasets", None)
        with pytest.raises(ImportError, match=r"datasets is not installed: pip install"):
            read_corpus(DataConfig(source="wikitext2"))
