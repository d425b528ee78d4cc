"""A trained model: its loss on held-out text, the speed of its decoding, and the bytes that it keeps for that."""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch import Tensor, nn

from smt.baselines import RunModel
from smt.config import SMTConfig
from smt.data.held_out import HeldOut
from smt.data.settings import DataConfig
from smt.data.store import TokenStore
from smt.evaluation.perplexity import Evaluation, evaluate
from smt.hymba.config import HymbaConfig
from smt.hymba.cost import cache_bytes
from smt.model.evaluating import evaluating
from smt.runtime.precision import precision
from smt.state.state import SMTState

# Rows that decode together.
BATCH_SIZES = (1, 8)
# Of which the middle one counts.
TIMES = 3
# At which what a model keeps is also counted from its configuration.
LONG = 4096


def held_out_loss(objective: nn.Module, text: TokenStore, data: DataConfig) -> Evaluation:
    """The loss of ``objective`` on held-out documents, every ``eval_chunk_length`` tokens read as if nothing came before."""
    pieces = HeldOut.of(text, data.eval_documents).pieces(data.eval_chunk_length)
    batches = pieces.walk(batch_size=data.eval_batch_size, length=data.eval_chunk_length)
    with precision(next(objective.parameters()).device):
        return evaluate(objective, batches, pieces.n_bytes)


def decoding_speeds(model: RunModel, prompt: Tensor, n_tokens: int) -> dict[str, float]:
    """Tokens per second behind a prompt (T,), all rows together, by their number; reading the prompt is left out."""
    speeds = {}
    for batch_size in BATCH_SIZES:
        rows = prompt[None].expand(batch_size, -1)
        _seconds(model, rows, 1)  # what is compiled or allocated once
        middle = statistics.median(_seconds(model, rows, n_tokens) for _ in range(TIMES))
        speeds[str(batch_size)] = batch_size * n_tokens / middle
    return speeds


def _seconds(model: RunModel, rows: Tensor, n_tokens: int) -> float:
    """To draw so many tokens behind the first, which the pass over the prompt gives."""
    with precision(rows.device):
        drawn = model.stream(rows, 1 + n_tokens, temperature=0.0)
        next(drawn)
        _wait(rows.device)
        started = time.perf_counter()
        for _ in drawn:
            pass
        _wait(rows.device)
        return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def kept_bytes(model: RunModel, prompt: Tensor) -> dict[str, int]:
    """Bytes that a row keeps after a prompt (T,), as they are in the running model, and as the configuration gives them."""
    with evaluating(model):
        if isinstance(model.config, SMTConfig):
            measured = model.encode(prompt[None])[1].state.n_bytes()
        else:
            cache = model.new_cache(1, len(prompt))
            model.hidden(prompt[None], cache=cache)
            measured = cache.nbytes
    counted = {n: counted_bytes(model.config, n, model.embedding.weight.dtype) for n in (len(prompt), LONG)}
    return {"tokens": len(prompt), "measured": measured, "counted": counted[len(prompt)], f"counted_at_{LONG}": counted[LONG]}


def counted_bytes(config: SMTConfig | HymbaConfig, n_tokens: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that a row keeps after ``n_tokens`` tokens, counted from the configuration."""
    if isinstance(config, SMTConfig):
        return SMTState.size_in_bytes(config, 1, dtype)
    return cache_bytes(config, n_tokens, 1, dtype.itemsize)


def peak_bytes(device: torch.device) -> int | None:
    """The most memory so far: of tensors on a GPU, else of this whole process, Python and libraries included.

    None on a system that does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
