"""Needle in a haystack: a fact is put at some depth of a text of some length, and asked for at its end.

The model gives the likelihood of the question's answer and of other answers that would fit; it is right where the true one is
the likeliest. That is defined for every model and tokenizer, for one that cannot chat as well.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smt.data.recall import RecallTask, words
from smt.data.tokenizer import Tokenizer
from smt.evaluation.scorer import Scorer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PLACES = ("Paris", "London", "Rome", "Berlin", "Vienna", "Madrid", "Lisbon", "Dublin", "Athens", "Moscow", "Cairo", "Tokyo")
THINGS = ("bread", "water", "silver", "gold", "paper", "music", "iron", "salt", "wood", "glass", "milk", "stone")


@dataclass(frozen=True)
class NeedleStyle:
    """What needle, question and answer look like; ``{key}`` and ``{value}`` stand for the words that are drawn.

    The question and the answer together end the document.
    """

    needle: str
    question: str
    answer: str
    keys: tuple[str, ...]
    values: tuple[str, ...]


ENGLISH = NeedleStyle(
    needle=" The secret word of {key} is {value}.",
    question=" The secret word of {key} is",
    answer=" {value}",
    keys=PLACES,
    values=THINGS,
)


def recall_style(task: RecallTask) -> NeedleStyle:
    """The pairs of the source ``recall``, as a model that was trained on it has seen them."""
    keys, values = tuple(words("k", task.keys)), tuple(words("v", task.values))
    return NeedleStyle(" {key} {value}", " {key}", " {value}", keys, values)


@dataclass(frozen=True)
class NeedleGrid:
    """Results by depth and length.

    Attributes:
        depths: shares of the haystack before the needle.
        lengths: tokens of the haystack.
        accuracy: per depth and length, how often the true answer is the likeliest of ``n_candidates``.
        exact: per depth and length, how often it is the likeliest of all texts, token by token.
        n_trials: needles in each cell.
        n_candidates: answers to choose from; chance is 1 / n_candidates.
    """

    depths: tuple[float, ...]
    lengths: tuple[int, ...]
    accuracy: tuple[tuple[float, ...], ...]
    exact: tuple[tuple[float, ...], ...]
    n_trials: int
    n_candidates: int

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 1 / self.n_candidates


def needle_in_haystack(
    scorer: Scorer,
    tokenizer: Tokenizer,
    haystack: Tensor,
    style: NeedleStyle,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    n_trials: int = 8,
    n_candidates: int = 8,
    seed: int = 0,
) -> NeedleGrid:
    """Hide ``n_trials`` needles at each depth of haystacks of each length.

    Args:
        haystack: (L,) tokens without ends of documents, from which every trial cuts its own piece.
        lengths: tokens of a piece, none longer than ``haystack``.
        depths: between 0, the needle first, and 1, the needle last.

    Raises:
        ValueError: a haystack that is too short, a depth out of range, or more candidates than the style has values.
    """
    if max(lengths) > len(haystack):
        raise ValueError(f"haystack must have the {max(lengths)} tokens of the longest piece, got {len(haystack)}")
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must lie in [0, 1], got {tuple(depths)}")
    if not 2 <= n_candidates <= len(style.values):
        raise ValueError(f"n_candidates must lie in 2..{len(style.values)}, got {n_candidates}")
    accuracy, exact = [], []
    for depth in depths:
        cells = []
        for length in lengths:
            draw = random.Random(f"{seed} {depth} {length}")
            trials = [_trial(tokenizer, haystack, style, depth, length, n_candidates, draw) for _ in range(n_trials)]
            cells.append(_right(scorer, trials))
        accuracy.append(tuple(cell[0] for cell in cells))
        exact.append(tuple(cell[1] for cell in cells))
    return NeedleGrid(tuple(depths), tuple(lengths), tuple(accuracy), tuple(exact), n_trials, n_candidates)


def usual_lengths(window_size: int, available: int) -> tuple[int, ...]:
    """1, 2, 4, 8 and 16 windows, as far as there is text."""
    return tuple(factor * window_size for factor in (1, 2, 4, 8, 16) if factor * window_size <= available)


def _trial(
    tokenizer: Tokenizer,
    haystack: Tensor,
    style: NeedleStyle,
    depth: float,
    length: int,
    n_candidates: int,
    draw: random.Random,
) -> list[tuple[Tensor, int]]:
    """A document for each candidate, the true one first, and how many tokens the answer at its end has."""
    key, values = draw.choice(style.keys), draw.sample(style.values, n_candidates)
    start = draw.randint(0, len(haystack) - length)
    hay, cut = haystack[start : start + length], round(depth * length)
    needle = tokenizer.encode(style.needle.format(key=key, value=values[0]))
    question = tokenizer.encode(style.question.format(key=key))
    before = torch.cat([torch.tensor([tokenizer.end_of_document], device="cpu"), hay[:cut], needle, hay[cut:], question])
    answers = [tokenizer.encode(style.answer.format(value=value)) for value in values]
    return [(torch.cat([before, answer]), len(answer)) for answer in answers]


def _right(scorer: Scorer, trials: list[list[tuple[Tensor, int]]]) -> tuple[float, float]:
    """The shares of trials in which the true answer is the likeliest candidate, and the likeliest of all texts."""
    scores = scorer.score([document for trial in trials for document, _ in trial])
    likeliest = exact = 0
    for trial in trials:
        of_trial, scores = scores[: len(trial)], scores[len(trial) :]
        likelihoods = [score.log_probs[-n:].sum().item() for score, (_, n) in zip(of_trial, trial, strict=True)]
        # A tie is no answer.
        likeliest += all(likelihoods[0] > other for other in likelihoods[1:])
        exact += bool(of_trial[0].greedy[-trial[0][1] :].all())
    return likeliest / len(trials), exact / len(trials)
