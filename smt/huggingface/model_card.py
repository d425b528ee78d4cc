"""The model card of a checkpoint: what is known of the model itself, and the questions that its author answers."""

from __future__ import annotations

from importlib import resources
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smt.model.transformer import StrideMemoryTransformer

CARD_FILE = "README.md"


def model_card(model: StrideMemoryTransformer) -> str:
    """The packaged template, filled in for ``model``."""
    config = model.config
    template = Template(resources.files("smt.huggingface").joinpath("model_card.md").read_text(encoding="utf-8"))
    return template.substitute(
        summary=config.summary(),
        parameters=f"{model.count_parameters()['total']:,}",
        n_slots=config.n_ssm_outputs,
        n_tokens=config.m_input_tokens,
        stride=config.stride,
        vocabulary=f"{config.vocab_size:,}",
    )
