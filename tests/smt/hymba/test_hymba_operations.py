"""What a Hymba asks of the host while a device works: nothing is sent there or read back, in training and in decoding."""

import pytest
import torch
from models import SIZES, configuration, model_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from smt.hymba import attention
from smt_kernels import checks

# How a list of numbers comes to a device, and how a number comes back from it.
HOST = {"lift_fresh", "lift_fresh_copy", "_local_scalar_dense", "nonzero", "is_nonzero"}


class Asked(TorchDispatchMode):
    """Operations that need the host, and the dtypes of all results."""

    def __init__(self):
        super().__init__()
        self.of_host, self.dtypes = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        if name in HOST:
            self.of_host.append(name)
        results = out if isinstance(out, tuple | list) else [out]
        self.dtypes |= {each.dtype for each in results if isinstance(each, torch.Tensor)}
        return out


@pytest.fixture(autouse=True)
def unread(monkeypatch):
    """What reads tokens and counts where they are on a CPU."""
    monkeypatch.setattr("smt.hymba.model.check_tokens", lambda *arguments: None)
    monkeypatch.setattr(checks, "counts", lambda *arguments, **settings: None)


@pytest.mark.parametrize("name", ["hybrid", "parallel"])
def test_a_training_step_waits_for_nothing(name):
    model, ids = model_of(configuration(name)).train(), torch.randint(SIZES["vocab_size"], (2, 9))
    model.hidden(ids)  # makes a table of frequencies, once per device
    with Asked() as asked:
        model.hidden(ids).sum().backward()
    assert asked.of_host == [] and torch.float64 not in asked.dtypes


@torch.no_grad()
@pytest.mark.parametrize("name", ["hybrid", "parallel"])
def test_decoding_rows_of_any_lengths_waits_for_nothing(name):
    model, ids = model_of(configuration(name)), torch.randint(SIZES["vocab_size"], (2, 9))
    cache, token, kept = model.new_cache(2, 12), ids[:, :1].clone(), torch.arange(1)
    model(ids, n_valid=torch.tensor([9, 4]), cache=cache)
    with Asked() as asked:
        model(token, cache=cache)
    assert asked.of_host == [] and torch.float64 not in asked.dtypes
    alike = model.new_cache(2, 12)
    with Asked() as asked:
        assert alike.rows(kept).lengths == (0,)
    assert asked.of_host == []


@pytest.mark.parametrize(
    ("dtype", "n_keys", "grouped"), [(torch.bfloat16, 6, True), (torch.float32, 6, False), (torch.bfloat16, 30, False)]
)
def test_a_gpu_never_takes_the_attention_that_forms_all_scores(dtype, n_keys, grouped, monkeypatch):
    """Its fused kernels take grouped heads in half precision and without a mask, or else a key head for each query head."""
    asked = []

    def seen(q, k, v, *, enable_gqa, attn_mask=None, is_causal=False):
        asked.append((enable_gqa, k.shape[1], is_causal, attn_mask is None))
        return torch.empty_like(q)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", seen)
    with FakeTensorMode():
        q, k = (torch.empty(1, length, heads, 8, dtype=dtype, device="cuda") for length, heads in ((4, 4), (n_keys, 2)))
        assert attention.attend(q, (k, k[..., None, :]), None, None).shape == (1, 4, 4, 1, 8)
    is_square = n_keys == 6
    assert asked == [(grouped, 2 if grouped else 4, is_square, is_square)]
