"""What a study begins with: its text read, its models sized, and the run of stage 1 of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smt.data.settings import DataConfig
from smt.data.tokenized import TokenizedCorpus, tokenize_corpus
from smt.data.tokenizer import TRAINED
from smt.runtime.fields import check_names
from smt.runtime.files import check_folder
from smt.study.cell import TRAINING
from smt.study.preference import PAIRS_FILE
from smt.study.settings import CARRIED, StudySettings
from smt.study.sizes import Sized, sized_models
from smt.training.second_stage import SECOND_STAGE
from smt.training.settings import RunConfig

VOCABULARY = 4000


@dataclass(frozen=True)
class Prepared:
    """A study whose text has been read and whose models have been sized.

    Attributes:
        settings: what is compared.
        folder: of its results.
        text: what all models read.
        models: by name.
    """

    settings: StudySettings
    folder: Path
    text: TokenizedCorpus
    models: dict[str, Sized]

    @property
    def first_stage(self) -> RunConfig:
        """Data and training of stage 1; the model is none of the study's."""
        return _first_stage(self.settings)

    def training_of(self, model: str, seed: int, learning_rate: float | None = None) -> RunConfig:
        """The run of stage 1 of a model; ``learning_rate``: in the stead of that of ``run``."""
        settings, sized = self.settings, self.models[model]
        training = {**settings.run.get("training", {}), "seed": seed}
        if learning_rate is not None:
            training["learning_rate"] = learning_rate
        return RunConfig.from_dict(
            {
                "experiment": TRAINING,
                "architecture": sized.architecture,
                "model": {**sized.config.to_dict(), "vocab_size": _asked_vocabulary(settings)},
                "data": {**settings.run.get("data", {}), **(settings.carried if model == CARRIED else {})},
                "training": training,
            }
        ).anchored()


def prepare(settings: StudySettings, out: str | Path = "results") -> Prepared:
    """Read the text and size the models.

    Raises:
        ValueError: a text that cannot be read, a field that is wrong, or a folder that cannot be written.
    """
    data, asked = _first_stage(settings).data, _asked_vocabulary(settings)
    _check_second_stage(settings, data)
    folder = check_folder(Path(out) / settings.name)
    text = tokenize_corpus(data, asked)
    vocabulary = text.tokenizer.vocab_size if data.tokenizer in TRAINED else asked
    return Prepared(settings, folder, text, sized_models(settings, vocabulary))


def _asked_vocabulary(settings: StudySettings) -> int:
    """Of the tokenizer; a text may give it fewer tokens."""
    return settings.hymba.get("vocab_size", VOCABULARY)


def _first_stage(settings: StudySettings) -> RunConfig:
    check_names("run", settings.run, ("data", "training"))
    config = RunConfig.from_dict(settings.run)
    if config.training.steps is None:
        raise ValueError("run must bound training by a number of steps, got None")
    return config


def _check_second_stage(settings: StudySettings, data: DataConfig) -> None:
    """Raise ValueError for what would end the stage after the first one has run."""
    config = RunConfig.from_yaml(SECOND_STAGE, {"pairs": PAIRS_FILE, "chunk_length": data.chunk_length, **settings.orpo})
    longest = settings.prompt_length + settings.completion_length - 1
    if longest > config.data.chunk_length:
        raise ValueError(
            f"prompt_length + completion_length - 1 must be at most chunk_length = {config.data.chunk_length}, got {longest}"
        )
