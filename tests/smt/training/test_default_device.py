"""What training and evaluation keep on the CPU stays there, wherever ``torch.set_default_device`` points."""

import torch
from tiny_training import DATA, random_documents, trainer_of

from smt.data.walk import DocumentWalk
from smt.evaluation.perplexity import evaluate
from smt.evaluation.position import loss_by_position
from smt.evaluation.scorer import TokenScores
from smt.experiments.paired import paired_difference


def test_a_default_device_moves_nothing():
    expected = trained_and_evaluated()
    with torch.device("meta"):  # where any tensor that is read fails
        found = trained_and_evaluated()
    assert found == expected


def test_a_default_device_moves_no_scores():
    """Neither a difference between models nor a loss by position is computed there."""
    with torch.device("cpu"):
        scores = [TokenScores(-torch.rand(30).double(), torch.zeros(30, dtype=torch.bool)) for _ in range(2)]
    expected = paired_difference(scores, scores[::-1]), loss_by_position(scores)
    with torch.device("meta"):
        assert (paired_difference(scores, scores[::-1]), loss_by_position(scores)) == expected


def trained_and_evaluated():
    with torch.device("cpu"):
        trainer, documents = trainer_of(steps=3), random_documents()
    walk = DocumentWalk(documents, batch_size=2, length=DATA["chunk_length"], epochs=1, together=True)
    evaluation = trainer.train(lambda: evaluate(trainer.objective, walk, n_bytes=1))
    return trainer.progress.recent, evaluation
