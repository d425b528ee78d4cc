"""Preference pairs: a prompt with the completion that is preferred and the one that is not, from a file to tokens.

A line of the file is an object of texts, ``{"prompt": ..., "chosen": ..., "rejected": ...}``. A pair becomes two rows that
begin and end as documents do:

    <end> prompt chosen <end>        <end> prompt rejected <end>

The last token is the completion's: a model is taught where an answer ends. Tokens of the prompt and of a completion are made
apart, so that both rows of a pair have the same prompt. A pair that has been cut out of tokens says which they are
(``prompt_ids``, ``chosen_ids``, ``rejected_ids``), and of which ``tokenizer`` (its hash): its rows are exactly these, because
text need not give the same tokens again, and a piece of a document neither begins nor ends there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from smt.data.documents import LeftOut, hash_texts, held_out_below, rank_of
from smt.data.local import HALF_A_PAIR, is_unicode, json_lines
from smt.data.tokenizer import Tokenizer
from smt.runtime.files import text_writer, write_files
from smt.runtime.names import shown

FIELDS = ("prompt", "chosen", "rejected")
ID_FIELDS = tuple(f"{field}_ids" for field in FIELDS)


class Pair(NamedTuple):
    """Tokens of a preference: the rows ``prompt + chosen`` and ``prompt + rejected``, none of them empty."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class TokenizedPairs:
    """The pairs of a file, some of them held out.

    Attributes:
        source: the file.
        train, held_out: no prompt is in both.
        left_out: lines that are no pairs, by reason; ``left_out.names`` has file and line of each.
        n_cut_prompts, n_cut_completions: pairs that were too long, and what was cut of them.
    """

    source: str
    train: list[Pair]
    held_out: list[Pair]
    left_out: LeftOut
    n_cut_prompts: int
    n_cut_completions: int

    @property
    def n_targets(self) -> int:
        """Tokens of the rows to train on that are preferred, but the first of each."""
        return sum(len(pair.prompt) + len(pair.chosen) - 1 for pair in self.train)

    def describe(self) -> str:
        """One line of counts: what there is, what was cut and what was left out."""
        parts = [f"training {len(self.train):,} pairs", f"held out {len(self.held_out):,} pairs"]
        parts += [f"prompts cut on the left: {self.n_cut_prompts:,}"] * bool(self.n_cut_prompts)
        parts += [f"completions cut on the right: {self.n_cut_completions:,}"] * bool(self.n_cut_completions)
        if self.left_out:
            parts.append(f"left out: {_told(self.left_out)}")
        return f"{self.source}: {'; '.join(parts)}"


def read_pairs(path: str | Path, tokenizer: Tokenizer, length: int) -> TokenizedPairs:
    """Read and tokenise a file of JSON lines, which may be gzipped, and hold out about one prompt in twenty, by its hash.

    Lines that are no pairs are left out and counted. Where a pair is too long its prompt is cut on the left, in both rows
    alike; where one token of it is too much, completions are cut on the right.

    Args:
        tokenizer: of the model.
        length: steps of a row at most, one less than its tokens.

    Raises:
        ValueError: no such file, no pair in it, or all pairs have one prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"pairs must be a file of JSON lines, {path} is none")
    left_out, keys, pairs = LeftOut(), [], []
    n_cut_prompts = n_cut_completions = 0
    for name, values in json_lines(path, path.name, left_out):
        reason = _fault(values, tokenizer)
        if reason is not None:
            left_out.note(reason, name)
            continue
        whole = _tokens(values, tokenizer)
        pair = _cut(whole, length + 1)
        if pair.chosen == pair.rejected:
            left_out.note("pairs whose completions are the same", name)
            continue
        n_cut_prompts += pair.prompt != whole.prompt
        n_cut_completions += pair[1:] != whole[1:]
        keys.append(rank_of(values["prompt"]))
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"pairs must hold a pair on each line, {path} holds none: {_told(left_out) or 'nothing there'}")
    if len(set(keys)) == 1:
        raise ValueError(f"pairs must have two prompts or more, of which one is held out, {path} has one")
    limit = held_out_below(min(keys), max(keys))
    train, held_out = (
        [pair for key, pair in zip(keys, pairs, strict=True) if (key < limit) == below] for below in (False, True)
    )
    return TokenizedPairs(str(path), train, held_out, left_out, n_cut_prompts, n_cut_completions)


def write_pairs(path: str | Path, pairs: Sequence[Pair], tokenizer: Tokenizer) -> None:
    """Write pairs that have been cut out of tokens as ``read_pairs`` reads them, with their texts for people to read."""
    lines = []
    for pair in pairs:
        texts = {field: tokenizer.decode(torch.tensor(ids)) for field, ids in zip(FIELDS, pair, strict=True)}
        ids = dict(zip(ID_FIELDS, pair, strict=True))
        lines.append(json.dumps({**texts, **ids, "tokenizer": tokenizer.hash}) + "\n")
    write_files({Path(path): text_writer("".join(lines))})


def hash_pairs(pairs: Sequence[Pair]) -> str:
    """Of all tokens and of their order."""
    return hash_texts(*(str(tuple(pair)) for pair in pairs))


def _fault(values: Any, tokenizer: Tokenizer) -> str | None:
    """Why a line is no pair; None: it is one."""
    texts = [values.get(field) for field in FIELDS] if isinstance(values, dict) else []
    if any(isinstance(text, list) for text in texts):
        return "lines with messages instead of texts: no chat template is applied here"
    if not texts or not all(isinstance(text, str) for text in texts):
        return f"lines without texts in {', '.join(FIELDS)}"
    if not all(map(is_unicode, texts)):
        return HALF_A_PAIR
    ids = [values.get(field) for field in ID_FIELDS]
    if all(tokens is None for tokens in ids):
        return None if texts[1].strip() and texts[2].strip() else "pairs with an empty completion"
    if values.get("tokenizer") != tokenizer.hash:
        return "lines with tokens of another tokenizer"
    if not all(_are_tokens(tokens, tokenizer.vocab_size) for tokens in ids):
        return f"lines without tokens in {', '.join(ID_FIELDS)}"
    return None


def _are_tokens(values: Any, vocab_size: int) -> bool:
    return isinstance(values, list) and bool(values) and all(type(i) is int and 0 <= i < vocab_size for i in values)


def _tokens(values: dict[str, Any], tokenizer: Tokenizer) -> Pair:
    if values.get(ID_FIELDS[0]) is not None:
        return Pair(*(values[field] for field in ID_FIELDS))
    prompt, chosen, rejected = (tokenizer.encode(values[field]).tolist() for field in FIELDS)
    end = tokenizer.end_of_document
    return Pair([end, *prompt], [*chosen, end], [*rejected, end])


def _cut(pair: Pair, n_tokens: int) -> Pair:
    """A pair whose rows have at most ``n_tokens`` >= 2 tokens, one or more of the prompt."""
    room = n_tokens - max(len(pair.chosen), len(pair.rejected))
    return Pair(pair.prompt[-max(1, room) :], pair.chosen[: n_tokens - 1], pair.rejected[: n_tokens - 1])


def _told(left_out: LeftOut) -> str:
    return ", ".join(f"{count} {reason} ({shown(left_out.names[reason])})" for reason, count in sorted(left_out.items()))
