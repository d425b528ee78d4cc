"""GPT-2 and Mamba in: published weights into our parameters.

In reading order: ``sources`` (an object, a folder or a name on the hub as configuration and named tensors), ``families`` (what
makes these a GPT-2 or a Mamba, and its sizes), ``transfer`` (tensors into parameters: planned, checked, written, reported),
``loading`` (which tensor goes where, in a model that it is given).
"""
