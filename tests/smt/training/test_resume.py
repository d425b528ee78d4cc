"""A run that is interrupted and resumed ends as if nothing had happened, wherever it was killed."""

import json
import multiprocessing
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smt import StrideMemoryTransformer
from smt.training.checkpoints import Checkpoints
from smt.training.run import resume, run_in
from smt.training.settings import RunConfig
from smt.training.trainer import Trainer

KILLS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run with everything that a resume must restore: dropout, lanes, rows that wait, accumulation, evaluations."""
    texts = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for index in range(12):
        (texts / f"{index}.txt").write_text(" ".join(f"word{draw.randrange(9)}" for _ in range(20 + 30 * index)))
    return RunConfig.from_dict(
        {
            "experiment": "resumed",
            "model": {
                "vocab_size": 270, "d_model": 16, "d_k": 8, "dropout": 0.2, "pooling_dropout": 0.2,
                "n_ssm_outputs": 3, "m_input_tokens": 6, "stride": 2, "write_group": 2,
                "transformer_n_layers": 1, "transformer_n_heads": 2, "ssm_n_layers": 1, "ssm_d_state": 4,
                "encoding": "stream",
            },
            "data": {"text": str(texts), "batch_size": 2, "chunk_length": 16, "lanes": 2, "eval_chunk_length": 32},
            "training": {
                "device": "cpu", "steps": 24, "evaluations": 3, "save_steps": 2, "gradient_accumulation_steps": 2,
                "sample_tokens": 0,
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """The folder of the run that nothing interrupts."""
    return run_in(tmp_path_factory.mktemp("undisturbed") / "run", config).folder


def history_of(folder: Path) -> dict:
    return json.loads((folder / "metrics_history.json").read_text())


def assert_same_end(folder: Path, other: Path) -> None:
    assert history_of(folder) == history_of(other)
    mine, others = (json.loads((path / "results.json").read_text())["results"] for path in (folder, other))
    for name in ("best_val_loss", "best_step", "final_val_loss", "steps", "train_tokens", "padding"):
        assert mine[name] == others[name], name
    weights, expected = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


class Interrupted(Exception):
    pass


def test_a_run_that_is_interrupted_in_a_step_ends_as_one_that_is_not(config, undisturbed, tmp_path, monkeypatch):
    take_step = Trainer._step

    def interrupted(self, *arguments, **options):
        if self.progress.step == 16:
            raise Interrupted
        take_step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(Interrupted):
            run_in(tmp_path / "run", config)
    torch.manual_seed(99)  # nothing of this process may matter
    outcome = resume(tmp_path / "run")
    assert outcome.progress.step == 24
    assert_same_end(tmp_path / "run", undisturbed)


def test_a_checkpoint_that_was_being_written_is_not_taken_for_one(config, undisturbed, tmp_path, monkeypatch):
    save, saved = Checkpoints.save, []

    def killed_at_the_fourth(self, step, snapshot):
        saved.append(step)
        if len(saved) == 4:
            monkeypatch.setattr("os.replace", dies)
        save(self, step, snapshot)

    def dies(*arguments, **options):
        monkeypatch.setattr("shutil.rmtree", dies)  # who is killed does not tidy up
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed_at_the_fourth)
        with pytest.raises(Interrupted):
            run_in(tmp_path / "run", config)
    monkeypatch.undo()
    partial = list((tmp_path / "run" / "checkpoints").glob("*.partial"))
    assert [path.name for path in partial] == [f"step_{saved[-1]:08d}.partial"]
    resume(tmp_path / "run")
    assert_same_end(tmp_path / "run", undisturbed)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))


def test_a_run_killed_at_random_moments_ends_as_one_that_is_not(config, tmp_path, seed):
    draw = random.Random(seed)
    longer = replace(config, training=replace(config.training, steps=48))
    processes = multiprocessing.get_context("forkserver")  # new ones, without the seconds that imports take
    imports = ["accelerate", "matplotlib.backends.backend_agg", "tokenizers", "torch._dynamo", "smt.training.run"]
    processes.set_forkserver_preload(imports)

    def begin(folder: Path) -> multiprocessing.Process:
        process = processes.Process(target=run_in, args=(folder, longer))
        process.start()
        return process

    def newest(folder: Path) -> str:
        return max((path.name for path in (folder / "checkpoints").glob("step_*[0-9]")), default="")

    undisturbed = begin(tmp_path / "undisturbed")
    undisturbed.join()
    assert undisturbed.exitcode == 0
    killed, reached = tmp_path / "killed", [""]
    for _ in range(KILLS):
        process = begin(killed)
        while newest(killed) == reached[-1]:
            assert process.is_alive()
            time.sleep(0.01)  # and leaves the core to the run
        process.join(draw.uniform(0.0, 0.15))  # a step takes 0.03 s, and every second writes a checkpoint
        process.kill()
        process.join()
        reached.append(newest(killed))
    assert not (killed / "results.json").is_file(), reached
    process = begin(killed)
    process.join()
    assert process.exitcode == 0
    assert_same_end(killed, tmp_path / "undisturbed")


class TestRefusals:
    def test_a_folder_without_a_run(self, tmp_path):
        with pytest.raises(ValueError, match=r"it has no config\.yaml"):
            resume(tmp_path)

    def test_a_run_that_has_finished(self, undisturbed):
        with pytest.raises(ValueError, match="has finished: there is nothing to resume"):
            resume(undisturbed)

    def test_a_run_of_another_configuration(self, config, undisturbed):
        other = replace(config, model=replace(config.model, stride=3))
        with pytest.raises(ValueError, match="holds another run, with stride = 2, not 3"):
            run_in(undisturbed, other)


def test_checkpoints_of_a_finished_run_are_models_and_no_more(undisturbed):
    folders = sorted((undisturbed / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step_00000022", "step_00000024"]
    names = {path.name for path in folders[0].iterdir()}
    assert names == {"config.yaml", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    StrideMemoryTransformer.from_pretrained(folders[0])
