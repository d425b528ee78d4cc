"""Models that we compare with, behind the interface that training and evaluation use.

``gpt2``: Hugging Face's, with the sizes of an ``SMTConfig`` so that only the architecture differs, alone and as runs train it.
``hymba``: a Hymba as runs train it. ``architectures``: these and ours, by name.
"""

from smt.baselines.architectures import CONFIGS, RunModel, architecture_of, build
from smt.baselines.gpt2 import FullAttentionGPT2, build_gpt2
from smt.baselines.hymba import ChunkedHymba

__all__ = ["CONFIGS", "ChunkedHymba", "FullAttentionGPT2", "RunModel", "architecture_of", "build", "build_gpt2"]
