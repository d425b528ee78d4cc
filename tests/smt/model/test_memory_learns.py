"""The memory learns to name a key 140 to 255 tokens after it was shown, where only slots can tell (learn_recall.py)."""

import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def task(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("learn_recall")


# Nineteen of twenty trainings learn it within 120 steps (docs/results.md).
@pytest.mark.parametrize(("encoding", "seed"), [("stream", 0), ("stride", 1)])
def test_memory_recalls_what_the_window_has_lost_and_nothing_else_does(task, encoding, seed, fresh_gates):
    model = task.build(seed, encoding=encoding)
    *_, (step, recalled) = task.train(model, seed, first=80)
    assert recalled >= task.RECALLED, f"{recalled:.1%} after {step} steps"

    # Without writes no weights can do better than guess: the answer does not depend on the key at all.
    control = task.build(seed, encoding=encoding, writes=False)
    control.load_state_dict(model.state_dict())
    ids, targets = task.recall_batch(32, torch.Generator().manual_seed(seed + 10))
    is_key = (ids >= task.N_FILLERS) & (ids < task.MARKER)
    other_keys = torch.where(is_key, (ids - task.N_FILLERS + 1) % task.N_KEYS + task.N_FILLERS, ids)
    assert torch.equal(task.answers(control, ids, targets), task.answers(control, other_keys, targets))
    assert not torch.equal(task.answers(model, ids, targets), task.answers(model, other_keys, targets))
    # 192 questions at 1 in 32: 6 right on average; 17 or more have a probability below 2e-4.
    assert task.accuracy(control) < 17 / 192
