"""Pretrained models are found in every form that they come in, and what cannot be read says why."""

import json
import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file

from smt.pretrained.sources import Source, open_source
from smt.runtime.extras import MissingExtraError

CONFIG = {"model_type": "gpt2", "n_embd": 4}
TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4)}
HUB_NAME = "someone/gpt2-tiny"


def folder_with(tmp_path, weights):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    index = {"weight_map": {"a.weight": f"part-1.{weights}", "b.weight": f"part-2.{weights}"}}
    if weights == "safetensors":
        save_file(TENSORS, tmp_path / "model.safetensors")
    elif weights == "bin":
        torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    elif weights == "old bin":
        torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif weights == "safetensors in parts":
        for part, name in enumerate(TENSORS, start=1):
            save_file({name: TENSORS[name]}, tmp_path / f"part-{part}.safetensors")
        index["weight_map"] = {name: f"part-{part}.safetensors" for part, name in enumerate(TENSORS, start=1)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    elif weights == "bin in parts":
        for part, name in enumerate(TENSORS, start=1):
            torch.save({name: TENSORS[name]}, tmp_path / f"part-{part}.bin")
        index["weight_map"] = {name: f"part-{part}.bin" for part, name in enumerate(TENSORS, start=1)}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tmp_path


def same(source):
    return source.config == CONFIG and source.tensors.keys() == TENSORS.keys() and all(
        torch.equal(source.tensors[name], TENSORS[name]) for name in TENSORS
    )  # fmt: skip


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["text", "path"])
@pytest.mark.parametrize("weights", ["safetensors", "bin", "old bin", "safetensors in parts", "bin in parts"])
def test_a_folder_is_read_in_every_format(weights, kind, tmp_path):
    folder = folder_with(tmp_path, weights)
    source = open_source(kind(folder))
    assert same(source) and source.tokenizer == folder / "tokenizer.json" and source.origin == str(folder)


def test_a_model_object_gives_its_config_and_weights_and_an_opened_source_itself():
    model = torch.nn.Linear(2, 3)
    model.config = type("Config", (), {"to_dict": lambda self: CONFIG})()
    source = open_source(model)
    assert source.config == CONFIG and source.tensors.keys() == {"weight", "bias"} and source.origin == "a Linear"
    assert open_source(source) is source


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json must hold a mapping, got list"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has none of model.safetensors, .*pytorch_model.bin"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"half"), "model.safetensors is not a whole safetensors"),
    ],
    ids=["no-config", "broken-config", "no-object", "no-weights", "broken-weights"],
)
def test_a_damaged_folder_is_refused_with_the_file(damage, message, tmp_path):
    damage(folder_with(tmp_path, "safetensors"))
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)


def test_a_damaged_pickle_and_one_that_runs_code_are_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return print, ("ran",)

    weights = folder_with(tmp_path, "bin") / "pytorch_model.bin"
    for content in (Harmful(), {"a.weight": 3}):
        torch.save(content, weights)
        with pytest.raises(ValueError, match=r"pytorch_model.bin (is damaged or holds more than|must hold) tensors"):
            open_source(tmp_path)
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ValueError, match="is damaged"):
        open_source(tmp_path)


def test_a_part_that_is_missing_or_incomplete_is_named(tmp_path):
    folder = folder_with(tmp_path, "safetensors in parts")
    save_file({"c.weight": torch.ones(1)}, folder / "part-2.safetensors")
    with pytest.raises(ValueError, match=r"lacks b.weight, which model.safetensors.index.json names in part-2.safetensors"):
        open_source(folder)
    (folder / "part-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no part-2.safetensors, which model.safetensors.index.json names"):
        open_source(folder)


@pytest.fixture
def hub(monkeypatch):
    """A hub with nothing on it and an empty cache; tests put files into ``hub.cached`` and ``hub.files``."""

    class Hub:
        def __init__(self):
            self.cached, self.files, self.asked, self.offline = {}, {}, [], False

        def download(self, name, file, *, local_files_only):
            assert name == HUB_NAME
            if file in self.cached:
                return self.cached[file]
            if local_files_only:
                raise LocalEntryNotFoundError("not in the cache")
            self.asked.append(file)
            if self.offline:
                raise LocalEntryNotFoundError("not in the cache") from ConnectionError("no route")
            if file not in self.files:
                raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)
            return self.files[file]

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    return hub


def test_a_hub_name_is_fetched_file_by_file(hub, tmp_path):
    folder = folder_with(tmp_path, "bin")
    hub.files = {path.name: str(path) for path in folder.iterdir()}
    source = open_source(HUB_NAME)
    assert same(source) and source.origin == f"{HUB_NAME} of the hub" and source.tokenizer == folder / "tokenizer.json"


def test_what_is_in_the_cache_needs_no_connection(hub, tmp_path):
    folder = folder_with(tmp_path, "bin")
    hub.cached = {path.name: str(path) for path in folder.iterdir()}
    hub.offline = True
    assert same(open_source(HUB_NAME))
    assert len(hub.asked) == 1, "a hub that cannot be reached is asked once: every question takes half a minute"


def test_without_a_connection_the_error_says_what_was_tried(hub):
    hub.offline = True
    with pytest.raises(
        ValueError, match=r"has no config.json; tried a folder of that name, the cache .* and the hub, .*no route"
    ):
        open_source(HUB_NAME)


def test_a_name_that_the_hub_does_not_know_is_refused(monkeypatch):
    def download(name, file, local_files_only):
        error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        error.args = ("401: no such repository\nmore",)
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ValueError, match="there is no folder 'someone/gpt2-tiny' here, and the hub says: "):
        open_source(HUB_NAME)


def test_a_hub_name_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"huggingface_hub is not installed: pip install -e \".\[pretrained\]\""):
        open_source(HUB_NAME)


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/missing"])
def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ValueError, match=f"source must be a folder or a hub name like .*, {name} does not exist"):
        open_source(name)


def test_a_file_or_anything_else_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"source must be a folder with config.json and weights, .*model.safetensors is a file"
    ):
        open_source(tmp_path / "model.safetensors")
    with pytest.raises(TypeError, match="source must be a model with a config, a local folder or a hub name, got int"):
        open_source(3)
    assert isinstance(open_source(Source("here", {}, {})), Source)
