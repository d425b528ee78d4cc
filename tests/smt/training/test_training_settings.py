"""A run's settings are checked and written down; its clock says how far it is."""

import itertools
from dataclasses import fields

import pytest
import torch
from tiny_training import run_config

from smt.training.clock import Clock, schedule
from smt.training.settings import CONFIG_FOLDER, PARTS, RunConfig, TrainingConfig

FLOATS = [
    *("minutes", "learning_rate", "beta_1", "beta_2", "weight_decay", "warmup", "clip", "orpo_lambda"),
    *("dropout", "pooling_dropout", "initializer_range", "rope_theta"),
]


def test_these_are_all_the_floating_point_fields():
    assert set(FLOATS) == {
        field.name for part in PARTS.values() for field in fields(part) if str(field.type).startswith("float")
    }


class TestSettings:
    def test_written_and_read_they_are_the_same(self, tmp_path):
        config = run_config(tmp_path)
        config.to_yaml(tmp_path / "config.yaml")
        assert RunConfig.from_yaml(tmp_path / "config.yaml") == config

    def test_the_packaged_example_is_valid_and_bounded_to_five_minutes(self):
        config = RunConfig.from_yaml("stdlib")
        assert config.training.steps is None and config.training.minutes < 5
        assert config.model.encoding == "stream" and config.model.pool_source == "window" and config.model.write_group == 8

    @pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
    def test_every_packaged_example_is_valid_and_named_after_its_file(self, path):
        of_a_user = {"pairs": "pairs.jsonl"} if path.stem == "orpo" else {}
        assert RunConfig.from_yaml(path.stem, of_a_user).experiment == path.stem

    def test_where_gpt2s_weights_go_the_encoding_is_stride_unless_another_is_named(self):
        def encoding(model, **training):
            return RunConfig.from_dict({"model": model, "training": training}).model.encoding

        assert encoding({}) == encoding({}, init_from={"mamba": "m"}) == "stream"
        assert encoding({}, init_from={"gpt2": "g"}) == encoding({}, init_from="mamba=m,gpt2=g") == "stride"
        assert encoding({"encoding": "token"}, init_from={"gpt2": "g"}) == "token"

    @pytest.mark.parametrize(("value", "word"), [(True, "true"), (False, "false"), ("auto", "auto"), ("true", "true")])
    def test_a_truth_value_of_yaml_is_the_word_where_there_are_more_than_two(self, value, word):
        assert RunConfig.from_dict({"training": {"compile": value}}).training.compile == word

    @pytest.mark.parametrize(
        ("fields", "on_gpu", "on_cpu"),
        [
            *(({}, True, False), ({"steps": 60}, False, False), ({"steps": 4000}, True, False), ({"epochs": 1}, True, False)),
            *(({"compile": "true", "steps": 1}, True, True), ({"compile": "false"}, False, False)),
            *(({"compile": "graphs"}, True, True), ({"minutes": 1.0}, False, False), ({"minutes": 30.0}, True, False)),
        ],
    )
    def test_a_gpu_compiles_what_is_trained_long_enough_to_gain_by_it(self, fields, on_gpu, on_cpu, monkeypatch):
        monkeypatch.setattr("smt.runtime.device.has_triton", lambda: True)
        config = TrainingConfig(**fields)
        assert config.compiles(torch.device("cuda")) == on_gpu and config.compiles(torch.device("cpu")) == on_cpu

    def test_a_gpu_without_triton_trains_uncompiled_and_is_not_told_to_compile(self, monkeypatch):
        monkeypatch.setattr("smt.runtime.device.has_triton", lambda: False)
        gpu, cpu = torch.device("cuda"), torch.device("cpu")
        assert not TrainingConfig().compiles(gpu) and not TrainingConfig(compile="false").compiles(gpu)
        for value in ("true", "graphs"):
            with pytest.raises(ValueError, match=f"compile = {value} is not possible: torch.compile needs Triton"):
                TrainingConfig(compile=value).compiles(gpu)
            assert TrainingConfig(compile=value).compiles(cpu)

    def test_graphs_are_a_mode_of_the_compiler_and_overwrite_what_accumulates(self):
        assert TrainingConfig(compile="graphs").compile_options() == {"mode": "reduce-overhead"}
        assert TrainingConfig(compile="true").compile_options() == TrainingConfig().compile_options() == {}
        with pytest.raises(ValueError, match="graphs needs gradient_accumulation_steps = 1, got 2"):
            TrainingConfig(compile="graphs", gradient_accumulation_steps=2)
        with pytest.raises(ValueError, match="graphs cannot be with gradient_checkpointing"):
            TrainingConfig(compile="graphs", gradient_checkpointing=True)

    def test_overrides_find_their_part_and_are_read_as_its_types(self):
        overrides = {"stride": "10", "encoding": "token", "writes": "false", "steps": "none", "learning_rate": "1e-3"}
        overrides["text"] = "x"
        config = RunConfig.from_yaml("stdlib", overrides)
        assert (config.model.stride, config.model.encoding, config.model.writes) == (10, "token", False)
        assert (config.training.steps, config.training.learning_rate, config.data.text) == (None, 1e-3, "x")

    @pytest.mark.parametrize(
        ("overrides", "error", "message"),
        [
            ({"strid": "1"}, ValueError, "no setting 'strid'; did you mean 'stride'"),
            ({"stride": "99"}, ValueError, "stride must lie in 1..m_input_tokens = 1..50, got 99"),
            ({"d_model": "wide"}, TypeError, "d_model must be of type int, got 'wide'"),
            ({"batch_size": "0"}, ValueError, "batch_size must be at least 1, got 0"),
            ({"minutes": "-1"}, ValueError, "minutes must be above 0, got -1.0"),
            *(({name: "inf"}, ValueError, f"{name} must be finite, got inf") for name in FLOATS),
            ({"minutes": "nan"}, ValueError, "minutes must be finite, got nan"),
            ({"rope_theta": "nan"}, ValueError, "rope_theta must be finite, got nan"),
            ({"learning_rates": "ssm=inf"}, ValueError, "learning_rates must be finite, got inf"),
            ({"minutes": 10**400}, ValueError, "minutes must be finite, got 1000"),
            ({"seed": str(2**64)}, ValueError, f"seed must lie in 0..{2**63 - 1}, got {2**64}"),
            ({"seed": "-1"}, ValueError, f"seed must lie in 0..{2**63 - 1}, got -1"),
            ({"recall": f"seed={2**64}"}, ValueError, "seed of recall must lie in 0.."),
            *(({name: ""}, ValueError, f"{name} must not be empty") for name in ("text", "tokenizer", "cache", "dataset")),
            ({"init_from": "gpt2="}, ValueError, "init_from must not be empty"),
            ({"steps": "1.5"}, TypeError, "steps must be of type int | None, got '1.5'"),
            ({"warmup": "1"}, ValueError, r"warmup must lie in \[0, 1\), got 1.0"),
            ({"weight_decay": "-0.1"}, ValueError, "weight_decay must be at least 0, got -0.1"),
            ({"match_scale": "true"}, ValueError, "match_scale needs a mamba in init_from, got {}"),
            ({"eval_documents": "0"}, ValueError, "eval_documents must be at least 1, got 0"),
            ({"lr_schedule": "cosin"}, ValueError, "lr_schedule must be one of cosine, linear, constant, got 'cosin'"),
            ({"mixed_precision": "fp8"}, ValueError, "mixed_precision must be one of auto, no, bf16, fp16, got 'fp8'"),
            ({"report_to": "wandbb"}, ValueError, "wandbb"),
            ({"steps": "3", "epochs": "2"}, ValueError, "a run has one bound, got steps = 3 and epochs = 2"),
            ({"save_steps": "0"}, ValueError, "save_steps must be at least 1, got 0"),
            ({"architecture": "gpt3"}, ValueError, "architecture must be one of smt, gpt2, hymba, got 'gpt3'"),
            (
                {"architecture": "gpt2"},
                ValueError,
                "eval_chunk_length must be at most chunk_length = 128 for architecture 'gpt2'",
            ),
            ({"architecture": "hymba"}, ValueError, "eval_chunk_length must be at most chunk_length = 128 for architecture"),
            ({"n_layers": 2}, ValueError, "n_layers is a field of architecture hymba, this run is of smt"),
            (
                {"architecture": "hymba", "stride": 2},
                ValueError,
                "stride is a field of architecture smt and gpt2, this run is of",
            ),
            (
                {"architecture": "hymba", "eval_chunk_length": 8, "init_from": "gpt2=x"},
                ValueError,
                "init_from must be a checkpoint for architecture 'hymba', got {'gpt2': 'x'}",
            ),
            ({"device": "tpu"}, ValueError, "device must be one of auto, cpu, cuda, got 'tpu'"),
            *(
                ({"experiment": name}, ValueError, "experiment must be the name of a folder")
                for name in ("../up", "..", ".", "")
            ),
        ],
        ids=lambda value: ",".join(f"{name}={text}"[:40] for name, text in value.items()) if isinstance(value, dict) else None,
    )
    def test_a_bad_override_is_refused(self, overrides, error, message):
        with pytest.raises(error, match=message.replace("|", r"\|")):
            RunConfig.from_yaml("stdlib", overrides)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[1, 2]", "must hold a mapping"),
            ("a: [", "is not YAML"),
            ("modle: {}", "no part 'modle'; did you mean 'model'"),
            ("model: {strid: 1}", "model has no field 'strid'; did you mean 'stride'"),
            ("data: 3", "data must be a mapping of fields, got 3"),
        ],
        ids=["list", "broken", "unknown-part", "unknown-field", "scalar-part"],
    )
    def test_a_bad_file_is_refused(self, tmp_path, content, message):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            RunConfig.from_yaml(tmp_path / "bad.yaml")

    def test_the_word_no_is_a_number_format_in_yaml_too(self, tmp_path):
        (tmp_path / "run.yaml").write_text("training: {mixed_precision: no, gradient_checkpointing: no}")
        training = RunConfig.from_yaml(tmp_path / "run.yaml").training
        assert training.mixed_precision == "no" and training.gradient_checkpointing is False

    def test_the_home_folder_is_found_in_paths_of_a_file(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        data = "{text: ~/text, dataset: ~/rows, tokenizer: ~/tokens, cache: ~/cache}"
        (tmp_path / "run.yaml").write_text(f"data: {data}\ntraining: {{init_from: {{gpt2: ~/gpt2}}}}")
        config = RunConfig.from_yaml(tmp_path / "run.yaml")
        paths = [getattr(config.data, name) for name in ("text", "dataset", "tokenizer", "cache")]
        assert [*paths, config.training.init_from["gpt2"]] == [
            str(tmp_path / name) for name in ("text", "rows", "tokens", "cache", "gpt2")
        ]

    def test_a_missing_file_is_refused_with_the_examples(self):
        with pytest.raises(ValueError, match=r"one of those packaged \(.*stdlib.*\), got 'missing'"):
            RunConfig.from_yaml("missing")


class TestClock:
    def test_by_steps_progress_is_the_share_of_steps(self):
        clock = Clock(TrainingConfig(steps=8, minutes=1e-9), 0.0)
        clock.steps = 2
        assert clock.progress == 0.25

    def test_by_time_the_reserve_is_kept_and_what_came_before_counts(self):
        now = 30.0
        clock = Clock(TrainingConfig(minutes=2), 0.0, now=lambda: now)  # 30 of 120 seconds are gone
        clock.reserve = 20.0
        assert clock.progress == 0.0
        now = 65.0
        assert clock.progress == 0.5
        now = 100.0
        assert clock.progress == 1.0

    def test_an_estimate_of_the_end_never_takes_more_than_half_of_the_time(self):
        now = 0.0
        clock = Clock(TrainingConfig(minutes=2), 0.0, now=lambda: now)
        clock.reserve, now = 1000.0, 30.0
        assert clock.progress == 0.5

    @pytest.mark.parametrize(("seconds", "evaluated_at"), [(20.0, [0.5]), (40.0, [])], ids=["short", "long"])
    def test_evaluations_neither_end_a_run_nor_move_its_learning_rate(self, seconds, evaluated_at):
        """120 seconds, of which one evaluation at the end and, where there is time for it, one in the middle take some."""
        now, evaluated, shares = 0.0, [], [0.0]
        clock = Clock(TrainingConfig(minutes=2, evaluations=2), 0.0, now=lambda: now)
        clock.evaluation = clock.reserve = seconds
        while clock.progress < 1:
            now += 1.0
            shares.append(clock.progress)
            if not evaluated and clock.progress >= 0.5 and clock.has_time_to_evaluate:
                with clock.evaluating():
                    now += seconds
                evaluated.append(clock.progress)
        assert evaluated == evaluated_at
        assert now + seconds == 120.0
        assert all(later - earlier == pytest.approx(shares[1]) for earlier, later in itertools.pairwise(shares))

    def test_a_run_that_goes_on_has_the_evaluations_left_that_it_had(self):
        now = 0.0
        clock, later = (Clock(TrainingConfig(minutes=2, evaluations=3), 0.0, now=lambda: now) for _ in range(2))
        with clock.evaluating():
            now += 10.0
        now += 30.0
        later.load_state_dict(clock.state_dict())
        clock.evaluation = later.evaluation = 5.0
        assert clock.progress == later.progress == 30.0 / (120.0 - 10.0 - 5.0)

    def test_without_time_left_a_run_is_over_at_once(self):
        assert Clock(TrainingConfig(minutes=1), 0.0, now=lambda: 61.0).progress == 1.0

    def test_what_was_used_and_what_remains_goes_on_in_another_process_as_if_no_time_had_passed(self):
        now = 10.0
        clock = Clock(TrainingConfig(minutes=2), 0.0, now=lambda: now)
        now = 65.0
        state = clock.state_dict()
        assert clock.progress == 0.5 and state == {"used": 55.0, "remaining": 55.0, "evaluations": 2}
        now = 7000.0
        resumed = Clock(TrainingConfig(minutes=2), 6990.0, now=lambda: now)
        resumed.load_state_dict(state)
        assert resumed.progress == 0.5
        now += 27.5
        assert resumed.progress == 0.75

    @pytest.mark.parametrize(
        ("shape", "progress", "share"),
        [("cosine", 0.1, 1.0), ("cosine", 0.55, 0.5), ("linear", 0.55, 0.5), ("linear", 1.2, 0.0), ("constant", 0.9, 1.0)]
        + [(shape, 0.05, 0.5) for shape in ("cosine", "linear", "constant")]
        + [("cosine", 1.0, 0.0), ("linear", 1.0, 0.0), ("constant", 1.0, 1.0), ("cosine", 0.0, 0.01)],
    )
    def test_learning_rate_rises_then_follows_its_schedule(self, shape, progress, share):
        config = TrainingConfig(warmup=0.1, lr_schedule=shape)
        assert schedule(config, progress) == pytest.approx(share)


@pytest.mark.parametrize(
    ("data", "given", "source"),
    [
        ({"text": "novels"}, {"source": "stdlib"}, "stdlib"),
        ({"source": "pg19"}, {"text": "novels"}, "text"),
        ({}, {"dataset": "folder"}, "dataset"),
        ({"text": "novels"}, {"dataset": "folder"}, "dataset"),
        ({"source": "pg19"}, {"dataset": "folder"}, "pg19"),
    ],
)
def test_a_text_that_is_given_takes_the_place_of_the_file_s(data, given, source):
    config = RunConfig.from_dict({"data": data}, given)
    assert config.data.source == source and (config.data.text is not None) == (source == "text")


def test_two_texts_that_are_given_are_refused():
    with pytest.raises(ValueError, match="text is what the source 'text' reads, got it and source = 'pg19'"):
        RunConfig.from_dict({}, {"source": "pg19", "text": "novels"})
    for given in ({"source": "stdlib"}, {"source": "recall"}, {"text": "novels"}, {"text": "pg19"}):
        ((name, value),) = given.items()
        with pytest.raises(
            ValueError, match=f"dataset is what the sources shakespeare, .* read, got it and {name} = '{value}'"
        ):
            RunConfig.from_dict({}, {**given, "dataset": "rows"})


@pytest.mark.parametrize("given", [{"minutes": 2.0}, {"epochs": 3}, {"steps": 9}], ids=str)
def test_a_bound_that_is_given_takes_the_place_of_the_file_s(given):
    for bound in ({"steps": 5}, {"epochs": 1}):
        training = RunConfig.from_dict({"training": bound}, given).training
        wanted = {"steps": None, "epochs": None, **given}
        assert {name: getattr(training, name) for name in wanted} == wanted
