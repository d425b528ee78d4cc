"""Hugging Face's GPT-2 with the decoder of an ``SMTConfig`` and full causal attention: alone, and to be trained as ours is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smt.config import SMTConfig
from smt.model.evaluating import evaluating
from smt.model.generation import check_sampling, sample
from smt.model.loss import head_loss
from smt.model.parameters import count_parameters
from smt.runtime.extras import needs_extra

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


def build_gpt2(config: SMTConfig, n_positions: int) -> GPT2LMHeadModel:
    """A fresh GPT-2 of the decoder of ``config``: width, layers, heads, vocabulary, dropout, tied head.

    ``model(input_ids, labels=input_ids).loss`` is the mean next-token cross-entropy. Attention is scaled_dot_product_attention.

    Args:
        config: its ``transformer_n_kv_heads`` must be its ``transformer_n_heads``: GPT-2 has no grouped queries.
        n_positions: the longest sequence that the model takes.

    Raises:
        MissingExtraError: transformers is not installed.
        ValueError: grouped key/value heads, or ``n_positions`` below 1.
    """
    if config.n_kv_heads != config.transformer_n_heads:
        raise ValueError(
            f"transformer_n_kv_heads must be transformer_n_heads = {config.transformer_n_heads} for a GPT-2, "
            f"got {config.n_kv_heads}"
        )
    if n_positions < 1:
        raise ValueError(f"n_positions must be at least 1, got {n_positions}")
    with needs_extra("train"):
        from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=n_positions,
            n_embd=config.d_model,
            n_layer=config.transformer_n_layers,
            n_head=config.transformer_n_heads,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=0.0,  # as in SMT, whose fused kernels have no dropout on attention weights
            initializer_range=config.initializer_std,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    model.loss_type = "ForCausalLM"  # transformers cannot tell it from the class's name, and warns before it assumes it
    return model


@dataclass(frozen=True)
class NoMemory:
    """What full attention carries from one chunk to the next."""

    state: None = None


class FullAttentionGPT2(nn.Module):
    """A GPT-2 behind the interface that training and evaluation use; each chunk begins anew.

    Args:
        config: sizes of the decoder; what it says about memory means nothing here.
        context: the longest chunk, and the most tokens that a prediction sees.

    Raises:
        MissingExtraError, ValueError: as ``build_gpt2``.
    """

    def __init__(self, config: SMTConfig, context: int) -> None:
        super().__init__()
        self.config, self.context = config, context
        self.transformer = build_gpt2(config, context).transformer

    @property
    def embedding(self) -> nn.Embedding:
        """Tied to the head."""
        return self.transformer.wte

    def forward(self, input_ids: Tensor, state: Any = None, *, targets: Tensor) -> tuple[Tensor, NoMemory]:
        """Mean cross-entropy per target of input_ids and targets (B, T), -100 where nothing is due."""
        hidden, memory = self.encode(input_ids)
        return head_loss(hidden, self.embedding.weight, targets), memory

    def encode(self, input_ids: Tensor, state: Any = None) -> tuple[Tensor, NoMemory]:
        """Hidden states (B, T, d) after the final norm, before the head."""
        return self.transformer(input_ids, use_cache=False).last_hidden_state, NoMemory()

    def logits(self, input_ids: Tensor) -> Tensor:
        """(B, T, V) of a chunk."""
        return self.encode(input_ids)[0] @ self.embedding.weight.mT

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Prompts (B, T) and their continuations, (B, T + new), each token with the last ``context`` before it.

        Raises:
            ValueError: an option out of range, as in ``smt.model.generation.stream``.
        """
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        with evaluating(self):
            for _ in range(max_new_tokens):
                hidden = self.transformer(input_ids[:, -self.context :], use_cache=False).last_hidden_state
                logits = hidden[:, -1] @ self.embedding.weight.mT
                input_ids = torch.cat([input_ids, sample(logits, temperature, top_k, top_p, generator)], dim=1)
        return input_ids

    def compile(self, **options: Any) -> None:
        """Compile in place all but the head and its loss, with the ``options`` of ``torch.compile``."""
        self.transformer.compile(**options)

    def gradient_checkpointing_enable(self) -> None:
        """Keep only the input of every block and recompute the rest in the backward pass."""
        # Newer releases of transformers call it so, and the old name deprecated.
        enable = getattr(self.transformer, "activation_checkpointing_enable", self.transformer.gradient_checkpointing_enable)
        enable({"use_reentrant": False})

    def parts(self) -> dict[str, nn.Module]:
        """``embedding`` and ``transformer``; every parameter is in one of them."""
        decoder = self.transformer
        return {"embedding": self.embedding, "transformer": nn.ModuleList([decoder.wpe, decoder.h, decoder.ln_f])}

    def count_parameters(self) -> dict[str, Any]:
        """As ``StrideMemoryTransformer.count_parameters``."""
        return count_parameters(self)
