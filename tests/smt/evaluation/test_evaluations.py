"""Position, needle, recall and pooling: what is measured is what the names say, for models of known answers."""

import math
import random
import statistics
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from smt import SMTConfig, StrideMemoryTransformer
from smt.data.documents import Document, hold_out
from smt.data.recall import RecallTask, read_recall, words
from smt.data.settings import DataConfig
from smt.data.tokenizer import Tokenizer
from smt.evaluation import run as run_module
from smt.evaluation.needle import ENGLISH, NeedleStyle, needle_in_haystack, recall_style
from smt.evaluation.perplexity import Evaluation
from smt.evaluation.pooling import analyse_pooling, pooling_weights, summarise
from smt.evaluation.position import fall_between, log_spaced, loss_by_position, mean_between
from smt.evaluation.recall import FIRST_DOCUMENT, encode_words, recall, usual_distances
from smt.evaluation.report import Report
from smt.evaluation.run import EvaluationConfig, EvaluationRun
from smt.evaluation.scorer import TokenScores
from smt.evaluation.statistics import Estimate, mean_difference, mean_of, mean_per_count, t_quantile, t_within
from smt.evaluation.text import held_out_text

TASK = RecallTask(keys=6, values=5, fillers=4, pairs=2, length=90, longest=20, spacing=10, documents=6)


@pytest.fixture(scope="module")
def tokenizer():
    """One that splits the made-up words, as a tokenizer of another text does."""
    return Tokenizer.train([Document("text", "the secret word of Paris is bread. kaba vaba faba")], 300)


class Reader:
    """A scorer that names what followed the last ``order`` tokens when they last occurred, ``memory`` tokens back at most."""

    def __init__(self, memory=10**6, order=3):
        self.memory, self.order = memory, order

    def score(self, documents):
        scores = []
        for document in documents:
            tokens, score = document.tolist(), TokenScores.of_length(len(document))
            for t in range(self.order, len(tokens)):
                last, first = tokens[t - self.order : t], max(self.order, t - self.memory)
                seen = [s for s in range(first, t) if tokens[s - self.order : s] == last]
                right = bool(seen) and tokens[seen[-1]] == tokens[t]
                score.log_probs[t - 1], score.greedy[t - 1] = math.log(0.9 if right else 0.01), right
            scores.append(score)
        return scores


def random_scores(lengths=(5, 80, 33, 300), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [TokenScores(-torch.rand(n, generator=generator).double(), torch.zeros(n, dtype=torch.bool)) for n in lengths]


def test_bits_per_character_by_hand():
    evaluation = Evaluation(nats=8 * math.log(2), n_targets=4, n_bytes=4, n_characters=2)
    assert evaluation.bits_per_character == pytest.approx(4.0)
    assert Evaluation(nats=1.0, n_targets=1, n_bytes=1).bits_per_character is None


@pytest.mark.parametrize("bins_per_octave", [1, 2, 5])
def test_bins_weighted_by_their_tokens_add_up_to_the_whole(bins_per_octave):
    scores = random_scores()
    result = loss_by_position(scores, bins_per_octave=bins_per_octave)
    there = [mean for mean in result.bins if mean is not None]
    assert sum(mean.n_tokens for mean in there) == sum(len(score.log_probs) for score in scores)
    whole = -sum(score.log_probs.sum().item() for score in scores)
    assert sum(mean.nats * mean.n_tokens for mean in there) == pytest.approx(whole)


def test_a_position_counts_the_tokens_before_the_one_that_is_predicted():
    score = TokenScores(-torch.arange(1.0, 11.0).double(), torch.zeros(10, dtype=torch.bool))
    assert mean_between([score], 3, 6).nats == pytest.approx(4.0)  # tokens 3, 4 and 5
    assert mean_between([score], 9).n_tokens == 2
    assert mean_between([score], 11) is None


def test_the_interval_over_documents_of_one_length_is_that_of_their_means():
    scores = random_scores((50,) * 12)
    means = torch.stack([-score.log_probs.mean() for score in scores])
    mean = mean_between(scores, 1)
    assert mean.margin == pytest.approx((2.200985 * means.std() / math.sqrt(12)).item())  # t of 11 degrees of freedom
    assert mean_between(scores[:1], 1).margin is None


# Two-sided critical values of t at 5 %, of any table.
CRITICAL = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 9: 2.26216, 52: 2.00665, 10_000: 1.96020}


