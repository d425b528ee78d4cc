"""A process of its own: training steps with CUDA graphs on chunks that go on, beside the same steps without.

    python tests/smt/model/graph_steps.py cuda

It may stand still where recording goes wrong, so that whoever begins it gives it a time; it says where it stood.
"""

from __future__ import annotations

import copy
import faulthandler
import sys

import torch

from smt import SMTConfig, StrideMemoryTransformer

SECONDS, LENGTH, N_CHUNKS, N_SEQUENCES = 240, 64, 4, 3


def main(device: str) -> None:
    """Compare losses and gradients of every step.

    Raises:
        AssertionError: they differ.
    """
    torch.manual_seed(0)
    config = SMTConfig(
        vocab_size=256, d_model=64, transformer_n_layers=2, transformer_n_heads=2, ssm_n_layers=2, initializer_range=0.1,
        n_ssm_outputs=5, m_input_tokens=20, stride=8, write_group=4, dropout=0.0,
    )  # fmt: skip
    plain = StrideMemoryTransformer(config).to(device)
    recorded = copy.deepcopy(plain)
    recorded.compile(mode="reduce-overhead")
    for ids in torch.randint(256, (N_SEQUENCES, 4, N_CHUNKS * LENGTH), device=device):
        states = {plain: None, recorded: None}
        for chunk in ids.split(LENGTH, dim=1):
            losses = []
            torch.compiler.cudagraph_mark_step_begin()
            for model in states:
                loss, aux = model.loss(chunk, state=states[model])
                loss.backward()
                states[model] = aux.state.detach()
                losses.append(loss.detach().clone())
            torch.testing.assert_close(losses[1], losses[0])
            gradients = [{name: of.grad for name, of in model.named_parameters()} for model in (recorded, plain)]
            torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
            for model in states:
                model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    main(sys.argv[1])
