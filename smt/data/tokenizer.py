"""Byte-level byte-pair encoding, trained on the training documents and saved with the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smt.data.documents import Document
from smt.extras import needs_extra

if TYPE_CHECKING:
    import tokenizers

END_OF_DOCUMENT = "<|end_of_document|>"
PRETRAINED_END = "<|endoftext|>"  # of GPT-2 and of GPT-NeoX, whose vocabulary Mamba has
N_BYTES = 256


class Tokenizer:
    """Text to tokens and back. Every string has an encoding: the 256 bytes are tokens.

    Attributes:
        end_of_document: the token that separates documents; text never contains it, even where it spells its name.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        ends = [tokenizer.token_to_id(name) for name in (END_OF_DOCUMENT, PRETRAINED_END)]
        end = next((token for token in ends if token is not None), None)
        if end is None:
            raise ValueError(f"the tokenizer must have the token {END_OF_DOCUMENT!r} or {PRETRAINED_END!r}")
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.end_of_document = end

    @classmethod
    def train(cls, documents: list[Document], vocab_size: int) -> Tokenizer:
        """Learn ``vocab_size`` tokens: the end of a document, the 256 bytes, and the most frequent merges.

        Raises:
            ValueError: ``vocab_size`` has no room for the bytes.
        """
        if vocab_size <= N_BYTES:
            raise ValueError(f"vocab_size must be at least {N_BYTES + 1} for byte-level tokens, got {vocab_size}")
        with needs_extra("train"):
            from tokenizers import Tokenizer as Backend
            from tokenizers import decoders, models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator((document.text for document in documents), trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        with needs_extra("train"):
            from tokenizers import Tokenizer as Backend

        return cls(Backend.from_file(str(path)))

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON."""
        self._tokenizer.save(str(path))

    @property
    def vocab_size(self) -> int:
        """Tokens; at most what was asked for, fewer where the text has no more pairs to merge."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> Tensor:
        """Text -> (L,) int64."""
        return torch.tensor(self._tokenizer.encode(text).ids, dtype=torch.int64)

    def encode_documents(self, documents: list[Document]) -> list[Tensor]:
        """Each document as (L + 2,) int64: its L tokens between two ends of documents, so that the first is predicted too."""
        encodings = self._tokenizer.encode_batch([document.text for document in documents])
        end = self.end_of_document
        return [torch.tensor([end, *encoding.ids, end], dtype=torch.int64) for encoding in encodings]

    def decode(self, tokens: Tensor) -> str:
        """(L,) tokens -> text; ends of documents are spelled out, bytes that are not UTF-8 become replacement characters."""
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
