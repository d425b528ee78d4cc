"""The model as a model of Hugging Face ``transformers``.

In reading order: ``config`` (``SMTConfig`` as theirs), ``model`` (the causal language model), ``cache`` (the state where their
``generate`` expects keys and values), ``versions`` (what their releases call it), ``padding`` (what their collators put behind
a row), ``packing`` (or pack into one), ``special_tokens`` (what ends and pads a text of a run), ``model_card`` (the README of a
saved model), ``registration`` (their Auto classes know ours, whichever package comes first).
"""
