"""A Hymba where kernels run: the numbers of the reference, forward and backward, in mixed precision, and in decoding."""

import copy

import pytest
import torch
from models import SIZES, configuration, model_of

from smt_kernels import last_choice, use_backend

# A global layer and a local one; heads of 24 on grouped keys.
CONFIG = configuration("parallel", n_layers=2, d_model=48, n_heads=2, n_kv_heads=1)


@pytest.fixture
def model(device):
    torch.manual_seed(7)
    return model_of(CONFIG).to(device)


def tokens(device, *shape):
    return torch.randint(SIZES["vocab_size"], shape, device=device)


def loss_and_gradients(model, ids, backend, dtype=None):
    with use_backend(backend), torch.autocast(ids.device.type, dtype, enabled=dtype is not None):
        loss = model(ids, targets=ids.roll(-1, 1))["loss"]
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([loss.detach().flatten(), *(gradient.flatten() for gradient in gradients)]).double()


@pytest.mark.triton
@pytest.mark.native
@pytest.mark.parametrize("dtype", [pytest.param(None, marks=pytest.mark.cuda), torch.bfloat16], ids=str)
def test_kernels_give_the_loss_and_the_gradients_of_the_reference(model, dtype, device):
    ids = tokens(device, 2, 9)
    exact = loss_and_gradients(copy.deepcopy(model).double(), ids, "reference")
    plain, found = (loss_and_gradients(model, ids, name, dtype) for name in ("reference", "triton"))
    assert {last_choice(name).backend for name in ("stream_attention", "stride_write")} == {"triton"}
    assert (found - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.triton
@pytest.mark.native
@torch.no_grad()
def test_decoding_with_kernels_gives_what_a_whole_pass_does(model, device):
    ids, counts = tokens(device, 2, 7), torch.tensor([3, 5], device=device)
    with use_backend("reference"):
        whole = model(ids)["logits"]
    with use_backend("triton"):
        cache, rows = model.new_cache(2), torch.arange(2, device=device)
        model(ids[:, :5], n_valid=counts, cache=cache)
        for step in range(2):  # at the end of a ring, and past it
            logits = model(ids[rows, counts + step][:, None], cache=cache)["logits"][:, 0]
            torch.testing.assert_close(logits, whole[rows, counts + step], rtol=1e-4, atol=1e-4)
    assert last_choice("stream_attention_decode").backend == last_choice("stride_write").backend == "triton"
