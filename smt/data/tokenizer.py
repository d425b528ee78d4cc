"""Text to tokens: byte-pair encoding or unigram pieces trained on the corpus, GPT-2's, or any tokenizer of Hugging Face."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from smt.data.documents import Document
from smt.runtime.extras import needs_extra
from smt.runtime.files import read_json, text_writer, write_files
from smt.runtime.hub import cached_first

if TYPE_CHECKING:
    import tokenizers
    from torch import Tensor

END_OF_DOCUMENT = "<|end_of_document|>"
GPT2_END = "<|endoftext|>"
N_BYTES = 256
TRAINED = ("bpe", "unigram")
TOKENIZER_FILES = TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
# GPT-2's tokens and merges, as Hugging Face names the two files and as they were first published.
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
# Characters encoded side by side: enough for every core, few enough for their encodings to fit into memory.
_ENCODED_TOGETHER = 2**22
# Training goes through a piece between two spaces once for each merge in it: text without spaces would take quadratic time.
# No word, and no line of equals signs, is as long.
LONGEST_PIECE = 256


class TokenizedDocument(NamedTuple):
    """A document, its tokens, and which of them the loss counts; None: all but the first."""

    document: Document
    tokens: list[int]
    counted: list[bool] | None


class Tokenizer:
    """Text to tokens and back.

    Attributes:
        end_of_document: the token that separates documents; text never contains it, even where it spells its name.
        end_name: how that token is spelled.
    """

    def __init__(self, serialised: str, end_name: str = END_OF_DOCUMENT) -> None:
        with needs_extra("train"):
            from tokenizers import Tokenizer as Backend
        # Always made from its text, which ``save`` writes and ``hash`` reads: a second text of the same unigram model would
        # differ in the last digits of its scores.
        try:
            tokenizer = Backend.from_str(serialised)
        except Exception as error:  # the library has no type of its own
            raise ValueError(f"the tokenizer is damaged, or of a kind that cannot be read: {error}") from error
        end = tokenizer.token_to_id(end_name)
        if end is None:
            raise ValueError(f"the tokenizer must have the token {end_name!r}")
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._serialised = serialised
        self._tokenizer = tokenizer
        self.end_of_document = end
        self.end_name = end_name
        self._vocab_size = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps

    @classmethod
    def train(cls, documents: Iterable[Document], vocab_size: int, kind: str = "bpe") -> Tokenizer:
        """Learn ``vocab_size`` tokens: the end of a document, the 256 bytes, and pieces of text. Every string has an encoding.

        Args:
            documents: read once.
            vocab_size: tokens at most.
            kind: ``bpe``, the most frequent merges (Sennrich et al., 2016, arXiv:1508.07909); or ``unigram``, the pieces
                under which the text is most likely (Kudo, 2018, arXiv:1804.10959).

        Raises:
            ValueError: ``vocab_size`` has no room for the bytes, or there is no such kind.
        """
        if kind not in TRAINED:
            raise ValueError(f"kind must be one of {', '.join(TRAINED)}, got {kind!r}")
        if vocab_size <= N_BYTES:
            raise ValueError(f"vocab_size must be at least {N_BYTES + 1} for byte-level tokens, got {vocab_size}")
        with needs_extra("train"):
            from tokenizers import Regex, models, pre_tokenizers, trainers

        options = {
            "vocab_size": vocab_size,
            "special_tokens": [END_OF_DOCUMENT],
            "initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet()),
            "show_progress": False,
        }
        trainer = trainers.BpeTrainer(**options) if kind == "bpe" else trainers.UnigramTrainer(**options)
        backend = _byte_level(models.BPE() if kind == "bpe" else models.Unigram())
        bounded = pre_tokenizers.Split(Regex(f".{{1,{LONGEST_PIECE}}}"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([backend.pre_tokenizer, bounded])
        backend.train_from_iterator((document.text for document in documents), trainer)
        return cls(backend.to_str())

    @classmethod
    def pretrained(cls, source: str | Path) -> Tokenizer:
        """Any tokenizer of Hugging Face, or GPT-2's.

        Args:
            source: a folder with ``tokenizer.json``, and mostly ``tokenizer_config.json`` (what ``save`` writes), with GPT-2's
                two files, or with another format that ``transformers`` reads; or a name on the Hub.

        Raises:
            ValueError: it is not there, cannot be reached, or has no token that ends a text; the message says what was tried.
        """
        folder = Path(source)
        with needs_extra("train"):
            from tokenizers import models
        if (folder / TOKENIZER_FILE).is_file():
            settings = read_json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
            ends = [settings.get(name) for name in ("eos_token", "sep_token")]
            read_json(folder / TOKENIZER_FILE)  # names the file where it is damaged
            serialised = (folder / TOKENIZER_FILE).read_text(encoding="utf-8")
            end = _end([end["content"] if isinstance(end, dict) else end for end in ends], serialised, source)
            try:
                return cls(serialised, end)
            except ValueError as error:
                raise ValueError(f"{folder / TOKENIZER_FILE}: {error}") from error
        for vocabulary, merges in GPT2_FILES:
            if (folder / vocabulary).is_file() and (folder / merges).is_file():
                backend = _byte_level(models.BPE.from_file(str(folder / vocabulary), str(folder / merges)))
                backend.add_special_tokens([GPT2_END])
                return cls(backend.to_str(), GPT2_END)
        return cls(*_from_transformers(source))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: no such files.
        """
        for name in TOKENIZER_FILES:
            if not (Path(folder) / name).is_file():
                raise FileNotFoundError(f"no tokenizer in {folder}: there is no {name}")
        return cls.pretrained(folder)

    def save(self, folder: str | Path) -> None:
        """Write two files into a folder, from which ``transformers.AutoTokenizer`` reads the tokenizer too."""
        ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), self.end_name)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **ends, "padding_side": "left"}
        texts = {TOKENIZER_FILE: self._serialised, SETTINGS_FILE: json.dumps(settings, indent=2) + "\n"}
        write_files({Path(folder) / name: text_writer(text) for name, text in texts.items()})

    @property
    def hash(self) -> str:
        """Another one wherever any text could have other tokens."""
        return hashlib.sha256(f"{self.end_of_document} {self._serialised}".encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """The largest token plus one; of a trained one at most what was asked for, less where the text has no more pairs."""
        return self._vocab_size

    def token(self, name: str) -> int | None:
        """The token that is spelled ``name``; None: there is none."""
        return self._tokenizer.token_to_id(name)

    def encode(self, text: str) -> Tensor:
        """Text -> (L,) int64, without special tokens."""
        import torch

        return torch.tensor(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64, device="cpu")

    def encode_documents(self, documents: Iterable[Document]) -> Iterator[TokenizedDocument]:
        """Each document with its L + 2 tokens: its text's between two ends of documents, so that the first is predicted too."""
        end = self.end_of_document
        for together in _groups(documents):
            # Where a token's characters are takes longer to find, and matters only to documents that name their targets.
            whole = all(document.targets is None for document in together)
            encode = self._tokenizer.encode_batch_fast if whole else self._tokenizer.encode_batch
            encodings = encode([document.text for document in together], add_special_tokens=False)
            for document, encoding in zip(together, encodings, strict=True):
                counted = None if document.targets is None else [False, *_within(encoding.offsets, document.targets), False]
                yield TokenizedDocument(document, [end, *encoding.ids, end], counted)

    def decode(self, tokens: Tensor, after: Tensor | None = None) -> str:
        """(L,) tokens -> text; ends of documents are spelled out, bytes that are not UTF-8 become replacement characters.

        Args:
            after: the tokens before them. Many tokenizers put a space before a token, except where a text begins.
        """
        before = [] if after is None else after.tolist()
        text, known = (self._tokenizer.decode(ids, skip_special_tokens=False) for ids in ([*before, *tokens.tolist()], before))
        return text[len(known) :]


def _within(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which pieces, each from one character up to another, have a character in one of the spans."""
    return [any(start < last and first < stop for first, last in spans) for start, stop in offsets]


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    n_characters = 0
    for document in documents:
        group.append(document)
        n_characters += len(document.text)
        if n_characters >= _ENCODED_TOGETHER:
            yield group
            group, n_characters = [], 0
    if group:
        yield group


def _byte_level(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, pre_tokenizers

    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _from_transformers(source: str | Path) -> tuple[str, str]:
    with needs_extra("train"):
        from transformers import AutoTokenizer
    loaded = cached_first(
        lambda local: AutoTokenizer.from_pretrained(str(source), local_files_only=local),
        f"tokenizer must be {', '.join(TRAINED)}, a folder with a tokenizer, or a name on the Hugging Face Hub, got "
        f"{str(source)!r}: no such folder holds one, and",
    )
    if not loaded.is_fast:
        raise ValueError(f"tokenizer {str(source)!r} must have a form that the tokenizers library runs, it has none")
    if not loaded.encode("a", add_special_tokens=False):  # what transformers makes of a folder with a model alone
        raise ValueError(f"tokenizer {str(source)!r} must be a folder with a tokenizer's files, that one knows no letter")
    serialised = loaded.backend_tokenizer.to_str()
    return serialised, _end([loaded.eos_token, loaded.sep_token], serialised, source)


def _end(names: list[str | None], serialised: str, source: str | Path) -> str:
    """The first name that is one; else GPT-2's, whose settings on the Hub leave to its class to know it."""
    for name in names:
        if name:
            return name
    if any(token["content"] == GPT2_END for token in json.loads(serialised).get("added_tokens") or ()):
        return GPT2_END
    raise ValueError(
        f"tokenizer {str(source)!r} needs an eos_token, a sep_token or {GPT2_END} to end documents with, it has none of them"
    )
