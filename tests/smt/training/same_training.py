"""The same optimiser steps in one batch or several, on one process or two: eight rows, or pairs, in all, cut in any way."""

import torch
from tiny_training import trainer_of

from smt.data.pairs import Pair

ROWS, LENGTH, STEPS = 8, 24, 4
TASKS = ("text", "recall", "pairs")
# conftest.py opens the memory of one process alone.
MODEL = {"slot_gate": "open", "slot_readout": False}


def trained(task, accumulated, processes=1):
    """What steps on eight documents of one length leave, all of them in every step: losses, and gradients of the first step.

    Recall counts other numbers of targets in every row and chunk, in some none; text counts all. Pairs are of many lengths.
    """
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 270, (LENGTH + 1,), generator=generator) for _ in range(ROWS)]
    counted = pairs = None
    if task == "recall":
        share = torch.arange(ROWS)[:, None] / ROWS  # from none to most
        counted = list((torch.rand(ROWS, LENGTH + 1, generator=generator) < share).numpy())
    if task == "pairs":
        tokens = [document.tolist() for document in documents]
        pairs = [Pair(some[: row + 1], some[row + 1 : 2 * row + 3], some[-row - 1 :]) for row, some in enumerate(tokens)]
    data = {"batch_size": ROWS // accumulated // processes, "lanes": accumulated}
    data["chunk_length"] = LENGTH // 3 if pairs is None else LENGTH  # pairs are not cut into chunks
    options = {"steps": STEPS, "learning_rate": 0.01, "gradient_accumulation_steps": accumulated}
    trainer = trainer_of(documents, data=data, counted=counted, pairs=pairs, model=MODEL, **options)
    batches, losses, first = iter(trainer._walk), [], []
    clip = trainer.accelerator.clip_grad_norm_

    def recorded(parameters, largest):
        parameters = list(parameters)
        if not first:
            first.extend(parameter.grad.flatten().clone() for parameter in parameters)
        return clip(parameters, largest)

    trainer.accelerator.clip_grad_norm_ = recorded
    for step in range(STEPS):
        trainer._step(batches, step / STEPS, is_first=not step)
        nats, n_targets = trainer.progress.recent[-1]
        losses.append(nats / n_targets)
    return {"losses": torch.tensor(losses, dtype=torch.float64), "gradient": torch.cat(first)}


def assert_same_training(one, other):
    """To 1e-6 of a loss, and of the gradient as a whole."""
    torch.testing.assert_close(one["losses"], other["losses"], rtol=1e-6, atol=0.0)
    difference = (one["gradient"] - other["gradient"]).norm() / other["gradient"].norm()
    assert difference < 1e-6, difference
