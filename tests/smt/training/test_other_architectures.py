"""Runs of other architectures than ours: trained, resumed, compared, evaluated and continued by the same commands."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_training import run_config

from smt.baselines import ChunkedHymba
from smt.cli import main
from smt.evaluation.subjects import open_run
from smt.hymba import Hymba, HymbaConfig
from smt.training.run import resume, run, run_in
from smt.training.settings import RunConfig
from smt.training.trainer import Trainer

HYMBA = {
    "architecture": "hymba", "layout": "hybrid", "vocab_size": 270, "d_model": 16, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1,
    "d_mlp": 24, "sliding_window": 4, "global_layers": "0,2", "n_meta_tokens": 3, "chunk_length": 16, "eval_chunk_length": 16,
}  # fmt: skip


def hymba_config(tmp_path, **fields):
    """A run of a Hymba on texts of different lengths, in each of which a needle has room."""
    for index in range(5):
        (tmp_path / f"{index}.txt").write_text(" ".join(f"word{(index * j) % 7}" for j in range(40 + index)))
    common = {"text": str(tmp_path), "batch_size": 2, "lanes": 2, "device": "cpu", "sample_tokens": 3}
    common |= {"steps": 4, "evaluations": 2, "learning_rates": "none"}
    return RunConfig.from_yaml("stdlib", {"experiment": "tiny", **common, **HYMBA, **fields})


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return run(hymba_config(tmp_path_factory.mktemp("texts"), save_steps=2), tmp_path_factory.mktemp("hymba"))


def test_its_configuration_is_read_and_written_with_fields_of_its_own(outcome, tmp_path):
    there = RunConfig.from_yaml(outcome.folder / "config.yaml")
    assert there == outcome.config and isinstance(there.model, HymbaConfig) and there.model.global_layers == (0, 2)
    # What the configuration of another architecture says of both is kept, what this one has not is left out.
    of_stdlib = RunConfig.from_yaml("stdlib", {"architecture": "hymba", "eval_chunk_length": 128}).model
    assert of_stdlib == HymbaConfig(vocab_size=2048, d_model=128, dropout=0.0, initializer_range=0.05)
    (tmp_path / "run.yaml").write_text("architecture: hymba\nmodel: {n_layers: 2, stride: 3}")
    with pytest.raises(ValueError, match="stride is a field of architecture smt and gpt2, this run is of hymba"):
        RunConfig.from_yaml(tmp_path / "run.yaml")
    with pytest.raises(TypeError, match="model must be of type HymbaConfig for architecture 'hymba', got a SMTConfig"):
        replace(run_config(tmp_path), architecture="hymba")


def test_its_weights_are_those_of_a_hymba_with_the_loss_on_record(outcome):
    model = Hymba.from_pretrained(outcome.folder)
    subject = open_run(outcome.folder, torch.device("cpu"))
    text = Path(outcome.config.data.text)
    names = {path.name: path.read_text() for path in text.iterdir()}
    held_out = [document for document in names.values() if len(document.encode()) == outcome.evaluation.n_bytes]
    end = subject.tokenizer.end_of_document
    ids = torch.tensor([[end, *subject.tokenizer.encode(held_out[0]), end]])
    nats = sum(
        model(ids[:, start : start + 17][:, :-1], targets=ids[:, start + 1 : start + 17])["loss"].item()
        * (len(ids[0, start : start + 17]) - 1)
        for start in range(0, ids.shape[1] - 1, 16)
    )
    assert subject.scorer.context == 16  # the longest chunk of its training
    assert len(held_out) == 1 and nats / (ids.shape[1] - 1) == pytest.approx(outcome.results["best_val_loss"], rel=1e-4)


def test_interrupted_and_resumed_it_ends_as_one_that_was_not(outcome, tmp_path, monkeypatch):
    take_step = Trainer._step

    def interrupted(self, *arguments, **options):
        if self.progress.step == 2:
            raise RuntimeError
        take_step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(RuntimeError):
            run_in(tmp_path / "run", outcome.config)
    assert resume(tmp_path / "run").progress.step == 4
    expected = load_file(outcome.folder / "model.safetensors")
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("architecture", ["hymba", "gpt2"])
def test_a_run_begins_with_the_checkpoint_of_its_own_architecture_alone(architecture, outcome, tmp_path):
    first = outcome
    if architecture == "gpt2":
        config = run_config(tmp_path, steps=1, sample_tokens=0)
        data = replace(config.data, eval_chunk_length=config.data.chunk_length)
        first = run(replace(config, architecture="gpt2", data=data), tmp_path / "out")
    begins = {"checkpoint": str(first.folder)}
    training = replace(first.config.training, init_from=begins, learning_rate=1e-12, steps=1, sample_tokens=0)
    second = run(replace(first.config, training=training), tmp_path / "out")
    weights, expected = (load_file(of.folder / "model.safetensors") for of in (second, first))
    assert all(torch.allclose(weights[name], expected[name], atol=1e-6) for name in expected)
    message = f"init_from names a checkpoint of architecture {architecture}, this run is of smt"
    with pytest.raises(ValueError, match=message):
        run(run_config(tmp_path, init_from=begins), tmp_path / "out")


def test_the_other_commands_take_it(outcome, tmp_path, capsys):
    folder = str(outcome.folder)
    assert main(["compare", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["encoding"] == "hymba hybrid"
    assert main(["plot", folder, "--out", str(tmp_path / "plot.png")]) == 0 and (tmp_path / "plot.png").stat().st_size
    tasks = ["--tasks", "perplexity,position,needle,pooling", "--trials", "1", "--device", "cpu"]
    assert main(["eval", folder, *tasks, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"perplexity", "position", "needle"} == set(results["results"])
    assert "pooling: not for Hymba, without a memory" in results["notes"]
    capsys.readouterr()
    assert main(["generate", "--model", folder, "--prompt", "word1 word2", "--max_new_tokens", "4", "--device", "cpu"]) == 0
    alone = capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("word1\nword1 word2\n")
    batch = ["--file", str(tmp_path / "prompts.txt"), "--batch", "--max_new_tokens", "4", "--greedy", "--device", "cpu"]
    assert main(["generate", "--model", folder, *batch]) == 0
    assert alone.strip("\n") and len(capsys.readouterr().out.splitlines()) == 2


def test_a_checkpoint_that_names_no_length_of_chunks_is_not_evaluated(outcome, tmp_path, capsys):
    Hymba.from_pretrained(outcome.folder).save_pretrained(tmp_path / "saved")
    assert main(["eval", str(tmp_path / "saved"), "--data", str(tmp_path), "--device", "cpu"]) == 1
    assert "config.yaml must name data.chunk_length, the longest chunk of its training" in capsys.readouterr().err


def test_a_gpt2_is_not_continued(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"architecture": "gpt2", "model": {}}))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert main(["generate", "--model", str(tmp_path), "--prompt", "a", "--device", "cpu"]) == 1
    assert "must be of architecture smt or hymba" in capsys.readouterr().err


def test_what_decodes_and_what_trains_are_one_model(outcome):
    config = outcome.config.model
    torch.manual_seed(0)
    model, ids = ChunkedHymba(config).eval(), torch.randint(config.vocab_size, (2, 9))
    with torch.no_grad():
        drawn = model.generate(ids, 3, temperature=0.0)
        logits = model.logits(drawn[:, :-1])
        assert torch.equal(logits[:, 8:].argmax(-1), drawn[:, 9:])
        loss, aux = model(drawn[:, :-1], targets=drawn[:, 1:])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn[:, 1:].flatten())
    assert aux.state is None and torch.allclose(loss, expected, atol=1e-5)
