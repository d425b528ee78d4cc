"""Saved states: what is loaded is what was saved, and a file that is not that says what is wrong."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from smt import SMTConfig, SMTState, StrideMemoryTransformer

CONFIG = dict(
    vocab_size=37, d_model=16, d_k=16, transformer_n_layers=2, transformer_n_heads=2, ssm_n_layers=2, ssm_d_state=4,
    initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(params=["token", "stride", "stream"])
def saved(request, tmp_path):
    """A model, a state with rows at different steps, and its file."""
    torch.manual_seed(3)
    model = StrideMemoryTransformer(SMTConfig(**CONFIG, encoding=request.param)).eval()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    with torch.no_grad():
        state = model(torch.randint(37, (2, 40)), attention_mask=mask)[1].state
    path = tmp_path / "state.safetensors"
    state.save(path)
    return model, state, path


def rewrite(path, change):
    """Save the file again after ``change(tensors, metadata)``."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def test_a_loaded_state_is_the_saved_one(saved):
    model, state, path = saved
    loaded = SMTState.load(path)
    assert loaded.config == state.config and loaded.steps == state.steps == (40, 27)
    for name, tensor in state.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor) and loaded.tensors()[name].dtype == tensor.dtype
    token = torch.tensor([[1], [2]])
    assert torch.equal(model(token, loaded)[0], model(token, state)[0])
    assert [file.name for file in path.parent.iterdir()] == ["state.safetensors"], "no temporary file is left"


def test_a_state_is_loaded_onto_a_device(saved):
    _, state, path = saved
    loaded = SMTState.load(path, "meta")
    for name, tensor in (*loaded.tensors().items(), ("device_steps", loaded.device_steps)):
        assert tensor.device.type == "meta" and tensor.shape == getattr(state, name).shape, name


def test_a_save_that_fails_leaves_the_old_file(saved, monkeypatch):
    _, state, path = saved
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        state.rows([0]).save(path)
    assert path.read_bytes() == before


DAMAGES = {
    "a tensor is missing": (lambda tensors, metadata: tensors.pop("ssm"), "lacks the tensor 'ssm'"),
    "a tensor too many": (lambda tensors, metadata: tensors.update(keys=torch.zeros(1)), "unknown tensor 'keys'"),
    "another shape": (
        lambda tensors, metadata: tensors.update(tokens=tensors["tokens"][:, 1:].contiguous()),
        r"'tokens' of shape \(2, 50, 16\), got \(2, 49, 16\)",
    ),
    "another dtype": (
        lambda tensors, metadata: tensors.update(tokens=tensors["tokens"].long()),
        "'tokens' of a floating dtype, got torch.int64",
    ),
    "fewer steps than rows": (lambda tensors, metadata: metadata.update(steps="[3]"), r"of shape \(1, "),
    "negative steps": (lambda tensors, metadata: metadata.update(steps="[-1, 2]"), r"step counts in 'steps', got \[-1, 2\]"),
    "no steps": (lambda tensors, metadata: metadata.pop("steps"), "has no 'steps'"),
    "unreadable config": (lambda tensors, metadata: metadata.update(config="{"), "a 'config' that cannot be used"),
    "unknown field": (
        lambda tensors, metadata: metadata.update(config=json.dumps({"strid": 3})),
        "has no field 'strid'; did you mean 'stride'",
    ),
    "another format": (lambda tensors, metadata: metadata.update(format="weights"), "not a saved state: .* format 'weights'"),
    "an earlier format": (
        lambda tensors, metadata: metadata.update(format="smt.state/1"),
        "not a saved state: .* 'smt.state/1'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_a_state_says_what_is_wrong(saved, damage):
    change, message = DAMAGES[damage]
    rewrite(saved[2], change)
    with pytest.raises(ValueError, match=message):
        SMTState.load(saved[2])


def test_a_truncated_file_is_refused(saved):
    path = saved[2]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        SMTState.load(path)
    with pytest.raises(FileNotFoundError, match="there is no state file"):
        SMTState.load(path.with_name("other"))


def test_a_state_of_another_config_is_refused_by_the_model(saved):
    model, _, path = saved
    with pytest.raises(ValueError, match="state belongs to a model with stride = 16, this one has 10"):
        other = StrideMemoryTransformer(SMTConfig(**{**CONFIG, "encoding": model.config.encoding, "stride": 10}))
        other(torch.tensor([[1], [2]]), SMTState.load(path))
