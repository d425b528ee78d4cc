"""The model of ``docs/model.md`` as one loop over steps, made of Hugging Face parts; it shares no code with ``smt``."""

import math

import torch


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


def naive_forward(
    ids, embedding, gpt2, mamba, w_q, w_k, *, n, m, stride, encoding, empty, source, norm, group, gates=None, readout=None
):
    """Logits (B, T, V), write steps, and weights per write; one GPT-2 call per step, on the existing entries of its window."""
    present = []
    hooks = gated(gpt2, gates, lambda: sum(position < n for position in present)) if gates is not None else []
    x = embedding[ids]
    batch, length, width = x.shape
    nothing = torch.zeros(batch, width, dtype=x.dtype)
    pooled, slots, logits, write_steps, all_weights = [], [], [], [], []

    def slot(index):
        return slots[index] if index >= 0 else nothing if empty == "zero" else None

    def token(step):
        return x[:, step] if step >= 0 else nothing if empty == "zero" else None

    for t in range(length):
        written = 0 if t == 0 else (t - 1) // stride
        assert written == len(slots)
        end = t if encoding == "token" else stride * math.ceil(t / stride)
        window = [slot(written - n + i) for i in range(n)] + [token(end - m + 1 + j) for j in range(m) if end - m + 1 + j <= t]
        present[:] = [position for position, entry in enumerate(window) if entry is not None]
        hidden = gpt2(
            inputs_embeds=torch.stack([window[position] for position in present], dim=1), position_ids=torch.tensor([present])
        ).last_hidden_state[:, -1]
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
            write_steps.append(t)
            all_weights.append(weights)
    for hook in hooks:
        hook.remove()
    return torch.stack(logits, dim=1), write_steps, all_weights
