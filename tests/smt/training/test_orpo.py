"""ORPO: the paper's loss, and a second stage on preference pairs that is a run as any other."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_training import run_config, trainer_of
from torch.autograd import gradcheck

from smt.cli import main
from smt.data.pair_walk import pair_batch
from smt.data.pairs import Pair, read_pairs, write_pairs
from smt.data.tokenized import tokenize_corpus
from smt.evaluation.perplexity import Evaluation
from smt.evaluation.preference import PairEvaluation, evaluate_pairs
from smt.model.loss import target_nats
from smt.model.preference import log1mexp, log_odds, odds_ratio_loss
from smt.runtime.files import tensors_writer, write_files
from smt.training.corpus_pairs import corpus_pairs
from smt.training.objective import PairLogProbabilities
from smt.training.run import _stage, resume, run, run_in
from smt.training.second_stage import staged
from smt.training.settings import RunConfig
from smt.training.starting_point import fresh_model
from smt.training.trainer import Trainer

PAIRS = [Pair([1, 2, 3], [4, 5, 6], [7, 8]), Pair([9], [10, 11], [12, 13, 14, 15]), Pair([3, 2], [1, 1], [1, 2])]


def paper(chosen, rejected):
    """Equations 4 and 7: odds(y|x) = P / (1 - P), L_OR = -log sigma(log (odds(chosen) / odds(rejected)))."""
    odds = [p.exp() / (1 - p.exp()) for p in (chosen, rejected)]
    return -torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))


class TestLoss:
    def test_it_is_the_papers_where_that_can_be_computed_plainly(self):
        log_p = -torch.logspace(-4, 1.2, 60, dtype=torch.float64)
        chosen, rejected = (grid.flatten().clone().requires_grad_() for grid in torch.meshgrid(log_p, log_p, indexing="ij"))
        got, expected = odds_ratio_loss(chosen, rejected), paper(chosen, rejected)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
        gradients = [torch.autograd.grad(loss.sum(), (chosen, rejected), retain_graph=True) for loss in (got, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)
        assert gradcheck(odds_ratio_loss, (chosen[::97].detach().requires_grad_(), rejected[::97].detach().requires_grad_()))

    def test_log1mexp_has_all_digits_at_both_ends(self):
        """In float32, against float64 with nine digits to spare."""
        x = -torch.logspace(-6, 1.1, 500)
        expected = torch.log(-torch.expm1(x.double()))
        torch.testing.assert_close(log1mexp(x).double(), expected, rtol=3e-7, atol=0.0)
        # Far below -ln 2 the series says what no float64 of 1 - e^x does: -e^x.
        far = torch.tensor([-40.0, -80.0], dtype=torch.float64)
        torch.testing.assert_close(log1mexp(far), -far.exp(), rtol=1e-15, atol=0.0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_both_ends_have_finite_losses_and_the_gradients_of_the_limit(self, dtype):
        def of(chosen, rejected):
            pair = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (chosen, rejected)]
            loss = odds_ratio_loss(*pair)
            loss.backward()
            found = [loss, pair[0].grad, pair[1].grad]
            assert all(value.isfinite() and value.dtype == dtype for value in found)
            return [value.item() for value in found]

        eps = torch.finfo(dtype).eps
        odds = log_odds(torch.tensor(-1.0, dtype=torch.float64)).exp().item()
        # The chosen is certain: nothing is lost, and the derivative goes to -odds(rejected), where autograd alone has 0 * inf.
        loss, of_chosen, of_rejected = of(0.0, -1.0)
        assert loss == pytest.approx(odds * eps, rel=1e-2) and of_chosen == pytest.approx(-odds, rel=1e-5)
        assert 0 < of_rejected < 2 * eps
        # The rejected is certain: it is pushed down by 1 / eps, not by the 0 of a clamp.
        assert of(-1.0, 0.0)[2] == pytest.approx(1 / eps, rel=1e-5)
        assert of(0.0, 0.0) == pytest.approx([0.6931472, -0.5 / eps, 0.5 / eps], rel=1e-5)
        # Nothing is left of the chosen: the loss is -log P, its derivative -1; of the rejected: there is nothing to do.
        assert of(-1e30, -1.0)[1] == -1.0 and of(-1e30, -1.0)[0] == pytest.approx(1e30)
        assert of(-float("inf"), -1.0)[1] == -1.0
        assert of(-1.0, -float("inf")) == [0.0, 0.0, 0.0]
        assert of(-float("inf"), -float("inf"))[0] == pytest.approx(0.6931472)

    def test_what_is_no_number_stays_none(self):
        assert odds_ratio_loss(torch.tensor(float("nan")), torch.tensor(-1.0)).isnan()

    def test_half_precision_is_computed_in_float32(self):
        assert log_odds(torch.tensor(-1.0, dtype=torch.bfloat16)).dtype == torch.float32

    def test_nats_of_targets_are_the_cross_entropy_of_all_logits_at_once(self, monkeypatch):
        monkeypatch.setattr("smt.model.loss.CHUNK_LOGITS", 35)  # five steps at a time
        hidden, weight = torch.randn(2, 6, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
        targets, weights = torch.randint(0, 7, (2, 6)), torch.randn(2, 6)
        targets[0, :2] = -100
        expected = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="none")
        got = target_nats(hidden, weight, targets)
        torch.testing.assert_close(got.flatten(), expected)
        losses = [(nats * weights.flatten()).sum() for nats in (got.flatten(), expected)]
        gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in losses]
        torch.testing.assert_close(*gradients)


class TestStage:
    def test_a_step_descends_the_papers_loss_of_its_pairs(self, monkeypatch):
        """Every row alone, all logits, equations 6 and 7; the stage has them padded side by side in one forward pass."""
        gradients = []

        def keep(self, parameters, norm):
            gradients.extend(parameter.grad for parameter in parameters)
            return torch.tensor(1.0)

        monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", keep)
        trainer = trainer_of(pairs=PAIRS, data={"batch_size": 3}, orpo_lambda=0.7, steps=1)
        model = trainer.model
        nats, n_targets, ratios = 0.0, 0, []
        for pair in PAIRS:
            means = []
            for completion in (pair.chosen, pair.rejected):
                row = torch.tensor([[*pair.prompt, *completion]])
                log_p = model(row[:, :-1])[0].log_softmax(-1).gather(2, row[:, 1:, None])[0, :, 0]
                means.append(log_p[-len(completion) :].mean().double())
                if completion is pair.chosen:
                    nats, n_targets = nats - log_p.sum(), n_targets + len(log_p)
            ratios.append(paper(*means))
        loss = nats / n_targets + 0.7 * torch.stack(ratios).mean()
        expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        trainer._step(iter(trainer._walk), 0.0, is_first=True)
        assert trainer.progress.loss == pytest.approx(loss.item(), rel=1e-5)
        for got, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted, rtol=1e-4, atol=1e-6)
        held_out = evaluate_pairs(PairLogProbabilities(trainer.model), PAIRS, batch_size=2, strength=0.7)
        assert held_out.n_pairs == 3 and 0 <= held_out.accuracy <= 1

    def test_the_best_weights_are_those_of_the_lowest_loss_of_pairs_whatever_that_of_the_text(self):
        pairs, text, best = [3.0, 2.0, 2.5], [3.0, 4.0, 1.0], []
        trainer = trainer_of(pairs=PAIRS, data={"batch_size": 3}, steps=3, evaluations=3)

        def evaluate():
            of_pairs = PairEvaluation(loss=pairs.pop(0), accuracy=0.5, margin=0.1, n_pairs=3)
            return Evaluation(nats=text.pop(0), n_targets=1, n_bytes=1, pairs=of_pairs)

        trainer.train(evaluate, on_best=lambda: best.append(trainer.progress.step))
        found = trainer.progress.best
        assert best == [1, 2] and (found["best_step"], found["best_pair_loss"], found["best_val_loss"]) == (2, 2.0, 4.0)

    def test_the_stage_of_a_run_trains_on_what_is_not_held_out_with_its_strength(self, tmp_path):
        config = run_config(tmp_path, orpo_lambda=0.7, seed=5)
        pairs, process = SimpleNamespace(train=PAIRS[:2], held_out=PAIRS[2:]), SimpleNamespace(process_index=0, num_processes=1)
        stage = _stage(config, None, pairs, process)
        assert stage.walk.pairs == PAIRS[:2] and stage.walk.seed == 5 and stage._strength == 0.7

    def test_an_evaluation_counts_pairs_and_says_what_the_loss_is(self):
        trainer = trainer_of(pairs=PAIRS, data={"batch_size": 3}, orpo_lambda=0.7, steps=1, learning_rate=1e-12)
        held_out = evaluate_pairs(PairLogProbabilities(trainer.model), PAIRS, batch_size=2, strength=0.7)
        with torch.no_grad():
            batch = pair_batch(PAIRS)
            _, log_p = PairLogProbabilities(trainer.model)(batch.input_ids, batch.targets, completion=batch.completion)
        chosen, rejected = log_p.chunk(2)
        assert held_out.accuracy == pytest.approx((chosen > rejected).double().mean().item())
        assert held_out.margin == pytest.approx((log_odds(chosen) - log_odds(rejected)).mean().item(), rel=1e-5)
        trainer._step(iter(trainer._walk), 0.0, is_first=True)
        assert held_out.loss == pytest.approx(trainer.progress.loss, rel=1e-5)  # what the first step descends


def test_reading_late_and_in_full_shapes_trains_the_same():
    """As on a GPU, where every batch has the shape of every other, and no step waits for the numbers of its own."""
    trainers, losses = [trainer_of(pairs=PAIRS, learning_rate=0.01) for _ in range(2)], []
    trainers[1]._keeps_shapes = trainers[1]._reads_late = True
    for trainer in trainers:
        batches = iter(trainer._walk)
        for step in range(3):
            trainer._step(batches, step / 3, is_first=not step)
        trainer._read()
        losses.append(torch.tensor([nats / n_targets for nats, n_targets in trainer.progress.recent]))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0.0)
    assert trainers[0].progress.padding < trainers[1].progress.padding


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def preferences(path):
    """Up rather than down, whatever the number."""
    lines = [{"prompt": f"{index}: ", "chosen": "up up", "rejected": "down"} for index in range(12)]
    return write_lines(path, lines)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Drawing curves takes longer than such a run."""
    monkeypatch.setattr("smt.training.ending.training_curves", lambda history, path, title: path.touch())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("corpus"))
    return tokenize_corpus(config.data, config.model.vocab_size)


