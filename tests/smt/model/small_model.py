"""The small model of the tests of rows: in a batch, packed, or token by token."""

import torch

from smt import SMTConfig, StrideMemoryTransformer

VOCAB = 37
ENCODINGS = ["token", "stride", "stream"]


def build(**switches):
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=VOCAB, d_model=16, d_k=16, transformer_n_layers=2, transformer_n_heads=2, ssm_n_layers=2, ssm_d_state=4,
        initializer_range=0.3, n_ssm_outputs=4, m_input_tokens=7, stride=3, write_group=2,
    )  # fmt: skip
    return StrideMemoryTransformer(SMTConfig(**{**sizes, **switches})).eval()
