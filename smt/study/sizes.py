"""Models of as many parameters as each other: the width of MLPs follows for a Hymba, the numbers of layers for ours.

The number aimed at is that of the layout ``hybrid`` with the MLPs of its configuration; all are linear in what is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch

from smt.baselines import build
from smt.config import SMTConfig
from smt.hymba.config import HymbaConfig
from smt.runtime.fields import defaults_of, parse
from smt.study.settings import CARRIED, OURS, StudySettings

# Widths of MLPs are multiples of it.
WIDTH_STEP = 8
MOST_SSM_LAYERS = 4


@dataclass(frozen=True)
class Sized:
    """A model of a study.

    Attributes:
        architecture: of its runs.
        config: of the model.
        parameters: all.
        embedding: those of the token embedding, which is the head.
    """

    architecture: str
    config: HymbaConfig | SMTConfig
    parameters: int
    embedding: int


def sized_models(settings: StudySettings, vocab_size: int) -> dict[str, Sized]:
    """The models of a study by name.

    Raises:
        ValueError: a field that is wrong, or a model that cannot be made so small.
    """
    shared = _hymba(settings, vocab_size)
    aim = count("hymba", replace(shared, layout="hybrid"))
    sized = {}
    for name in settings.models:
        if name in (OURS, CARRIED):
            architecture, config = "smt", _ours(settings, vocab_size, aim)
        else:
            architecture, config = "hymba", _with_width(replace(shared, layout=name), aim)
        sized[name] = Sized(architecture, config, count(architecture, config), vocab_size * config.d_model)
    return sized


def count(architecture: str, config: HymbaConfig | SMTConfig) -> int:
    """Parameters of a model, which is built without memory for them."""
    with torch.device("meta"):
        return build(architecture, config, context=1).count_parameters()["total"]


def _hymba(settings: StudySettings, vocab_size: int) -> HymbaConfig:
    known = defaults_of(HymbaConfig)
    fields = {name: parse(HymbaConfig, name, value) if name in known else value for name, value in settings.hymba.items()}
    return HymbaConfig.from_dict({**fields, "vocab_size": vocab_size})


def _with_width(config: HymbaConfig, aim: int) -> HymbaConfig:
    """The configuration with the MLP that brings it nearest to ``aim`` parameters."""
    narrow, wide = (count("hymba", replace(config, d_mlp=steps * WIDTH_STEP)) for steps in (1, 2))
    steps = 1 + round((aim - narrow) / (wide - narrow))
    if steps < 1:
        raise ValueError(
            f"hymba must have a larger d_mlp: with one of {WIDTH_STEP} layout {config.layout} has {narrow:,} parameters, more "
            f"than {aim:,}"
        )
    return replace(config, d_mlp=steps * WIDTH_STEP)


def _ours(settings: StudySettings, vocab_size: int, aim: int) -> SMTConfig:
    """The numbers of layers that bring it nearest to ``aim`` parameters; of those as near the deepest decoder."""

    def config(n_layers: int, n_ssm_layers: int) -> SMTConfig:
        layers = {"transformer_n_layers": n_layers, "ssm_n_layers": n_ssm_layers}
        return SMTConfig.from_dict({**settings.smt, "vocab_size": vocab_size, **layers})

    least, deeper, more_memory = (count("smt", config(*layers)) for layers in ((1, 1), (2, 1), (1, 2)))
    most = max(1, 1 + (aim - least) // (deeper - least))
    choices = product(range(most + 1, 0, -1), range(1, MOST_SSM_LAYERS + 1))

    def distance(layers: tuple[int, int]) -> int:
        return abs(least + (layers[0] - 1) * (deeper - least) + (layers[1] - 1) * (more_memory - least) - aim)

    return config(*min(choices, key=distance))
