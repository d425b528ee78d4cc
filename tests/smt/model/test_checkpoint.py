"""A model in a folder comes back as it was; a checkpoint that is damaged or of another model is refused with what differs."""

import json

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smt import SMTConfig, StrideMemoryTransformer
from smt.model.checkpoint import load_weights, read_config
from smt.runtime.files import write_files
from smt.training.settings import RunConfig

SIZES = dict(vocab_size=37, d_model=16, d_k=8, n_ssm_outputs=3, m_input_tokens=6, stride=2, write_group=2,
             transformer_n_layers=2, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4, encoding="stride")  # fmt: skip


def model_of(**changes):
    return StrideMemoryTransformer(SMTConfig(**{**SIZES, **changes}))


@pytest.fixture
def saved(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("encoding", ["token", "stride", "stream"])
def test_a_saved_model_comes_back_with_its_config_weights_and_number_format(encoding, dtype, tmp_path):
    model = model_of(encoding=encoding, dropout=0.3, pooling_dropout=0.3).to(dtype)
    model.save_pretrained(tmp_path / "deep" / "folder")
    again = StrideMemoryTransformer.from_pretrained(tmp_path / "deep" / "folder")
    assert again.config == model.config and not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, parameter in model.named_parameters():
        loaded = again.get_parameter(name)
        expected = torch.float32 if name.endswith("A_log") else dtype
        assert torch.equal(loaded, parameter) and loaded.dtype == expected and loaded.requires_grad, name
    assert {path.name for path in (tmp_path / "deep" / "folder").iterdir()} == {"config.yaml", "model.safetensors"}


def test_a_model_is_loaded_onto_a_device(saved):
    model = StrideMemoryTransformer.from_pretrained(saved, device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_loaded_model_trains_and_leaves_its_file_alone(saved):
    before = (saved / "model.safetensors").read_bytes()
    model = StrideMemoryTransformer.from_pretrained(saved).train()
    model.loss(torch.randint(37, (2, 20)))[0].backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad
    assert (saved / "model.safetensors").read_bytes() == before


def test_the_tensors_have_the_names_of_the_state_dict_and_the_file_says_whose_they_are(saved):
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # which loaders of other libraries look for
    assert load_file(saved / "model.safetensors").keys() == model_of().state_dict().keys()


def test_the_config_of_a_checkpoint_is_a_config_of_a_run_and_the_other_way_round(saved, tmp_path):
    assert RunConfig.from_yaml(saved / "config.yaml").model == SMTConfig(**SIZES)
    RunConfig.from_dict({"model": SIZES, "training": {"steps": 3}}).to_yaml(tmp_path / "run.yaml")
    SMTConfig(**SIZES).to_yaml(tmp_path / "fields.yaml")
    assert read_config(tmp_path / "run.yaml") == read_config(tmp_path / "fields.yaml") == SMTConfig(**SIZES)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("comes_by", ["folder", "state_dict", "here"])
def test_a_trained_memory_keeps_its_scale_when_an_embedding_is_loaded_on_top_and_a_fresh_one_follows(
    comes_by, trained, tmp_path
):
    from transformers import GPT2Config, GPT2Model

    model = model_of()
    if trained:
        model.memory.ssm.norm_f.weight.data[3] += 0.01
    before = model.memory.ssm.norm_f.weight.detach().clone()
    if comes_by == "folder":
        model.save_pretrained(tmp_path)
        model = StrideMemoryTransformer.from_pretrained(tmp_path)
    elif comes_by == "state_dict":
        weights, model = model.state_dict(), model_of()
        model.load_state_dict(weights)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 37, "bos_token_id": 0, "eos_token_id": 0}
    model.load_gpt2(GPT2Model(GPT2Config(**sizes)))
    assert torch.equal(model.memory.ssm.norm_f.weight, before) is trained


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.norm.bias"), "model.safetensors lacks decoder.norm.bias$"),
        (lambda t: t.update(extra=torch.ones(1)), "model.safetensors has extra, which the model has not$"),
        (
            lambda t: t.update({"embedding.weight": torch.ones(36, 16)}),
            r"model.safetensors has other shapes: embedding.weight \(36, 16\), not \(37, 16\)$",
        ),
        (lambda t: [t.pop(name) for name in list(t)[:5]], "lacks .*, .*, .* and 2 more$"),
    ],
    ids=["missing", "foreign", "shape", "many"],
)
def test_weights_that_are_not_the_models_are_refused_with_their_names(change, message, saved):
    edit(saved, change)
    with pytest.raises(ValueError, match=message):
        StrideMemoryTransformer.from_pretrained(saved)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", None, r"there is no .*config\.yaml"),
        ("config.yaml", b"a: [", r"config\.yaml is not YAML"),
        ("config.yaml", b"[1]", r"config\.yaml must hold a mapping of SMTConfig fields, got list"),
        ("config.yaml", b"model: 3", r"config\.yaml must hold a mapping of SMTConfig fields, got int"),
        ("config.yaml", b"model: {strid: 3}", "SMTConfig has no field 'strid'; did you mean 'stride'"),
        ("model.safetensors", None, r"there is no .*model\.safetensors"),
        ("model.safetensors", b"half", r"model\.safetensors is not a whole safetensors file"),
    ],
    ids=["no-config", "broken", "list", "scalar", "unknown-field", "no-weights", "half"],
)
def test_a_missing_or_damaged_file_is_named(name, content, message, saved):
    (saved / name).unlink()
    if content is not None:
        (saved / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        StrideMemoryTransformer.from_pretrained(saved)


def test_a_truncated_weights_file_is_refused(saved):
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        StrideMemoryTransformer.from_pretrained(saved)


def test_an_interrupted_save_leaves_the_old_checkpoint_whole(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        model_of(d_k=4).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_no_file_takes_its_place_before_all_are_written(tmp_path):
    def fails(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_files({tmp_path / "first.txt": lambda path: path.write_text("whole"), tmp_path / "second.txt": fails})
    assert not list(tmp_path.iterdir())


class TestLoadWeights:
    def test_settings_without_weights_may_differ(self, saved):
        model = model_of(encoding="token", dropout=0.0, write_group=1)
        assert set(load_weights(model, saved)) == model.state_dict().keys()
        saved_model = StrideMemoryTransformer.from_pretrained(saved)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved_model.parameters(), strict=True))

    def test_a_model_of_another_size_is_refused_with_the_fields_that_differ(self, saved):
        model = model_of(d_model=32, dropout=0.0)
        before = [parameter.clone() for parameter in model.parameters()]
        message = r"other shapes: embedding.weight \(37, 16\), not \(37, 32\).*; its config has d_model = 16, not 32, dropout"
        with pytest.raises(ValueError, match=message):
            load_weights(model, saved)
        assert all(map(torch.equal, before, model.parameters()))

    def test_what_is_to_be_left_may_have_any_shape(self, saved):
        model = model_of(vocab_size=50)
        before = model.embedding.weight.clone()
        assert "embedding.weight" not in load_weights(model, saved, leave=("embedding.weight",))
        assert torch.equal(model.embedding.weight, before)


def test_the_config_file_is_plain_yaml_of_the_fields(saved):
    values = yaml.safe_load((saved / "config.yaml").read_text())
    assert values == {"model": json.loads(json.dumps(SMTConfig(**SIZES).to_dict()))}