@pytest.mark.parametrize(("degrees", "critical"), CRITICAL.items())
def test_quantiles_are_those_of_the_t_distribution(degrees, critical):
    assert t_quantile(degrees) == pytest.approx(critical, abs=1e-4)
    assert t_within(t_quantile(degrees), degrees) == pytest.approx(0.95)


@pytest.mark.parametrize("n", [2, 5])
def test_95_of_100_intervals_over_few_documents_hold_the_true_mean(n):
    draw = random.Random(0)
    means = [mean_of([draw.gauss() for _ in range(n)]) for _ in range(4000)]
    held = sum(abs(found.mean) <= found.margin for found in means) / len(means)
    assert abs(held - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 4000)  # 5 standard errors


def test_an_estimate_weighs_samples_by_their_counts_and_pairs_by_what_they_differ():
    values = [0.5, 2.0, 0.25]
    error = pytest.approx(statistics.stdev(values) / math.sqrt(3))
    assert mean_of(values) == Estimate(pytest.approx(2.75 / 3), error, 3)
    assert mean_per_count([8 * value for value in values], [8, 8, 8]) == Estimate(pytest.approx(2.75 / 3), error, 3)
    assert mean_difference([value + 9.0 for value in values], [9.0] * 3) == Estimate(pytest.approx(2.75 / 3), error, 3)
    assert mean_per_count([3.0, 1.0], [3, 1]) == Estimate(1.0, 0.0, 2)
    assert mean_of([1.5]) == Estimate(1.5, None, 1) and mean_of([1.5]).margin is None
    assert math.isnan(mean_of([1.0, math.nan]).margin)


def test_without_a_model_of_ours_the_window_is_that_of_the_default():
    config = SMTConfig()
    run = EvaluationRun([], DataConfig(), EvaluationConfig(), Report())
    reach = config.n_ssm_outputs * config.stride + config.m_input_tokens
    assert run.window == (config.m_input_tokens, config.window_size, reach)
    assert run.marks == {}  # of what none of the subjects has


def test_a_fall_is_measured_within_documents_that_are_long_enough():
    falling = TokenScores(-torch.cat([torch.full((20,), 3.0), torch.full((30,), 2.0)]).double(), torch.zeros(50, dtype=bool))
    easier = TokenScores(-torch.full((20,), 1.0).double(), torch.zeros(20, dtype=bool))
    fall = fall_between([falling, easier], (1, 21), (21, 51))
    assert fall.nats == pytest.approx(1.0) and fall.n_documents == 1
    assert fall_between([easier], (1, 21), (21, 51)) is None
    rising = TokenScores(-torch.arange(1.0, 51.0).double(), torch.zeros(50, dtype=bool))  # as much as the position
    fall = fall_between([rising, rising], (3, 6), (10, 15))
    assert fall.nats == pytest.approx(4 - 12) and (fall.n_tokens, fall.n_documents) == (2 * 8, 2)
    assert fall_between([rising], (3, 6), (10, 51)) is not None and fall_between([rising], (3, 6), (10, 52)) is None


def test_the_fall_on_record_is_from_the_reach_of_the_slots_on():
    loss = torch.cat([torch.full((4,), 9.0), torch.full((6,), 3.0), torch.full((11,), 1.0), torch.full((5,), 7.0)])
    score, report = TokenScores(-loss.double(), torch.zeros(len(loss), dtype=bool)), Report()
    run = SimpleNamespace(
        window=(5, 8, 11), marks={}, subjects=[SimpleNamespace(name="a")], scores=lambda subject: [score, score],
        report=report, draw=lambda *plot: None,
    )  # fmt: skip
    run_module.TASKS["position"](run)
    assert report.results["position"]["a"]["fall"]["nats"] == pytest.approx(2.0)
    assert report.rows == [("position", "a", "fall of the loss from 5..11 to 11..22", "2.0000 ± 0.0000, 2 documents")]


