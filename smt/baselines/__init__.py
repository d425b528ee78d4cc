"""Models that we compare with, built from the same ``SMTConfig`` so that only the architecture differs.

``gpt2``: Hugging Face's, alone and as runs train it.
"""

from smt.baselines.gpt2 import FullAttentionGPT2, build_gpt2

__all__ = ["FullAttentionGPT2", "build_gpt2"]
