"""A Hymba in a folder comes back as it was, and is what it says it is."""

import pytest
import torch
import yaml
from models import configuration, model_of

from smt import StrideMemoryTransformer
from smt.baselines import architecture_of
from smt.hymba import Hymba


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_saved_model_comes_back_with_its_config_weights_and_number_format(dtype, tmp_path):
    model, ids = model_of(configuration("parallel", dropout=0.3), dtype), torch.randint(40, (2, 9))
    model.save_pretrained(tmp_path / "deep" / "folder")
    again = Hymba.from_pretrained(tmp_path / "deep" / "folder")
    assert again.config == model.config and not again.training
    for name, parameter in model.named_parameters():
        loaded = again.get_parameter(name)
        expected = torch.float32 if name.endswith("A_log") else dtype
        assert torch.equal(loaded, parameter) and loaded.dtype == expected and loaded.requires_grad, name
    assert torch.equal(again(ids)["logits"], model(ids)["logits"])
    again.train()(ids, targets=ids)["loss"].backward()
    assert all(parameter.grad is not None for parameter in again.parameters())


def test_a_folder_says_which_architecture_it_holds(tmp_path):
    model_of(configuration("hybrid")).save_pretrained(tmp_path)
    assert architecture_of(tmp_path) == "hymba"
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["global_layers"] == [0, 5]
    with pytest.raises(ValueError, match=r"config\.yaml must be of a model of architecture smt, it is of hymba"):
        StrideMemoryTransformer.from_pretrained(tmp_path)
    (tmp_path / "config.yaml").write_text("architecture: hymba\nmodel: 3")
    with pytest.raises(ValueError, match="must hold a mapping of HymbaConfig fields, got int"):
        Hymba.from_pretrained(tmp_path)
