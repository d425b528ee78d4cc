"""Associative recall as text: pairs of a key and its value among filler words; later the key comes again, and its value is due.

    filler ... KEY VALUE filler ... KEY VALUE filler ... KEY [VALUE] filler ...

Multi-query associative recall of Arora et al., 2023 (Zoology, arXiv:2312.04927), with the distance between a value and its
recall as a setting. Words are made up; a tokenizer that is trained on them has one token for each. Every pair is new in every
document, so that nothing but the document can tell a value.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from smt.data.documents import Corpus, Document, Documents, hash_texts
from smt.fields import check_at_least, check_types

VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
# Of one first letter: vowel, consonant, vowel follow.
WORDS_PER_LETTER = len(VOWELS) ** 2 * len(CONSONANTS)
# How often a place for a pair is drawn before the document is begun anew.
ATTEMPTS = 200
HELD_OUT_DOCUMENTS = 64


@dataclass(frozen=True)
class Question:
    """A value that is due.

    Attributes:
        position: of the value, in words; the key stands before it.
        distance: how many words after it was shown.
    """

    position: int
    distance: int


@dataclass(frozen=True)
class RecallDocument:
    """Words, and which of them are answers."""

    words: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def text(self) -> str:
        """Every word with a space before it, so that a word is the same token wherever it stands."""
        return "".join(f" {word}" for word in self.words)


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """What documents look like.

    Args:
        keys, values, fillers: how many words of each kind there are.
        pairs: shown in each document; each is asked for once.
        length: words in a document.
        shortest, longest: distances, between which each question's is drawn.
        spacing: words between two pairs at least; where this is less than the window's tokens, two pairs may be pooled as one.
        documents: to train on.
        seed: of all documents.
    """

    keys: int = 32
    values: int = 32
    fillers: int = 16
    pairs: int = 2
    length: int = 400
    shortest: int = 4
    longest: int = 288
    spacing: int = 50
    documents: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 2, "keys", "values", "shortest")
        check_at_least(self, 1, "fillers", "pairs", "documents", "spacing")
        check_at_least(self, 0, "seed")
        for name in ("keys", "values", "fillers"):
            if getattr(self, name) > WORDS_PER_LETTER:
                raise ValueError(f"{name} must be at most {WORDS_PER_LETTER}, got {getattr(self, name)}")
        if self.pairs > self.keys:
            raise ValueError(f"pairs must be at most keys = {self.keys}, got {self.pairs}")
        if self.longest < self.shortest:
            raise ValueError(f"longest must be at least shortest = {self.shortest}, got {self.longest}")
        least = self.longest + 2 + 2 * (self.pairs - 1) * (self.spacing + 2)
        if self.length < least:
            raise ValueError(f"length must be at least {least} for {self.pairs} pairs at these distances, got {self.length}")

    def at_distance(self, distance: int) -> RecallTask:
        """The same task with every question at one distance, in documents as long as they must be."""
        least = distance + 2 + 2 * (self.pairs - 1) * (self.spacing + 2)
        return replace(self, shortest=distance, longest=distance, length=max(self.length, least))

    def document(self, index: int) -> RecallDocument:
        """The document of that number; negative ones are held out."""
        draw = random.Random(f"{self.seed} {index}")
        keys = draw.sample(words("k", self.keys), self.pairs)
        values = draw.choices(words("v", self.values), k=self.pairs)
        text = draw.choices(words("f", self.fillers), k=self.length)
        questions = []
        for (shown, distance), key, value in zip(self._places(draw), keys, values, strict=True):
            for start in (shown, shown + distance):
                text[start : start + 2] = key, value
            questions.append(Question(shown + distance + 1, distance))
        return RecallDocument(tuple(text), tuple(sorted(questions, key=lambda question: question.position)))

    def _places(self, draw: random.Random) -> list[tuple[int, int]]:
        """Where each pair is shown, and how much later its key comes again."""
        while True:
            places: list[tuple[int, int]] = []
            taken: set[int] = set()
            for _ in range(ATTEMPTS):
                distance = draw.randint(self.shortest, self.longest)
                shown = draw.randint(0, self.length - distance - 2)
                words_here = {shown, shown + 1, shown + distance, shown + distance + 1}
                apart = all(abs(shown - other) >= self.spacing + 2 for other, _ in places)
                if apart and taken.isdisjoint(words_here):
                    places.append((shown, distance))
                    taken |= words_here
                    if len(places) == self.pairs:
                        return places


def words(letter: str, count: int) -> list[str]:
    """The first ``count`` made-up words that begin with ``letter``."""
    return [letter + a + b + c for a in VOWELS for b in CONSONANTS for c in VOWELS][:count]


def read_recall(task: RecallTask) -> Corpus:
    """The documents of ``task``, with ``HELD_OUT_DOCUMENTS`` more held out."""
    held_out = range(-HELD_OUT_DOCUMENTS, 0)
    splits = {"train": range(task.documents), "validation": held_out}

    def read(numbers: range, skipped: Counter[str]) -> Iterator[Document]:
        return (Document(f"recall {number}", task.document(number).text) for number in numbers)

    made = [Documents(partial(read, numbers), hash_texts(repr(task), name)) for name, numbers in splits.items()]
    return Corpus("associative recall", *made)
