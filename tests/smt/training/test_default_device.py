"""What training and evaluation keep on the CPU stays there, wherever ``torch.set_default_device`` points."""

import torch
from tiny_training import DATA, random_documents, trainer_of

from smt.data.walk import DocumentWalk
from smt.evaluation.perplexity import evaluate


def test_a_default_device_moves_nothing():
    expected = trained_and_evaluated()
    with torch.device("meta"):  # where any tensor that is read fails
        found = trained_and_evaluated()
    assert found == expected


def trained_and_evaluated():
    with torch.device("cpu"):
        trainer, documents = trainer_of(steps=3), random_documents()
    walk = DocumentWalk(documents, batch_size=2, length=DATA["chunk_length"], epochs=1, together=True)
    evaluation = trainer.train(lambda: evaluate(trainer.objective, walk, n_bytes=1))
    return trainer.progress.recent, evaluation
