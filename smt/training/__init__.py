"""A training run: its settings, its loop and the folder that it leaves.

In reading order: ``settings`` (every field of a run), ``second_stage`` (fields that it leaves to the run before), ``run`` (one
run from text to results), ``reading`` (its text and pairs), ``trainer`` (the loop), ``stage`` (documents, or pairs: what the
loop descends), ``shapes`` (of its batches), ``objective`` (the loss of a chunk, the log-probabilities of a pair),
``corpus_pairs`` (pairs out of documents), ``taken_step`` (what a device may still be computing), ``parameter_groups`` (what
AdamW trains), ``clock`` (how far a run is), ``progress`` (what it has done), ``starting_point`` (where weights come from),
``checkpoints`` (from which a run goes on exactly), ``ending`` (what a run ends with, or how it goes on), ``sample`` (how a
model goes on with a text), ``run_folder`` and ``run_files`` (what is left), ``accelerate`` and ``sharding`` (several
processes), ``plots`` (curves of losses).
"""
