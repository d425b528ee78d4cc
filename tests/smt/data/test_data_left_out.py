"""What is no text, or may not be read, ends no run: it is left out, counted and named. Lines are what a line feed ends."""

import gzip
import os

import pytest

from smt.data.documents import LeftOut
from smt.data.local import read_text
from smt.data.settings import DataConfig
from smt.data.tokenized import tokenize_corpus


def read(path, **options):
    """The texts of both splits by name, and what was left out."""
    corpus, left_out = read_text(path, **options), LeftOut()
    documents = [document for split in (corpus.train, corpus.validation) for document in split.read(left_out)]
    return {document.name: document.text for document in documents}, left_out.names


def write_good(folder):
    for index in range(3):
        (folder / f"{index}.txt").write_text(f"text {index}")


GOOD = {f"{index}.txt": f"text {index}" for index in range(3)}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "half \\ud800 a pair"}', "lines with half a surrogate pair"),
        (b'{"text": "good", "id": ' + b"9" * 5000 + b"}", "lines with too long a number or too deep a nesting"),
        (
            b'{"text": "good", "tree": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "lines with too long a number or too deep a nesting",
        ),
        (b'{"text": "cut', "lines that are not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
    ids=["surrogate", "digits", "nesting", "cut", "bytes"],
)
def test_a_line_that_cannot_be_read_is_left_out_by_its_number(line, reason, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n')
    assert read(tmp_path) == ({"a.jsonl:1": "one", "a.jsonl:3": "two"}, {reason: ["a.jsonl:2"]})


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00"}\n{"text": "two"}\n')
    assert read(tmp_path)[0]["a.jsonl:1"] == "\U0001f600"


def test_a_file_whose_name_is_not_utf8_is_left_out(tmp_path):
    write_good(tmp_path)
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt"), "wb") as file:
        file.write(b"coffee")
    assert read(tmp_path) == (GOOD, {"names that are not UTF-8": ["caf\\xe9.txt"]})


def test_links_and_pipes_are_counted(tmp_path):
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    write_good(folder)
    (elsewhere / "linked.txt").write_text("linked")
    (folder / "file").symlink_to(elsewhere / "linked.txt")
    (folder / "folder").symlink_to(elsewhere)
    (folder / "round").symlink_to(folder)
    (folder / "nothing").symlink_to(elsewhere / "missing")
    (folder / "itself").symlink_to("itself")
    os.mkfifo(folder / "pipe")
    assert read(folder) == (
        {**GOOD, "file": "linked"},
        {
            "links to folders": ["folder", "round"],
            "links to nothing": ["itself", "nothing"],
            "pipes, sockets and devices": ["pipe"],
        },
    )
    with pytest.raises(ValueError, match="pipe is neither; what is read more than once cannot be a pipe"):
        read(folder / "pipe")


def test_what_may_not_be_read_is_counted(tmp_path, monkeypatch):
    # Permissions as the system would report them: whoever runs the tests may be allowed to read everything.
    write_good(tmp_path)
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secrets.jsonl").write_text('{"text": "secret"}\n')
    (tmp_path / "closed").mkdir()
    scandir, open_file = os.scandir, type(tmp_path).open

    def denied(path, opened, *arguments):
        if os.path.basename(path) in ("closed", "secret.txt", "secrets.jsonl"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments)

    monkeypatch.setattr(os, "scandir", lambda path: denied(path, scandir))
    monkeypatch.setattr(type(tmp_path), "open", lambda path, *arguments: denied(path, open_file, *arguments))
    expected = {"files that may not be read": ["secret.txt", "secrets.jsonl"], "folders that may not be read": ["closed"]}
    assert read(tmp_path) == (GOOD, dict(sorted(expected.items(), reverse=True)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.jsonl.gz", "a.NDJSON.GZ"])
def test_json_lines_have_several_names(name, tmp_path):
    content = b"\xef\xbb\xbf" + '{"text": "one"}\r\n{"text": "two\u2028\x85"}'.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert read(tmp_path)[0] == {f"{name}:1": "one", f"{name}:2": "two\u2028\x85"}


def test_a_name_with_json_inside_is_a_text(tmp_path):
    (tmp_path / "about.jsonl.txt").write_text("x" * 40)
    assert "".join(read(tmp_path)[0].values()) == "x" * 40


def test_names_reach_everything_literally(tmp_path):
    folder = tmp_path / "a [b] *.txt 50% {c} $d$ 'e'"
    folder.mkdir()
    write_good(folder)
    (folder / "[x]*%s{}.jsonl").write_text('{"text": "line"}\n')
    assert read(folder)[0] == {**GOOD, "[x]*%s{}.jsonl:1": "line"}


def test_a_run_says_where_it_names_what_it_left_out(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_good(folder)
    (folder / "a.jsonl").write_text('{"text": "one"}\n{\n{"text": 3}\n')
    (folder / "line\nend.txt").write_bytes(b"\xff")
    said = tokenize_corpus(DataConfig(text=str(folder), cache=str(tmp_path / "cache")), 280).describe()
    (file,) = (tmp_path / "cache" / "tokens").glob("*/left_out.txt")
    assert said.endswith(f"; left out: 1 lines that are not JSON, 1 lines without a text in 'text', 1 not UTF-8 ({file})")
    assert file.read_text().splitlines() == [
        "lines that are not JSON\t'a.jsonl:2'", "lines without a text in 'text'\t'a.jsonl:3'", "not UTF-8\t'line\\nend.txt'"
    ]  # fmt: skip


def test_a_cache_that_cannot_be_written_says_how_to_name_another(tmp_path):
    (tmp_path / "file").write_text("in the way")
    write_good(tmp_path)
    with pytest.raises(
        ValueError, match=r"cannot write to the cache .*file.* \(Not a directory\): name another folder with --cache"
    ):
        tokenize_corpus(DataConfig(text=str(tmp_path), cache=str(tmp_path / "file" / "cache")), 280)


def test_a_cache_that_is_full_of_what_is_needed_need_not_be_written(tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_good(folder)
    settings = DataConfig(text=str(folder), cache=str(tmp_path / "cache"))
    first = tokenize_corpus(settings, 280)
    monkeypatch.setattr(type(tmp_path), "mkdir", lambda *arguments, **options: pytest.fail("it was written"))
    assert tokenize_corpus(settings, 280).train.folder == first.train.folder
