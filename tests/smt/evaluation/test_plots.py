"""Plots of evaluations and of runs can be read: axes have numbers, numbers do not overlap, and a curve of one point is seen."""

from itertools import combinations
from types import SimpleNamespace

import pytest

from smt.evaluation import plots
from smt.evaluation.ablation import Ablation
from smt.evaluation.pooling import PoolingAnalysis, WritePooling
from smt.evaluation.position import LossByPosition, Mean
from smt.training.plots import curves_of_runs, training_curves

SPANS = {"window": "1 to 16", "slots": "17 to 48", "beyond": "beyond 48", "all": "all"}
ONE_STEP = SimpleNamespace(train_loss=[5.0], train_steps=[1], val_loss=[5.2], eval_steps=[1])


@pytest.fixture
def figure(monkeypatch):
    """The last figure that was saved; ``draw`` lays it out."""
    saved = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *arguments, **options: saved.append(figure))

    def last():
        saved[-1].canvas.draw()
        return saved[-1]

    return last


def mean(nats, margin=0.01):
    return Mean(nats, margin, 1000, 3)


def by_position(first, n_bins):
    edges = tuple(first * 2**index for index in range(n_bins + 1))
    return LossByPosition(edges, tuple(mean(0.02 * index) for index in range(n_bins)))


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(("first", "n_bins"), [(256, 3), (1, 16)], ids=["short", "long"])
def test_positions_have_whole_numbers_at_every_tick_and_differences_an_even_axis(first, n_bins, figure):
    plots.plot_position_differences({"a": by_position(first, n_bins)}, "encoding=stream, pool_source=window", "a.png")
    axes = figure().axes[0]
    assert axes.yaxis.label.get_window_extent().height < axes.get_window_extent().height
    low, high = axes.get_xlim()
    shown = [tick.label1.get_text() for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert 2 <= len([text for text in shown if text]) <= 10
    assert all(text.replace(",", "").isdigit() for text in shown if text)
    assert not len(axes.xaxis.get_minorticklocs()) and axes.get_yscale() == "linear"


@pytest.mark.usefixtures("drawn")
def test_numbers_of_bars_overlap_neither_each_other_nor_the_axis(figure):
    whole = Ablation(*(mean(5.0) for _ in SPANS))
    hindered = {
        "slots zeroed": Ablation(mean(5.1234), mean(5.123), mean(4.99996), mean(5.112)),
        "frozen after 48": Ablation(mean(5.1233), mean(4.99996), mean(5.01), mean(5.111)),
        "no writes": Ablation(mean(5.1231), mean(5.1), mean(4.99996), mean(5.111)),
    }
    plots.plot_ablations({"whole": whole, **hindered}, SPANS, "a.png")
    axes = figure().axes[0]
    boxes = {text: text.get_window_extent() for text in axes.texts}
    assert len(boxes) == 12 and {"0", "+0.123"} <= {text.get_text() for text in boxes}
    assert not any(one.overlaps(other) for one, other in combinations(boxes.values(), 2))
    inside = axes.get_window_extent()
    assert all(inside.y0 <= box.y0 and box.y1 <= inside.y1 for box in boxes.values())


def test_a_curve_of_one_point_has_a_marker(figure):
    training_curves(ONE_STEP, "a.png", title="one step")
    curves = list(figure().axes[0].get_lines())
    curves_of_runs({"run": ONE_STEP}, "a.png")
    curves += figure().axes[0].get_lines()
    write = WritePooling(0.4, 0.6, 0.2, 0.1, 1.0)
    plots.plot_pooling(PoolingAnalysis(1, (0.4, 0.3, 0.3), write, (write,), 0, 1), "a.png")
    curves += [line for axes in figure().axes[1:] for line in axes.get_lines()]
    assert len(curves) == 8 and all(line.get_marker() not in (None, "None", "") for line in curves)
