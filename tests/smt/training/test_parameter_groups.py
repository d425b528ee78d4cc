"""Which parameters are trained, how fast, and with how much decay."""

import pytest
import torch

from smt import SMTConfig, StrideMemoryTransformer
from smt.baselines import build
from smt.hymba import HymbaConfig
from smt.model.transformer import PARTS
from smt.training.parameter_groups import parameter_groups
from smt.training.settings import RunConfig, TrainingConfig

SIZES = dict(vocab_size=37, d_model=16, d_k=8, dropout=0.0, n_ssm_outputs=3, m_input_tokens=6, stride=2, write_group=2,
             transformer_n_layers=2, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4)  # fmt: skip


@pytest.fixture(params=["stride", "stream"])
def model(request):
    return StrideMemoryTransformer(SMTConfig(**SIZES, encoding=request.param))


def in_groups(model, groups):
    """Name of each parameter -> its group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    listed = [(names[parameter], group) for group in groups for parameter in group["params"]]
    assert len(listed) == len(dict(listed)), "a parameter may be in one group only"
    return dict(listed)


def test_every_parameter_is_in_one_part(model):
    parts = [parameter for part in model.parts().values() for parameter in part.parameters()]
    assert len(parts) == len(set(parts)) == len(list(model.parameters()))


def test_only_projections_and_convolutions_decay(model):
    groups = in_groups(model, parameter_groups(model, TrainingConfig(weight_decay=0.3)))
    assert groups.keys() == dict(model.named_parameters()).keys()
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.3}
    linear = ("qkv", "proj", "up", "down", "w_q", "w_k", "in_proj", "x_proj", "dt_proj", "out_proj", "conv1d", "slot_readout")
    assert decayed == {name for name in groups if name.split(".")[-2] in linear and name.endswith(".weight")}
    assert {group["weight_decay"] for group in groups.values()} == {0.0, 0.3}
    for name in ("embedding.weight", "memory.ssm.layers.0.mixer.A_log", "memory.ssm.layers.0.mixer.D", "decoder.norm.weight"):
        assert name not in decayed


@pytest.mark.parametrize("architecture", ["gpt2", "hymba"])
def test_of_other_architectures_too_only_projections_and_convolutions_decay(architecture):
    sizes = dict(vocab_size=27, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_mlp=24, sliding_window=4, n_meta_tokens=3)
    config = HymbaConfig(layout="hybrid", global_layers=(0,), **sizes) if architecture == "hymba" else SMTConfig(**SIZES)
    model = build(architecture, config, 8)
    groups = in_groups(model, parameter_groups(model, TrainingConfig(weight_decay=0.3)))
    assert groups.keys() == dict(model.named_parameters()).keys()
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.3}
    others = ("wte.weight", "wpe.weight", "embedding.weight", "meta_tokens.weight", "A_log")
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith(others)}
    assert decayed == matrices and len(decayed) > 5


def test_a_part_that_this_model_has_must_be_left_to_train():
    model = build("gpt2", SMTConfig(**SIZES), 8)
    with pytest.raises(ValueError, match=r"freeze must leave a part of the model to train, got all of embedding, transformer"):
        parameter_groups(model, TrainingConfig(freeze=("embedding", "transformer")))


def test_each_part_has_its_own_rate_and_the_others_the_common_one(model):
    training = TrainingConfig(learning_rate=1e-3, learning_rates={"transformer": 5e-6, "attention_pooling": 1e-4})
    groups = in_groups(model, parameter_groups(model, training))
    expected = {"embedding": 1e-3, "transformer": 5e-6, "attention_pooling": 1e-4, "ssm": 1e-3}
    for part, path in PARTS.items():
        rates = {group["peak"] for name, group in groups.items() if name.startswith(path + ".")}
        assert rates == {expected[part]}, part


def test_frozen_parts_get_no_gradient_and_do_not_change(model):
    training = TrainingConfig(freeze=("embedding", "transformer"), learning_rate=0.1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.AdamW(parameter_groups(model, training))
    model.loss(torch.randint(37, (2, 30)))[0].backward()
    optimiser.step()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("embedding.", "decoder."))
        assert (parameter.grad is None) == frozen == torch.equal(parameter, before[name]), name
    counted = model.count_parameters()
    assert counted["trainable"] == counted["breakdown"]["attention_pooling"] + counted["breakdown"]["ssm"]


def test_what_is_no_longer_frozen_trains_again(model):
    parameter_groups(model, TrainingConfig(freeze=("ssm",)))
    groups = parameter_groups(model, TrainingConfig())
    assert in_groups(model, groups).keys() == dict(model.named_parameters()).keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"learning_rates": {"transfomer": 1e-5}},
            ValueError,
            "learning_rates has no 'transfomer'; did you mean 'transformer'",
        ),
        ({"learning_rates": "ssm=fast"}, TypeError, r"learning_rates must be of type dict\[str, float\], got {'ssm': 'fast'}"),
        ({"learning_rates": "ssm"}, TypeError, r"learning_rates must be of type dict\[str, float\], got 'ssm'"),
        ({"learning_rates": {"ssm": 0}}, ValueError, "learning_rates of ssm must be above 0, got 0; freeze=ssm stops"),
        ({"freeze": "embeding"}, ValueError, "freeze has no 'embeding'; did you mean 'embedding'"),
        ({"freeze": 3}, TypeError, r"freeze must be of type tuple\[str, ...\], got 3"),
        ({"freeze": list(PARTS)}, ValueError, "freeze must leave a part of the model to train"),
        ({"init_from": {"gpt": "x"}}, ValueError, "init_from has no 'gpt'; did you mean 'gpt2'"),
        ({"init_from": {"gpt2": 2}}, TypeError, r"init_from must be of type dict\[str, str\]"),
        ({"init_from": "checkpoint=a,gpt2=b"}, ValueError, "init_from must be a checkpoint, .* or gpt2 and mamba"),
    ],
    ids=["part", "rate", "no-rate", "zero", "freeze", "freeze-type", "freeze-all", "source", "source-type", "both"],
)
def test_settings_that_cannot_work_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        RunConfig.from_dict({"training": fields})


def test_settings_are_read_from_yaml_and_from_the_command_line_alike(tmp_path):
    yaml_text = "training: {learning_rates: {ssm: 5e-6, embedding: 1.0e-4}, freeze: [transformer], init_from: {gpt2: a/b}}"
    (tmp_path / "run.yaml").write_text(yaml_text)
    overrides = {"learning_rates": "ssm=5e-6,embedding=1e-4", "freeze": "transformer", "init_from": "gpt2=a/b"}
    config = RunConfig.from_yaml(tmp_path / "run.yaml")
    assert config == RunConfig.from_dict({"experiment": "run"}, overrides)
    assert config.training.learning_rates == {"ssm": 5e-6, "embedding": 1e-4} and config.training.freeze == ("transformer",)
    config.to_yaml(tmp_path / "again.yaml")
    assert RunConfig.from_yaml(tmp_path / "again.yaml") == config
    assert RunConfig.from_dict({}, {"freeze": "none"}).training.freeze == ()


def test_the_packaged_recipe_has_the_published_values():
    training = RunConfig.from_yaml("finetune").training
    pretrained = dict.fromkeys(("embedding", "transformer", "ssm"), 5e-6)
    assert training.learning_rates == {**pretrained, "attention_pooling": 1e-4}
    assert (training.weight_decay, training.clip, training.lr_schedule, training.seed) == (0.01, 1.0, "cosine", 42)
    assert training.warmup * training.steps == 1000 and training.steps / training.evaluations == 500
