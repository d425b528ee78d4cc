"""What a study compares, and how much of it: one YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from smt.hymba.config import ArchType
from smt.runtime.fields import check_at_least, check_fields, check_folder_name, check_known
from smt.runtime.files import packaged_or_file, read_yaml

FOLDER = Path(__file__).parent / "configs"
# Ours, beside the layouts of a Hymba: trained on what they are trained on, and with its memory carried through longer parts.
OURS = "smt"
CARRIED = "smt_carried"
QUICK = "quick"


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What a study compares.

    Args:
        name: of the folder with its results.
        models: layouts of a Hymba, ``smt`` and ``smt_carried``, which is the same model and carries its memory in training.
        seeds: each model is trained with every one of them.
        equal_time_seeds: with so many of the seeds, the first of them, each model is trained once more, for as many steps as
            should take the time of the middle one of all models, by the speeds of all seeds.
        learning_rates: of stage 1, which every model is trained at before, with ``learning_rate_seeds``; it then has the one
            with the lowest mean held-out loss. Empty: all models have that of ``run``.
        learning_rate_seeds: none of ``seeds``.
        run: ``data`` and ``training`` of stage 1, as in the configuration of a run.
        hymba: fields that all layouts share; the width of their MLPs follows from the number of parameters.
        smt: fields of ours; its numbers of layers follow from the number of parameters.
        carried: fields of ``data`` in the stead of those of ``run``, for ``smt_carried``: its parts are longer than a chunk.
        orpo: fields of the runs of stage 2.
        n_pairs: preference pairs to train on, made by each model of stage 1 from training documents.
        n_held_out_pairs: further ones, of held-out documents, to measure on.
        prompt_length: tokens of their prompts.
        completion_length: tokens of their completions.
        context: tokens that are read before the speed of decoding, and what is kept for it, are measured.
        decode_tokens: tokens that are drawn to measure it.
        sample_tokens: tokens of each sample.
        map_model: whose attention is drawn.
        map_tokens: tokens of the text that it is drawn for.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of range, with its name.
    """

    name: str
    models: tuple[str, ...] = (*(layout.value for layout in ArchType), OURS)
    seeds: tuple[int, ...] = (1, 2, 3)
    equal_time_seeds: int = 1
    learning_rates: tuple[float, ...] = ()
    learning_rate_seeds: tuple[int, ...] = (0,)
    run: dict[str, Any] = field(default_factory=dict)
    hymba: dict[str, Any] = field(default_factory=dict)
    smt: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, Any] = field(default_factory=dict)
    orpo: dict[str, Any] = field(default_factory=dict)
    n_pairs: int = 256
    n_held_out_pairs: int = 128
    prompt_length: int = 64
    completion_length: int = 64
    context: int = 128
    decode_tokens: int = 32
    sample_tokens: int = 80
    map_model: str = "parallel"
    map_tokens: int = 192

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "models": (*(layout.value for layout in ArchType), OURS, CARRIED),
        "map_model": tuple(layout.value for layout in ArchType),
    }

    def __post_init__(self) -> None:
        check_fields(self)
        check_folder_name("name", self.name)
        sizes = (
            "n_pairs",
            "n_held_out_pairs",
            "prompt_length",
            "completion_length",
            "context",
            "decode_tokens",
            "sample_tokens",
        )
        check_at_least(self, 1, *sizes, "map_tokens")
        check_at_least(self, 0, "equal_time_seeds")
        for name in ("models", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more, each once, got {values}")
        if not all(rate > 0 for rate in self.learning_rates) or len(set(self.learning_rates)) < len(self.learning_rates):
            raise ValueError(f"learning_rates must be above 0, each once, got {self.learning_rates}")
        if self.learning_rates and (not self.learning_rate_seeds or {*self.learning_rate_seeds} & {*self.seeds}):
            raise ValueError(
                f"learning_rate_seeds must be one or more, none of seeds = {self.seeds}, got {self.learning_rate_seeds}"
            )

    @classmethod
    def from_yaml(cls, path: str | Path, *, quick: bool = False, seeds: tuple[int, ...] = ()) -> StudySettings:
        """Read a YAML file, or the packaged study of that name.

        Args:
            quick: as its part ``quick`` says, which has other values for some fields; or, if that is the name of another study,
                as that one's does.
            seeds: instead of the file's.

        Raises:
            ValueError: no such file, an unknown field with the nearest name, or no quick form.
        """
        file = packaged_or_file(path, FOLDER, "config")
        values = {"name": file.stem, **read_yaml(file)}
        of_quick = values.pop(QUICK, None)
        if quick:
            if isinstance(of_quick, str):
                return cls.from_yaml(of_quick, quick=True, seeds=seeds)
            if of_quick is None:
                raise ValueError(f"{file} has no quick form: it has no part {QUICK}")
            values = _merged({**values, "name": f"{values['name']}_quick"}, of_quick)
        if seeds:
            values["seeds"] = seeds
        check_known(cls, values)
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The values of both, those of the second where they differ."""
    both = dict(first)
    for name, value in second.items():
        before = both.get(name)
        both[name] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return both
