"""What ``model.compile`` is told where CUDA graphs are recorded."""

from __future__ import annotations

from typing import Any

# The modes of ``torch.compile`` that record CUDA graphs.
GRAPH_MODES = ("reduce-overhead", "max-autotune")


def records_graphs(options: dict[str, Any]) -> bool:
    """Whether ``torch.compile`` with these options records CUDA graphs, on a GPU."""
    return options.get("mode") in GRAPH_MODES or bool((options.get("options") or {}).get("triton.cudagraphs", False))


def of_one_shape(options: dict[str, Any]) -> dict[str, Any]:
    """The options; where graphs are recorded, with ``dynamic`` False unless given, as code for any shape would be slower."""
    return {"dynamic": False, **options} if records_graphs(options) else options
