"""What a run is: the model, the data and the training, each a dataclass; one YAML file, every field overridable by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from smt.config import SMTConfig
from smt.data.settings import DataConfig
from smt.fields import check_at_least, check_names, check_types, nearest, parse
from smt.model import PARTS as MODEL_PARTS

CONFIG_FOLDER = Path(__file__).parent.parent / "configs"
LR_SCHEDULES = ("cosine", "linear", "constant")
DEVICES = ("auto", "cpu", "cuda")
BEGINNINGS = ("checkpoint", "gpt2", "mamba")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimiser and its bounds.

    Args:
        minutes: wall-clock bound of the whole command, evaluation and sample included; the schedule follows the clock.
        steps: bound in optimiser steps instead, which makes a run repeatable; None: the clock decides.
        learning_rate: of AdamW at its peak.
        learning_rates: peaks of single parts of the model (embedding, transformer, attention_pooling, ssm) in its stead.
        freeze: parts of the model that are not trained.
        init_from: where weights come from: ``gpt2`` and ``mamba`` (a folder or a hub name), or a ``checkpoint`` (a folder).
        match_scale: of a ``mamba`` in ``init_from``: give the memory's output the scale of the embedding.
        beta_1, beta_2: of AdamW.
        weight_decay: on the weights of projections and convolutions alone.
        warmup: share of the run in which the learning rate rises.
        lr_schedule: how it falls afterwards: ``cosine`` or ``linear`` to 0, or ``constant``.
        clip: largest norm of the gradient.
        evaluations: how often the held-out documents are evaluated, evenly over the run, though never twice at one step;
            the last time is at its end.
        seed: of the weights, the order of documents and the sample.
        device: ``cpu``, ``cuda``, or ``auto``: CUDA where there is a GPU, then in bfloat16 autocast.
        sample_tokens: length of the sample at the end.
    """

    minutes: float = 4.5
    steps: int | None = None
    learning_rate: float = 2e-3
    learning_rates: dict[str, float] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    init_from: dict[str, str] = field(default_factory=dict)
    match_scale: bool = False
    beta_1: float = 0.9
    beta_2: float = 0.95
    weight_decay: float = 0.1
    warmup: float = 0.05
    lr_schedule: str = "cosine"
    clip: float = 1.0
    evaluations: int = 2
    seed: int = 42
    device: str = "auto"
    sample_tokens: int = 160

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("minutes", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("beta_1", "beta_2", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        for name in ("learning_rates", "freeze"):
            check_names(name, getattr(self, name), MODEL_PARTS)
        for name, rate in self.learning_rates.items():
            if not rate > 0:
                raise ValueError(f"learning_rates of {name} must be above 0, got {rate}; freeze={name} stops its training")
        if set(self.freeze) == set(MODEL_PARTS):
            raise ValueError("freeze must leave a part of the model to train, got all of them")
        check_names("init_from", self.init_from, BEGINNINGS)
        if "checkpoint" in self.init_from and len(self.init_from) > 1:
            raise ValueError(f"init_from must be a checkpoint, which is a whole model, or gpt2 and mamba, got {self.init_from}")
        if self.match_scale and "mamba" not in self.init_from:
            raise ValueError(f"match_scale needs a mamba in init_from, got {self.init_from}")
        check_at_least(self, 1, "steps", "evaluations")
        check_at_least(self, 0, "seed", "sample_tokens")
        for name, allowed in (("lr_schedule", LR_SCHEDULES), ("device", DEVICES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Field names are unique across its three parts, so that an override needs no prefix."""

    experiment: str
    model: SMTConfig
    data: DataConfig
    training: TrainingConfig

    @classmethod
    def from_dict(cls, values: dict[str, Any], overrides: dict[str, Any] | None = None) -> RunConfig:
        """Build from ``{experiment, model: {...}, data: {...}, training: {...}}`` with single fields overridden by name.

        Raises:
            ValueError: an unknown part or field, with the nearest name, or a value out of range.
            TypeError: a value of the wrong type.
        """
        for name, value in values.items():
            if name not in ("experiment", *PARTS):
                raise ValueError(f"a run has no part {name!r}; did you mean {nearest(name, ('experiment', *PARTS))!r}?")
            if name in PARTS and not isinstance(value, dict):
                raise ValueError(f"{name} must be a mapping of fields, got {value!r}")
        parts = {part: dict(values.get(part, {})) for part in PARTS}
        experiment = values.get("experiment", "run")
        for name, value in (overrides or {}).items():
            if name == "experiment":
                experiment = value
            else:
                parts[part_of(name)][name] = value
        for part, settings in PARTS.items():
            known = [field.name for field in fields(settings)]
            for name in parts[part]:
                if name not in known:
                    raise ValueError(f"{part} has no field {name!r}; did you mean {nearest(name, known)!r}?")
        if not isinstance(experiment, str) or not experiment or experiment != Path(experiment).name:
            raise ValueError(f"experiment must be the name of a folder, got {experiment!r}")
        built = {
            part: settings(**{name: parse(settings, name, value) for name, value in parts[part].items()})
            for part, settings in PARTS.items()
        }
        return cls(experiment=experiment, **built)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
        """Read a YAML file, or the packaged example of that name.

        Raises:
            ValueError: no such file, not a mapping, or as ``from_dict``.
        """
        packaged = CONFIG_FOLDER / f"{path}.yaml"
        file = packaged if packaged.is_file() else Path(path)
        if not file.is_file():
            names = ", ".join(sorted(example.stem for example in CONFIG_FOLDER.glob("*.yaml")))
            raise ValueError(f"config must be a YAML file or one of the examples ({names}), got {str(path)!r}")
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file} must hold a mapping with {', '.join(PARTS)}, got {type(values).__name__}")
        return cls.from_dict(values, overrides)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as ``from_dict`` takes them."""
        return {"experiment": self.experiment, **{part: asdict(getattr(self, part)) for part in PARTS}}

    def to_yaml(self, path: str | Path) -> None:
        """Write all fields as YAML."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


PARTS: dict[str, type] = {"model": SMTConfig, "data": DataConfig, "training": TrainingConfig}


def part_of(name: str) -> str:
    """The part of a run that has the field ``name``.

    Raises:
        ValueError: none has; the message gives the nearest name.
    """
    owners = {field.name: part for part, settings in PARTS.items() for field in fields(settings)}
    if name not in owners:
        raise ValueError(f"there is no setting {name!r}; did you mean {nearest(name, owners)!r}?")
    return owners[name]