def test_log_spaced_edges_grow_and_end_where_they_are_told():
    edges = log_spaced(1, 1000, 2)
    assert edges[0] == 1 and edges[-1] == 1000 and list(edges) == sorted(set(edges))
    assert all(b / a < 2.1 for a, b in pairwise(edges))


@pytest.mark.parametrize("queries", [1, 2])
def test_recall_documents_show_each_pair_once_and_ask_for_it_at_the_distance_that_is_named(queries):
    task = replace(TASK, queries=queries, length=60 + 40 * queries)
    for index in range(50):
        document = task.document(index)
        assert len(document.words) == task.length and len(document.questions) == task.pairs * queries
        for question in document.questions:
            shown = question.position - question.distance
            assert task.shortest <= question.distance <= task.longest
            pair = document.words[shown - 1 : shown + 1]
            assert pair == document.words[question.position - 1 : question.position + 1]
            assert pair[0] in words("k", task.keys) and pair[1] in words("v", task.values)
            assert document.words.count(pair[0]) == 1 + queries
            assert pair[0] not in document.words[shown : question.position - 1]
        starts = {key: [i for i, word in enumerate(document.words) if word == key] for key in set(document.words)}
        one, other = (places for key, places in starts.items() if key[0] == "k")
        assert all(abs(a - b) >= task.spacing + 2 for a in one for b in other)


def test_the_answers_of_a_recall_document_and_nothing_else_are_its_targets():
    document = replace(TASK, queries=2, length=140).document(0)
    assert len(document.answers) == 4
    for (start, stop), question in zip(document.answers, document.questions, strict=True):
        assert document.text[start:stop] == f" {document.words[question.position]}"
    train = next(iter(read_recall(replace(TASK, queries=2, length=140)).train))
    assert (train.text, train.targets) == (document.text, document.answers)


def test_at_a_distance_every_pair_is_asked_for_once_whatever_the_task_asks():
    task = replace(TASK, queries=2, length=140)
    for index in range(20):
        questions = task.at_distance(60).document(index).questions
        assert [question.distance for question in questions] == [60] * task.pairs


