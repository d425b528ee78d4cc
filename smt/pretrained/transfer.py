"""Tensors of a pretrained model into parameters of ours: planned by name, checked, then written, then reported."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from smt.pretrained.families import Pretrained


@dataclass
class LoadReport:
    """What a loader did; ``str(report)`` is a table with the layers of a name drawn together.

    Attributes:
        source: what was loaded, and from where.
        loaded: parameters of the model that were filled.
        skipped: tensors of the source that were not used, and why.
        fresh: parameters of the model that keep their values.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)

    def __add__(self, later: LoadReport) -> LoadReport:
        """The report of both, one after the other, into the same model."""
        return LoadReport(
            source=f"{self.source}; {later.source}",
            loaded=list(dict.fromkeys([*self.loaded, *later.loaded])),
            skipped={**self.skipped, **later.skipped},
            fresh=[name for name in self.fresh if name in later.fresh],
        )

    def __str__(self) -> str:
        skipped = [f"{name}: {reason}" for name, reason in self.skipped.items()]
        lines = [self.source]
        for title, names in (("loaded", self.loaded), ("skipped", skipped), ("fresh", self.fresh)):
            lines.append(f"  {title} ({len(names)})" + ("" if names else ": nothing"))
            lines.extend(f"    {name}" for name in _draw_together(names))
        return "\n".join(lines)


class Transfer:
    """Which tensor of a source becomes which parameter; written at the end, when everything is known to fit."""

    def __init__(self, model: nn.Module, source: Pretrained) -> None:
        self.source = source
        self.parameters = dict(model.named_parameters())
        self.unused = dict(source.tensors)
        self.taken: dict[str, Tensor] = {}
        self.skipped: dict[str, str] = {}

    def take(self, theirs: str, ours: str, change: Callable[[Tensor], Tensor] | None = None) -> None:
        if theirs not in self.unused:
            raise ValueError(f"{self.source.title} lacks {theirs}, which {ours} needs")
        tensor = self.unused.pop(theirs)
        if change is not None:
            tensor = change(tensor)
        expected = self.parameters[ours].shape
        if tensor.shape != expected:
            sizes = f"{tuple(tensor.shape)} but {ours} is {tuple(expected)}"
            raise ValueError(f"the config of {self.source.title} fits, its weights do not: {theirs} is {sizes}")
        self.taken[ours] = tensor

    def take_module(self, theirs: str, ours: str, change: Callable[[Tensor], Tensor] | None = None) -> None:
        self.take(f"{theirs}.weight", f"{ours}.weight", change)
        self.take(f"{theirs}.bias", f"{ours}.bias")

    def skip(self, name: str, reason: str) -> None:
        if self.unused.pop(name, None) is not None:
            self.skipped[name] = reason

    def rest(self, pattern: str) -> list[str]:
        return [name for name in self.unused if re.fullmatch(pattern, name)]

    def leave_deeper_layers(self, layers: str, count: int) -> None:
        """Skip the layers from ``count`` on; refuse a tensor that belongs to a layer we take and has no place in it."""
        for name in self.rest(rf"{layers}\.\d+\..*"):
            if int(name.split(".")[1]) < count:
                raise ValueError(f"{self.source.title} has {name}, which has no place in the model")
            self.skip(name, f"beyond the model's {count} layers")

    @torch.no_grad()
    def finish(self) -> LoadReport:
        head = self.unused.get("lm_head.weight")
        embedding = self.source.tensors.get(self.source.embedding)
        if head is not None and embedding is not None and torch.equal(head, embedding):
            del self.unused["lm_head.weight"]  # tied: one tensor under two names
        self.skip("lm_head.weight", "the model's head is its embedding")
        for name in list(self.unused):
            self.skip(name, "no place in the model")
        for name, tensor in self.taken.items():
            self.parameters[name].copy_(tensor)
        fresh = [name for name in self.parameters if name not in self.taken]
        return LoadReport(self.source.title, list(self.taken), self.skipped, fresh)


def _draw_together(lines: Iterable[str]) -> list[str]:
    """Lines that differ in the number of a layer alone, as one: ``blocks.{0..11}.up.weight``."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for line in lines:
        numbered = re.fullmatch(r"(\S*?\.)(\d+)(\..*)", line)
        before, number, after = numbered.groups() if numbered else (line, None, "")
        numbers.setdefault((before, after), []).extend([int(number)] if number else [])
    drawn = []
    for (before, after), layers in numbers.items():
        number = "" if not layers else str(layers[0]) if len(layers) == 1 else f"{{{min(layers)}..{max(layers)}}}"
        drawn.append(before + number + after)
    return drawn
