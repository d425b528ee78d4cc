"""A model in evaluation mode, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode inside the block; after it those of its modules train again that did before."""
    training = []
    if model.training:  # a walk through all modules, which takes as long as a part of a step
        training = [module for module in model.modules() if module.training]
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
