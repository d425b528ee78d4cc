"""Hymba and its relatives (Dong et al., 2024, arXiv:2411.13676): attention and Mamba in one decoder, in turns or side by side.

In reading order: ``config`` (sizes, and what each layer is made of), ``layers`` (one layer, and its mixers), ``attention`` (who
sees whom, and values in pieces), ``passes`` (a layer over a piece of a sequence, and over one token per row), ``cache`` (what
decoding keeps) and ``cost`` (how many bytes that is), ``output`` (loss and logits), ``model``; ``maps`` (whom a layer looks
at).
"""

from smt.hymba.cache import HymbaCache
from smt.hymba.config import ArchType, HymbaConfig, LayerPlan
from smt.hymba.cost import cache_bytes
from smt.hymba.maps import attention_map
from smt.hymba.model import Hymba
from smt.hymba.output import HymbaOutput

__all__ = ["ArchType", "Hymba", "HymbaCache", "HymbaConfig", "HymbaOutput", "LayerPlan", "attention_map", "cache_bytes"]
