"""Text continued by a model from a folder: one prompt as a stream of text, or many prompts in batches (``smt generate``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from smt.baselines import architecture_of
from smt.data.tokenizer import TOKENIZER_FILE, Tokenizer
from smt.hymba.model import Hymba
from smt.model.checkpoint import CONFIG_FILE
from smt.model.generation import check_sampling
from smt.model.transformer import StrideMemoryTransformer
from smt.pretrained.sources import HF_CONFIG_FILE
from smt.runtime.fields import check_seed
from smt.runtime.precision import precision

REPLACEMENT = "\ufffd"  # stands for bytes that are no character, or not yet one
# Tokens held back while their last bytes are not a character; longer than any character, a broken one may not hold up the text.
_MOST_HELD = 16


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: see ``smt.model.generation.stream``; ``seed`` is that of the whole command.

    Raises:
        ValueError: a field out of range.
    """

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int

    def __post_init__(self) -> None:
        check_sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p)
        check_seed("seed", self.seed)


class Continuer:
    """A model with its tokenizer. Every prompt is the beginning of a document, and the end of the document ends it."""

    def __init__(self, model: StrideMemoryTransformer | Hymba, tokenizer: Tokenizer, sampling: Sampling) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            sizes = f"{tokenizer.vocab_size} tokens, the model {model.config.vocab_size}"
            raise ValueError(f"the tokenizer in the folder is not the model's: it has {sizes}")
        self._model, self._tokenizer, self._end = model, tokenizer, tokenizer.end_of_document
        self._device = model.embedding.weight.device
        self._options = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
            "eos_token_id": self._end,
            "generator": torch.Generator(self._device).manual_seed(sampling.seed),
        }

    def stream(self, prompt: str) -> Iterator[str]:
        """The continuation, piece by piece, as it is drawn."""
        encoded = self._encoded(prompt)
        return text_of(self._tokenizer, (tokens[0] for tokens in self._drawn([encoded])), encoded)

    def batch(self, prompts: Sequence[str]) -> list[str]:
        """The continuations of prompts that run together."""
        encoded = [self._encoded(prompt) for prompt in prompts]
        columns = list(self._drawn(encoded))
        rows = [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in prompts]
        return ["".join(text_of(self._tokenizer, *both)) for both in zip(rows, encoded, strict=True)]

    def _encoded(self, prompt: str) -> list[int]:
        return self._tokenizer.encode(prompt).tolist()

    def _drawn(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """The next token of every row, again and again."""
        encoded = [[self._end, *prompt] for prompt in prompts]
        longest = max(map(len, encoded))
        ids = torch.tensor([[self._end] * (longest - len(row)) + row for row in encoded], device=self._device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded], device=self._device)
        drawn = self._model.stream(ids, attention_mask=mask, **self._options)
        while True:
            with precision(self._device):  # and not around the yield: between two tokens the caller computes as it likes
                tokens = next(drawn, None)
            if tokens is None:
                return
            yield tokens.tolist()

    @classmethod
    def from_folder(cls, folder: str | Path, sampling: Sampling, device: torch.device) -> Continuer:
        """Load what a training run, ``save_pretrained`` of either class of model or ``smt convert`` left.

        Raises:
            ValueError: a file that is missing or damaged, or a model that does not decode by itself.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"model must be the folder of a run or a checkpoint, {folder} is not a folder")
        if not (folder / TOKENIZER_FILE).is_file():
            raise ValueError(f"there is no tokenizer in {folder}: {TOKENIZER_FILE} is missing")
        if not (folder / CONFIG_FILE).is_file() and (folder / HF_CONFIG_FILE).is_file():
            from smt.huggingface.model import SMTForCausalLM

            model = SMTForCausalLM.from_pretrained(folder).model.to(device)
        else:
            architecture = architecture_of(folder)
            if architecture == "smt":
                model = StrideMemoryTransformer.from_pretrained(folder, device=device)
            elif architecture == "hymba":
                model = Hymba.from_pretrained(folder, device=device)
            else:
                raise ValueError(f"model must be of architecture smt or hymba, {folder} is of {architecture}")
        return cls(model, Tokenizer.pretrained(folder), sampling)


def text_of(tokenizer: Tokenizer, tokens: Iterable[int], prompt: Sequence[int] = ()) -> Iterator[str]:
    """The text of tokens up to an end of the document, as soon as its characters are whole: one may take several tokens.

    Args:
        prompt: the tokens that they follow. Many tokenizers write a token with a space before it, except where a text begins.
    """
    before = list(prompt[-_MOST_HELD:])
    held: list[int] = []
    for token in tokens:
        if token == tokenizer.end_of_document:
            break
        held.append(token)
        text = tokenizer.decode(torch.tensor(held), after=torch.tensor(before))
        if text and (not text.endswith(REPLACEMENT) or len(held) == _MOST_HELD):
            yield text
            before, held = held, []
    if held:
        yield tokenizer.decode(torch.tensor(held), after=torch.tensor(before))
