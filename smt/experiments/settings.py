"""A set of variants of one configuration: the product of a grid, or budgets x seeds x variants of a YAML file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smt.runtime.fields import check_folder_name, check_names
from smt.runtime.files import packaged_or_file, read_yaml
from smt.training.settings import RunConfig

STUDY_FOLDER = Path(__file__).parent / "studies"
# How long a run trains; one of them at a time, minutes where the others are None.
BOUNDS = {"steps", "epochs", "minutes"}
PARTS_OF_A_STUDY = ("base", "variants", "budgets", "seeds")


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        label: names it, and its folder.
        variant: what it changes in the configuration.
        budget: how long it trains; None: the study has one budget, that of its configuration.
        seed: of its run; None: the study has one seed, that of its configuration.
        config: what it runs.
    """

    label: str
    variant: str
    budget: str | None
    seed: int | None
    config: RunConfig

    @property
    def name(self) -> str:
        """What cells that differ in the seed alone have in common: the label without it."""
        return _label(self.budget, None, self.variant)


@dataclass(frozen=True)
class Study:
    """A named set of cells with different labels, each of them valid."""

    name: str
    cells: tuple[Cell, ...]

    @classmethod
    def of_grid(
        cls,
        base: str | Path,
        axes: Mapping[str, Sequence[Any]],
        overrides: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
    ) -> Study:
        """Every combination of values.

        Args:
            base: the configuration, as ``RunConfig.from_yaml`` takes it.
            axes: values by field of a run.
            overrides: further fields, the same in every cell.
            name: of the study; None: the experiment's and the fields'.

        Raises:
            ValueError: an unknown field, a value out of range or given twice, a field both in ``axes`` and ``overrides``.
            TypeError: a value of the wrong type.
        """
        for field, values in axes.items():
            if not values:
                raise ValueError(f"grid must give {field} a value, got none")
            for value in values:
                if list(values).count(value) > 1:
                    raise ValueError(f"grid must give {field} different values, got {value} twice")
        variants = {}
        for values in itertools.product(*axes.values()):
            fields = dict(zip(axes, values, strict=True))
            variants[",".join(f"{field}={value}" for field, value in fields.items())] = fields
        experiment = RunConfig.from_yaml(base).experiment
        return cls._of(name or "-".join([experiment, *axes]), base, variants, {}, [], overrides)

    @classmethod
    def from_yaml(
        cls,
        path: str | Path,
        overrides: Mapping[str, Any] | None = None,
        *,
        base: str | Path | None = None,
        name: str | None = None,
    ) -> Study:
        """Read a YAML file, or the packaged study of that name: ``{base, variants: {name: {field: value}}, budgets, seeds}``.

        There is a cell for each variant; with ``budgets``, which are named as variants are, one for each budget and variant;
        with ``seeds``, a list, all that for each seed. A budget that names one of ``steps``, ``epochs`` and ``minutes``
        lifts the others.

        Args:
            overrides: further fields, the same in every cell.
            base: in place of the file's.
            name: of the study; None: the file's.

        Raises:
            ValueError: no such file, not a study, or as ``of_grid``.
        """
        file = packaged_or_file(path, STUDY_FOLDER, "study")
        values = read_yaml(file, f"a mapping with {', '.join(PARTS_OF_A_STUDY)}")
        check_names(str(file), values, PARTS_OF_A_STUDY)
        base = base or values.get("base")
        if base is None:
            raise ValueError(f"{file} must name its base, the configuration that is varied")
        variants = _named_fields(values.get("variants"), "variants", file)
        if not variants:
            raise ValueError(f"{file} must have variants, got none")
        budgets = _named_fields(values.get("budgets"), "budgets", file)
        return cls._of(name or file.stem, base, variants, budgets, _seeds(values.get("seeds"), file), overrides)

    @classmethod
    def _of(
        cls,
        name: str,
        base: str | Path,
        variants: Mapping[str, Mapping[str, Any]],
        budgets: Mapping[str, Mapping[str, Any]],
        seeds: Sequence[int],
        overrides: Mapping[str, Any] | None,
    ) -> Study:
        check_folder_name("name", name)
        cells = []
        cells_of = itertools.product((budgets or {None: {}}).items(), seeds or [None], variants.items())
        for (budget, bounds), seed, (variant, fields) in cells_of:
            if not BOUNDS.isdisjoint(bounds):
                bounds = {**dict.fromkeys(BOUNDS - {"minutes"}), **bounds}
            given = [overrides or {}, bounds, {} if seed is None else {"seed": seed}, fields]
            for first, second in itertools.combinations(given, 2):
                if both := sorted(set(first) & set(second)):
                    raise ValueError(f"{both[0]} is varied by the study {name}, so it cannot have one value for all its cells")
            label = _label(budget, seed, variant)
            check_folder_name(f"a label of the study {name}", label)
            if label in [cell.label for cell in cells]:
                raise ValueError(f"the study {name} has two cells of the label {label!r}")
            changed = {field: value for part in given for field, value in part.items()}
            config = RunConfig.from_yaml(base, {**changed, "experiment": name})
            cells.append(Cell(label, variant, budget, seed, config))
        return cls(name, tuple(cells))

    def control_of(self, cell: Cell, control: str) -> Cell:
        """The cell that ``cell`` is compared with: of the label ``control``, or that variant with the same budget and seed.

        Raises:
            ValueError: there is none.
        """
        by_label = {other.label: other for other in self.cells}
        of = cell.budget, cell.seed
        by_variant = {other.variant: other for other in self.cells if (other.budget, other.seed) == of}
        found = by_label.get(control) or by_variant.get(control)
        if found is None:
            check_names("control", [control], list(dict.fromkeys([*by_variant, *by_label])))
        return found


def _named_fields(values: Any, part: str, file: Path) -> dict[str, dict[str, Any]]:
    """``{name: {field: value}}``, where ``{}`` may be left empty."""
    if not isinstance(values, dict | None):
        raise ValueError(f"{part} of {file} must be a mapping from names to fields, got {values!r}")
    named = {str(name): fields or {} for name, fields in (values or {}).items()}
    for name, fields in named.items():
        if not isinstance(fields, dict):
            raise ValueError(f"{name} of {part} in {file} must be a mapping of fields, got {fields!r}")
        if "experiment" in fields:
            raise ValueError(f"{name} of {part} in {file} cannot have an experiment: that is the name of the study")
    return named


def _seeds(values: Any, file: Path) -> list[int]:
    """Different whole numbers, or none at all."""
    if values is None:
        return []
    numbers = isinstance(values, list) and all(type(value) is int for value in values)
    if not numbers or not values or len(set(values)) < len(values):
        raise ValueError(f"seeds of {file} must be a list of different whole numbers, got {values!r}")
    return values


def _label(budget: str | None, seed: int | None, variant: str) -> str:
    parts = [budget, None if seed is None else f"seed_{seed}", variant]
    return re.sub(r"[^\w.+=,-]", "_", ",".join(part for part in parts if part is not None))