@pytest.fixture(scope="module")
def first_stages(text, tmp_path_factory):
    """What a run of each architecture leaves to go on from; it had dropout."""
    config, folders = run_config(tmp_path_factory.mktemp("first"), sample_tokens=0), {}
    sizes = replace(config.model, dropout=0.1, vocab_size=text.tokenizer.vocab_size)
    data = replace(config.data, chunk_length=16, eval_chunk_length=16)
    for name in ("smt", "gpt2"):
        config = replace(config, architecture=name, model=sizes, data=data)
        folder = folders[name] = tmp_path_factory.mktemp(name)
        text.tokenizer.save(folder)
        weights = tensors_writer(fresh_model(config).state_dict())
        write_files({folder / "config.yaml": config.to_yaml, folder / "model.safetensors": weights})
    return folders


def second(first, pairs, **overrides):
    given = {
        "stage": "orpo", "init_from": f"checkpoint={first}", "pairs": str(pairs), "steps": 12, "learning_rate": 1e-2,
        "orpo_lambda": 1.0, "evaluations": 3, "sample_tokens": 0, "batch_size": 3, "device": "cpu", **overrides,
    }  # fmt: skip
    return staged("orpo", given)


@pytest.mark.parametrize("architecture", ["smt", "gpt2"])
def test_a_second_stage_tells_pairs_apart_that_the_first_did_not(architecture, first_stages, tmp_path):
    config = second(first_stages[architecture], preferences(tmp_path / "pairs.jsonl"))
    outcome = run_in(tmp_path / "run", config)
    assert outcome.config.architecture == architecture and outcome.config.model.dropout == 0.0
    history = json.loads((outcome.folder / "metrics_history.json").read_text())
    results = json.loads((outcome.folder / "results.json").read_text())["results"]
    margins = history["log_odds_margin"]
    assert margins == sorted(margins) and margins[-1] > margins[0] + 0.1  # of a pair that was held out
    assert history["pair_loss"][-1] < history["pair_loss"][0] and history["reward_accuracy"][-1] == 1.0
    assert history["train_loss"][-1] < history["train_loss"][0]
    assert len(history["val_loss"]) == len(margins) == 3  # of the run's text, as in the stage before
    assert results["final_log_odds_margin"] == margins[-1] and results["best_pair_loss"] == min(history["pair_loss"])


