"""Associative recall as text: pairs of a key and its value among filler words; later the key comes again, and its value is due.

    filler ... KEY VALUE filler ... KEY VALUE filler ... KEY [VALUE] filler ...

Multi-query associative recall of Arora et al., 2023 (Zoology, arXiv:2312.04927), with the distance between a value and its
recall as a setting. Words are made up; a tokenizer that is trained on them has one token for each. Every pair is new in every
document, so that nothing but the document can tell a value. The loss counts the answers alone: nothing can tell the other
words, and what cannot be learned drowns what can.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise

from smt.data.documents import Corpus, Document, Documents, LeftOut, hash_texts
from smt.runtime.fields import check_at_least, check_fields, check_seed

VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
# Of one first letter: vowel, consonant, vowel follow.
WORDS_PER_LETTER = len(VOWELS) ** 2 * len(CONSONANTS)
# How often the places of a pair are drawn before the document is begun anew, and how often that.
ATTEMPTS = 200
HELD_OUT_DOCUMENTS = 64


@dataclass(frozen=True)
class Question:
    """A value that is due.

    Attributes:
        position: of the value, in words; the key stands before it.
        distance: how many words after it was last there.
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

    @property
    def answers(self) -> tuple[tuple[int, int], ...]:
        """Where each answer and the space before it begin and end in the text."""
        ends = list(accumulate((len(word) + 1 for word in self.words), initial=0))
        return tuple((ends[question.position], ends[question.position + 1]) for question in self.questions)


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """What documents look like.

    Args:
        keys: different keys.
        values: different values.
        fillers: different words between them.
        pairs: of a key and its value, in each document.
        queries: how often each pair is asked for. The answer shows it again, so that the next distance counts from there.
        length: words in a document.
        shortest: words from a value to its question at least.
        longest: words from a value to its question at most; the distance is drawn between the two.
        spacing: words between different pairs at least, shown or asked for; where this is less than the window's tokens, two
            pairs may be pooled as one.
        documents: how many there are to train on.
        seed: of all documents.
    """

    keys: int = 32
    values: int = 32
    fillers: int = 16
    pairs: int = 2
    queries: int = 1
    length: int = 400
    shortest: int = 4
    longest: int = 288
    spacing: int = 50
    documents: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 2, "keys", "values", "shortest")
        check_at_least(self, 1, "fillers", "pairs", "queries", "documents")
        check_at_least(self, 0, "spacing")
        check_seed("seed of recall", self.seed)
        for name in ("keys", "values", "fillers"):
            if getattr(self, name) > WORDS_PER_LETTER:
                raise ValueError(f"{name} must be at most {WORDS_PER_LETTER}, got {getattr(self, name)}")
        if self.pairs > self.keys:
            raise ValueError(f"pairs must be at most keys = {self.keys}, got {self.pairs}")
        if self.longest < self.shortest:
            raise ValueError(f"longest must be at least shortest = {self.shortest}, got {self.longest}")
        least = self.longest + (self.queries - 1) * self.shortest + 2
        if self.length < least:
            raise ValueError(f"length must be at least {least} for the longest distance, got {self.length}")
        self._places(random.Random(self.seed))

    def at_distance(self, distance: int) -> RecallTask:
        """The same task with every pair asked for once, at one distance, in documents as long as they must be."""
        room = distance + 2 + 4 * (self.pairs - 1) * (self.spacing + 2)
        return replace(self, shortest=distance, longest=distance, queries=1, length=max(self.length, room))

    def document(self, index: int) -> RecallDocument:
        """The document of that number; negative ones are held out."""
        draw = random.Random(f"{self.seed} {index}")
        keys = draw.sample(words("k", self.keys), self.pairs)
        values = draw.choices(words("v", self.values), k=self.pairs)
        text = draw.choices(words("f", self.fillers), k=self.length)
        questions = []
        for starts, key, value in zip(self._places(draw), keys, values, strict=True):
            for start in starts:
                text[start : start + 2] = key, value
            questions += [Question(start + 1, start - before) for before, start in pairwise(starts)]
        return RecallDocument(tuple(text), tuple(sorted(questions, key=lambda question: question.position)))

    def _places(self, draw: random.Random) -> list[list[int]]:
        """Where each pair is shown and then asked for."""
        for _ in range(ATTEMPTS):
            places: list[list[int]] = []
            for _ in range(ATTEMPTS):
                distances = [draw.randint(self.shortest, self.longest) for _ in range(self.queries)]
                last = self.length - 2 - sum(distances)
                if last < 0:
                    continue
                starts = list(accumulate(distances, initial=draw.randint(0, last)))
                if all(abs(start - other) >= self.spacing + 2 for start in starts for others in places for other in others):
                    places.append(starts)
                    if len(places) == self.pairs:
                        return places
        raise ValueError(
            f"length must have room for {self.pairs} pairs, {self.queries + 1} times each, {self.spacing} words apart, "
            f"got {self.length}"
        )


def words(letter: str, count: int) -> list[str]:
    """The first ``count`` made-up words that begin with ``letter``."""
    return [letter + a + b + c for a in VOWELS for b in CONSONANTS for c in VOWELS][:count]


def read_recall(task: RecallTask) -> Corpus:
    """The documents of ``task``, with ``HELD_OUT_DOCUMENTS`` more held out."""
    held_out = range(-HELD_OUT_DOCUMENTS, 0)
    splits = {"train": range(task.documents), "validation": held_out}

    def read(numbers: range, skipped: LeftOut) -> Iterator[Document]:
        documents = ((number, task.document(number)) for number in numbers)
        return (Document(f"recall {number}", document.text, document.answers) for number, document in documents)

    made = [Documents(partial(read, numbers), hash_texts(repr(task), name)) for name, numbers in splits.items()]
    return Corpus("associative recall", *made)
