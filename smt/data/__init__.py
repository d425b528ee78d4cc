"""Text to batches: documents stay whole and in order from the file to the chunk that a model reads.

In reading order: ``documents`` (texts with a name, in splits), ``settings`` (which text, which tokens, which batches),
``sources`` (from the name of a source to what reads it) and the readers: ``local`` (files and folders), ``stdlib``,
``shakespeare``, ``recall`` (made up), ``hub`` with ``wikitext`` and ``books``. Then ``tokenizer`` (text to tokens), ``store``
(tokens in a file, made once), ``tokenized`` (from settings to tokens), ``parts`` (long documents cut), ``walk`` (rows that walk
along documents: the batches) and ``held_out`` (what a model is measured on). Beside documents ``pairs`` (what is preferred to
what) and ``pair_walk`` (their batches).
"""
