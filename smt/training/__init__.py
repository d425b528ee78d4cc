"""A training run: its settings, its loop and the folder that it leaves.

In reading order: ``settings`` (every field of a run), ``run`` (one run from text to results), ``trainer`` (the loop),
``shapes`` (of its batches), ``objective`` (the loss of a chunk), ``taken_step`` (what a device may still be computing),
``parameter_groups`` (what AdamW trains), ``clock`` (how far a run is), ``progress`` (what it has done), ``starting_point``
(where weights come from), ``checkpoints`` (from which a run goes on exactly), ``ending`` (what a run ends with, or how it
goes on), ``run_folder`` and ``run_files`` (what is left), ``accelerate`` and ``sharding`` (several processes), ``plots``
(curves of losses).
"""
