"""Several runs beside each other: reading and comparing finished ones, and training the cells of a study.

In reading order: ``record`` (a finished run, as its folder tells it), ``comparison`` (runs in one table and one plot),
``settings`` (the variants of a study; ``studies/`` has some), ``run`` and ``cell`` (train them), ``paired`` (two models on
the same tokens), ``seeds`` (means of cells that differ in the seed alone), ``report`` (what a study ends with).
"""
