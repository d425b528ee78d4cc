"""Two processes, each with half of the rows, train what one process with all rows trains: DDP, and FSDP with a resume."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from same_training import TASKS, assert_same_training, trained

from smt.training.checkpoints import Checkpoints, Snapshot
from smt.training.run import run_in
from smt.training.settings import RunConfig


def settings(texts: Path, rows: int) -> dict:
    return {
        "experiment": "two",
        "model": {
            "vocab_size": 270, "d_model": 16, "d_k": 8, "dropout": 0.0, "n_ssm_outputs": 3, "m_input_tokens": 6, "stride": 2,
            "write_group": 2, "transformer_n_layers": 1, "transformer_n_heads": 2, "ssm_n_layers": 1, "ssm_d_state": 4,
            "slot_gate": "open", "slot_readout": False,  # conftest.py opens the memory of this process alone
        },
        "data": {
            "text": str(texts), "batch_size": rows, "chunk_length": 16, "lanes": 2, "eval_batch_size": rows,
            "eval_chunk_length": 32,
        },
        "training": {
            "device": "cpu", "steps": 20, "evaluations": 2, "save_steps": 10, "sample_tokens": 4, "learning_rate": 0.01,
            "gradient_accumulation_steps": 2,
        },
    }  # fmt: skip


@pytest.fixture
def texts(tmp_path):
    """Seven documents to train on, so that with rows of four some rows, and at times all of a process, wait."""
    folder = tmp_path / "texts"
    folder.mkdir()
    draw = random.Random(0)
    for index in range(8):
        (folder / f"{index}.txt").write_text(" ".join(f"word{draw.randrange(9)}" for _ in range(20 + 15 * index)))
    return folder


def run_two(folder: Path, texts: Path) -> None:
    """Two processes with two rows each leave in ``folder`` what ``two_processes.py`` says."""
    (folder / "settings.json").write_text(json.dumps(settings(texts, 2)))
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, str(script), str(folder), str(folder / "settings.json")]
    # FSDP would shard over GPUs if it saw any.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("training 7 documents") == 3  # only one of them talks


def assert_same_losses(folder: Path, expected: Path) -> None:
    mine, theirs = (json.loads((path / "metrics_history.json").read_text()) for path in (folder, expected))
    assert mine["train_steps"] == theirs["train_steps"] == [1, 10, 20] and mine["eval_steps"] == theirs["eval_steps"]
    for name in ("train_loss", "val_loss"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    results, others = (json.loads((path / "results.json").read_text())["results"] for path in (folder, expected))
    for name in ("train_tokens", "val_tokens", "parameters"):
        assert results[name] == others[name], name
    weights = load_file(expected / "model.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        expected = weights[name]
        if name.endswith("qkv.bias"):
            # A bias of all keys changes no attention: its gradient is rounding, of which AdamW makes whole steps.
            (query, _, value), (others_query, _, others_value) = tensor.chunk(3), expected.chunk(3)
            tensor, expected = torch.cat([query, value]), torch.cat([others_query, others_value])
        torch.testing.assert_close(tensor, expected, rtol=1e-2, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_two_processes_train_what_one_does_whole_or_sharded_and_resumed_and_in_accumulated_batches(texts, tmp_path):
    """One test, since two processes take seconds to begin."""
    run_two(tmp_path, texts)
    alone = run_in(tmp_path / "alone", RunConfig.from_dict(settings(texts, 4))).folder
    for how in ("ddp", "fsdp"):
        assert_same_losses(tmp_path / how, alone)
    of_two = torch.load(tmp_path / "same.pt")
    for task in TASKS:
        expected = trained(task, 1)
        for result in of_two[task].values():
            assert_same_training(result, expected)


def test_a_checkpoint_of_fewer_processes_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    Checkpoints(tmp_path, limit=1).save(1, Snapshot({}, {}, {}, {}))
    with pytest.raises(ValueError, match="is of 1 processes, this is process 2: resume with as many"):
        Checkpoints(tmp_path, limit=1, rank=1).newest()
