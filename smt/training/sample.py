"""How a model goes on with a text: what runs and studies show of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from smt.baselines import RunModel
from smt.data.tokenizer import Tokenizer

TEMPERATURE, TOP_P = 0.8, 0.95


def continuation(model: RunModel, prompt: Iterable[int], n_tokens: int, tokenizer: Tokenizer, seed: int) -> tuple[str, str]:
    """The text of ``prompt`` behind its first token, which begins a document, and ``n_tokens`` more, drawn with ``seed``."""
    device = model.embedding.weight.device
    tokens = torch.tensor([int(token) for token in prompt])
    generator = torch.Generator(device).manual_seed(seed)
    (drawn,) = model.generate(tokens[None].to(device), n_tokens, temperature=TEMPERATURE, top_p=TOP_P, generator=generator)
    read = tokens[1:]
    return tokenizer.decode(read), tokenizer.decode(drawn[len(tokens) :].cpu(), after=read)
