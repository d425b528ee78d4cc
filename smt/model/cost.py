"""What a model costs: multiply-adds per token, bytes moved and numbers kept, counted from its configuration.

Conventions, the same for every model that is compared:

- One multiply-add (MAC) is one product in a matrix product, a weighted sum or a recurrence. Norms, softmax, activations,
  biases, dropout, residual sums and the embedding lookup are not counted.
- A key costs 2 d per query and layer: d for its score and d for its value.
- ``token`` and ``stride`` attend with dense W x W products, as the published figure does; without the half that causality hides
  the published sizes would cost 0.7 % less in all. ``stream`` and GPT-2 are charged for the keys that a query sees.
- Everything is per token of the sequence, past its first window. Work done once per write is divided by the stride.
- A training step is three times the forward pass for every part of every model, so ratios in training are those of forward
  passes; what tells training from decoding is the mean context of full attention: (length + 1) / 2 instead of the context.
- The head is counted once per token in every model.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from smt.config import SMTConfig


@dataclass(frozen=True)
class Cost:
    """Multiply-adds per token of one model, by part.

    Attributes:
        projections: the decoder's matrix products with weights: Q, K, V, output and MLP.
        attention: scores and weighted values in the decoder.
        pooling: attention pooling of the memory.
        ssm: the Mamba stack of the memory.
        head: logits, and what the newest slot adds to them.
    """

    projections: float
    attention: float
    pooling: float
    ssm: float
    head: float

    @property
    def decoder(self) -> float:
        """Projections and attention."""
        return self.projections + self.attention

    @property
    def total(self) -> float:
        """All parts."""
        return sum(astuple(self))


def literal_cost(config: SMTConfig) -> Cost:
    """The published description taken at its word: per token the whole window through every layer; pooling forms keys."""
    window, layers = config.window_size, config.transformer_n_layers
    return Cost(
        projections=layers * window * sum(_block_products(config)),
        attention=layers * attention_products(config, window, window),
        pooling=pooling_products(config, window, form_keys=True) / config.stride,
        ssm=ssm_products(config) / config.stride,
        head=_head_products(config),
    )


def smt_cost(config: SMTConfig) -> Cost:
    """This package's model in ``config.encoding``, a sequence at a time.

    Pooling forms no keys, and the last layer computes nothing that no logit needs.
    """
    before, after = _block_products(config)
    layers, stride = config.transformer_n_layers, config.stride
    if config.encoding == "stream":
        seen = config.m_input_tokens + (config.n_ssm_outputs if config.writes else 0)
        slots = 1 / stride if config.writes else 0.0
        projections = layers * (before + after) + slots * (layers * before + (layers - 1) * after)
        attention = layers * attention_products(config, 1, seen)
        attention += slots * (layers - 1) * attention_products(config, 1, config.n_ssm_outputs)
    else:
        window, queries = config.window_size, stride if config.encoding == "stride" else 1
        projections = (layers * window * before + ((layers - 1) * window + queries) * after) / queries
        attention = attention_products(config, (layers - 1) * window + queries, window) / queries
    entries = config.window_size if config.pool_source == "window" else config.m_input_tokens
    memory = 1 / stride if config.writes else 0.0
    return Cost(
        projections=projections,
        attention=attention,
        pooling=memory * pooling_products(config, entries, form_keys=False),
        ssm=memory * ssm_products(config),
        head=_head_products(config) + memory * readout_products(config),
    )


def gpt2_decode_cost(config: SMTConfig, context: int) -> Cost:
    """A GPT-2 of the same decoder that decodes one token with a KV cache of ``context`` tokens, the new one included."""
    return _gpt2_cost(config, context)


def gpt2_training_cost(config: SMTConfig, length: int) -> Cost:
    """A GPT-2 of the same decoder over a sequence of ``length`` tokens, the mean of its tokens."""
    return _gpt2_cost(config, (length + 1) / 2)


def full_attention_ratio(length: int, window_size: int) -> float:
    """How many times more keys full causal attention sees over ``length`` tokens than a window of ``window_size`` entries."""
    return (length + 1) / 2 / window_size


def position_passes(config: SMTConfig) -> float:
    """Positions that go through the decoder's layers per token (``docs/model.md``)."""
    if config.encoding == "stream":
        return 1 + 1 / config.stride
    return config.window_size / (config.stride if config.encoding == "stride" else 1)


def attention_products(config: SMTConfig, n_queries: int, n_keys: float) -> float:
    """Scores and weighted values of one layer for ``n_queries`` queries that see ``n_keys`` keys each."""
    return 2 * n_queries * n_keys * config.d_model


def pooling_products(config: SMTConfig, entries: int, *, form_keys: bool) -> int:
    """One pooled vector from ``entries`` entries: query, scores and weighted sum, with W_k x per entry or W_k^T q once."""
    query = config.d_model * config.d_k
    keys = query * (entries if form_keys else 1)
    scores = entries * (config.d_k if form_keys else config.d_model)
    return query + keys + scores + entries * config.d_model


def pooling_passes(config: SMTConfig, entries: int) -> int:
    """What pooling does per entry besides its products: the mean, and with ``pooling_norm`` the square and the scaling."""
    return config.d_model * entries * (3 if config.pooling_norm else 1)


def ssm_products(config: SMTConfig) -> int:
    """The Mamba stack on one write: five projections, and decay, input and output of every entry of the state."""
    inner, rank, state = config.ssm_d_inner, config.dt_rank, config.ssm_d_state
    projections = config.d_model * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * config.d_model
    return config.ssm_n_layers * (projections + config.ssm_d_conv * inner + 3 * inner * state)


def readout_products(config: SMTConfig) -> int:
    """What a slot tells the head directly."""
    return config.d_model**2 if config.reads_out else 0


def break_even_context(config: SMTConfig) -> int:
    """The context at which a KV-cached GPT-2 costs as much per decoded token as the literal published form."""
    fixed = gpt2_decode_cost(config, 0).total
    return math.ceil((literal_cost(config).total - fixed) / (gpt2_decode_cost(config, 1).total - fixed))


def break_even_length(config: SMTConfig) -> int:
    """The length at which training GPT-2 costs as much per token as training the literal published form."""
    return 2 * break_even_context(config) - 1


def kv_cache_floats(config: SMTConfig) -> int:
    """Numbers that a GPT-2 of the same decoder keeps per token of context: K and V in every layer."""
    return 2 * config.transformer_n_layers * config.d_model


def published_state_floats(config: SMTConfig) -> tuple[int, int]:
    """Numbers in the Mamba stack's state (SSM state, ``ssm_d_conv`` inputs per channel), and in it and the window together."""
    ssm = config.ssm_n_layers * config.ssm_d_inner * (config.ssm_d_state + config.ssm_d_conv)
    return ssm, ssm + config.window_size * config.d_model


def break_even_state_context(config: SMTConfig) -> int:
    """The context from which GPT-2's KV cache is larger than the published state with its window."""
    return math.ceil(published_state_floats(config)[1] / kv_cache_floats(config))


def gpt2_parameters(config: SMTConfig, n_positions: int) -> int:
    """Weights of a GPT-2 of the same decoder with ``n_positions`` learned positions and a tied head."""
    d, kv = config.d_model, config.n_kv_heads * config.head_dim
    biases, norms = (d + 2 * kv) + d + 4 * d + d, 4 * d
    block = sum(_block_products(config)) + biases + norms
    return config.transformer_n_layers * block + 2 * d + (config.vocab_size + n_positions) * d


def ssm_parameters(config: SMTConfig) -> int:
    """Weights of the Mamba stack's layers and norms."""
    d, inner, rank, state = config.d_model, config.ssm_d_inner, config.dt_rank, config.ssm_d_state
    projections = d * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner + inner * d
    layer = projections + inner * (config.ssm_d_conv + 1) + inner * state + inner + d
    return config.ssm_n_layers * layer + d


def _gpt2_cost(config: SMTConfig, context: float) -> Cost:
    if config.n_kv_heads != config.transformer_n_heads:
        raise ValueError(
            f"GPT-2 has as many key/value heads as query heads, but transformer_n_kv_heads is {config.transformer_n_kv_heads} "
            f"and transformer_n_heads {config.transformer_n_heads}"
        )
    layers = config.transformer_n_layers
    return Cost(
        projections=layers * sum(_block_products(config)),
        attention=layers * attention_products(config, 1, context),
        pooling=0.0,
        ssm=0.0,
        head=_head_products(config),
    )


def _block_products(config: SMTConfig) -> tuple[int, int]:
    """One position of one block: before its attention (Q, K, V) and after it (output and MLP)."""
    d, kv = config.d_model, config.n_kv_heads * config.head_dim
    return d * (d + 2 * kv), d * d + 8 * d * d


def _head_products(config: SMTConfig) -> int:
    return config.vocab_size * config.d_model