def test_a_stage_that_is_interrupted_ends_as_one_that_is_not(first_stages, tmp_path, monkeypatch):
    steps = {"steps": 4, "save_steps": 2, "evaluations": 1, "gradient_accumulation_steps": 2}
    config = second(first_stages["smt"], preferences(tmp_path / "pairs.jsonl"), **steps)
    whole = run_in(tmp_path / "whole", config).folder
    take_step = Trainer._step

    def interrupted(self, *arguments, **options):
        if self.progress.step == 3:
            raise OSError("the power is out")
        take_step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(OSError, match="power"):
            run_in(tmp_path / "run", config)
    torch.manual_seed(99)
    resume(tmp_path / "run")
    for name in ("metrics_history.json", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name


def test_an_epoch_is_one_of_pairs(first_stages, tmp_path):
    path = preferences(tmp_path / "pairs.jsonl")
    config = second(first_stages["smt"], path, steps="none", epochs=1, evaluations=1, batch_size=2)
    outcome = run_in(tmp_path / "run", config)
    n_pairs = len(read_pairs(path, tokenize_corpus(config.data, 270).tokenizer, config.data.chunk_length).train)
    assert outcome.progress.step == -(-n_pairs // 2)


def test_a_stage_goes_on_with_its_own_pairs_alone():
    trainer = trainer_of(pairs=PAIRS)
    with pytest.raises(ValueError, match="state belongs to a walk with hash_of_pairs"):
        trainer_of(pairs=PAIRS[:2]).resume(trainer.snapshot())


def test_a_pair_that_is_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="pairs must have at most chunk_length = 4 steps in a row, one has 5"):
        trainer_of(pairs=[Pair([1, 2], [3], [4, 5]), Pair([1, 2], [3, 4, 5, 6], [7])], data={"chunk_length": 4})


def test_without_pairs_the_command_is_refused_before_anything_is_read(first_stages, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--stage", "orpo", "--init_from", f"checkpoint={first_stages['smt']}", "--text", "nowhere"]) == 1
    assert capsys.readouterr() == ("", "smt: error: pairs must be given for stage 'orpo', got None\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"stage": "orpo"}}, "pairs must be given for stage 'orpo', got None"),
        ({"data": {"pairs": "a.jsonl"}}, "pairs are read in stage 'orpo' alone, got them in stage 'pretrain'"),
        ({"training": {"stage": "orpo"}, "data": {"pairs": "a.jsonl"}}, "dropout must be 0 in stage 'orpo'"),
        ({"training": {"stage": "opro"}}, "stage must be one of pretrain, orpo, got 'opro'; did you mean 'orpo'"),
        ({"training": {"orpo_lambda": -0.1}}, "orpo_lambda must be at least 0, got -0.1"),
    ],
    ids=["no pairs", "no stage", "dropout", "stage", "lambda"],
)
def test_settings_that_do_not_fit_a_stage_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(values)


class TestSecondStage:
    def test_what_is_left_open_is_as_in_the_run_before_and_the_rest_as_given(self, first_stages):
        before = RunConfig.from_yaml(first_stages["smt"] / "config.yaml")
        config = staged("orpo", {"init_from": f"checkpoint={first_stages['smt']}", "pairs": "p.jsonl", "batch_size": "5"})
        assert config.model == replace(before.model, dropout=0.0)
        assert config.data == replace(before.data, pairs="p.jsonl", batch_size=5)
        training = config.training
        assert (training.learning_rate, training.weight_decay, training.orpo_lambda) == (1e-4, 0.01, 0.1)
        assert training.warmup * training.steps == 100 and config.experiment == "orpo"

    def test_pairs_are_never_those_of_the_run_before(self, first_stages, tmp_path):
        config = second(first_stages["smt"], "p.jsonl")
        config.to_yaml(tmp_path / "config.yaml")
        with pytest.raises(ValueError, match="pairs must be given for stage 'orpo', got None"):
            staged("orpo", {"init_from": f"checkpoint={tmp_path}"})
        assert staged("orpo", {"init_from": f"checkpoint={tmp_path}", "pairs": "q.jsonl"}).data.pairs == "q.jsonl"

    def test_a_checkpoint_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=f"there is no {tmp_path}/none/config.yaml"):
            staged("orpo", {"init_from": f"checkpoint={tmp_path}/none", "pairs": "p.jsonl"})

    def test_the_packaged_configuration_needs_weights_to_start_from(self):
        with pytest.raises(ValueError, match="init_from must be given for the configuration 'orpo'"):
            staged("orpo", {"pairs": "p.jsonl"})

    def test_fresh_weights_are_allowed_and_told(self, tmp_path, capsys):
        values = run_config(tmp_path, steps=1, evaluations=1, sample_tokens=0).to_dict()
        values["data"]["pairs"] = str(preferences(tmp_path / "pairs.jsonl"))
        values["training"]["stage"] = "orpo"
        config = RunConfig.from_dict(values)
        run(config, tmp_path / "out")
        assert "warning: stage orpo begins with fresh weights: nothing is in init_from" in capsys.readouterr().err


