"""Files are whole or not there, open to whom the umask says, and named in what goes wrong with them."""

import errno
import math
import os

import pytest
import torch
from safetensors import SafetensorError

from smt.runtime import files
from smt.runtime.files import (
    check_folder,
    finite,
    read_json,
    read_yaml,
    remove_partial,
    tensors_writer,
    text_writer,
    write_files,
)


@pytest.fixture
def umask():
    """Others may read, and the group may write."""
    before = os.umask(0o002)
    yield 0o664
    os.umask(before)


def mode_of(path):
    return path.stat().st_mode & 0o777


class TestWriting:
    def test_two_that_write_one_file_do_not_disturb_each_other(self, tmp_path):
        path = tmp_path / "name.txt"

        def interrupted_by_another(partial):
            partial.write_text("first")
            write_files({path: text_writer("second")})
            assert path.read_text() == "second"

        write_files({path: interrupted_by_another})
        assert path.read_text() == "first" and os.listdir(tmp_path) == ["name.txt"]

    def test_what_a_writer_made_private_is_open_to_whom_the_umask_says(self, tmp_path, umask):
        def private(partial):
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))

        weights = tmp_path / "model.safetensors"
        write_files({tmp_path / "private": private, weights: tensors_writer({"weight": torch.ones(2)})})
        assert mode_of(tmp_path / "private") == mode_of(weights) == umask

    def test_a_full_disk_is_said_with_the_path_and_leaves_nothing(self, tmp_path, monkeypatch):
        def full(partial):
            partial.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.raises(OSError, match=r"No space left on device: '.*/name\.txt'"):
            write_files({tmp_path / "whole.txt": text_writer("whole"), tmp_path / "name.txt": full})

        def full_for_safetensors(tensors, path, metadata):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("safetensors.torch.save_file", full_for_safetensors)
        with pytest.raises(OSError, match=r"model\.safetensors could not be written: .*No space left on device"):
            write_files({tmp_path / "model.safetensors": tensors_writer({})})
        assert not os.listdir(tmp_path)

    def test_a_file_is_on_the_disk_before_its_name_is(self, tmp_path, monkeypatch):
        events, replace = [], os.replace
        monkeypatch.setattr(files, "sync", lambda path: events.append(path.name))
        monkeypatch.setattr(os, "replace", lambda source, target: (events.append("rename"), replace(source, target)))
        write_files({tmp_path / "a.txt": text_writer("a"), tmp_path / "b.txt": text_writer("b")})
        assert [event.split(".")[0] for event in events] == ["a", "b", "rename", "rename", tmp_path.name]

    def test_what_a_killed_process_has_left_of_a_file_is_removed_and_nothing_else(self, tmp_path):
        def killed(partial):
            partial.write_text("half")
            os.link(partial, tmp_path / "kept")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_files({tmp_path / "model.txt": killed})
        for name in ("model.partial-00ff00ff.txt", "model.partial.txt", "other.partial-00ff00ff.txt"):
            (tmp_path / name).touch()
        remove_partial([tmp_path / "model.txt"])
        assert {path.name for path in tmp_path.iterdir()} == {"kept", "model.partial.txt", "other.partial-00ff00ff.txt"}

    def test_the_path_of_another_file_stays_in_the_message(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="source"):
            write_files({tmp_path / "target": lambda partial: (tmp_path / "source").read_text()})


class TestFolders:
    def test_one_that_is_there_and_one_that_can_be_made_pass_and_nothing_is_left(self, tmp_path):
        check_folder(tmp_path)
        check_folder(tmp_path / "deep" / "er")
        assert not os.listdir(tmp_path)

    def test_a_file_and_a_link_to_nothing_are_refused(self, tmp_path):
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to(tmp_path / "nothing")
        for name in ("file", "file/below"):
            with pytest.raises(ValueError, match=r"^out must be a folder that can be written, .*file is none$"):
                check_folder(tmp_path / name)
        with pytest.raises(ValueError, match=r"^run must be a folder that can be written, .*link is a link to nothing$"):
            check_folder(tmp_path / "link" / "below", "run")

    def test_one_that_cannot_be_written_is_refused(self, tmp_path, monkeypatch):
        def read_only(dir):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr("tempfile.TemporaryFile", read_only)
        with pytest.raises(ValueError, match=r"out must be a folder that can be written, .* is not: Read-only file system"):
            check_folder(tmp_path / "new")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"], ids=["empty", "half", "list", "bytes"])
@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_a_damaged_file_is_named(read, content, tmp_path):
    (tmp_path / "results.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"results\.txt (is damaged|is not YAML|must hold a mapping)"):
        read(tmp_path / "results.txt")


def test_values_for_json_have_none_where_it_has_no_number():
    values = {"losses": [1.5, math.inf, (math.nan, 2)], "n": 3, "name": "inf", "none": None}
    assert finite(values) == {"losses": [1.5, None, [None, 2]], "n": 3, "name": "inf", "none": None}
