"""The model of ``docs/model.md`` as one loop over steps, with Hugging Face's parts; it shares no code with ``smt``."""

import math

import torch
import torch.nn.functional as F


def rms(x):
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-5)


def pool(entries, w_q, w_k, norm):
    """entries: list of (B, d). Returns the pooled vector (B, d) and the weights (B, len(entries))."""
    x = torch.stack(entries, dim=1)
    x = rms(x) if norm else x
    query = x.mean(dim=1) @ w_q.T
    scores = ((x @ w_k.T) * query[:, None]).sum(-1) / math.sqrt(w_q.shape[0])
    weights = scores.softmax(-1)
    return (weights[..., None] * x).sum(1), weights


def gated(gpt2, gates, slots_present):
    """Hooks that scale, in every layer, the values of the first ``slots_present()`` entries by a gate for each head."""

    def hook(gate):
        def scale(module, inputs, qkv):
            qkv = qkv.clone()
            values = qkv[..., -qkv.shape[-1] // 3 :].unflatten(-1, (len(gate), -1))
            values[:, : slots_present()] *= gate[:, None]
            return qkv

        return scale

    return [layer.attn.c_attn.register_forward_hook(hook(gate)) for layer, gate in zip(gpt2.h, gates, strict=True)]


class Stream:
    """The decoder of ``stream``: every layer keeps the keys and values of every token and of every slot there has been.

    weights: those of each layer, by their last names; ``slot_type`` (d,), and ``norm``, that after the last layer.
    """

    def __init__(self, layers, slot_type, norm, *, heads, kv_heads, theta, n, m, stride):
        self.layers, self.slot_type, self.norm, self.theta = layers, slot_type, norm, theta
        self.heads, self.kv_heads, self.n, self.m, self.stride = heads, kv_heads, n, m, stride
        self.tokens, self.slots = ([[] for _ in layers] for _ in range(2))  # of each layer (key, value) after (key, value)
        self.before = 0  # slots that stand before the first one

    def begin_with(self, nothing):
        """The published form: before the first step there are zeros (B, d), n slots and m tokens."""
        self.before = self.n
        for _ in range(self.n):
            self.add_slot(nothing)
        for step in range(-self.m, 0):
            self.add_token(nothing, step)

    def add_token(self, x, step):
        """What the token x (B, d) at ``step`` is after the decoder; it sees the last slots of those written before it."""
        written = self.before + max(0, (step - 1) // self.stride)
        for layer, slots, tokens in zip(self.layers, self.slots, self.tokens, strict=True):
            query, entry = self.heads_of(layer, x, step)
            tokens.append(entry)
            x = self.after(layer, x, query, slots[max(0, written - self.n) : written] + tokens[-self.m :])
        return F.layer_norm(x, x.shape[-1:], *self.norm)

    def add_slot(self, x):
        """A slot (B, d), which stands at its write step and sees the slots up to itself."""
        x = x + self.slot_type
        for layer, slots in zip(self.layers, self.slots, strict=True):
            query, (key, value) = self.heads_of(layer, x, self.stride * (len(slots) - self.before + 1))
            slots.append((key, value * layer["gate"][:, None]))
            x = self.after(layer, x, query, slots[-self.n :])

    def heads_of(self, layer, x, step):
        heads = F.linear(F.layer_norm(x, x.shape[-1:], *layer["norm_1"]), *layer["qkv"])
        query, key, value = heads.unflatten(-1, (self.heads + 2 * self.kv_heads, -1)).split(
            [self.heads, self.kv_heads, self.kv_heads], dim=1
        )
        return self.turned(query, step), (self.turned(key, step), value)

    def turned(self, x, step):
        """x (B, H, D): coordinates i and i + D / 2 are a complex number, turned by step theta^(-2 i / D)."""
        half = x.shape[-1] // 2
        angles = step * self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    def after(self, layer, x, query, entries):
        keys, values = (
            torch.stack(part, dim=2).repeat_interleave(self.heads // self.kv_heads, dim=1)  # (B, H, entries, D)
            for part in zip(*entries, strict=True)
        )
        weights = ((query[:, :, None] * keys).sum(-1) / math.sqrt(query.shape[-1])).softmax(-1)
        x = x + F.linear((weights[..., None] * values).sum(2).flatten(1), *layer["proj"])
        inner = F.linear(F.layer_norm(x, x.shape[-1:], *layer["norm_2"]), *layer["up"])
        return x + F.linear(F.gelu(inner, approximate="tanh"), *layer["down"])


def naive_forward(
    ids, embedding, gpt2, mamba, w_q, w_k, *, n, m, stride, encoding, empty, source, norm, group, gates=None, readout=None
):
    """Logits (B, T, V), write steps, and weights per write; one GPT-2 call per step, on the existing entries of its window.

    In ``stream`` there are no windows, and ``gpt2`` is a ``Stream``, which has the gates.
    """
    present = []
    has_hooks = gates is not None and encoding != "stream"
    hooks = gated(gpt2, gates, lambda: sum(position < n for position in present)) if has_hooks else []
    x = embedding[ids]
    batch, length, width = x.shape
    nothing = torch.zeros(batch, width, dtype=x.dtype)
    pooled, slots, logits, write_steps, all_weights = [], [], [], [], []

    if encoding == "stream" and empty == "zero":
        gpt2.begin_with(nothing)

    def slot(index):
        return slots[index] if index >= 0 else nothing if empty == "zero" else None

    def token(step):
        return x[:, step] if step >= 0 else nothing if empty == "zero" else None

    for t in range(length):
        written = 0 if t == 0 else (t - 1) // stride
        assert written == len(slots)
        if encoding == "stream":
            hidden = gpt2.add_token(x[:, t], t)
        else:
            end = t if encoding == "token" else stride * math.ceil(t / stride)
            seen = range(end - m + 1, min(end, t) + 1)
            window = [slot(written - n + i) for i in range(n)] + [token(step) for step in seen]
            present[:] = [position for position, entry in enumerate(window) if entry is not None]
            entries = torch.stack([window[position] for position in present], dim=1)
            hidden = gpt2(inputs_embeds=entries, position_ids=torch.tensor([present])).last_hidden_state[:, -1]
        if readout is not None and written > 0:
            hidden = hidden + rms(slots[-1]) @ readout.T
        logits.append(hidden @ embedding.T)
        if t > 0 and t % stride == 0:
            w = len(slots)
            group_start = (w // group) * group
            entries = [token(step) for step in range(t - m + 1, t + 1)]
            if source == "window":
                entries = [slot(index) for index in range(group_start - n, group_start)] + entries
            vector, weights = pool([entry for entry in entries if entry is not None], w_q, w_k, norm)
            pooled.append(vector)
            slots.append(mamba(inputs_embeds=torch.stack(pooled, dim=1)).last_hidden_state[:, -1])
            if encoding == "stream":
                gpt2.add_slot(slots[-1])
            write_steps.append(t)
            all_weights.append(weights)
    for hook in hooks:
        hook.remove()
    return torch.stack(logits, dim=1), write_steps, all_weights
