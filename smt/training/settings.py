"""What a run is: the model, the data and the training, each a dataclass; one YAML file, every field overridable by name."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml

from smt.baselines.architectures import CONFIGS
from smt.config import SMTConfig
from smt.data.settings import DataConfig
from smt.data.sources import READ_A_DATASET
from smt.data.tokenizer import TRAINED
from smt.hymba.config import HymbaConfig
from smt.model.transformer import PARTS as MODEL_PARTS
from smt.pretrained.loading import GPT2_ENCODING
from smt.runtime.device import compiler_is_missing
from smt.runtime.fields import (
    check_above,
    check_at_least,
    check_choice,
    check_fields,
    check_folder_name,
    check_fraction,
    check_seed,
    expand_home,
    nearest,
    parse,
)
from smt.runtime.files import packaged_or_file, read_yaml

CONFIG_FOLDER = Path(__file__).parent.parent / "configs"
# Compiling takes up to a minute or two, and saves a few hundredths of a second of each step.
LEAST_STEPS_TO_COMPILE, LEAST_MINUTES_TO_COMPILE = 1000, 4


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What is trained, the optimiser and its bounds.

    Args:
        stage: ``pretrain`` on documents, or ``orpo`` on the preference pairs of ``pairs`` (Hong et al., 2024,
            arXiv:2403.07691).
        orpo_lambda: in stage ``orpo``, weight of the odds ratio loss beside the loss of the chosen completion.
        minutes: wall-clock bound of the whole command, evaluation and sample included; the schedule follows the clock.
        steps: bound in optimiser steps instead, which makes a run repeatable; None: epochs or the clock decide.
        epochs: bound in passes over the training documents instead.
        learning_rate: of AdamW at its peak.
        learning_rates: peaks for single parts of the model, which replace it there.
        freeze: parts of the model that are not trained.
        init_from: where weights come from: ``gpt2`` and ``mamba`` (a folder or a hub name), or a ``checkpoint`` (a folder).
            With GPT-2's, the encoding is ``stride`` if the configuration names none.
        match_scale: of a ``mamba`` in ``init_from``: give the memory's output the scale of the embedding.
        beta_1: AdamW's decay of the first moment.
        beta_2: AdamW's decay of the second moment.
        weight_decay: of AdamW, on the weights of projections and convolutions alone.
        warmup: share of the run in which the learning rate rises linearly.
        lr_schedule: the learning rate after warm-up: ``cosine`` or ``linear`` to 0, or ``constant``.
        clip: largest norm of the gradient, to which it is clipped.
        gradient_accumulation_steps: batches of each optimiser step.
        gradient_checkpointing: keep only the input of every decoder block and recompute the rest in the backward pass.
        compile: compile the model's layers before training: ``true``, ``false``, or ``auto``: on a GPU, unless the run is so
            short that it would gain nothing (``LEAST_STEPS_TO_COMPILE``, ``LEAST_MINUTES_TO_COMPILE``). ``graphs``: on a GPU
            record layers and memory as CUDA graphs besides, which takes a minute or more; then a step waits for the host no
            more (steps have been timed so, but no whole run has been seen to its end). Evaluations and the sample are not
            compiled.
        mixed_precision: ``no``, ``bf16`` or ``fp16`` autocast; ``auto``: bf16 on a GPU with bf16 tensor cores (Ampere and
            later), else none.
        evaluations: how many times the held-out documents are evaluated, evenly over the run, the last at its end; never
            twice at one step. In a run bounded by time only at its end, where all would leave less than half to train.
        eval_steps: steps between evaluations, instead of ``evaluations``.
        early_stopping_patience: end the run after this many evaluations without a lower loss; None: never.
        save_steps: steps between checkpoints from which the run can be resumed; there is one after every evaluation, too.
        save_total_limit: how many of these checkpoints are kept, the newest.
        report_to: trackers that losses and learning rates are logged to: ``wandb``, ``tensorboard``, ``trackio``.
        seed: of the weights, the order of documents and the sample.
        device: ``cpu``, ``cuda``, or ``auto``: CUDA where there is a GPU.
        sample_tokens: length of the sample that is generated at the end.
    """

    stage: str = "pretrain"
    orpo_lambda: float = 0.1
    minutes: float = 4.5
    steps: int | None = None
    epochs: int | None = None
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
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    compile: str = "auto"
    mixed_precision: str = "auto"
    evaluations: int = 2
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    save_steps: int = 500
    save_total_limit: int = 2
    report_to: tuple[str, ...] = ()
    seed: int = 42
    device: str = "auto"
    sample_tokens: int = 160

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "stage": ("pretrain", "orpo"),
        "learning_rates": tuple(MODEL_PARTS),
        "freeze": tuple(MODEL_PARTS),
        "init_from": ("checkpoint", "gpt2", "mamba"),
        "compile": ("auto", "true", "graphs", "false"),
        "lr_schedule": ("cosine", "linear", "constant"),
        "mixed_precision": ("auto", "no", "bf16", "fp16"),
        "report_to": ("wandb", "tensorboard", "trackio"),
        "device": ("auto", "cpu", "cuda"),
    }

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "init_from", {kind: expand_home(source) for kind, source in self.init_from.items()})
        check_above(self, 0, "minutes", "learning_rate", "clip")
        check_fraction(self, "beta_1", "beta_2", "warmup")
        check_at_least(self, 0, "weight_decay", "orpo_lambda")
        for name, rate in self.learning_rates.items():
            if not rate > 0:
                raise ValueError(f"learning_rates of {name} must be above 0, got {rate}; freeze={name} stops its training")
        if set(self.freeze) == set(MODEL_PARTS):
            raise ValueError("freeze must leave a part of the model to train, got all of them")
        if "checkpoint" in self.init_from and len(self.init_from) > 1:
            raise ValueError(f"init_from must be a checkpoint, which is a whole model, or gpt2 and mamba, got {self.init_from}")
        if self.match_scale and "mamba" not in self.init_from:
            raise ValueError(f"match_scale needs a mamba in init_from, got {self.init_from}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"a run has one bound, got steps = {self.steps} and epochs = {self.epochs}")
        counts = ("steps", "epochs", "gradient_accumulation_steps", "evaluations", "eval_steps", "early_stopping_patience")
        check_at_least(self, 1, *counts, "save_steps", "save_total_limit")
        check_at_least(self, 0, "sample_tokens")
        if self.compile == "graphs" and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "compile = graphs needs gradient_accumulation_steps = 1, got "
                f"{self.gradient_accumulation_steps}: a graph overwrites the gradients of the pass before"
            )
        if self.compile == "graphs" and self.gradient_checkpointing:
            raise ValueError(
                "compile = graphs cannot be with gradient_checkpointing: what is computed again overwrites a graph's"
            )
        check_seed("seed", self.seed)

    def compiles(self, device: torch.device) -> bool:
        """Whether a model is compiled that is trained on ``device``.

        Raises:
            ValueError: it must be, and cannot.
        """
        missing = compiler_is_missing(device)
        if missing and self.compile in ("true", "graphs"):
            raise ValueError(f"compile = {self.compile} is not possible: {missing}")
        if self.steps is not None:
            is_long = self.steps >= LEAST_STEPS_TO_COMPILE
        else:
            is_long = self.epochs is not None or self.minutes >= LEAST_MINUTES_TO_COMPILE
        return {"auto": device.type == "cuda" and is_long and not missing, "false": False}.get(self.compile, True)

    def compile_options(self) -> dict[str, str]:
        """Those of ``model.compile``."""
        return {"mode": "reduce-overhead"} if self.compile == "graphs" else {}

    def uncompiled(self, device: torch.device) -> AbstractContextManager[None]:
        """In it a model is not compiled for what has other shapes than training, which takes longer than it saves."""
        return torch.compiler.set_stance("force_eager") if self.compiles(device) else nullcontext()


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Field names are unique across its parts, so that an override needs no prefix.

    Attributes:
        experiment: the name of the folder of its runs.
        model, data, training: its three parts.
        architecture: ``smt``; or, to compare with, ``gpt2``: full attention to the last ``chunk_length`` tokens, with the sizes
            that ``model`` gives its decoder; or ``hymba``: attention and Mamba, with a ``model`` of its own. Neither carries
            anything from chunk to chunk.
    """

    experiment: str
    model: SMTConfig | HymbaConfig
    data: DataConfig
    training: TrainingConfig
    architecture: str = "smt"

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"architecture": tuple(CONFIGS)}

    def __post_init__(self) -> None:
        check_folder_name("experiment", self.experiment)
        self._check_stage()
        check_choice("architecture", self.architecture, self.CHOICES["architecture"])
        if not isinstance(self.model, CONFIGS[self.architecture]):
            wanted, got = CONFIGS[self.architecture].__name__, type(self.model).__name__
            raise TypeError(f"model must be of type {wanted} for architecture {self.architecture!r}, got a {got}")
        if self.architecture == "smt":
            return
        if self.data.eval_chunk_length > self.data.chunk_length:
            raise ValueError(
                f"eval_chunk_length must be at most chunk_length = {self.data.chunk_length} for architecture "
                f"{self.architecture!r}, which has read nothing longer, got {self.data.eval_chunk_length}"
            )
        if not set(self.training.init_from) <= {"checkpoint"}:
            raise ValueError(
                f"init_from must be a checkpoint for architecture {self.architecture!r}, got {self.training.init_from}"
            )

    def _check_stage(self) -> None:
        if self.training.stage != "orpo":
            if self.data.pairs is not None:
                raise ValueError(f"pairs are read in stage 'orpo' alone, got them in stage {self.training.stage!r}")
            return
        if self.data.pairs is None:
            raise ValueError("pairs must be given for stage 'orpo', got None")
        for name, value in asdict(self.model).items():
            if name.endswith("dropout") and value:
                raise ValueError(
                    f"{name} must be 0 in stage 'orpo', which compares what one model says of two rows, got {value}"
                )

    @classmethod
    def from_dict(cls, values: dict[str, Any], overrides: dict[str, Any] | None = None) -> RunConfig:
        """Build from ``{experiment, architecture, model: {}, data: {}, training: {}}``, single fields overridden by name.

        Where ``architecture`` is overridden by one with another kind of ``model``, that keeps the fields that both have.

        Raises:
            ValueError: an unknown part or field, with the nearest name, or a value out of range.
            TypeError: a value of the wrong type.
        """
        names = (*OF_RUN, *PARTS)
        for name, value in values.items():
            if name not in names:
                raise ValueError(f"a run has no part {name!r}; did you mean {nearest(name, names)!r}?")
            if not isinstance(value, dict if name in PARTS else str):
                kind = "a mapping of fields" if name in PARTS else "of type str"
                raise ValueError(f"{name} must be {kind}, got {value!r}")
        parts = {part: dict(values.get(part, {})) for part in PARTS}
        of_run = {"experiment": "run", "architecture": "smt", **{name: values[name] for name in OF_RUN if name in values}}
        of_file = of_run["architecture"]
        of_run.update({name: value for name, value in (overrides or {}).items() if name in OF_RUN})
        architecture = of_run["architecture"]
        for name in (of_file, architecture):
            check_choice("architecture", name, cls.CHOICES["architecture"])
        left = _names(CONFIGS[of_file]) - _names(CONFIGS[architecture])
        parts["model"] = {name: value for name, value in parts["model"].items() if name not in left}
        for name, value in (overrides or {}).items():
            if name not in OF_RUN:
                parts[part_of(name, architecture)][name] = value
        _give_way(parts["data"], parts["training"], overrides or {})
        kinds = parts_of(architecture)
        for part, settings in kinds.items():
            known = [field.name for field in fields(settings)]
            for name in parts[part]:
                if name not in known:
                    _check_architecture(name, architecture)
                    raise ValueError(f"{part} has no field {name!r}; did you mean {nearest(name, known)!r}?")
        parsed = {
            part: {name: parse(settings, name, value) for name, value in parts[part].items()}
            for part, settings in kinds.items()
        }
        if architecture == "smt" and "gpt2" in (parsed["training"].get("init_from") or ()):
            parsed["model"].setdefault("encoding", GPT2_ENCODING)
        built = {part: settings(**parsed[part]) for part, settings in kinds.items()}
        return cls(**of_run, **built)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
        """Read a YAML file, or the packaged example of that name.

        Raises:
            ValueError: no such file, not a mapping, or as ``from_dict``.
        """
        file = packaged_or_file(path, CONFIG_FOLDER, "config")
        return cls.from_dict(read_yaml(file, f"a mapping with {', '.join(PARTS)}"), overrides)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as ``from_dict`` takes them."""
        return {**{name: getattr(self, name) for name in OF_RUN}, **{part: asdict(getattr(self, part)) for part in PARTS}}

    def flat(self) -> dict[str, Any]:
        """All fields by name, those of the parts among them."""
        parts = self.to_dict()
        return {**{name: parts[name] for name in OF_RUN}, **{name: v for part in PARTS for name, v in parts[part].items()}}

    def anchored(self) -> RunConfig:
        """The same run, whatever folder it goes on from: what names a file or a folder here has its absolute path."""
        data, training = self.data, self.training
        sources = {name: _if_there(source) for name, source in training.init_from.items() if name != "checkpoint"}
        if "checkpoint" in training.init_from:
            sources["checkpoint"] = _absolute(training.init_from["checkpoint"])
        paths = {name: _absolute(getattr(data, name)) for name in ("text", "pairs", "cache")}
        paths["dataset"] = _if_there(data.dataset)
        if data.tokenizer not in TRAINED:
            paths["tokenizer"] = _if_there(data.tokenizer)
        return replace(self, data=replace(data, **paths), training=replace(training, init_from=sources))

    def to_yaml(self, path: str | Path) -> None:
        """Write all fields as YAML."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def _if_there(source: str | None) -> str | None:
    """A path if it is one, else a name of the Hub as it is."""
    return _absolute(source) if source is not None and Path(source).exists() else source


OF_RUN = ("experiment", "architecture")
PARTS: dict[str, type] = {"model": SMTConfig, "data": DataConfig, "training": TrainingConfig}


def parts_of(architecture: str) -> dict[str, type]:
    """The parts of a run, by name: what each of them is."""
    return {**PARTS, "model": CONFIGS[architecture]}


def _give_way(data: dict[str, Any], training: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Take out of the fields of a file what one that is ``given`` stands in place of: another text, or another bound.

    Raises:
        ValueError: two texts are given, of which one would not be read.
    """
    if "text" not in given and given.get("source", "text") != "text":
        data.pop("text", None)
    elif given.get("text") is not None and given.get("source", "text") != "text":
        raise ValueError(f"text is what the source 'text' reads, got it and source = {given['source']!r}")
    if given.get("dataset") is not None:
        others = {name: given[name] for name in ("text", "source") if given.get(name) is not None}
        if "text" in others or others.get("source", "dataset") not in READ_A_DATASET:
            name, value = next(iter(others.items()))
            raise ValueError(f"dataset is what the sources {', '.join(READ_A_DATASET)} read, got it and {name} = {value!r}")
    if given.get("dataset") is not None and not {"source", "text"} & given.keys():
        data.pop("text", None)
        if data.get("source", DataConfig.source) not in READ_A_DATASET:
            data["source"] = "dataset"
    if any(given.get(name) is not None for name in ("steps", "epochs", "minutes")):
        for name in {"steps", "epochs"}.difference(given):
            training.pop(name, None)


def part_of(name: str, architecture: str = "smt") -> str:
    """The part of a run of that architecture that has the field ``name``.

    Raises:
        ValueError: none has; the message gives the architectures that have it, or the nearest name.
    """
    owners = {field: part for part, settings in parts_of(architecture).items() for field in _names(settings)}
    if name not in owners:
        _check_architecture(name, architecture)
        raise ValueError(f"there is no setting {name!r}; did you mean {nearest(name, (*owners, *OF_RUN))!r}?")
    return owners[name]


def _check_architecture(name: str, architecture: str) -> None:
    """Raise ValueError if the model of another architecture has the field ``name``, and that of this one has not."""
    others = [other for other, settings in CONFIGS.items() if name in _names(settings)]
    if others and architecture not in others:
        raise ValueError(f"{name} is a field of architecture {' and '.join(others)}, this run is of {architecture}")


def _names(settings: type) -> set[str]:
    return {field.name for field in fields(settings)}
