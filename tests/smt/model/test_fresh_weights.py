"""Fresh weights are drawn as GPT-2's and Mamba's are, at the deviation that the configuration gives."""

import math

import pytest
import torch
import torch.nn.functional as F

from smt import SMTConfig, StrideMemoryTransformer

LAYERS, SSM_LAYERS, RANK, STATE = 3, 5, 7, 6
STD = 0.05
SIZES = dict(
    vocab_size=101, d_model=48, d_k=40, transformer_n_layers=LAYERS, transformer_n_heads=4, ssm_n_layers=SSM_LAYERS,
    ssm_d_state=STATE, ssm_dt_rank=RANK, initializer_range=STD,
)  # fmt: skip
# Deviations of normal weights, by the ends of their names.
DRAWN = {
    ("embedding.weight", "w_q.weight", "w_k.weight", "in_proj.weight", "x_proj.weight"): STD,
    ("decoder.positions", "decoder.slot_type", "qkv.weight", "up.weight"): STD,
    ("attention.proj.weight", "down.weight"): STD / math.sqrt(2 * LAYERS),  # two branches of each layer end in the residual
    ("out_proj.weight",): STD / math.sqrt(SSM_LAYERS),
}


@pytest.mark.parametrize("encoding", ["token", "stride", "stream"])
def test_normal_weights_have_their_deviations_and_what_is_added_to_a_stream_is_smaller(encoding, fresh_gates):
    model = StrideMemoryTransformer(SMTConfig(**SIZES, encoding=encoding))
    unknown = {name for name, _ in model.named_parameters()}
    for ends, deviation in DRAWN.items():
        for name, weight in model.named_parameters():
            if name.endswith(ends):
                unknown.remove(name)
                error = 5 / math.sqrt(weight.numel())  # 5 standard errors, of the mean and (but for sqrt(2)) of the deviation
                assert abs(weight.mean()) < error * deviation, name
                assert weight.std().item() == pytest.approx(deviation, rel=error / math.sqrt(2)), name
    constants = {
        (".norm.weight", "norm_1.weight", "norm_2.weight", "mixer.D"): 1,
        ("qkv.bias", "attention.proj.bias", "up.bias", "down.bias", "norm.bias", "norm_1.bias", "norm_2.bias"): 0,
        ("slot_readout.weight",): 0,
        ("slot_gate",): 0.01 / 20,  # of what a gate is, a twentieth is its parameter
        ("norm_f.weight",): STD,  # so that slots have the scale of embeddings
    }
    for ends, value in constants.items():
        for name in [name for name in unknown if name.endswith(ends)]:
            unknown.remove(name)
            assert torch.equal(model.get_parameter(name), torch.full_like(model.get_parameter(name), value)), name
    assert {name.rpartition("mixer.")[2] for name in unknown} == {
        *("A_log", "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias")
    }


def test_time_steps_and_decays_begin_as_in_mamba():
    """Gu and Dao, 2023, section 3.6: A_n = -n, and time steps are log-uniform between 0.001 and 0.1."""
    model = StrideMemoryTransformer(SMTConfig(**SIZES, ssm_expand_factor=10))
    for layer in model.memory.ssm.layers:
        mixer = layer.mixer
        decay = mixer.prepare("mixer")["a"]
        torch.testing.assert_close(decay, -torch.arange(1.0, STATE + 1).expand_as(decay))
        log_dt = F.softplus(mixer.dt_proj.bias.double()).log10()
        assert -3.001 < log_dt.min() < -2.95 and -1.05 < log_dt.max() < -0.999
        assert log_dt.mean().item() == pytest.approx(-2, abs=5 * 2 / math.sqrt(12 * len(log_dt)))
        bound = RANK**-0.5
        assert 0.95 * bound < mixer.dt_proj.weight.abs().max() <= bound
        assert mixer.dt_proj.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
