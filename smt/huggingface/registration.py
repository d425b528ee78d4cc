"""Makes ``transformers``' Auto classes know the model, whichever of the two packages is imported first.

Registering needs the Auto classes, whose import takes seconds and brings torch; ``import smt`` must do neither. So where they
are not loaded yet, our module is loaded right behind theirs: an import hook for two modules, which does nothing else.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Modules of transformers, and the module of ours that registers itself with what they define.
REGISTERED_BEHIND = {
    "transformers.models.auto.configuration_auto": "smt.huggingface.config",
    "transformers.models.auto.modeling_auto": "smt.huggingface.model",
}


class _Behind(MetaPathFinder):
    """Finds what the other finders find, and loads our module when theirs has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in REGISTERED_BEHIND:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _load(REGISTERED_BEHIND[name])

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register now with what is loaded of ``transformers``, and with the rest as soon as it is."""
    for theirs, ours in REGISTERED_BEHIND.items():
        if theirs in sys.modules:
            _load(ours)
    sys.meta_path.insert(0, _Behind())


def _load(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:  # of a transformers that is too old, or too new; its own import must not fail for our sake
        warnings.warn(f"the Stride Memory Transformer is not registered with transformers: {error}", stacklevel=2)