def test_recall_documents_come_from_the_seed_and_their_number_alone():
    assert TASK.document(3) == TASK.document(3) != TASK.document(4)
    assert RecallTask(seed=1).document(0) != RecallTask(seed=2).document(0)
    corpus = read_recall(TASK)
    train, held_out = list(corpus.train), list(corpus.validation)
    assert len(train) == TASK.documents and {d.text for d in train}.isdisjoint(d.text for d in held_out)
    other = read_recall(replace(TASK, fillers=5))
    assert len({split.hash for of in (corpus, other) for split in (of.train, of.validation)}) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 280}, "length must be at least 290 for the longest distance, got 280"),
        ({"length": 300, "pairs": 8}, "length must have room for 8 pairs, 2 times each, 50 words apart, got 300"),
        ({"pairs": 40}, "pairs must be at most keys = 32, got 40"),
        ({"longest": 2}, "longest must be at least shortest = 4, got 2"),
        ({"values": 10**4}, "values must be at most 525, got 10000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_recall_task_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RecallTask(**fields)


def test_words_in_any_tokens_spell_the_text_of_the_document(tokenizer):
    document = TASK.document(0)
    tokens, starts = encode_words(document.words, tokenizer)
    assert tokenizer.decode(tokens[1:]) == document.text
    assert tokenizer.decode(tokens[starts[5] : starts[6]]) == f" {document.words[5]}"


def test_recall_is_whole_for_one_who_can_look_back_and_none_for_one_who_cannot():
    tokenizer = Tokenizer.train(read_recall(replace(TASK, documents=64)).train, 512)
    assert encode_words(TASK.document(0).words, tokenizer)[1] == list(range(1, TASK.length + 2))  # a word is a token
    able = recall(Reader(order=1), tokenizer, TASK, [10, 40], n_documents=4)
    assert [(there.distance, there.n_questions) for there in able.distances] == [(10, 8), (40, 8)]
    assert able.chance == 1 / 5
    assert all(there.accuracy == 1 for there in able.distances)
    assert able.distances[0].nats == pytest.approx(-math.log(0.9))
    unable = recall(Reader(order=1, memory=30), tokenizer, TASK, [10, 40], n_documents=4)
    assert [there.accuracy for there in unable.distances] == [1, 0]


class Steady:
    """A scorer that gives every token e^-1, and names every second token of a document from its end on."""

    def __init__(self):
        self.documents = []

    def score(self, documents):
        self.documents += [document.tolist() for document in documents]
        greedy = [torch.arange(len(document) - 1).flip(0) % 2 == 0 for document in documents]
        return [TokenScores(torch.full((len(named),), -1.0, dtype=torch.float64), named) for named in greedy]


def test_an_answer_of_several_tokens_has_the_likelihood_of_all_and_is_right_where_all_are(tokenizer):
    documents = [TASK.at_distance(10).document(FIRST_DOCUMENT + index) for index in range(4)]
    answers = [document.words[question.position] for document in documents for question in document.questions]
    sizes = [len(tokenizer.encode(f" {word}")) for word in answers]
    result = recall(Steady(), tokenizer, TASK, [10], n_documents=4).distances[0]
    assert max(sizes) > 1 and result.nats == pytest.approx(statistics.fmean(sizes))
    assert result.accuracy <= sizes.count(1) / len(sizes)
    style = NeedleStyle(" {key} is {value}", " {key} is", " {value}", ("kaba",), ("e", "silver"))
    lengths = [len(tokenizer.encode(f" {value}")) for value in style.values]
    haystack, options = torch.arange(40), {"lengths": [20], "depths": [0.5], "n_trials": 16, "n_candidates": 2}
    grid = needle_in_haystack(Steady(), tokenizer, haystack, style, **options)
    assert lengths[0] < lengths[1] and 0 < grid.accuracy[0][0] < 1  # right where the true one is the shorter
    assert grid.exact[0][0] == (grid.accuracy[0][0] if lengths[0] == 1 else 0)


def test_the_seed_draws_the_needles_and_what_they_are_hidden_in(tokenizer):
    options = {"lengths": [20], "depths": [0.5], "n_trials": 4, "n_candidates": 4}

    def documents(seed):
        scorer = Steady()
        needle_in_haystack(scorer, tokenizer, torch.arange(200), ENGLISH, seed=seed, **options)
        return scorer.documents

    assert documents(0) == documents(0) != documents(1)


def test_no_question_of_recall_is_of_a_document_to_train_on_or_to_choose_by_and_none_is_asked_twice():
    tokenizer, corpus = Tokenizer.train(read_recall(TASK).train, 512), read_recall(TASK)
    reader, asked = Reader(order=1), []
    score = reader.score
    reader.score = lambda documents: asked.extend(tokenizer.decode(tokens[1:]) for tokens in documents) or score(documents)
    recall(reader, tokenizer, TASK, [10, 40], n_documents=4)
    assert len(set(asked)) == 8
    assert set(asked).isdisjoint(document.text for split in (corpus.train, corpus.validation) for document in split)


def test_the_first_held_out_documents_are_evaluated_where_a_number_is_given():
    corpus = hold_out("here", lambda skipped: (Document(f"{index}", f"text {index}") for index in range(100)))
    tokenizer = Tokenizer.train(corpus.train, 260)
    every, two = held_out_text(corpus, tokenizer), held_out_text(corpus, tokenizer, 2)
    assert [d.tolist() for d in two.documents] == [d.tolist() for d in every.documents[:2]] and len(every.documents) > 2
    assert two.n_targets == sum(len(d) - 1 for d in every.documents[:2])
    assert two.n_bytes == sum(len(document.text) for document in [*corpus.validation][:2])


def test_recall_asks_within_the_window_and_at_multiples_of_its_length():
    assert usual_distances(65) == (16, 32, 65, 130, 195, 260, 325, 390, 520)
    assert min(usual_distances(4)) == 2  # a value stands no closer to its next occurrence


@pytest.mark.parametrize("style", [ENGLISH, recall_style(TASK)], ids=["English", "recall"])
def test_a_needle_is_found_by_one_who_can_look_back_so_far_and_by_no_other(tokenizer, style):
    haystack = torch.tensor(random.Random(0).choices(range(1, 200), k=400))
    options = {"lengths": [20, 200], "depths": [0.0, 1.0], "n_trials": 4, "n_candidates": 4}
    found = needle_in_haystack(Reader(), tokenizer, haystack, style, **options)
    assert found.chance == 0.25
    assert min(value for row in found.accuracy for value in row) >= 0.75
    lost = needle_in_haystack(Reader(memory=100), tokenizer, haystack, style, **options)
    assert lost.accuracy[1][1] >= 0.75 and lost.accuracy[0][1] <= 0.25 and lost.exact[0][1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [50]}, "haystack must have the 50 tokens of the longest piece, got 40"),
        ({"depths": [1.5]}, r"depths must lie in \[0, 1\], got \(1.5,\)"),
        ({"n_candidates": 13}, r"n_candidates must lie in 2\.\.12, got 13"),
    ],
    ids=["length", "depth", "candidates"],
)
def test_a_grid_that_cannot_be_is_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        needle_in_haystack(Reader(), tokenizer, torch.ones(40, dtype=torch.int64), ENGLISH, **{"lengths": [20], **options})


