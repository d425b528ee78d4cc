"""The configuration of a run that goes on from another's weights: what it leaves open is as it was there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smt.model.checkpoint import CONFIG_FILE
from smt.runtime.fields import expand_home, parse
from smt.runtime.files import packaged_or_file, read_yaml
from smt.training.settings import CONFIG_FOLDER, OF_RUN, PARTS, RunConfig, TrainingConfig

# The packaged configuration of the stage.
SECOND_STAGE = "orpo"


def staged(path: str | Path, overrides: dict[str, Any]) -> RunConfig:
    """``RunConfig.from_yaml``; one of stage ``orpo`` that begins with a checkpoint has what it leaves open from there.

    That is its architecture, model and data. Dropout of that model is off, as the stage needs it.

    Raises:
        ValueError: as ``RunConfig.from_yaml``, there is no such checkpoint, or the packaged configuration has no weights to
            start from.
    """
    ours = read_yaml(packaged_or_file(path, CONFIG_FOLDER, "config"), f"a mapping with {', '.join(PARTS)}")
    training = ours.get("training")
    training = {**(training if isinstance(training, dict) else {}), **overrides}
    init_from = parse(TrainingConfig, "init_from", training.get("init_from"))
    if path == SECOND_STAGE and not init_from:
        raise ValueError(
            f"init_from must be given for the configuration {path!r}, which leaves the model to it: checkpoint=RUN, got nothing"
        )
    if training.get("stage") != SECOND_STAGE or not isinstance(init_from, dict) or "checkpoint" not in init_from:
        return RunConfig.from_yaml(path, overrides)
    checkpoint = Path(expand_home(init_from["checkpoint"])) / CONFIG_FILE
    if not checkpoint.is_file():
        raise ValueError(f"there is no {checkpoint}")
    theirs = read_yaml(checkpoint)
    if not any(part in theirs for part in PARTS):  # nothing but the fields of a model
        theirs = {"model": theirs}
    values: dict[str, Any] = {**{name: theirs[name] for name in OF_RUN if name in theirs}, **ours}
    for part in PARTS:
        mine, before = ours.get(part, {}), theirs.get(part)
        if part == "training" or not isinstance(mine, dict) or not isinstance(before, dict):
            continue
        # Pairs are of another such stage.
        before = {name: 0.0 if name.endswith("dropout") else value for name, value in before.items() if name != "pairs"}
        values[part] = {**before, **mine}
    return RunConfig.from_dict(values, overrides)