class TestPairsOfACorpus:
    @pytest.mark.parametrize("architecture", ["smt", "gpt2"])
    def test_a_document_goes_on_as_it_did(self, architecture, first_stages, text, tmp_path):
        model = fresh_model(RunConfig.from_yaml(first_stages[architecture] / "config.yaml"))
        sizes = {"prompt_length": 5, "completion_length": 4, "batch_size": 3}
        pairs, again, others = (corpus_pairs(model, text.train, 8, seed=seed, **sizes) for seed in (1, 1, 2))
        assert pairs == again != others
        documents = [" ".join(map(str, document.tolist())) for document in text.train]
        assert len(pairs) > 4
        for pair in pairs:
            assert [len(part) for part in pair] == [5, 4, 4] and pair.chosen != pair.rejected
            assert any(" ".join(map(str, pair.prompt + pair.chosen)) in document for document in documents)
        write_pairs(tmp_path / "pairs.jsonl", pairs, text.tokenizer)
        read = read_pairs(tmp_path / "pairs.jsonl", text.tokenizer, 8)
        assert sorted([*read.train, *read.held_out]) == sorted(pairs) and not read.left_out

    def test_every_piece_of_every_document_is_drawn_once_where_all_are(self, text):
        class Elsewhere(torch.nn.Module):
            """Goes on with a token that no text has."""

            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(1))

            def generate(self, ids, n_tokens, **options):
                return torch.cat([ids, ids.new_full((len(ids), n_tokens), 999)], dim=1)

        every = [tokens[start : start + 9].tolist() for tokens in text.train for start in range(len(tokens) - 8)]
        pairs = corpus_pairs(Elsewhere(), text.train, len(every), prompt_length=5, completion_length=4)
        assert sorted(pair.prompt + pair.chosen for pair in pairs) == sorted(every)
        assert all(pair.rejected == [999] * 4 for pair in pairs)

    def test_a_temperature_of_0_gives_the_models_likeliest_continuation(self, first_stages, text):
        model = fresh_model(RunConfig.from_yaml(first_stages["smt"] / "config.yaml")).eval()
        pairs = corpus_pairs(model, text.train, 4, prompt_length=5, completion_length=4, temperature=0.0)
        prompts = torch.tensor([pair.prompt for pair in pairs])
        assert [pair.rejected for pair in pairs] == model.generate(prompts, 4, temperature=0.0)[:, 5:].tolist()

    def test_more_pieces_than_there_are_are_refused(self, text):
        there = sum(max(0, length - 8) for length in text.train.lengths)
        with pytest.raises(ValueError, match=f"n_pairs must lie in 1..{there}, the pieces of 9 tokens that there are"):
            corpus_pairs(None, text.train, there + 1, prompt_length=5, completion_length=4)
        longest = max(text.train.lengths)
        with pytest.raises(ValueError, match=f"completion_length = {longest + 1} is more than any document has tokens"):
            corpus_pairs(None, text.train, 1, prompt_length=longest, completion_length=1)
        with pytest.raises(ValueError, match="prompt_length \\+ completion_length = 2 is more than any document has tokens"):
            corpus_pairs(None, SimpleNamespace(lengths=[]), 1, prompt_length=1, completion_length=1)
