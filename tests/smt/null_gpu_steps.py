"""A process of its own, on the null GPU: what steps of training and decoding ask of the device, as JSON.

    python -m smt_kernels.testing.null_gpu python tests/smt/null_gpu_steps.py

It begins on the null GPU or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from smt import SMTConfig, StrideMemoryTransformer
from smt_kernels.testing.null_gpu import counts

LENGTH = 64


def main() -> None:
    config = SMTConfig(
        vocab_size=256, d_model=64, transformer_n_layers=2, transformer_n_heads=2, ssm_n_layers=2,
        n_ssm_outputs=5, m_input_tokens=20, stride=8, write_group=4, dropout=0.1,
    )  # fmt: skip
    model = StrideMemoryTransformer(config).to("cuda")
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    ids = torch.randint(256, (2, 2 * LENGTH), device="cuda")
    first, second = ids.split(LENGTH, dim=1)
    _, aux = model.loss(first)
    state = aux.state.detach()  # the second chunk goes on from it

    def backward() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = model.loss(second, state=state)
        loss.backward()

    def step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def record() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream()):
            backward()

    def record_on_two_streams() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream()):
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                first * 2
            torch.cuda.current_stream().wait_stream(other)

    def decode() -> None:
        with torch.no_grad():
            model(second[:, :1], state=state)

    def packed() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = model.loss(ids.view(1, -1), cu_seqlens=[0, 30, 100, 170, 2 * ids.shape[1]])
        loss.backward()

    def decode_rows_at_several_steps() -> None:
        nonlocal ragged
        with torch.no_grad():
            for _ in range(2 * config.stride):
                ragged = model(ids[:, :1], state=ragged)[1].state

    ragged = model(ids.view(1, -1), cu_seqlens=[0, 100, 2 * ids.shape[1]])[1].state.detach()
    other = torch.cuda.Stream()
    found = {"training": asked(step), "backward": asked(backward), "recorded": asked(record), "decoding": asked(decode)}
    found |= {"packed": asked(packed), "rows at several steps": asked(decode_rows_at_several_steps)}
    found["two streams"] = asked(record_on_two_streams)
    other.synchronize()  # which the graph has let go
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            float(parameters[0].sum())
    except RuntimeError as error:
        found["waiting while a graph is recorded"] = str(error)
    print(json.dumps(found))


def asked(call: Callable[[], None]) -> dict[str, Any]:
    """The counts of the third ``call``: in the first two, kernels are compiled and memory is allocated."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    before = counts()
    call()
    return asdict(counts() - before)


if __name__ == "__main__":
    with torch.cuda.stream(torch.cuda.Stream()):  # on the default stream no graph can be recorded
        main()
