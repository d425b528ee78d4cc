"""``SMTConfig`` as a configuration of Hugging Face ``transformers``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from smt.config import SMTConfig
from smt.runtime.extras import needs_extra

with needs_extra("hf"):
    from transformers import AutoConfig, PreTrainedConfig

NAMES = tuple(field.name for field in fields(SMTConfig))


class SMTPreTrainedConfig(PreTrainedConfig):
    """The fields of ``SMTConfig``, with its defaults, and those that every configuration of ``transformers`` has.

    Args:
        fields of ``SMTConfig``: see there.
        bos_token_id, eos_token_id, pad_token_id: as everywhere in ``transformers``.
        use_cache: whether a forward pass out of training returns its state (``SMTCache``).

    Raises:
        TypeError, ValueError: as ``SMTConfig``; or the head is to be untied from the embedding.
    """

    model_type: ClassVar[str] = "stride_memory_transformer"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "transformer_n_layers",
        "num_attention_heads": "transformer_n_heads",
    }

    # Releases before 5.4 have no dataclass here, so that a __post_init__ would never be called: an __init__ serves all.
    def __init__(
        self,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        given = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        config = SMTConfig(**{name: given.pop(name) for name in NAMES if name in given})
        check_tied(tie_word_embeddings)
        for name, value in config.to_dict().items():
            setattr(self, name, value)
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.use_cache, self.tie_word_embeddings = use_cache, tie_word_embeddings
        super().__init__(**given)

    @property
    def smt(self) -> SMTConfig:
        """The configuration of the model inside."""
        return SMTConfig(**{name: getattr(self, name) for name in NAMES})


AutoConfig.register(SMTPreTrainedConfig.model_type, SMTPreTrainedConfig, exist_ok=True)


def check_tied(tie_word_embeddings: bool) -> None:
    """Raise ValueError unless the head is to be the embedding, as it is."""
    if not tie_word_embeddings:
        raise ValueError("tie_word_embeddings must be True: the head is the embedding")
