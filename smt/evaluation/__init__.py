"""How good a model is on text it was not trained on.

In reading order: ``run`` (one evaluation from models and text to a report), ``subjects`` (what is evaluated), ``text``
(held-out documents as tokens), ``scorer`` (one interface to every model), ``perplexity`` and ``preference`` (while
training, too); the tasks: ``position`` (loss along the document), ``recall``, ``needle``, ``pooling`` (what is pooled),
``ablation`` (the memory hindered); ``statistics`` (means and their errors); and ``report`` and ``plots``.
"""
