"""A pretrained model as configuration and named tensors, wherever it is: an object, a local folder, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smt.data.tokenizer import TOKENIZER_FILES
from smt.runtime.extras import needs_extra
from smt.runtime.files import read_json, read_safetensors

HF_CONFIG_FILE = "config.json"
# In the order of preference; an index names the files that hold the parts of a large model.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Source:
    """What a pretrained model is made of.

    Attributes:
        origin: where it came from, for messages.
        config: the fields of its configuration.
        tensors: its weights by their own names.
        tokenizer: its ``tokenizer.json``, with ``tokenizer_config.json`` beside it where there is one; None where it has none.
    """

    origin: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer: Path | None = None


def open_source(source: Any) -> Source:
    """Read a pretrained model.

    Args:
        source: a model object with its ``config``; a local folder with ``config.json`` and safetensors or PyTorch weights; or
            the name of such a folder on the hub.

    Raises:
        TypeError: something else.
        ValueError: no such folder or name, a file that is missing or cannot be read, or no connection to the hub.
        MissingExtraError: a hub name without ``huggingface_hub``.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, nn.Module) and hasattr(source, "config"):
        return Source(f"a {type(source).__name__}", _fields(source.config), source.state_dict())
    if not isinstance(source, str | Path):
        kinds = "a model with a config, a local folder or a hub name"
        raise TypeError(f"source must be {kinds}, got {type(source).__name__}")
    folder = Path(source)
    if folder.is_dir():
        return _read(str(source), lambda name: folder / name if (folder / name).is_file() else None, lambda: "")
    if folder.is_file():
        raise ValueError(f"source must be a folder with config.json and weights, {source} is a file")
    if isinstance(source, Path) or source.startswith((".", "/", "~")):
        raise ValueError(f"source must be a folder or a hub name like openai-community/gpt2, {source} does not exist")
    hub = _Hub(source)
    return _read(f"{source} of the hub", hub, hub.explain)


class _Hub:
    """Files of one model on the hub: from its local cache, else fetched, unless the hub was found out of reach before."""

    def __init__(self, name: str) -> None:
        with needs_extra("pretrained"):
            import huggingface_hub  # noqa: F401
        self.name, self.unreachable = name, ""

    def __call__(self, file: str) -> Path | None:
        from huggingface_hub import errors, hf_hub_download

        for local in (True,) if self.unreachable else (True, False):
            try:
                return Path(hf_hub_download(self.name, file, local_files_only=local))
            except errors.LocalEntryNotFoundError as error:
                if not local:
                    self.unreachable = str(error.__cause__ or error).splitlines()[0]
            except errors.EntryNotFoundError:
                pass
            except (errors.HfHubHTTPError, errors.HFValidationError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"there is no folder {self.name!r} here, and the hub says: {reason}") from error
        return None

    def explain(self) -> str:
        if not self.unreachable:
            return ""
        from huggingface_hub.constants import HF_HUB_CACHE

        return (
            f"; tried a folder of that name, the cache {HF_HUB_CACHE} and the hub, which cannot be reached ({self.unreachable})"
        )


def _read(origin: str, find: Callable[[str], Path | None], explain: Callable[[], str]) -> Source:
    """The files of a model; ``find`` gives a file's path or None, ``explain`` why there may be none."""
    path = find(HF_CONFIG_FILE)
    if path is None:
        raise ValueError(f"{origin} has no config.json{explain()}")
    config = read_json(path)
    for name in WEIGHT_FILES:
        path = find(name)
        if path is not None:
            break
    else:
        raise ValueError(f"{origin} has none of {', '.join(WEIGHT_FILES)}{explain()}")
    if path.suffix != ".json":
        return Source(origin, config, _tensors(path), _tokenizer(find))
    tensors: dict[str, Tensor] = {}
    parts = read_json(path).get("weight_map", {})
    for part in sorted(set(parts.values())):
        found = find(part)
        if found is None:
            raise ValueError(f"{origin} has no {part}, which {path.name} names{explain()}")
        tensors.update(_tensors(found))
    lacking = sorted(set(parts) - set(tensors))
    if lacking:
        raise ValueError(f"{origin} lacks {lacking[0]}, which {path.name} names in {parts[lacking[0]]}")
    return Source(origin, config, tensors, _tokenizer(find))


def _tokenizer(find: Callable[[str], Path | None]) -> Path | None:
    path, _ = (find(name) for name in TOKENIZER_FILES)
    return path


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch each have their own
        raise ValueError(f"{path} is damaged or holds more than tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} must hold tensors by name, got {type(tensors).__name__}")
    return tensors


def _fields(config: Any) -> dict[str, Any]:
    if hasattr(config, "to_dict"):
        return config.to_dict()
    return asdict(config) if is_dataclass(config) else dict(vars(config))
