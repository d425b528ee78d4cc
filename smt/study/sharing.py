"""What it saves that local layers share keys and values: in layers, and in bytes, counted and as a running model keeps them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from smt.hymba.config import HymbaConfig
from smt.hymba.cost import cache_bytes
from smt.hymba.model import Hymba
from smt.study.measure import LONG

KV_SHARING = ("none", "pairs", "runs")


def sharing(config: HymbaConfig, context: int, *, measure: bool = False) -> list[dict[str, Any]]:
    """One row for each way of sharing in a configuration, with all else equal.

    Args:
        config: sizes; its layout has local layers.
        context: tokens that have been read.
        measure: also run a model of fresh weights.

    Returns:
        rows with ``kv_sharing``, ``layers`` with attention, ``owners`` among them that make keys and values, and bytes of one
        sequence: ``measured`` (None: it was not) and ``counted`` at ``context`` tokens, and counted at ``LONG``.
    """
    rows = []
    for kv_sharing in KV_SHARING:
        shared = replace(config, kv_sharing=kv_sharing)
        plans = shared.layers()
        rows.append(
            {
                "layout": shared.layout,
                "kv_sharing": kv_sharing,
                "layers": sum(plan.attention is not None for plan in plans),
                "owners": sum(plan.kv_source == index for index, plan in enumerate(plans)),
                "tokens": context,
                "measured": _measured(shared, context) if measure else None,
                "counted": cache_bytes(shared, context),
                f"counted_at_{LONG}": cache_bytes(shared, LONG),
            }
        )
    return rows


@torch.no_grad()
def _measured(config: HymbaConfig, context: int) -> int:
    """Bytes of the cache of a model with fresh weights that has read ``context`` tokens."""
    model = Hymba(config).eval()
    cache = model.new_cache(1, context)
    model.hidden(torch.zeros(1, context, dtype=torch.int64), cache=cache)
    return cache.nbytes
