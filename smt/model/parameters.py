"""How many parameters a model has, in all and by part."""

from __future__ import annotations

from typing import Any

from torch import nn


def count_parameters(model: nn.Module) -> dict[str, Any]:
    """Parameters: ``total``, ``trainable`` and ``breakdown`` by part; ``lm_head`` is 0 because it is the embedding.

    Args:
        model: has ``parts()``, of which every parameter is in one.
    """
    breakdown = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in model.parts().items()}
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"total": sum(breakdown.values()), "trainable": trainable, "breakdown": {**breakdown, "lm_head": 0}}
