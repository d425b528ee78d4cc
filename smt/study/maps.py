"""Whom attention looks at: weights of a global and of a local layer after each stage, drawn from runs that have finished."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smt.hymba.config import HymbaConfig
from smt.hymba.maps import attention_map
from smt.runtime.files import write_files
from smt.runtime.pictures import empty_picture
from smt.study.cell import ORPO, TRAINING, load, measured_file
from smt.study.figures import NAMES, STAGE_NAMES
from smt.study.plots import LARGE, MEDIUM, SMALL, save
from smt.study.prepared import Prepared
from smt.study.run import cells_of
from smt.training.settings import RunConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Weights are drawn from this one on, on a logarithmic scale: an even look at 200 entries gives each 0.005.
LEAST = 1e-4


def draw_maps(prepared: Prepared) -> list[Path]:
    """One picture for each stage that the first seed of ``map_model`` has finished.

    Raises:
        ValueError: the model is not in the study, has not finished stage 1, or has no layer of one kind.
    """
    settings = prepared.settings
    cells = [cell for cell in cells_of(prepared) if cell.model == settings.map_model]
    if not cells or not measured_file(cells[0].folder, TRAINING).is_file():
        raise ValueError(f"maps are drawn from runs that have finished; {settings.map_model} has none in {prepared.folder}")
    cell, tokens = cells[0], prepared.text.validation[0][: settings.map_tokens]
    ids = torch.from_numpy(tokens.astype("int64"))[None]
    files = []
    for stage in (TRAINING, ORPO):
        run = cell.folder / stage
        if measured_file(cell.folder, stage).is_file():
            config = RunConfig.from_yaml(run / "config.yaml")
            model = load(run, config)
            device = model.embedding.weight.device
            layers = _layers(config.model)
            weights = {kind: attention_map(model, ids.to(device), layer).cpu() for kind, layer in layers.items()}
            path = prepared.folder / f"attention_maps_{stage}.png"
            title = f"{NAMES[cell.model]}, seed {cell.seed}, after {STAGE_NAMES[stage]}: mean weights of all heads"
            write_files({path: partial(plot_maps, weights, layers, config.model, title)})
            files.append(path)
    return files


def _layers(config: HymbaConfig) -> dict[str, int]:
    """A global and a local layer, in the middle of those there are."""
    found = {}
    for kind in ("global", "local"):
        of_kind = [index for index, plan in enumerate(config.layers()) if plan.attention == kind]
        if not of_kind:
            raise ValueError(f"maps need a model with global and local layers, {config.layout} has no {kind} ones")
        found[kind] = of_kind[len(of_kind) // 2]
    return found


def plot_maps(weights: dict[str, Tensor], layers: dict[str, int], config: HymbaConfig, title: str, path: str | Path) -> None:
    """Weights (H, T, M + T) by kind of layer, the meta tokens' columns marked."""
    canvas = empty_picture((16, 7.6))
    panels = canvas.subplots(1, len(weights))
    for axes, (kind, of_layer) in zip(panels, weights.items(), strict=True):
        _map(axes, of_layer.mean(0), config.n_meta_tokens)
        meta = of_layer[..., : config.n_meta_tokens].sum(-1).mean().item()
        reach = "sees everything before" if kind == "global" else f"window of {config.sliding_window} tokens"
        axes.set_title(
            f"layer {layers[kind] + 1} of {config.n_layers}, {kind}: {reach}\n{meta:.0%} of the weight on meta tokens",
            fontsize=LARGE,
        )
    canvas.colorbar(panels[0].images[0], ax=panels, label="attention weight", shrink=0.8)
    canvas.suptitle(title, fontsize=LARGE)
    save(canvas, path)


def _map(axes: Axes, weights: Tensor, n_metas: int) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    n_tokens = weights.shape[0]
    # Meta tokens stand before the first token.
    extent = (-n_metas, n_tokens, n_tokens, 0)
    norm = LogNorm(LEAST, 1.0)
    axes.imshow(
        weights.clamp(min=LEAST).numpy(), cmap="magma", norm=norm, extent=extent, aspect="auto", interpolation="nearest"
    )
    if n_metas:
        frame = Rectangle((-n_metas, 0), n_metas, n_tokens, fill=False, edgecolor="tab:cyan", linewidth=3, clip_on=False)
        axes.add_patch(frame)
        box = {"facecolor": "white", "edgecolor": "tab:cyan", "boxstyle": "round"}
        axes.annotate("meta tokens", (-n_metas / 2, 0.97 * n_tokens), rotation=90, fontsize=MEDIUM, ha="center", bbox=box)
    axes.set_xlabel("looked at: meta tokens (left of 0), then tokens of the text", fontsize=MEDIUM)
    axes.set_ylabel("token that looks", fontsize=MEDIUM)
    axes.tick_params(labelsize=SMALL)
