"""What the layers of each layout are, who shares keys and values, and which fields are refused."""

import json

import pytest

from smt.hymba import ArchType, HymbaConfig

# Letters: attention global or local, Mamba, and both at once.
LAYERS = {
    "mamba": "m m m m m m m m m m m m m m m",
    "global": "g g g g g g g g g g g g g g g",
    "local": "l l l l l l l l l l l l l l l",
    "hybrid_50_50": "g m g m g m g m g m g m g m g",
    "hybrid": "g m l m l m l g l m l m l m g",
    "parallel": "gm lm lm lm lm lm lm gm lm lm lm lm lm lm gm",
}


@pytest.mark.parametrize("layout", LAYERS)
def test_a_layout_says_what_every_layer_is_made_of(layout):
    plans = HymbaConfig(layout=layout).layers()
    assert " ".join((plan.attention or "")[:1] + "m" * plan.mamba for plan in plans) == LAYERS[layout]
    assert HymbaConfig(layout=ArchType(layout)) == HymbaConfig(layout=layout)


@pytest.mark.parametrize(
    ("layout", "kv_sharing", "groups", "producers"),
    [
        # Of 15 layers, 9 keep keys and values where a hybrid shares in pairs, 8 where all are local, 5 where runs share.
        ("parallel", "pairs", [[1, 2], [3, 4], [5, 6], [8, 9], [10, 11], [12, 13]], 9),
        ("local", "pairs", [[index, index + 1] for index in range(0, 14, 2)], 8),
        ("parallel", "runs", [[1, 2, 3, 4, 5, 6], [8, 9, 10, 11, 12, 13]], 5),
        ("parallel", "none", [], 15),
        ("hybrid", "runs", [[2, 4, 6], [8, 10, 12]], 5),  # across the Mamba layers between them
        ("global", "runs", [], 15),
        ("mamba", "pairs", [], 0),
    ],
)
def test_neighbouring_local_layers_share_keys_and_values(layout, kv_sharing, groups, producers):
    config = HymbaConfig(layout=layout, kv_sharing=kv_sharing)
    assert config.get_kv_sharing_groups() == groups
    sources = [plan.kv_source for plan in config.layers()]
    assert len(set(sources) - {None}) == producers
    for group in groups:
        assert [sources[index] for index in group] == [group[0]] * len(group)


def test_presets_are_those_of_the_study_and_the_paper():
    study, small = HymbaConfig.preset("study"), HymbaConfig.preset("125m", dropout=0.0)
    assert [index for index, plan in enumerate(study.layers()) if plan.attention == "global"] == [0, 7, 14]
    assert (study.head_dim, study.sliding_window, study.n_meta_tokens) == (64, 128, 64)
    assert (small.n_layers, small.mlp_width, small.sliding_window, small.dropout) == (24, 1664, 1024, 0.0)
    assert HymbaConfig.from_dict(small.to_dict()) == small


def test_a_configuration_comes_back_from_json():
    config = HymbaConfig(layout="hybrid", global_layers=(0, 5))
    again = HymbaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"layout": "paralel"}, ValueError, "layout must be one of .*, got 'paralel'; did you mean 'parallel'"),
        ({"n_heads": 7}, ValueError, "n_heads must divide d_model = 512 into even widths, got 7"),
        ({"n_kv_heads": 3}, ValueError, "n_kv_heads must divide n_heads = 8, got 3"),
        ({"global_layers": (0, 15)}, ValueError, r"global_layers must lie in 0\.\.n_layers - 1 = 0\.\.14, got 15"),
        ({"global_layers": [0, "1"]}, TypeError, r"global_layers must be of type tuple\[int, ...\], got \(0, '1'\)"),
        ({"sliding_window": 0}, ValueError, "sliding_window must be at least 1, got 0"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"n_layers": "15"}, TypeError, "n_layers must be of type int, got '15'"),
    ],
)
def test_bad_fields_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        HymbaConfig(**fields)


def test_an_unknown_field_or_preset_is_refused_by_name():
    with pytest.raises(ValueError, match="HymbaConfig has no field 'windows'; did you mean 'sliding_window'"):
        HymbaConfig.from_dict({"windows": 1})
    with pytest.raises(ValueError, match="preset must be one of study, 125m, 350m, got 'tiny'"):
        HymbaConfig.preset("tiny")
