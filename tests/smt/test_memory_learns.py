"""The memory learns: a key shown once is named 140 to 255 tokens later, where only slots can tell.

The memory is that of the defaults; the encoding is ``stream`` and dropout is off, which make the test five times shorter: the
default ``stride`` encodes four times as many positions, with the same slots.
"""

import torch

from smt import SMTConfig, StrideMemoryTransformer

N_KEYS, N_FILLERS, LENGTH = 32, 64, 256
MARKER, QUESTION = N_FILLERS + N_KEYS, N_FILLERS + N_KEYS + 1
STEPS = 300


def recall_batch(rows, generator):
    """Ids of random filler with a marker and a key in the first 60 tokens and a question in the last 56; targets there."""
    ids = torch.randint(N_FILLERS, (rows, LENGTH), generator=generator)
    shown = torch.randint(59, (rows,), generator=generator)
    asked = torch.randint(200, LENGTH, (rows,), generator=generator)
    key = N_FILLERS + torch.randint(N_KEYS, (rows,), generator=generator)
    row = torch.arange(rows)
    ids[row, shown], ids[row, shown + 1], ids[row, asked] = MARKER, key, QUESTION
    targets = torch.full((rows, LENGTH), -100)
    targets[row, asked] = key
    return ids, targets


def recall_accuracy(model):
    ids, targets = recall_batch(192, torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        hidden, _ = model.eval().encode(ids)
        predicted = (hidden[targets >= 0] @ model.embedding.weight.T).argmax(-1)
    model.train()
    return (predicted == targets[targets >= 0]).double().mean().item()


def train(seed, steps, **switches):
    """Accuracy after at most ``steps`` steps, stopping at 95 %, and the steps taken."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = SMTConfig(
        vocab_size=QUESTION + 1,
        d_model=64,
        d_k=64,
        transformer_n_layers=2,
        transformer_n_heads=4,
        ssm_n_layers=2,
        encoding="stream",
        dropout=0.0,
        **switches,
    )
    model = StrideMemoryTransformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    for step in range(1, steps + 1):
        loss, _ = model.loss(*recall_batch(32, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        if step % 30 == 0 and (accuracy := recall_accuracy(model)) >= 0.95:
            break
    return accuracy, step


def test_memory_recalls_what_the_window_has_lost_and_nothing_else_does():
    accuracy, steps = train(seed=0, steps=STEPS)
    assert accuracy >= 0.95, f"{accuracy:.1%} after {steps} steps"
    chance, _ = train(seed=0, steps=steps, writes=False)
    # 192 questions at 1 in 32: 6 right on average; 17 or more have a probability below 2e-4.
    assert chance < 17 / 192, f"{chance:.1%} without writes"
