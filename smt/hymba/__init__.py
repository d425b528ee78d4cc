"""Hymba and its relatives (Dong et al., 2024, arXiv:2411.13676): attention and Mamba in one decoder, in turns or side by side.

In reading order: ``config`` (sizes, and what each layer is made of).
"""

from smt.hymba.config import ArchType, HymbaConfig, LayerPlan

__all__ = ["ArchType", "HymbaConfig", "LayerPlan"]
