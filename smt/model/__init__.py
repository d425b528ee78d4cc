"""What a forward pass is, from token ids to logits and loss.

In reading order: ``transformer`` (the model, its methods and what a call returns); ``packed`` (texts one behind the other are
rows, too); ``batch`` (which rows run together); ``parallel`` (rows from one step on, any number of tokens at once) and ``step``
with ``step_layers`` (one token per row, whatever the row's step); what these call: ``memory`` (pool a window, write a slot),
``mamba`` (the recurrence behind the writes), ``decoder`` (three encodings) and its ``layers`` (a block, and whom its attention
sees), ``windows`` (cut out of a sequence), ``readout`` (the newest slot tells the head), ``loss`` (without all logits) and
``preference`` (the odds of two completions). Small parts: ``rotary``, ``rms_norm``, ``weights`` (of layers that are not
called), ``evaluating`` (no dropout for a while), ``graphs`` (recorded by the compiler). Around the model: ``generation``
(prompts continued), ``checkpoint`` (a model in a folder), ``parameters`` (how many it has), ``cost`` (what a configuration
costs, counted).
"""
