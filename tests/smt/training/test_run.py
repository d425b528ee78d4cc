"""A run from text to the folder that it leaves."""

import json
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_training import DATA, random_documents, run_config

from smt import StrideMemoryTransformer
from smt.data.local import read_text
from smt.data.tokenizer import Tokenizer
from smt.evaluation.perplexity import Evaluation, evaluate
from smt.evaluation.subjects import open_run
from smt.training import ending
from smt.training import run as run_module
from smt.training.accelerate import accelerator_of
from smt.training.clock import Clock
from smt.training.run import run
from smt.training.settings import RunConfig, TrainingConfig
from smt.training.starting_point import fresh_model
from smt.training.trainer import Trainer


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("run")
    return run(run_config(tmp_path, steps=4), tmp_path / "out")


class TestRun:
    def test_a_slow_first_step_does_not_end_a_run_bounded_by_time(self, tmp_path, monkeypatch):
        """The clock stands still but for steps: the first takes a third of the time, each other a hundredth."""
        step, limit, passed = Trainer._step, 12.0, [0.0]

        def slow_at_first(*arguments, **options):
            passed.append(passed[-1] + limit * (1 / 3 if len(passed) == 1 else 1 / 100))
            return step(*arguments, **options)

        def now():
            return passed[-1]

        monkeypatch.setattr(Trainer, "_step", slow_at_first)
        monkeypatch.setattr(time, "perf_counter", now)
        monkeypatch.setitem(Clock.__init__.__kwdefaults__, "now", now)
        bounded = run(run_config(tmp_path, minutes=limit / 60, sample_tokens=0), tmp_path / "out")
        assert bounded.progress.step > 10
        assert bounded.results["seconds"] <= limit * 1.01

    def test_folder_holds_everything_and_nothing_half_written(self, outcome):
        names = {path.name for path in outcome.folder.iterdir()}
        assert names == {
            "config.yaml", "results.json", "metrics_history.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json", "training_curves.png", "checkpoints", "text.json",
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

    def test_the_best_weights_are_kept_when_later_ones_are_worse(self, tmp_path, monkeypatch):
        from smt.training import run as module

        losses = iter([3.0, 2.0, 4.0])
        weights = []

        def evaluation(objective, *arguments, **options):
            weights.append({name: tensor.clone() for name, tensor in objective.model.state_dict().items()})
            return Evaluation(nats=next(losses), n_targets=1, n_bytes=1)

        monkeypatch.setattr(module, "evaluate", evaluation)
        outcome = run(run_config(tmp_path, steps=6, evaluations=3, sample_tokens=0), tmp_path / "out")
        assert outcome.results["best_step"] == 4 and outcome.results["best_val_loss"] == 2.0
        assert outcome.results["final_val_loss"] == outcome.evaluation.loss == 4.0
        kept = load_file(outcome.folder / "model.safetensors")
        assert all(torch.equal(kept[name], tensor) for name, tensor in weights[1].items())

    def test_the_time_that_is_kept_is_that_of_an_evaluation_and_of_the_sample(self, tmp_path, monkeypatch):
        reserves = []

        def train(trainer, evaluate, *, on_step, **named):
            trainer.progress.pace = [0.5]  # seconds per token
            for measured in (False, True):
                if measured:
                    evaluation = evaluate()
                on_step()
                reserves.append(trainer.clock.reserve)
            return evaluation

        monkeypatch.setattr(Trainer, "train", train)
        evaluation = run(run_config(tmp_path, sample_tokens=7), tmp_path / "out").evaluation
        kept = run_module.SAMPLE_COST * 0.5 * 7 + run_module.CLOSING_SECONDS
        assert reserves[0] == pytest.approx(1.1 * run_module.EVALUATION_COST * 0.5 * evaluation.n_targets + kept)
        assert kept < reserves[1] < reserves[0] - 1

    def test_evaluations_have_sizes_of_their_own(self, tmp_path, monkeypatch):
        seen = []

        def evaluation(objective, batches, n_bytes, **options):
            seen.append((batches.batch_size, batches.length, batches.epochs, batches.together))
            return Evaluation(nats=1.0, n_targets=1, n_bytes=1)

        monkeypatch.setattr("smt.training.run.evaluate", evaluation)
        run(run_config(tmp_path, steps=1, evaluations=1, sample_tokens=0), tmp_path / "out")
        assert seen == [(DATA["eval_batch_size"], DATA["eval_chunk_length"], 1, True)]

    def test_the_seed_is_that_of_weights_batches_and_sample_alike(self, tmp_path, monkeypatch):
        seeds = []
        monkeypatch.setattr(ending, "continuation", lambda *arguments: (seeds.append(arguments[-1]), ("", ""))[1])
        configs = [run_config(tmp_path, seed=seed, steps=1, evaluations=1) for seed in (7, 8)]
        weights = []
        for config in (configs[0], *configs):
            torch.manual_seed(len(weights))  # of whoever calls
            weights.append(fresh_model(config).embedding.weight)
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
        text, process = SimpleNamespace(train=random_documents()), SimpleNamespace(process_index=1, num_processes=2)
        text.train = type("Documents", (list,), {"counted": None})(text.train)
        walk = run_module._stage(configs[0], text, None, process).walk
        assert (walk.seed, walk.rank, walk.world_size) == (7, 1, 2)
        run(configs[0], tmp_path / "out")
        assert seeds == [7]

    def test_what_is_recomputed_and_in_which_numbers_is_as_the_settings_say(self, tmp_path):
        for asked in (False, True):
            model = fresh_model(run_config(tmp_path, gradient_checkpointing=asked))
            assert model.decoder.gradient_checkpointing is asked
        for precision in ("no", "bf16"):
            with accelerator_of(TrainingConfig(mixed_precision=precision, device="cpu")) as accelerator:
                assert accelerator.mixed_precision == precision

    def test_a_tracker_is_told_settings_losses_and_rates(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        config = run_config(tmp_path, steps=20, evaluations=2, report_to=["tensorboard"], sample_tokens=0)
        outcome = run(config, tmp_path / "out")
        events = [EventAccumulator(str(path.parent)).Reload() for path in outcome.folder.rglob("events.out.tfevents.*")]
        scalars = {tag: [event.step for event in log.Scalars(tag)] for log in events for tag in log.Tags()["scalars"]}
        assert scalars["train_loss"] == scalars["learning_rate"] == [10, 20] and scalars["val_loss"] == [10, 20]

    def test_a_run_that_fails_finishes_its_trackers_and_the_accelerator_of_the_caller_is_as_it_was(self, tmp_path, monkeypatch):
        from accelerate import Accelerator
        from accelerate.tracking import TensorBoardTracker

        mine, finished = Accelerator(gradient_accumulation_steps=3), []
        precision = mine.mixed_precision  # that of whatever has used Accelerate here before
        other = "no" if precision == "bf16" else "bf16"
        monkeypatch.setattr(TensorBoardTracker, "finish", lambda tracker: finished.append(tracker))
        monkeypatch.setattr(Trainer, "_step", lambda *arguments, **options: 1 / 0)
        config = run_config(tmp_path, steps=1, report_to=["tensorboard"], mixed_precision=other, gradient_accumulation_steps=2)
        with pytest.raises(ZeroDivisionError):
            run(config, tmp_path / "out")
        assert len(finished) == 1
        assert mine.mixed_precision == precision and mine.gradient_accumulation_steps == 3 and mine.state.num_processes == 1

    def test_fp16_is_refused_on_a_cpu_which_would_train_in_fp32(self, tmp_path):
        with pytest.raises(ValueError, match="mixed_precision must be auto, no or bf16 on a CPU, got 'fp16'"):
            run(run_config(tmp_path, steps=1, mixed_precision="fp16", device="cpu"), tmp_path / "out")

    def test_a_tracker_that_is_not_installed_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ImportError, match="report_to names wandb, which is not installed: pip install wandb"):
            run(run_config(tmp_path, report_to=["wandb"]), tmp_path / "out")

    def test_a_gpt2_trains_and_is_evaluated_in_the_same_way(self, tmp_path):
        config = run_config(tmp_path, steps=20, evaluations=2, sample_tokens=3, learning_rate=0.01)
        config = replace(config, architecture="gpt2", data=replace(config.data, eval_chunk_length=8))
        outcome = run(config, tmp_path / "out")
        losses = outcome.progress.history.val_loss
        assert losses[1] < losses[0] and outcome.results["parameters"] < 270 * 16 + 8 * 16 + 16 * 16 * 13
        subject = open_run(outcome.folder, torch.device("cpu"))
        text = "".join(document.text for document in read_text(config.data.text).validation)
        tokens = subject.tokenizer.encode(text)
        end = subject.tokenizer.end_of_document
        (scores,) = subject.scorer.score([torch.tensor([end, *tokens, end])])
        # Evaluation in training begins anew every 8 tokens; the scorer's windows overlap.
        assert -scores.log_probs.mean() < losses[1] + 0.05 and subject.name == "GPT-2"

    def test_a_gpu_that_is_not_there_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="device 'cuda' was asked for, but PyTorch finds no GPU"):
            run(run_config(tmp_path, device="cuda", steps=1), tmp_path / "out")

    def test_graphs_of_more_kinds_than_are_compiled_are_refused_before_anything_is_left(self, tmp_path):
        config = run_config(tmp_path, compile="graphs", steps=1)
        config = replace(config, model=replace(config.model, write_group=32), data=replace(config.data, chunk_length=9))
        message = rf"at most 5 kinds of chunks.* take a multiple of stride \* write_group = {32 * config.model.stride}"
        limited = torch._dynamo.config.patch(recompile_limit=5)  # a Hymba that was compiled before has raised it
        with limited, pytest.raises(ValueError, match=message):
            run(config, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_neither_evaluations_nor_steps_behind_the_first_chunks_compile_anything(self, tmp_path, monkeypatch):
        programs, compiled = [], []
        options = TrainingConfig.compile_options

        def with_stand_in(training):  # a compiler that runs what it is given
            return {**options(training), "backend": lambda graph, inputs, **_: programs.append(graph) or graph.forward}

        def counted(*args, **named):
            before = len(programs)
            try:
                return evaluate(*args, **named)
            finally:
                compiled.append((before, len(programs)))

        torch._dynamo.reset()
        monkeypatch.setattr(TrainingConfig, "compile_options", with_stand_in)
        monkeypatch.setattr("smt.training.run.evaluate", counted)
        run(run_config(tmp_path, compile="true", steps=9, evaluations=3), tmp_path / "out")
        assert len(compiled) == 3 and all(before == after for before, after in compiled)
        assert compiled[0][0] > 0 and compiled[1][0] == compiled[2][0], compiled

    def test_the_sample_at_the_end_of_a_compiled_run_compiles_nothing(self, tmp_path):
        config, programs = run_config(tmp_path, compile="true"), []
        model, tokenizer = StrideMemoryTransformer(config.model), SimpleNamespace(decode=lambda ids, **named: len(ids))
        model.compile(backend=lambda graph, inputs: programs.append(graph) or graph.forward)
        text = SimpleNamespace(validation=[np.arange(20)], tokenizer=tokenizer)
        assert ending._sample(model, text, config) == (5, 5) and not programs
        model.generate(torch.arange(6)[None], 1)
        assert programs
