"""Hymba as its equations say: one row, meta tokens and tokens one sequence, masks, heads one by one, the SSM step by step."""

import math

import torch


def hymba(config, weights, ids):
    """Logits (T, V) of tokens ids (T,), and of each layer with attention its weights (H, T, M + T)."""
    metas = config.n_meta_tokens
    x = weights["embedding.weight"][ids]
    if metas:
        x = torch.cat([weights["meta_tokens.weight"], x])
    maps, keys = {}, {}
    for index, plan in enumerate(config.layers()):
        layer = {name.removeprefix(f"layers.{index}."): w for name, w in weights.items() if name.startswith(f"layers.{index}.")}
        mixed, of_layer = mix(config, plan, layer, rms_norm(x, layer["norm_1.weight"]), index, keys)
        x = x + mixed
        gate, up = (rms_norm(x, layer["norm_2.weight"]) @ layer["mlp.gate_and_up.weight"].T).chunk(2, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ layer["mlp.down.weight"].T
        if of_layer is not None:
            maps[index] = of_layer[:, metas:]
    return rms_norm(x, weights["norm.weight"])[metas:] @ weights["embedding.weight"].T, maps


def mix(config, plan, layer, x, index, keys):
    """What the mixer of a layer makes of x (L, d), and its attention weights; ``keys`` holds those of earlier layers."""
    w = {name.removeprefix("mixer."): weight for name, weight in layer.items() if name.startswith("mixer.")}
    projected = x @ w["in_proj.weight"].T
    if plan.attention is None:
        u, z = projected.chunk(2, dim=-1)
        return ssm(u, z, w) @ w["out_proj.weight"].T, None
    size, pieces = config.d_model // config.n_heads, config.ssm_expand_factor if plan.mamba else 1
    own = plan.kv_source == index
    widths = [config.n_heads * size, config.kv_heads * size * own, config.kv_heads * size * pieces * own]
    q, k, v, rest = projected.split([*widths, projected.shape[1] - sum(widths)], dim=-1)
    if own:
        k = torch.stack([turn(head, config.rope_theta) for head in k.split(size, dim=-1)])
        keys[index] = k, v.split(size * pieces, dim=-1)
    k, v = keys[plan.kv_source]
    maps, attended = [], []
    for head, query in enumerate(q.split(size, dim=-1)):
        of_head = head * config.kv_heads // config.n_heads
        scores = turn(query, config.rope_theta) @ k[of_head].T / math.sqrt(size)
        maps.append(torch.softmax(scores.masked_fill(~visible(config, plan, len(x)), -math.inf), dim=-1))
        attended.append(maps[-1] @ v[of_head])
    y = torch.cat(attended, dim=-1)
    if plan.mamba:
        u, z = rest.chunk(2, dim=-1)
        y = (rms_norm(y, w["norm_1.weight"]) + rms_norm(ssm(u, z, w), w["norm_2.weight"])) / 2
    return y @ w["out_proj.weight"].T, torch.stack(maps)


def visible(config, plan, length):
    """Which entries (L,) each entry (L,) sees."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(query + 1):
            near = plan.attention == "global" or query - key < config.sliding_window
            seen[query, key] = near or key < config.n_meta_tokens
    return seen


def turn(x, theta):
    """x (L, D), of which coordinates i and i + D / 2 are a complex number, turned by its position."""
    half = x.shape[1] // 2
    rate = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * rate
    turned = torch.complex(x[:, :half].double(), x[:, half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def ssm(u, z, w):
    """Convolution, selective recurrence and output gate of u and z (L, E)."""
    taps = w["conv1d.weight"][:, 0]
    padded = torch.cat([u.new_zeros(taps.shape[1] - 1, u.shape[1]), u])
    u = torch.stack([(padded[t : t + taps.shape[1]] * taps.T).sum(0) for t in range(len(u))]) + w["conv1d.bias"]
    u = u * torch.sigmoid(u)
    a, rank = -torch.exp(w["A_log"]), w["dt_proj.weight"].shape[1]
    low, b, c = (u @ w["x_proj.weight"].T).split([rank, a.shape[1], a.shape[1]], dim=-1)
    dt = torch.log1p(torch.exp(low @ w["dt_proj.weight"].T + w["dt_proj.bias"]))
    state, y = torch.zeros_like(a), []
    for t in range(len(u)):
        state = torch.exp(dt[t][:, None] * a) * state + (dt[t] * u[t])[:, None] * b[t]
        y.append(state @ c[t] + w["D"] * u[t])
    return torch.stack(y) * z * torch.sigmoid(z)


def rms_norm(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight
