"""A comparative study: several models on the same text, in two stages, and one report of what came of them.

In reading order: ``settings`` (what is compared, and how much of it), ``sizes`` (models of as many parameters), ``prepared``
(what all of them read, and how each is trained), ``rates`` (which learning rate suits each), ``run`` (a process for each model
and seed), ``cell`` (what such a process does), ``measure`` (a trained model: loss, speed, bytes),
``preference`` (pairs by the model itself), ``sharing`` (what it saves to share keys and values), ``record`` (all of it in one
JSON), ``figures`` (over seeds) with ``paired_test`` (do models differ more than seeds?) and ``tables`` (all made from that JSON
alone), ``expected`` (what the documents say instead), ``plots``, ``report`` (one page, and the files beside it), ``maps`` (whom
attention looks at).
"""
