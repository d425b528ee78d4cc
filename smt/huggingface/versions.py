"""What differs between the releases of ``transformers``: newer ones call the state ``cache``, older ones ``past_key_values``.

Callers may use either name with either release; the library itself is given, and gives, its own.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from smt.runtime.extras import needs_extra

with needs_extra("hf"):
    from transformers.modeling_outputs import CausalLMOutputWithPast

STATE_NAMES = ("past_key_values", "cache")


def state_name(output_class: type) -> str:
    """What a release calls the state, told by the fields of one of its output classes.

    Raises:
        TypeError: the class has neither field.
    """
    names = [field.name for field in fields(output_class) if field.name in STATE_NAMES]
    if len(names) != 1:
        raise TypeError(f"{output_class.__name__} must have one field of {STATE_NAMES}, it has {names}")
    return names[0]


def pop_state(arguments: dict[str, Any]) -> Any:
    """Take the state out of ``arguments``, by whichever name it stands there; None: it does not.

    Raises:
        ValueError: the names stand for different states.
    """
    given = [state for state in (arguments.pop(name, None) for name in STATE_NAMES) if state is not None]
    if any(state is not given[0] for state in given):
        raise ValueError("past_key_values and cache are two names of one argument: pass one of them, got two different states")
    return given[0] if given else None


class EitherName:
    """In front of an output class of ``transformers``: the state stands under its name there, and answers to both, silently."""

    kept_as: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kept_as = state_name(cls)
        for name in STATE_NAMES:
            if name != cls.kept_as:
                setattr(cls, name, property(lambda output: getattr(output, output.kept_as)))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._own(key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self._own(key))

    def get(self, key: Any, default: Any = None) -> Any:
        """As of any mapping."""
        return super().get(self._own(key), default)

    def _own(self, key: Any) -> Any:
        return self.kept_as if key in STATE_NAMES else key


class SMTOutput(EitherName, CausalLMOutputWithPast):
    """What ``SMTForCausalLM`` returns: ``loss`` beside labels, ``logits`` if formed, and the state by the release's name."""


STATE_NAME = state_name(SMTOutput)  # of the installed release


def in_library_terms(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, with the state under the name of the installed release alone.

    Raises:
        ValueError: as ``pop_state``.
    """
    arguments = dict(arguments)
    state = pop_state(arguments)
    return arguments if state is None else {**arguments, STATE_NAME: state}
