"""A run begins with the weights that it is told to, and with their vocabulary."""

import pytest
import torch
from pretrained_folders import GPT2_TOKENS, GPT2_VOCABULARY, WINDOW, gpt2_folder, mamba_folder, text_folder
from transformers import GPT2LMHeadModel

from smt import StrideMemoryTransformer
from smt.cli.conversion import convert
from smt.data.tokenizer import Tokenizer
from smt.training.run import run
from smt.training.settings import RunConfig


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return gpt2_folder(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    return mamba_folder(tmp_path_factory.mktemp("mamba"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return text_folder(tmp_path_factory.mktemp("texts"))


def settings(texts, model=None, **training):
    model = model or {**WINDOW, "encoding": "stride", "d_model": 16, "d_k": 16, "transformer_n_layers": 1,
                      "transformer_n_heads": 2, "ssm_n_layers": 2, "ssm_d_state": 4, "vocab_size": 270}  # fmt: skip
    data = {"text": str(texts), "batch_size": 2, "chunk_length": 8, "lanes": 2}
    training = {"device": "cpu", "sample_tokens": 2, "steps": 2, "evaluations": 1, **training}
    return RunConfig.from_dict({"experiment": "tiny", "model": model, "data": data, "training": training})


def test_a_converted_checkpoint_is_tuned_in_its_vocabulary_and_frozen_parts_stay(texts, gpt2, mamba, tmp_path, capsys):
    convert(tmp_path / "start", gpt2=gpt2, mamba=mamba, fields=WINDOW)
    training = {"init_from": {"checkpoint": str(tmp_path / "start")}, "freeze": ["embedding", "transformer"]}
    outcome = run(settings(texts, **training), tmp_path / "runs")
    assert f"checkpoint {tmp_path / 'start'}" in capsys.readouterr().out
    assert outcome.config.model.vocab_size == GPT2_VOCABULARY
    first, last = (StrideMemoryTransformer.from_pretrained(folder) for folder in (tmp_path / "start", outcome.folder))
    for name, parameter in first.named_parameters():
        frozen = name.startswith(("embedding.", "decoder."))
        assert torch.equal(parameter, last.get_parameter(name)) == frozen, name


def test_sources_fill_the_model_and_their_tokenizer_reads_the_text(texts, gpt2, mamba, tmp_path, capsys):
    training = {"init_from": {"gpt2": str(gpt2), "mamba": str(mamba)}, "freeze": ["embedding", "transformer", "ssm"]}
    outcome = run(settings(texts, **training), tmp_path / "runs")
    model = StrideMemoryTransformer.from_pretrained(outcome.folder)
    assert torch.equal(model.embedding.weight, GPT2LMHeadModel.from_pretrained(gpt2).transformer.wte.weight)
    assert Tokenizer.load(outcome.folder).vocab_size == GPT2_TOKENS
    assert "  fresh (4)\n    memory.pooling.w_q.weight" in capsys.readouterr().out


@pytest.mark.parametrize("match_scale", [False, True], ids=["loaded-scale", "matched-scale"])
def test_slots_have_the_scale_of_the_embedding_where_it_is_asked_for(texts, gpt2, mamba, tmp_path, match_scale):
    training = {"init_from": {"gpt2": str(gpt2), "mamba": str(mamba)}, "freeze": ["embedding", "transformer", "ssm"]}
    outcome = run(settings(texts, **training, match_scale=match_scale), tmp_path / "runs")
    model = StrideMemoryTransformer.from_pretrained(outcome.folder)
    scale = model.embedding.weight.square().mean().sqrt() if match_scale else torch.tensor(1.0)  # a fresh Mamba's is 1
    torch.testing.assert_close(model.memory.ssm.norm_f.weight, scale.expand(16))


def test_without_a_tokenizer_the_embedding_is_fresh(texts, mamba, tmp_path, capsys):
    outcome = run(settings(texts, init_from={"mamba": str(mamba)}), tmp_path / "runs")
    assert outcome.config.model.vocab_size > 257
    sizes = {**WINDOW, "encoding": "stride", "transformer_n_layers": 1, "transformer_n_heads": 2}
    convert(tmp_path / "start", mamba=mamba, fields=sizes)
    run(settings(texts, init_from={"checkpoint": str(tmp_path / "start")}), tmp_path / "runs")
    assert "embedding.weight: without a tokenizer.json its tokens are not those of this run" in capsys.readouterr().out


def test_a_run_continues_a_run(texts, tmp_path):
    first = run(settings(texts), tmp_path / "runs")
    again = settings(texts, init_from={"checkpoint": str(first.folder)}, steps=1, learning_rate=1e-12)
    assert run(again, tmp_path / "runs").evaluation.loss == pytest.approx(first.evaluation.loss, rel=1e-5)


def test_a_checkpoint_of_another_size_is_refused(texts, gpt2, tmp_path):
    convert(tmp_path / "start", gpt2=gpt2, fields={**WINDOW, "ssm_n_layers": 3})
    with pytest.raises(ValueError, match=r"model.safetensors .*; its config has .*ssm_n_layers = 3, not 2"):
        run(settings(texts, init_from={"checkpoint": str(tmp_path / "start")}), tmp_path / "runs")


def test_a_tokenizer_that_is_larger_than_its_embedding_is_refused(texts, gpt2, tmp_path):
    folder = tmp_path / "start"
    convert(folder, gpt2=gpt2, fields={**WINDOW, "vocab_size": 99, "ssm_n_layers": 2, "ssm_d_state": 4}, embedding="none")
    (folder / "tokenizer.json").write_bytes((gpt2 / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=f"vocab_size must be at least {GPT2_TOKENS} for the tokenizer '.*start', got 99"):
        run(settings(texts, init_from={"checkpoint": str(folder)}), tmp_path / "runs")


def test_a_chunk_too_short_for_a_write_trains_nothing_when_only_the_memory_trains(texts, tmp_path):
    model = dict(n_ssm_outputs=3, m_input_tokens=40, stride=20, d_model=16, d_k=16, transformer_n_layers=1,
                 transformer_n_heads=2, ssm_n_layers=1, vocab_size=270)  # fmt: skip
    config = settings(texts, model=model, freeze=["embedding", "transformer"], steps=3)
    assert run(config, tmp_path / "runs").progress.step == 3
