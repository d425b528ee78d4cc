"""Whom the tokens of a text look at: the attention weights of a layer, computed plainly, for pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from smt.hymba.model import Hymba
from smt.hymba.passes import queries_and_keys
from smt.model.batch import check_tokens
from smt.model.evaluating import evaluating
from smt.model.rotary import rotation
from smt.runtime.precision import dtype_of_products


@torch.no_grad()
def attention_map(model: Hymba, input_ids: Tensor, layer: int) -> Tensor:
    """The attention weights of one layer.

    Args:
        model: in whichever mode; there is no dropout.
        input_ids: (1, T) integer tokens.
        layer: the index of a layer that has attention.

    Returns:
        (H, T, M + T) float32, the meta tokens before the tokens, zero where a query does not see; rows sum to 1.

    Raises:
        TypeError, ValueError: as ``Hymba.forward``, more than one row, or a layer that is not there or has no attention.
    """
    config = model.config
    if not 0 <= layer < config.n_layers:
        raise ValueError(f"layer must lie in 0..n_layers - 1 = 0..{config.n_layers - 1}, got {layer}")
    check_tokens(input_ids, config.vocab_size, model.embedding.weight.device)
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids must have shape (1, T), got {tuple(input_ids.shape)}")
    plan = config.layers()[layer]
    if plan.attention is None:
        raise ValueError(f"layer must have attention, which {layer} has not in the layout {config.layout}")
    q, k = _queries_and_keys(model, input_ids, layer)
    n_metas, n_tokens = config.n_meta_tokens, q.shape[1]
    scores = torch.einsum("thd,shd->hts", q[0], k[0].repeat_interleave(q.shape[2] // k.shape[2], dim=1)).float()
    step, entry = torch.arange(n_tokens, device=q.device)[:, None], torch.arange(n_metas + n_tokens, device=q.device)
    behind = step - (entry - n_metas)  # how many tokens before the query an entry is
    seen = behind >= 0
    if plan.attention == "local":
        seen &= (behind < config.sliding_window) | (entry < n_metas)
    return (scores / config.head_dim**0.5).masked_fill(~seen, float("-inf")).softmax(dim=-1)


def _queries_and_keys(model: Hymba, input_ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """The layer's queries (1, T, H, D), and the keys that it reads, (1, M + T, H_kv, D)."""
    with evaluating(model):
        metas, held = model.before(1)
        x, left = model.through(model.embedding(input_ids), 0, held, metas, keep=True, n_layers=layer)
    config, of_layer = model.config, model.layers[layer]
    position = config.n_meta_tokens + torch.arange(x.shape[1], device=x.device)
    turn = rotation(position, config.head_dim, config.rope_theta, dtype_of_products(x))
    source = config.layers()[layer].kv_source
    shared = left[source].tokens if source != layer else None
    q, (k, _) = queries_and_keys(of_layer, of_layer.mixer.heads(of_layer.norm_1(x)), turn, shared)
    return q, torch.cat([metas[source][0], k], dim=1)
