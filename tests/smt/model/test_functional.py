"""``torch.func`` transforms the whole model: gradients of functions, of each row apart, and of several models at once."""

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from smt import SMTConfig, StrideMemoryTransformer
from smt.model.rms_norm import RMSNorm


def build(encoding, seed=0):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=37, d_model=16, d_k=8, transformer_n_layers=1, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4,
        initializer_range=0.3, n_ssm_outputs=4, m_input_tokens=9, stride=3, dropout=0.0, encoding=encoding,
    )  # fmt: skip
    return StrideMemoryTransformer(SMTConfig(**sizes)).double()


@pytest.mark.parametrize("encoding", ["stride", "stream"])
def test_gradients_of_each_row_are_those_of_the_row_alone_and_add_up_to_that_of_the_batch(encoding):
    model, ids = build(encoding), torch.randint(37, (2, 10))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights, ids):
        return functional_call(model, weights, (ids,), {"targets": ids.roll(-1, 1)})[0]

    model(ids, targets=ids.roll(-1, 1))[0].backward()
    batch, each = grad(loss)(weights, ids), vmap(grad(loss), in_dims=(None, 0))(weights, ids[:, None])
    of_mean = grad(lambda weights: vmap(lambda row: loss(weights, row))(ids[:, None]).mean())(weights)
    for name, parameter in model.named_parameters():
        for found in (batch[name], each[name].mean(0), of_mean[name]):
            torch.testing.assert_close(found, parameter.grad, msg=name)


def test_several_models_are_one_call():
    models, ids = [build("stream", seed).eval() for seed in (1, 2)], torch.randint(37, (2, 14))
    weights, _ = stack_module_state(models)
    logits = vmap(lambda weights: functional_call(models[0], weights, (ids,))[0])(weights)
    torch.testing.assert_close(logits, torch.stack([model(ids)[0] for model in models]))


def test_a_norm_on_a_cpu_has_its_gradient():
    norm, x = RMSNorm(4, eps=1e-5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(norm(x).sin().sum(), x)
    torch.testing.assert_close(grad(lambda x: norm(x).sin().sum())(x.detach()), expected)
