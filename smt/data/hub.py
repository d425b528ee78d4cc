"""Data sets of the Hugging Face Hub through ``datasets``: by name, from its cache, or from a local copy."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smt.data.documents import Corpus, Document, Documents, LeftOut, hash_texts, hold_out
from smt.runtime.extras import needs_extra

if TYPE_CHECKING:
    import datasets

# The rows of a split -> its documents; counts what it leaves out.
ToDocuments = Callable[["datasets.Dataset", LeftOut], Iterator[Document]]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class HubDataset:
    """A published data set.

    Attributes:
        name: on the Hub.
        to_documents: makes documents of the rows of a split.
        way: in which it does, in words: the same rows read in another way are other documents.
        config: which of its configurations.
        files: the layout in which it was first published, as a pattern per split, with the options to read it as text.
    """

    name: str
    to_documents: ToDocuments
    way: str
    config: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def read(self, dataset: str | None = None) -> Corpus:
        """The splits as documents; where there is no validation split, documents are held out by name.

        Args:
            dataset: another name on the Hub, or a local copy: a folder that ``save_to_disk`` wrote, one that
                ``load_dataset`` reads, or one in the layout of ``files``; None: ``name``.

        Raises:
            MissingExtraError: ``datasets`` is not installed.
            ValueError: the data set is not there or cannot be reached; the message says what was tried.
        """
        dataset = self.name if dataset is None else dataset
        with needs_extra("train"):
            import datasets  # noqa: F401
        splits = self._load_local(Path(dataset)) if Path(dataset).exists() else self._load_from_hub(dataset)
        source = dataset if self.config is None else f"{dataset} ({self.config})"
        if "train" not in splits:
            raise ValueError(f"dataset must have a split 'train', {source} has {', '.join(splits)}")
        if "validation" not in splits:
            return hold_out(source, partial(self.to_documents, splits["train"]))
        # The fingerprint is what ``datasets`` knows its own cached files by: no need to read gigabytes to name them.
        parts = {
            name: Documents(partial(self.to_documents, splits[name]), hash_texts(splits[name]._fingerprint, self.way))
            for name in SPLITS
            if name in splits
        }
        return Corpus(source, **parts)

    def _load_local(self, folder: Path) -> dict[str, datasets.Dataset]:
        import datasets

        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
            return loaded if isinstance(loaded, dict) else {"train": loaded}
        folder = folder.resolve()
        files = {name: sorted(glob.escape(str(path)) for path in folder.glob(pattern)) for name, pattern in self.files.items()}
        files = {name: found for name, found in files.items() if found}
        if "train" in files:
            return datasets.load_dataset("text", data_files=files, encoding="utf-8-sig", **self.options)
        if glob.has_magic(str(folder)):
            return _load_literally(
                folder if self.config is None or not (folder / self.config).is_dir() else folder / self.config
            )
        configs = datasets.get_dataset_config_names(str(folder))
        if self.config is not None and self.config not in configs and (folder / self.config).is_dir():
            return datasets.load_dataset(str(folder / self.config))
        return datasets.load_dataset(str(folder), self.config if self.config in configs else None)

    def _load_from_hub(self, dataset: str) -> dict[str, datasets.Dataset]:
        import datasets

        try:
            return datasets.load_dataset(dataset, self.config)
        except Exception as error:  # of whichever library was at work; each becomes the same advice
            which = f"{dataset!r}" if self.config is None else f"{dataset!r}, configuration {self.config!r}"
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"no data set {which}: there is no local folder of that name, and neither the Hugging Face Hub nor the cache "
                f"of earlier downloads ({datasets.config.HF_DATASETS_CACHE}) gave it ({type(error).__name__}: {reason}). With "
                "a network it is downloaded once; without, name a local copy with --dataset PATH, or train on text that is "
                "here: --source stdlib, or --text PATH"
            ) from error


def _load_literally(folder: Path) -> dict[str, datasets.Dataset]:
    """The data files of a folder, which ``datasets`` would take for a pattern."""
    import datasets
    from datasets.data_files import get_data_patterns

    literal = glob.escape(folder.as_posix())
    files = {str(split): [f"{literal}/{name}" for name in names] for split, names in get_data_patterns(literal).items()}
    return datasets.load_dataset(str(folder), data_files=files)


def column(rows: datasets.Dataset, name: str) -> Iterator[str]:
    """One column of text, a few hundred rows in memory at a time: a row may be a book.

    Raises:
        ValueError: no such column.
    """
    if name not in rows.column_names:
        raise ValueError(f"text_field must be a column of the data set ({', '.join(rows.column_names)}), got {name!r}")
    for batch in rows.select_columns(name).iter(256):
        yield from batch[name]