SIZES = dict(
    vocab_size=40, d_model=16, d_k=8, dropout=0.0, n_ssm_outputs=3, m_input_tokens=6, stride=2, write_group=2,
    transformer_n_layers=1, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4, initializer_range=0.3,
)  # fmt: skip


def test_pooling_weights_of_chunks_are_those_of_the_whole_and_the_summary_counts_full_windows():
    torch.manual_seed(0)
    model = StrideMemoryTransformer(SMTConfig(**SIZES)).eval()
    documents = [torch.randint(0, 40, (length,)) for length in (60, 33, 8)]
    chunked = pooling_weights(model, documents, batch_size=2, length=7)
    for document, weights in zip(documents, chunked, strict=True):
        with torch.no_grad():
            _, aux = model(document[None, :-1], return_weights=True)
        assert torch.allclose(weights, aux.attention_weights[0], atol=1e-6)
    result = analyse_pooling(model, documents, batch_size=2, length=7)
    full = torch.cat([weights[result.first_write :] for weights in chunked[:2]])
    assert (full > 0).all() and not (chunked[0][: result.first_write] > 0).all(dim=1).any()
    assert result.n_writes == len(full)
    assert result.weights == pytest.approx(full.mean(0).tolist())
    assert result.mean.ssm_total + result.mean.input_total == pytest.approx(1.0)


def test_figures_of_known_weights():
    result = summarise(torch.tensor([[0.5, 0.0, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]]), n_memory=2)
    assert (result.ssm_total, result.input_total, result.ssm_max, result.input_max) == (0.5, 0.5, 0.375, 0.25)
    assert result.entropy == pytest.approx((1.5 * math.log(2) + 2 * math.log(2)) / 2)


def test_pooling_of_documents_without_a_full_window_is_refused():
    model = StrideMemoryTransformer(SMTConfig(**SIZES))
    with pytest.raises(ValueError, match="pooling needs a document of at least 11 tokens, the longest has 8"):
        analyse_pooling(model, [torch.arange(8)])
    with pytest.raises(ValueError, match="a model with writes = False pools nothing"):
        analyse_pooling(StrideMemoryTransformer(SMTConfig(**SIZES, writes=False)), [torch.arange(20)])
