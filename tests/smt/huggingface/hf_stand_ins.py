"""Stand-ins for ``GenerationMixin``: they call the model as an older and a newer release of ``transformers`` do.

Each knows one name of the state, and refuses the other as its release warns of it or does not know it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig


@dataclass
class OlderOutput(dict):
    """The fields of an output of 5.0."""

    logits: Tensor | None = None
    past_key_values: Any = None

    def __post_init__(self) -> None:
        self.update(vars(self))


@dataclass
class NewerOutput(dict):
    """The fields of an output of 5.24."""

    logits: Tensor | None = None
    cache: Any = None

    def __post_init__(self) -> None:
        self.update(vars(self))


class Library:
    """The part of ``generate`` that the two have in common: greedy search, ``attention_mask`` growing with the text."""

    state: ClassVar[str]
    output: ClassVar[type]

    @classmethod
    def generate(cls, model: Any, ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **given: Any) -> Tensor:
        assert set(given) <= {cls.state}, f"this release does not take {set(given) - {cls.state}}"
        assert cls.state in inspect.signature(model.forward).parameters
        kwargs = {"attention_mask": attention_mask, "logits_to_keep": 1, **given}
        model._prepare_cache_for_generation(GenerationConfig(), kwargs, None, len(ids), ids.shape[1] + max_new_tokens)
        taken = kwargs[cls.state].get_seq_length()
        for step in range(max_new_tokens):
            inputs = model.prepare_inputs_for_generation(
                ids, is_first_iteration=step == 0, use_cache=True, **cls.place(ids, taken), **kwargs
            )
            outputs = model(**inputs, return_dict=True)
            assert cls.state in outputs and outputs[cls.state] is getattr(outputs, cls.state) is outputs.get(cls.state)
            kwargs[cls.state] = outputs[cls.state]
            taken = ids.shape[1]
            ids = torch.cat([ids, outputs.logits[:, -1:].argmax(dim=-1)], dim=1)
            mask = kwargs["attention_mask"]
            kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
        return ids


class Older(Library):
    """5.0: the new columns are told by their positions."""

    state = "past_key_values"
    output = OlderOutput

    @staticmethod
    def place(ids: Tensor, taken: int) -> dict[str, Any]:
        return {"cache_position": torch.arange(taken, ids.shape[1])}

    @staticmethod
    def prepare(model, ids, past_key_values=None, attention_mask=None, cache_position=None, is_first_iteration=False, **kwargs):
        assert "cache" not in kwargs
        inputs = {"input_ids": ids[:, cache_position], "past_key_values": past_key_values, "attention_mask": attention_mask}
        return {**inputs, "cache_position": cache_position, "inputs_embeds": None, **kwargs}


class Newer(Library):
    """5.24: the new columns are told by their number."""

    state = "cache"
    output = NewerOutput

    @staticmethod
    def place(ids: Tensor, taken: int) -> dict[str, Any]:
        return {"next_sequence_length": ids.shape[1] - taken}

    @staticmethod
    def prepare(model, ids, next_sequence_length=None, cache=None, attention_mask=None, is_first_iteration=False, **kwargs):
        assert "past_key_values" not in kwargs
        inputs = {"input_ids": ids[:, -next_sequence_length:], "cache": cache, **kwargs}
        return inputs if attention_mask is None else {**inputs, "attention_mask": attention_mask}
