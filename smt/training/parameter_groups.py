"""What AdamW trains: parameters by part of the model, each part with its own learning rate, or frozen.

Weight decay is on the weights of projections and convolutions alone. Norms, biases, embeddings, positions and the SSM's
``A_log`` and ``D`` have a scale of their own, which decay would pull away.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from smt.training.settings import TrainingConfig


def parameter_groups(model: nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    """Parameter groups for AdamW, two for each part that is trained: with and without weight decay.

    Frozen parts no longer require gradients; the others do again.

    Args:
        model: has ``parts()``: a ``StrideMemoryTransformer``, or a baseline.

    Returns:
        groups with ``params``, ``lr``, ``weight_decay``, and for us the ``part`` and its ``peak`` learning rate.

    Raises:
        ValueError: every part is frozen.
    """
    groups = []
    for name, part in model.parts().items():
        part.requires_grad_(name not in training.freeze)
        if name in training.freeze:
            continue
        peak = training.learning_rates.get(name, training.learning_rate)
        for parameters, weight_decay in zip(_split(part), (training.weight_decay, 0.0), strict=True):
            if parameters:
                groups.append({"params": parameters, "lr": peak, "peak": peak, "weight_decay": weight_decay, "part": name})
    if not groups:
        raise ValueError(f"freeze must leave a part of the model to train, got all of {', '.join(model.parts())}")
    return groups


def _split(part: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of a part that decay, and those that do not."""
    decayed, others = [], []
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # transformers calls the projections of a GPT-2 Conv1D.
            projects = isinstance(module, (nn.Linear, nn.Conv1d)) or type(module).__name__ == "Conv1D"
            decays = projects and name == "weight"
            (decayed if decays else others).append(parameter)
    return decayed, others
