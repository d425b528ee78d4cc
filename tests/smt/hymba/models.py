"""Small models of every layout, whose norms and scales are no longer all the same."""

import torch

from smt.hymba import Hymba, HymbaConfig

SIZES = {"vocab_size": 40, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_mlp": 40, "sliding_window": 4, "n_meta_tokens": 6}
SIZES |= {"ssm_d_state": 5, "dropout": 0.0, "initializer_range": 0.25}
# In each of the hybrids two local layers share keys and values; in ``hybrid`` a Mamba layer lies between them.
LAYOUTS = {
    "mamba": {"layout": "mamba", "n_layers": 3},
    "global": {"layout": "global", "n_layers": 3},
    "local": {"layout": "local", "n_layers": 3},
    "hybrid_50_50": {"layout": "hybrid_50_50", "n_layers": 4},
    "hybrid": {"layout": "hybrid", "n_layers": 6, "global_layers": (0, 5)},
    "parallel": {"layout": "parallel", "n_layers": 4, "global_layers": (0,)},
    "parallel-runs": {"layout": "parallel", "n_layers": 5, "global_layers": (0,), "kv_sharing": "runs"},
    "parallel-none": {"layout": "parallel", "n_layers": 3, "global_layers": (2,), "kv_sharing": "none"},
    "parallel-no-metas": {"layout": "parallel", "n_layers": 4, "global_layers": (3,), "n_meta_tokens": 0},
    "parallel-narrow": {"layout": "parallel", "n_layers": 3, "global_layers": (1,), "ssm_expand_factor": 1, "n_kv_heads": None},
}


def configuration(name, **changes):
    return HymbaConfig(**{**SIZES, **LAYOUTS[name], **changes})


def model_of(config, dtype=torch.float32):
    model = Hymba(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model
