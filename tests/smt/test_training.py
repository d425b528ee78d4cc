"""A run: its settings, its clock, what its loop does with every target, and the folder that it leaves."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from smt import SMTConfig, StrideMemoryTransformer
from smt.data.local import read_text
from smt.data.tokenizer import Tokenizer
from smt.data.walk import DocumentWalk
from smt.evaluation.perplexity import Evaluation
from smt.loss import IGNORE_INDEX
from smt.training.accelerate import make_accelerator
from smt.training.clock import Clock, schedule
from smt.training.run import run
from smt.training.settings import CONFIG_FOLDER, DataConfig, RunConfig, TrainingConfig
from smt.training.trainer import Trainer

MODEL = dict(
    vocab_size=270, d_model=16, d_k=8, dropout=0.0, n_ssm_outputs=3, m_input_tokens=6, stride=2, write_group=2,
    transformer_n_layers=1, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4, encoding="stream",
)  # fmt: skip
DATA = dict(batch_size=2, chunk_length=8, lanes=2, eval_batch_size=4, eval_chunk_length=16)


def run_config(tmp_path, **training):
    texts = tmp_path / "texts"
    texts.mkdir(exist_ok=True)
    for index in range(5):
        (texts / f"{index}.txt").write_text(" ".join(f"word{(index + j) % 7}" for j in range(20 + 9 * index)))
    values = {
        "experiment": "tiny",
        "model": MODEL,
        "data": {"text": str(texts), **DATA},
        "training": {"device": "cpu", "sample_tokens": 5, **training},
    }
    return RunConfig.from_dict(values)


def random_documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, MODEL["vocab_size"], (length,), generator=generator) for length in (9, 30, 31, 50)]


def trainer_of(documents=None, clock=None, model=None, data=None, **training):
    """A trainer of a tiny model of a fixed seed."""
    torch.manual_seed(0)
    model = StrideMemoryTransformer(SMTConfig(**{**MODEL, **(model or {})}))
    training = TrainingConfig(**{"steps": 6, "evaluations": 1, "device": "cpu", **training})
    data = DataConfig(**{**DATA, **(data or {})})
    documents = random_documents() if documents is None else documents
    clock = clock or Clock(training, 0.0, epoch_targets=sum(len(document) - 1 for document in documents))
    return Trainer(model, documents, data, training, clock, make_accelerator(training))


def train_tiny(on_step=lambda done: None, losses=(), **options):
    """Train it; evaluations give ``losses``, then 1."""
    trainer, evaluated, losses = trainer_of(**options), [], list(losses)

    def evaluate():
        evaluated.append(trainer.progress.step)
        return Evaluation(nats=losses.pop(0) if losses else 1.0, n_targets=1, n_bytes=1)

    trainer.train(evaluate, on_step=lambda: on_step(trainer.progress))
    return trainer.model, trainer.progress, evaluated


def recorded_batches(monkeypatch):
    """Every batch that a walk of the loop gives from now on."""
    seen = []
    give = DocumentWalk.__iter__
    monkeypatch.setattr(DocumentWalk, "__iter__", lambda walk: (seen.append(batch) or batch for batch in give(walk)))
    return seen


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
        assert RunConfig.from_yaml(path.stem).experiment == path.stem

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
            ({"minutes": "nan"}, ValueError, "minutes must be above 0, got nan"),
            ({"steps": "1.5"}, TypeError, "steps must be of type int | None, got '1.5'"),
            ({"warmup": "1"}, ValueError, r"warmup must lie in \[0, 1\), got 1.0"),
            ({"weight_decay": "-0.1"}, ValueError, "weight_decay must be at least 0, got -0.1"),
            ({"match_scale": "true"}, ValueError, "match_scale needs a mamba in init_from, got {}"),
            ({"eval_documents": "0"}, ValueError, "eval_documents must be at least 1, got 0"),
            ({"lr_schedule": "cosin"}, ValueError, "lr_schedule must be one of cosine, linear, constant, got 'cosin'"),
            ({"device": "tpu"}, ValueError, "device must be one of auto, cpu, cuda, got 'tpu'"),
            ({"experiment": "../up"}, ValueError, "experiment must be the name of a folder"),
        ],
        ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
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

    def test_a_missing_file_is_refused_with_the_examples(self):
        with pytest.raises(ValueError, match=r"one of the examples \(.*stdlib.*\), got 'missing'"):
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

    def test_without_time_left_a_run_is_over_at_once(self):
        assert Clock(TrainingConfig(minutes=1), 0.0, now=lambda: 61.0).progress == 1.0

    @pytest.mark.parametrize(
        ("shape", "progress", "share"),
        [("cosine", 0.1, 1.0), ("cosine", 0.55, 0.5), ("linear", 0.55, 0.5), ("linear", 1.2, 0.0), ("constant", 0.9, 1.0)]
        + [(shape, 0.05, 0.5) for shape in ("cosine", "linear", "constant")],
    )
    def test_learning_rate_rises_then_follows_its_schedule(self, shape, progress, share):
        config = TrainingConfig(warmup=0.1, lr_schedule=shape)
        assert schedule(config, progress) == pytest.approx(share)


class TestLoop:
    def test_state_is_carried_over_the_chunks_of_a_document_and_carries_no_gradient(self, monkeypatch):
        steps_before = []
        loss_of = StrideMemoryTransformer.loss

        def loss(self, input_ids, targets, state):
            if state is not None:
                assert not state.tokens.requires_grad and not any(kv.token_k.requires_grad for kv in state.layers)
            steps_before.append(0 if state is None else state.step)
            return loss_of(self, input_ids, targets, state)

        monkeypatch.setattr(StrideMemoryTransformer, "loss", loss)
        batches = recorded_batches(monkeypatch)
        train_tiny(steps=12)
        expected = [batch.positions[batch.reading][0].item() for batch in batches]
        assert steps_before == expected and max(expected) >= 16

    def test_every_target_counts_once_and_padding_does_not(self, monkeypatch):
        batches = recorded_batches(monkeypatch)
        _, done, _ = train_tiny(steps=12)
        targets = sum((batch.targets != IGNORE_INDEX).sum().item() for batch in batches)
        positions = sum(batch.targets[batch.reading].numel() for batch in batches)
        assert (done.step, done.n_targets) == (12, targets)
        assert done.padding == pytest.approx(1 - targets / positions) and done.padding > 0

    def test_a_chunk_weighs_as_much_as_it_has_targets(self, monkeypatch):
        gradients = []
        keep = lambda self, parameters, norm: gradients.append([parameter.grad for parameter in parameters])  # noqa: E731
        monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", keep)
        batches = recorded_batches(monkeypatch)
        train_tiny(steps=1)
        torch.manual_seed(0)
        model = StrideMemoryTransformer(SMTConfig(**MODEL))
        logits = model(batches[0].input_ids)[0]
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batches[0].targets.flatten(), reduction="sum")
        (nats / (DATA["batch_size"] * DATA["chunk_length"])).backward()
        for got, parameter in zip(gradients[0], model.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad)

    def test_every_part_follows_the_schedule_from_its_own_peak(self, monkeypatch):
        rates = []
        step = torch.optim.AdamW.step

        def recorded(optimiser, *arguments):
            rates.append({group["part"]: group["lr"] for group in optimiser.param_groups})
            return step(optimiser, *arguments)

        monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
        peaks = {"embedding": 1e-3, "transformer": 5e-6, "attention_pooling": 1e-4, "ssm": 1e-3}
        listed = {name: peaks[name] for name in ("transformer", "attention_pooling")}
        train_tiny(steps=4, learning_rate=1e-3, learning_rates=listed, lr_schedule="linear", warmup=0.0)
        for index, share in enumerate((1.0, 0.75, 0.5, 0.25)):
            assert rates[index] == pytest.approx({name: share * peak for name, peak in peaks.items()})

    def test_evaluations_are_spread_over_the_run_and_the_last_is_at_its_end(self):
        _, done, evaluated = train_tiny(steps=6, evaluations=3)
        assert evaluated == done.history.eval_steps == [2, 4, 6]

    @pytest.mark.parametrize(("steps", "evaluations"), [(1, 1), (1, 2), (2, 5), (3, 3)])
    def test_no_step_is_evaluated_twice(self, steps, evaluations):
        _, done, evaluated = train_tiny(steps=steps, evaluations=evaluations)
        assert evaluated == done.history.eval_steps == list(range(1, steps + 1))

    def test_time_that_runs_out_in_an_evaluation_does_not_repeat_it(self):
        now = 0.0

        def on_step(done):
            nonlocal now
            now += 35.0

        def evaluate():
            nonlocal now
            now += 60.0
            return Evaluation(nats=1.0, n_targets=1, n_bytes=1)

        bounds = {"minutes": 1.0, "evaluations": 2, "steps": None}
        trainer = trainer_of(clock=Clock(TrainingConfig(**bounds), 0.0, now=lambda: now), **bounds)
        trainer.train(evaluate, on_step=lambda: on_step(trainer.progress))
        assert trainer.progress.history.eval_steps == [1]

    def test_a_run_bounded_by_steps_is_repeatable(self):
        losses = []
        for _ in range(2):
            run_losses: list[float] = []
            train_tiny(steps=3, on_step=lambda done, into=run_losses: into.append(done.loss))
            losses.append(run_losses)
        assert losses[0] == losses[1] and len(losses[0]) == 3

    def test_the_loss_falls(self):
        losses: list[float] = []
        repeated = [torch.arange(60) % 7 for _ in range(4)]
        train_tiny(steps=20, on_step=lambda done: losses.append(done.loss), documents=repeated, learning_rate=0.02)
        assert losses[0] == pytest.approx(math.log(MODEL["vocab_size"]), rel=0.05)
        assert losses[-1] < losses[0] / 2


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("run")
    return run(run_config(tmp_path, steps=4), tmp_path / "out")


class TestRun:
    def test_a_slow_first_step_does_not_end_a_run_bounded_by_time(self, tmp_path, monkeypatch):
        step, calls = Trainer._step, []

        def slow_at_first(*arguments, **options):
            calls.append(None)
            time.sleep(2.0 if len(calls) == 1 else 0.0)
            return step(*arguments, **options)

        monkeypatch.setattr(Trainer, "_step", slow_at_first)
        outcome = run(run_config(tmp_path, minutes=0.2, sample_tokens=0), tmp_path / "out")
        assert outcome.progress.step > 10
        assert outcome.results["seconds"] < 12

    def test_folder_holds_everything_and_nothing_half_written(self, outcome):
        names = {path.name for path in outcome.folder.iterdir()}
        assert names == {
            "config.yaml", "results.json", "metrics_history.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json", "training_curves.png", "checkpoints",
        }  # fmt: skip
        assert outcome.folder.parent.name == "tiny"

    def test_results_and_history_have_their_keys(self, outcome):
        results = json.loads((outcome.folder / "results.json").read_text())
        assert set(results) == {
            "experiment", "architecture", "model", "data", "training", "results", "environment"
        }  # fmt: skip
        assert {
            "best_val_loss", "best_val_ppl", "best_step", "final_val_loss", "final_val_ppl", "val_bits_per_byte",
            "tokens_per_second",
        } <= set(results["results"])  # fmt: skip
        assert results["results"]["final_val_ppl"] == pytest.approx(math.exp(results["results"]["final_val_loss"]))
        history = json.loads((outcome.folder / "metrics_history.json").read_text())
        assert set(history) == {"train_loss", "train_steps", "val_loss", "val_ppl", "eval_steps"}
        assert history["eval_steps"] == [2, 4] and len(history["train_loss"]) == len(history["train_steps"])

    def test_saved_model_tokenizer_and_config_give_the_reported_loss(self, outcome):
        config = RunConfig.from_dict(yaml.safe_load((outcome.folder / "config.yaml").read_text()))
        assert config == outcome.config
        model = StrideMemoryTransformer(config.model)
        model.load_state_dict(load_file(outcome.folder / "model.safetensors"))
        tokenizer = Tokenizer.load(outcome.folder)
        assert tokenizer.vocab_size == config.model.vocab_size
        text = "".join(document.text for document in read_text(config.data.text).validation)  # one of five files
        tokens = torch.tensor([tokenizer.end_of_document, *tokenizer.encode(text), tokenizer.end_of_document])[None]
        loss = model.eval().loss(tokens[:, :-1], tokens[:, 1:])[0].item()
        assert loss == pytest.approx(outcome.results["best_val_loss"], rel=1e-4)
        assert outcome.evaluation.n_bytes == len(text.encode())

    def test_an_interrupted_save_leaves_the_old_weights(self, outcome, monkeypatch):
        from smt.training.run_folder import RunFolder

        folder, weights = RunFolder(outcome.folder), outcome.folder / "model.safetensors"
        before = weights.read_bytes()

        def fails(tensors, path, metadata):
            path.write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr("safetensors.torch.save_file", fails)
        with pytest.raises(OSError, match="disk full"):
            folder.save_weights(StrideMemoryTransformer(outcome.config.model).state_dict())
        assert weights.read_bytes() == before

    @pytest.mark.parametrize("eval_documents", [None, 1, 99])
    def test_evaluation_reads_all_held_out_documents_unless_the_settings_bound_it(self, tmp_path, eval_documents):
        folder = tmp_path / "texts"
        folder.mkdir()
        for index in range(30):
            (folder / f"{index}.txt").write_text(f"word{index} " * (10 + index))
        config = run_config(tmp_path, steps=1, evaluations=1, sample_tokens=0)
        config = replace(config, data=replace(config.data, eval_documents=eval_documents))
        sizes = [len(document.text.encode()) for document in read_text(config.data.text).validation]
        assert len(sizes) > 1
        assert run(config, tmp_path / "out").evaluation.n_bytes == sum(sizes[:eval_documents])

    def test_a_gpu_that_is_not_there_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="device 'cuda' was asked for, but PyTorch finds no GPU"):
            run(run_config(tmp_path, device="cuda", steps=1), tmp_path / "out")
