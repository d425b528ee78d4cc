"""Hugging Face's GPT-2 with the decoder of an ``SMTConfig`` and full causal attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smt.config import SMTConfig

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


def build_gpt2(config: SMTConfig, n_positions: int) -> GPT2LMHeadModel:
    """A fresh GPT-2 of the decoder of ``config``: width, layers, heads, vocabulary, dropout, tied head.

    ``model(input_ids, labels=input_ids).loss`` is the mean next-token cross-entropy. Attention is scaled_dot_product_attention.

    Args:
        config: its ``transformer_n_kv_heads`` must be its ``transformer_n_heads``: GPT-2 has no grouped queries.
        n_positions: the longest sequence that the model takes.

    Raises:
        ImportError: transformers is not installed.
        ValueError: grouped key/value heads, or ``n_positions`` below 1.
    """
    if config.n_kv_heads != config.transformer_n_heads:
        raise ValueError(
            f"transformer_n_kv_heads must be transformer_n_heads = {config.transformer_n_heads} for a GPT-2, "
            f"got {config.n_kv_heads}"
        )
    if n_positions < 1:
        raise ValueError(f"n_positions must be at least 1, got {n_positions}")
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise ImportError("the GPT-2 baseline needs transformers: pip install transformers") from error
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
            initializer_range=config.initializer_range,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    model.loss_type = "ForCausalLM"  # transformers cannot tell it from the class's name, and warns before it assumes it
    return model
