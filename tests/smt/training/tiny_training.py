"""Runs and trainers so small that a test can afford them."""

import torch

from smt import SMTConfig, StrideMemoryTransformer
from smt.data.walk import DocumentWalk
from smt.evaluation.perplexity import Evaluation
from smt.training.accelerate import make_accelerator
from smt.training.clock import Clock
from smt.training.settings import DataConfig, RunConfig, TrainingConfig
from smt.training.stage import Preference, Pretraining
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


def trainer_of(documents=None, clock=None, model=None, data=None, counted=None, pairs=None, **training):
    """A trainer of a tiny model of a fixed seed, on documents or on pairs."""
    torch.manual_seed(0)
    model = StrideMemoryTransformer(SMTConfig(**{**MODEL, **(model or {})}))
    training = TrainingConfig(**{"steps": 6, "evaluations": 1, "device": "cpu", **training})
    data = DataConfig(**{**DATA, **(data or {})})
    documents = random_documents() if documents is None else documents
    clock = clock or Clock(training, 0.0, epoch_targets=sum(len(document) - 1 for document in documents))
    accelerator = make_accelerator(training)
    options = {"seed": training.seed, "rank": accelerator.process_index, "world_size": accelerator.num_processes}
    if pairs is None:
        stage = Pretraining(documents, data, counted=counted, **options)
    else:
        stage = Preference(pairs, data, strength=training.orpo_lambda, **options)
    return Trainer(model, stage, training, clock, accelerator)


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
