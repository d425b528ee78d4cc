"""The configuration refuses what cannot work, when it is built, and names the field."""

import math
import warnings

import pytest

from smt import SMTConfig
from smt.runtime.fields import parse


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"stride": 51}, ValueError, r"stride must lie in 1\.\.m_input_tokens = 1\.\.50, got 51"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"d_model": 770}, ValueError, "transformer_n_heads must divide d_model = 770, got 12"),
        ({"transformer_n_kv_heads": 5}, ValueError, "transformer_n_kv_heads must divide transformer_n_heads = 12, got 5"),
        ({"n_ssm_outputs": 79}, ValueError, r"n_ssm_outputs \+ m_input_tokens must be at most 128, got 129"),
        ({"n_ssm_outputs": -1}, ValueError, "n_ssm_outputs must be at least 0, got -1"),
        ({"encoding": "window"}, ValueError, "encoding must be one of token, stride, stream, got 'window'"),
        ({"empty_slots": "drop"}, ValueError, "empty_slots must be one of mask, zero, got 'drop'"),
        ({"pool_source": "slots"}, ValueError, "pool_source must be one of window, tokens, got 'slots'"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"pooling_dropout": -0.1}, ValueError, r"pooling_dropout must lie in \[0, 1\), got -0.1"),
        ({"initializer_range": 1.0}, ValueError, r"initializer_range must lie in \[0, 1\), got 1.0"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"write_group": 0}, ValueError, "write_group must be at least 1, got 0"),
        ({"ssm_d_conv": 1}, ValueError, "ssm_d_conv must be at least 2, got 1"),
        ({"rope_theta": 1.0}, ValueError, "rope_theta must be above 1, got 1.0"),
        ({"rope_theta": math.nan}, ValueError, "rope_theta must be finite, got nan"),
        ({"encoding": "stream", "d_model": 36, "transformer_n_heads": 4}, ValueError, "must be even, got 9"),
        ({"stride": "16"}, TypeError, "stride must be of type int, got '16'"),
        ({"pooling_norm": 1}, TypeError, "pooling_norm must be of type bool, got 1"),
        ({"stride": True}, TypeError, "stride must be of type int, got True"),
        ({"d_model": 768.0}, TypeError, "d_model must be of type int, got 768.0"),
    ],
)
def test_bad_fields_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        SMTConfig(**fields)


def test_an_unknown_field_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="no field 'stirde'; did you mean 'stride'"):
        SMTConfig.from_dict({"stirde": 16})
    with pytest.raises(ValueError, match="no field 'stirde'; did you mean 'stride'"):
        parse(SMTConfig, "stirde", "3")


@pytest.mark.parametrize("stride", [4, 7, 33, 40])
def test_a_stride_far_from_a_third_of_the_tokens_warns(stride):
    with pytest.warns(UserWarning, match=f"stride = {stride} is far from m_input_tokens // 3 = 16"):
        SMTConfig(stride=stride)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_a_stride_of_half_to_twice_a_third_of_the_tokens_is_usual(stride):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SMTConfig(stride=stride)


def test_derived_sizes():
    config = SMTConfig()
    assert (config.window_size, config.write_frequency, config.coverage) == (65, 1 / 16, 50 / 16)
    assert (config.head_dim, config.n_kv_heads, config.ssm_d_inner, config.dt_rank) == (64, 12, 1536, 48)
    assert config.n_state_slots == 15 + 8 - 1
    assert (config.dropout, config.pooling_dropout, config.rope_theta) == (0.1, 0.0, 10_000)


@pytest.mark.parametrize(("d_model", "std"), [(768, 0.02), (192, 0.04), (48, 0.08)])
def test_fresh_weights_follow_the_width_unless_their_deviation_is_given(d_model, std):
    assert SMTConfig(d_model=d_model, transformer_n_heads=12).initializer_std == pytest.approx(std)
    assert SMTConfig(d_model=d_model, transformer_n_heads=12, initializer_range=0.3).initializer_std == 0.3


def test_pooling_is_as_wide_as_the_model_unless_its_width_is_given():
    assert SMTConfig().d_k == 768 and SMTConfig(d_model=96).d_k == 96 and SMTConfig(d_model=96, d_k=32).d_k == 32
    assert SMTConfig.from_dict(SMTConfig(d_model=96).to_dict()) == SMTConfig(d_model=96)


def test_presets_are_the_sizes_of_the_source_documents():

    def sizes(config):
        return (config.n_ssm_outputs, config.m_input_tokens, config.stride)

    assert sizes(SMTConfig.preset("wikitext")) == (15, 50, 16)
    assert sizes(SMTConfig.preset("pg19")) == (20, 80, 25)
    small = SMTConfig.preset("small", vocab_size=100)
    assert sizes(small) == (10, 30, 10)
    assert (small.d_model, small.transformer_n_layers, small.ssm_n_layers, small.transformer_n_heads) == (512, 6, 12, 8)
    assert (small.vocab_size, small.d_k) == (100, 512)
    published = SMTConfig.published()
    assert (published.encoding, published.empty_slots, published.pool_source) == ("token", "zero", "window")
    assert (published.write_group, published.pooling_norm) == (1, False)
    assert (published.dropout, published.pooling_dropout) == (0.1, 0.1)
    assert (published.slot_gate, published.slot_readout) == ("open", False)
    with pytest.raises(ValueError, match="preset must be one of wikitext, pg19, small, got 'large'"):
        SMTConfig.preset("large")


def test_yaml_round_trip(tmp_path):
    config = SMTConfig.preset("pg19", transformer_n_kv_heads=4, encoding="stream")
    config.to_yaml(tmp_path / "config.yaml")
    assert SMTConfig.from_yaml(tmp_path / "config.yaml") == config
    (tmp_path / "some.yaml").write_text("rope_theta: 1e4\nstride: 20\n")  # YAML takes 1e4 for a text
    assert SMTConfig.from_yaml(tmp_path / "some.yaml") == SMTConfig(rope_theta=1e4, stride=20)
    (tmp_path / "unknown.yaml").write_text("stirde: 20\n")
    with pytest.raises(ValueError, match="no field 'stirde'; did you mean 'stride'"):
        SMTConfig.from_yaml(tmp_path / "unknown.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold a mapping of SMTConfig fields, got list"):
        SMTConfig.from_yaml(tmp_path / "list.yaml")
    (tmp_path / "half.yaml").write_text("stride: [")
    with pytest.raises(ValueError, match=r"half\.yaml is not YAML"):
        SMTConfig.from_yaml(tmp_path / "half.yaml")


def test_summary_names_what_matters():
    text = SMTConfig().summary()
    for part in (
        "65 = 15 slots + 50 tokens",
        "every 16 steps",
        "(6.25%)",
        "3.1 times",
        "12 layers",
        "24 Mamba layers",
        "50280",
    ):
        assert part in text
    assert math.isclose(SMTConfig().coverage, 3.125)
