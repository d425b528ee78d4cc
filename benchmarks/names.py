"""What cases are called where their results are kept: by those who measure them, and by those who make tables of them."""

from __future__ import annotations

FULL, FLEX, STREAM_ATTENTION = "full causal (SDPA)", "FlexAttention, compiled", "stream_attention, blocked"
GPT2, CACHE, STATIC_CACHE = "GPT-2, full attention (Hugging Face)", "GPT-2, KV cache", "GPT-2, static KV cache"
MAMBA, STREAM, STRIDE, TOKEN, POOLS_TOKENS = "Mamba", "SMT stream", "SMT stride", "SMT token", "SMT stream, pools tokens"

# In reports of GPUs, beside STREAM and POOLS_TOKENS.
CARD_FULL, CARD_FLEX, CARD_ATTENTION = "SDPA, full causal", "FlexAttention, the same window", "stream_attention"
CARD_GPT2 = "GPT-2, flash attention, compiled"
CARD_GROUPS, CARD_NO_WRITES = "SMT stream, groups of 32", "SMT stream, no writes"
