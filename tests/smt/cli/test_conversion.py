"""Pretrained models become a checkpoint that is ready: it loads and runs, and has what they had."""

import pytest
import torch
from pretrained_folders import WINDOW, gpt2_folder, mamba_folder
from transformers import GPT2LMHeadModel, MambaForCausalLM

from smt import SMTConfig, StrideMemoryTransformer
from smt.cli.conversion import convert


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return gpt2_folder(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    return mamba_folder(tmp_path_factory.mktemp("mamba"))


def test_a_converted_checkpoint_has_the_sources_sizes_and_weights(gpt2, mamba, tmp_path):
    config, report = convert(tmp_path / "start", gpt2=gpt2, mamba=mamba, fields=WINDOW)
    model = StrideMemoryTransformer.from_pretrained(tmp_path / "start")
    assert model.config == config == SMTConfig(
        **WINDOW, vocab_size=264, d_model=16, d_k=16, transformer_n_layers=1, transformer_n_heads=2, ssm_n_layers=2,
        ssm_d_state=4, ssm_dt_rank=1, encoding="stride",
    )  # fmt: skip
    theirs = GPT2LMHeadModel.from_pretrained(gpt2).transformer
    assert torch.equal(model.embedding.weight, theirs.wte.weight)
    assert torch.equal(model.decoder.positions, theirs.wpe.weight[:9])
    recurrent = MambaForCausalLM.from_pretrained(mamba).backbone
    assert torch.equal(model.memory.ssm.layers[1].mixer.in_proj.weight, recurrent.layers[1].mixer.in_proj.weight)
    assert set(report.fresh) == {
        "memory.pooling.w_q.weight", "memory.pooling.w_k.weight", "decoder.blocks.0.attention.slot_gate",
        "decoder.slot_readout.weight",
    }  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "start" / name).read_bytes() == (gpt2 / name).read_bytes()
    assert model(torch.randint(264, (2, 20)))[0].isfinite().all()


def test_what_is_fresh_depends_on_the_seed_alone(gpt2, tmp_path):
    pooling = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(tmp_path / name, gpt2=gpt2, fields={**WINDOW, "ssm_n_layers": 1}, seed=seed)
        pooling.append(StrideMemoryTransformer.from_pretrained(tmp_path / name).memory.pooling.w_q.weight)
    assert torch.equal(pooling[0], pooling[1]) and not torch.equal(pooling[0], pooling[2])


def test_the_embedding_can_be_mambas_or_stay_fresh(gpt2, mamba, tmp_path):
    config, report = convert(tmp_path / "a", gpt2=gpt2, mamba=mamba, fields=WINDOW, embedding="mamba")
    assert config.vocab_size == 50 and report.skipped["wte.weight"] == "embedding=False"
    assert not (tmp_path / "a" / "tokenizer.json").exists(), "GPT-2's tokenizer does not belong to Mamba's embedding"
    config, report = convert(tmp_path / "b", gpt2=gpt2, mamba=mamba, fields={**WINDOW, "vocab_size": 99}, embedding="none")
    assert config.vocab_size == 99 and "embedding.weight" in report.fresh


def test_matching_the_scale_gives_slots_that_of_the_embedding(gpt2, mamba, tmp_path):
    convert(tmp_path / "start", gpt2=gpt2, mamba=mamba, fields=WINDOW, match_scale=True)
    model = StrideMemoryTransformer.from_pretrained(tmp_path / "start")
    rms = model.embedding.weight.square().mean().sqrt()
    torch.testing.assert_close(model.memory.ssm.norm_f.weight, rms.expand(16))


@pytest.mark.parametrize("config", ["checkpoint", "fields"])
def test_a_configuration_may_come_from_a_file(config, gpt2, mamba, tmp_path):
    convert(tmp_path / "first", gpt2=gpt2, mamba=mamba, fields=WINDOW)
    path = tmp_path / "first" / "config.yaml"
    if config == "fields":
        path = tmp_path / "fields.yaml"
        StrideMemoryTransformer.from_pretrained(tmp_path / "first").config.to_yaml(path)
    found, _ = convert(tmp_path / "second", gpt2=gpt2, mamba=mamba, config=path, fields={"encoding": "token"})
    assert found.encoding == "token" and found.stride == 2
