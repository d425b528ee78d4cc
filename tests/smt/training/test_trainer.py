"""What the training loop does with every target, document, gradient and evaluation."""

import copy
import math

import pytest
import torch
from same_training import TASKS, assert_same_training, trained
from tiny_training import DATA, MODEL, random_documents, recorded_batches, train_tiny, trainer_of
from torch.utils._python_dispatch import TorchDispatchMode

from smt import SMTConfig, StrideMemoryTransformer
from smt.data.walk import IGNORE_INDEX
from smt.evaluation.perplexity import Evaluation
from smt.training.clock import Clock
from smt.training.objective import ChunkLoss
from smt.training.progress import Progress
from smt.training.settings import TrainingConfig


class Reads(TorchDispatchMode):
    """How many numbers that a device would compute are read while a step is launched; those of batches are on the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point()
        return function(*args, **(kwargs or {}))


class TestLoop:
    def test_state_is_carried_over_the_chunks_of_a_document_and_carries_no_gradient(self, monkeypatch):
        steps_before = []
        forward_of = StrideMemoryTransformer.forward

        def forward(self, input_ids, state, *, targets):
            if state is not None:
                assert not state.tokens.requires_grad and not state.kv_tokens.requires_grad
            steps_before.append(0 if state is None else state.step)
            return forward_of(self, input_ids, state, targets=targets)

        monkeypatch.setattr(StrideMemoryTransformer, "forward", forward)
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

        def keep(self, parameters, norm):
            gradients.append([parameter.grad for parameter in parameters])
            return torch.tensor(1.0)

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

    def test_a_gradient_is_clipped_once_all_its_batches_are_there(self, monkeypatch):
        norms, step = [], torch.optim.AdamW.step

        def recorded(optimiser, *arguments):
            gradients = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
            norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
            return step(optimiser, *arguments)

        monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
        for clip in (1e-3, 1e3):
            train_tiny(steps=2, clip=clip, gradient_accumulation_steps=2)
        assert norms[:2] == pytest.approx([1e-3] * 2, rel=1e-4) and min(norms[2:]) > 1e-2

    def test_the_moments_decay_as_the_settings_say(self):
        trainer = trainer_of(beta_1=0.8, beta_2=0.7)
        assert {group["betas"] for group in trainer._optimiser.param_groups} == {(0.8, 0.7)}

    def test_parts_of_documents_are_read_as_documents_of_their_own_and_keep_what_the_loss_counts(self):
        documents = random_documents()
        counted = [(document % 3 == 0).numpy() for document in documents]
        data = {"part_length": 7, "lanes": 1}
        walk = trainer_of(documents, data=data, counted=counted)._walk
        assert [len(part) - 1 for part in walk.documents] == [7, 1, *[7] * 4, 1, *[7] * 4, 2, *[7] * 7]
        batches, n_steps, n_targets = iter(walk), 0, 0
        while n_steps < sum(len(document) - 1 for document in documents):
            batch = next(batches)
            assert batch.reset[batch.reading].all()
            n_steps, n_targets = n_steps + batch.n_steps, n_targets + batch.n_targets
        assert n_targets == sum(flags[1:].sum() for flags in counted) < n_steps

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

    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("accumulated", [2, 4])
    def test_accumulated_batches_train_what_one_of_all_rows_trains(self, accumulated, task):
        assert_same_training(trained(task, accumulated), trained(task, 1))

    def test_reading_late_and_in_full_shapes_trains_the_same_and_a_run_may_go_on_so(self, monkeypatch):
        """As on a GPU, where every batch has the shape of every other, and no step waits for the numbers of its own."""
        shapes, forward, n_steps = [], ChunkLoss.forward, 12

        def recorded(self, input_ids, *rest):
            shapes.append(tuple(input_ids.shape))
            return forward(self, input_ids, *rest)

        monkeypatch.setattr(ChunkLoss, "forward", recorded)

        def steps(trainer, first, last):
            """How many steps are unread after each."""
            batches, unread = iter(trainer._walk), []
            for step in range(first, last):
                with Reads() as reads:
                    trainer._step(batches, step / n_steps, is_first=step == first)
                assert not (trainer._reads_late and reads.count)
                unread.append(len(trainer._taken))
            trainer._read()
            return unread

        plain = trainer_of(steps=n_steps)
        assert steps(plain, 0, 5) == [0] * 5
        snapshot = copy.deepcopy(plain.snapshot())  # of a lane in which one row waits
        steps(plain, 5, n_steps)
        assert len(set(shapes)) > 1
        late, resumed = trainer_of(steps=n_steps), trainer_of(steps=n_steps)
        for trainer in (late, resumed):
            trainer._reads_late = trainer._keeps_shapes = True
        resumed.resume(snapshot)
        shapes.clear()
        assert steps(late, 0, n_steps) == [0] + [1] * (n_steps - 1) and steps(resumed, 5, n_steps) == [0] + [1] * 6
        assert set(shapes) == {(DATA["batch_size"], DATA["chunk_length"])}
        for trainer in (late, resumed):
            assert trainer.progress.step == n_steps and trainer.progress.n_targets == plain.progress.n_targets
            assert trainer.progress.history.train_loss == pytest.approx(plain.progress.history.train_loss, rel=1e-6)
            for one, two in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
                torch.testing.assert_close(one, two)

    def test_the_speed_of_a_run_leaves_out_its_first_step_which_compiles(self):
        done = Progress(seconds=60.0)
        done.add(8, 8, 8)
        assert done.tokens_per_second == 8 / 60.0
        done.end_step(60.0, 8, is_first=True)
        done.seconds += 1.0
        done.add(8, 8, 8)
        assert done.tokens_per_second == 8.0

    def test_the_training_loss_on_record_is_that_of_the_targets_of_the_latest_ten_steps(self):
        done = Progress()
        for step in range(1, 22):
            done.tell(step, nats=float(step * step), n_targets=step)
        assert done.history.train_steps == [1, 10, 20]
        squares, steps = [sum(n**power for n in range(11, 21)) for power in (2, 1)]
        assert done.history.train_loss == pytest.approx([1.0, 385 / 55, squares / steps])
        assert done.loss == pytest.approx((squares - 11**2 + 21**2) / (steps - 11 + 21))

    def test_one_slow_step_does_not_change_what_the_rest_is_expected_to_take(self):
        done = Progress()
        for seconds in (60.0, 1.0, 2.0, 90.0, 1.0, 1.0):
            done.end_step(seconds, 4, is_first=seconds == 60.0)
        assert done.seconds_per_token == 0.25

    def test_what_graphs_return_is_of_one_step(self, monkeypatch):
        begun = []
        monkeypatch.setattr("torch.compiler.cudagraph_mark_step_begin", lambda: begun.append(1))
        train_tiny(steps=3, evaluations=1, compile="graphs")
        assert len(begun) == 3
        train_tiny(steps=3, evaluations=1)
        assert len(begun) == 3

    def test_evaluations_may_be_every_so_many_steps(self):
        assert train_tiny(steps=7, eval_steps=3, evaluations=1)[2] == [3, 6, 7]

    def test_a_run_ends_early_when_evaluations_no_longer_improve(self):
        losses = [5.0, 4.0, 4.5, 4.2, 3.0]
        _, done, evaluated = train_tiny(steps=20, eval_steps=2, early_stopping_patience=2, losses=losses)
        assert evaluated == [2, 4, 6, 8] and done.step == 8
        assert done.best == {"best_val_loss": 4.0, "best_val_ppl": math.exp(4.0), "best_step": 4}

    @pytest.mark.parametrize(
        ("losses", "evaluated_at"),
        [([5.0, 5.5, 4.0, 4.5, 4.2, 3.0], [2, 4, 6, 8, 10]), ([4.0, 4.0, 4.0, 3.0], [2, 4, 6])],
        ids=["improves between", "equal"],
    )
    def test_evaluations_without_a_lower_loss_are_counted_since_the_best(self, losses, evaluated_at):
        _, _, evaluated = train_tiny(steps=20, eval_steps=2, early_stopping_patience=2, losses=losses)
        assert evaluated == evaluated_at

    def test_epochs_bound_a_run_by_its_targets(self):
        _, done, _ = train_tiny(steps=None, epochs=2, data={"lanes": 1})
        targets = sum(len(document) - 1 for document in random_documents())
        assert 2 * targets <= done.n_targets < 2 * targets + DATA["batch_size"] * DATA["chunk_length"]

    def test_gradient_checkpointing_trains_the_same_and_is_used(self, monkeypatch):
        from smt.model.decoder import Decoder

        plain, _, _ = train_tiny(steps=2)
        calls = []
        monkeypatch.setattr(
            Decoder, "_gradient_checkpointing_func", staticmethod(lambda f, *given: (calls.append(f), f(*given))[1])
        )
        trainer = trainer_of(steps=2)
        trainer.model.gradient_checkpointing_enable()
        trainer.train(lambda: Evaluation(nats=1.0, n_targets=1, n_bytes=1))
        assert calls
        for one, two in zip(plain.parameters(), trainer.model.parameters(), strict=True):
            torch.testing.assert_close(two, one)

    def test_bf16_trains(self):
        losses: list[float] = []
        repeated = [torch.arange(60) % 7 for _ in range(4)]
        train_tiny(
            steps=20, on_step=lambda done: losses.append(done.loss), documents=repeated, learning_rate=0.02,
            mixed_precision="bf16",
        )  # fmt: skip
        assert losses[-1] < losses[0] / 2

    def test_the_loss_falls(self):
        losses: list[float] = []
        small = {"initializer_range": 0.02}  # whose first guess is uniform: larger embeddings of few numbers find themselves
        repeated = [torch.arange(60) % 7 for _ in range(4)]
        train_tiny(steps=20, on_step=lambda done: losses.append(done.loss), documents=repeated, model=small, learning_rate=0.02)
        assert losses[0] == pytest.approx(math.log(MODEL["vocab_size"]), rel=0.05)
        assert losses[-1] < losses[0] / 2
