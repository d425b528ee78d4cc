"""What is carried from one call to the next, constant in size whatever the length of the past.

In reading order: ``state`` (the value itself: tensors, rows, joins), ``layout`` (their shapes, by name), ``rings`` (how the
last entries of a sequence are stored), ``file`` (a state saved and read), ``carried`` (the states of rows that walk along
documents).
"""
