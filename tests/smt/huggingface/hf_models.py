"""Small models with the interface of ``transformers``, and padded batches."""

from __future__ import annotations

import torch

from smt import SMTForCausalLM, SMTPreTrainedConfig

VOCAB = 37
ENCODINGS = ["token", "stride", "stream"]
SIZES = dict(
    vocab_size=VOCAB, d_model=16, d_k=16, transformer_n_layers=2, transformer_n_heads=2, ssm_n_layers=2, ssm_d_state=4,
    initializer_range=0.3, n_ssm_outputs=4, m_input_tokens=9, stride=3,
)  # fmt: skip


def build(dtype=torch.float64, **switches):
    torch.manual_seed(3)
    return SMTForCausalLM(SMTPreTrainedConfig(**{**SIZES, **switches})).to(dtype).eval()


def padded(lengths, side="left"):
    """Prompts, their mask, and each alone."""
    alone = [torch.randint(VOCAB, (length,)) for length in lengths]
    ids = torch.full((len(lengths), max(lengths)), 5)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(alone):
        here = slice(-len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, here] = prompt
        mask[row, here] = 1
    return ids, mask, alone
