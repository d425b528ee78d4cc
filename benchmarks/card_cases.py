"""What a GPU is measured on: GPT-2 small's decoder in bf16, alone and with its memory, beside what a user would take instead.

A case makes its inputs and its model when its turn comes. The order is that of worth.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from attention_cases import flex_attention
from card_clock import Times, time_call, time_kernels
from card_hymba import hymba_decoding, hymba_training
from card_rows import Case
from card_ssm import ssm_cases
from names import CARD_ATTENTION, CARD_FLEX, CARD_FULL, CARD_GPT2, CARD_GROUPS, CARD_NO_WRITES, POOLS_TOKENS, STREAM
from torch import Tensor

from smt import SMTConfig, StrideMemoryTransformer
from smt.baselines.gpt2 import build_gpt2
from smt.config import PUBLISHED
from smt.hymba import HymbaConfig
from smt_kernels import WindowSpec, linear_cross_entropy, stream_attention

# The vocabulary of GPT-2 as those who train it pad it: products with an odd one are many times slower.
PADDED_VOCABULARY = 50304
TRAINING = "training step"
LAYERS, EAGER, RECORDS = "layers", "eager", "reduce-overhead"
GRAPHS = "layers and memory compiled as CUDA graphs"


@dataclass(frozen=True)
class Sizes:
    """What is measured: a model, tokens of a step, the lengths they are cut into, and one at which the host takes longest."""

    config: SMTConfig
    tokens: int
    lengths: tuple[int, ...]
    short: int = 512
    padded_vocabulary: int = PADDED_VOCABULARY
    hymba: HymbaConfig = field(default_factory=lambda: HymbaConfig.preset("study", dropout=0.0))


def gpt2_small() -> Sizes:
    """GPT-2 small's decoder with 24 Mamba layers, 32,768 tokens a step."""
    config = SMTConfig(
        vocab_size=50257,
        d_model=768,
        transformer_n_layers=12,
        transformer_n_heads=12,
        ssm_n_layers=24,
        encoding="stream",
        dropout=0.0,
    )
    return Sizes(config, tokens=32768, lengths=(4096, 1024, 16384, 65536))


@dataclass
class Suite:
    """All cases of one device and one set of sizes."""

    sizes: Sizes
    device: torch.device
    window: WindowSpec = field(default_factory=WindowSpec)

    def cases(self) -> Iterator[Case]:
        """In order of worth: what is cut off when time runs out is worth least."""
        first, *others = self.sizes.lengths
        yield from self._training(first, with_variants=True)
        yield from self._memory(first)
        yield from self._attention(first, torch.bfloat16, with_flex=True)
        yield from self._loss()
        for length in others:
            yield from self._training(length, with_variants=False)
        yield from self._without_graphs(first)
        yield from ssm_cases(self.sizes.config, self.sizes.tokens, first, self.window.stride, self.device)
        yield from self._published(self.sizes.lengths[1])
        yield from self._hymbas(self.sizes.lengths[1])
        yield from self._host()
        yield from self._decoding()
        yield from hymba_decoding(self.sizes.hymba, self.tokens_of, self.device)
        for length in (self.sizes.lengths[1], self.sizes.lengths[-1]):
            yield from self._attention(length, torch.bfloat16, with_flex=True)
        yield from self._attention(first, torch.bfloat16, head_dim=128)
        yield from self._attention(first, torch.bfloat16, kv_heads=self.sizes.config.transformer_n_heads // 3)
        yield from self._attention(first, torch.float32)

    # Training.

    def _training(self, length: int, *, with_variants: bool) -> Iterator[Case]:
        rows = max(1, self.sizes.tokens // length)
        case = functools.partial(self._step_case, TRAINING, rows, length)
        yield case(CARD_GPT2, lambda ids: self._gpt2(ids, length), "blocks and loss compiled, vocabulary padded")
        yield case(STREAM, lambda ids: self._smt(ids), GRAPHS)
        if not with_variants:
            return
        yield case(CARD_NO_WRITES, lambda ids: self._smt(ids, mode=LAYERS, writes=False), "layers compiled")
        yield case(POOLS_TOKENS, lambda ids: self._smt(ids, pool_source="tokens"), GRAPHS)
        yield case(CARD_GROUPS, lambda ids: self._smt(ids, write_group=32), GRAPHS)
        yield case("GPT-2, as above, with graphs", lambda ids: self._gpt2(ids, length, mode=RECORDS), "blocks as CUDA graphs")

    def _without_graphs(self, length: int) -> Iterator[Case]:
        """What the host costs: the same steps with kernels launched one by one."""
        rows = max(1, self.sizes.tokens // length)
        case = functools.partial(self._step_case, TRAINING, rows, length)
        launched = "layers compiled, the memory launched kernel by kernel"
        yield case("SMT stream, without graphs", lambda ids: self._smt(ids, mode=LAYERS), launched)
        yield case("SMT stream, eager", lambda ids: self._smt(ids, mode=EAGER))
        name = "GPT-2 of Hugging Face, eager"
        yield case(name, lambda ids: self._gpt2_as_it_is(ids, length), f"vocabulary {self.sizes.config.vocab_size:,}")

    def _published(self, length: int) -> Iterator[Case]:
        """The form of the source documents taken literally: 65 entries are encoded for every token, so one row is enough."""
        case = functools.partial(self._step_case, "training step, the published form", 1, length)
        yield case(CARD_GPT2, lambda ids: self._gpt2(ids, length), "blocks and loss compiled, vocabulary padded")
        yield case("SMT as published", lambda ids: self._smt(ids, mode=LAYERS, **PUBLISHED), "layers compiled")
        yield case(STREAM, lambda ids: self._smt(ids), GRAPHS)

    def _hymbas(self, length: int) -> Iterator[Case]:
        rows, config = max(1, self.sizes.tokens // length), self.sizes.hymba
        case = functools.partial(self._step_case, "training step, Hymba", rows, length, vocabulary=config.vocab_size)
        yield from hymba_training(config, case, self.device)

    def _step_case(
        self,
        section: str,
        rows: int,
        length: int,
        name: str,
        prepare: Callable[[Tensor], Callable[[], Tensor]],
        note: str = "",
        vocabulary: int | None = None,
    ) -> Case:
        """Forward, loss and backward of ``rows`` sequences."""

        def measure() -> Times:
            loss = prepare(self.tokens_of(rows, length, vocabulary))
            return time_call(lambda: self._train(loss), self.device, repeats=4, kernels=True)

        return Case(section, name, f"{rows} x {length:,}", measure, rows * length, note)

    def _gpt2_as_it_is(self, ids: Tensor, length: int) -> Callable[[], Tensor]:
        with self.device:
            model = build_gpt2(self.sizes.config, n_positions=length).train()
        return _step(model, lambda: model(ids, labels=ids).loss)

    def _gpt2(self, ids: Tensor, length: int, *, mode: str = LAYERS) -> Callable[[], Tensor]:
        """Blocks and loss compiled; or blocks recorded as CUDA graphs besides."""
        config = dataclasses.replace(self.sizes.config, vocab_size=self.sizes.padded_vocabulary)
        with self.device:  # where weights are drawn in no time
            model = build_gpt2(config, n_positions=length).train()
        for block in model.transformer.h:
            block.compile(**_options(mode))

        @torch.compile
        def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(hidden, weight).float(), targets)

        def of_batch() -> Tensor:
            hidden = model.transformer(ids, use_cache=False).last_hidden_state
            return loss(hidden[:, :-1].flatten(0, 1), model.transformer.wte.weight, ids[:, 1:].flatten())

        return _step(model, of_batch, mode)

    def _smt(self, ids: Tensor, *, mode: str = RECORDS, **changes: Any) -> Callable[[], Tensor]:
        """Layers and memory as CUDA graphs, or ``LAYERS`` compiled, or ``EAGER``."""
        model = self._model(**changes).train()
        if mode != EAGER:
            model.compile(**_options(mode))
        return _step(model, lambda: model.loss(ids)[0], mode)

    def _train(self, loss: Callable[[], Tensor]) -> None:
        loss.model.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16):
            value = loss()
        value.backward()

    # Operations.

    def _attention(
        self,
        length: int,
        dtype: torch.dtype,
        *,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        with_flex: bool = False,
    ) -> Iterator[Case]:
        config = self.sizes.config
        heads, head_dim = config.transformer_n_heads, head_dim or config.head_dim
        kv_heads = kv_heads or heads
        rows = max(1, self.sizes.tokens // length)
        grouped = f" on {kv_heads}" if kv_heads != heads else ""
        shape = f"{rows} x {length:,} x {heads}{grouped} x {head_dim}, {str(dtype).removeprefix('torch.')}"

        def inputs() -> list[Tensor]:
            n_slots = self.window.writes_before(length - 1)
            shapes = [
                (rows, n, h, head_dim) for n, h in [(length, heads), *[(length, kv_heads)] * 2, *[(n_slots, kv_heads)] * 2]
            ]
            return [torch.randn(shape, device=self.device, dtype=dtype, requires_grad=True) for shape in shapes]

        for name, attend, n_inputs in self._attentions(grouped=kv_heads != heads, with_flex=with_flex):
            for direction in ("forward", "forward + backward"):
                measure = self._of_operation(attend, lambda n=n_inputs: inputs()[:n], direction)
                yield Case(f"attention, {direction}", name, shape, measure)

    def _attentions(
        self, *, grouped: bool = False, with_flex: bool = False
    ) -> Iterator[tuple[str, Callable[..., Tensor], int]]:
        """What is compared: a name, a function, and how many of q, k, v and the keys and values of slots it takes."""

        def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

        yield CARD_FULL, full, 3
        yield CARD_ATTENTION, functools.partial(stream_attention, window=self.window), 5
        if with_flex:
            yield CARD_FLEX, functools.partial(flex_attention, window=self.window), 5

    def _loss(self) -> Iterator[Case]:
        config, rows = self.sizes.config, self.sizes.tokens

        def inputs(vocabulary: int) -> list[Tensor]:
            hidden = torch.randn(rows, config.d_model, device=self.device, dtype=torch.bfloat16, requires_grad=True)
            weight = torch.randn(vocabulary, config.d_model, device=self.device, dtype=torch.bfloat16) * 0.02
            return [hidden, weight.requires_grad_()]

        targets = torch.randint(config.vocab_size, (rows,), device=self.device)

        @torch.compile
        def compiled(hidden: Tensor, weight: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(hidden, weight).float(), targets)

        def ours(hidden: Tensor, weight: Tensor) -> Tensor:
            return linear_cross_entropy(hidden, weight, targets)

        cases = (
            ("linear + cross-entropy, compiled", compiled, self.sizes.padded_vocabulary),
            ("linear_cross_entropy", ours, config.vocab_size),
        )
        for name, loss, vocabulary in cases:
            shape = f"{rows:,} x {config.d_model}, bf16"

            def measure(loss: Callable[..., Tensor] = loss, vocabulary: int = vocabulary) -> Times:
                leaves = inputs(vocabulary)
                return time_call(lambda: torch.autograd.grad(loss(*leaves), leaves), self.device)

            yield Case("loss, forward + backward", name, shape, measure, rows, f"vocabulary {vocabulary:,}")

    def _of_operation(
        self, function: Callable[..., Tensor], inputs: Callable[[], list[Tensor]], direction: str
    ) -> Callable[[], float]:
        def measure() -> float:
            leaves = inputs()
            if direction == "forward":
                with torch.no_grad():
                    return time_kernels(lambda: function(*leaves), self.device)
            grad = torch.randn_like(function(*leaves))
            return time_kernels(lambda: torch.autograd.grad(function(*leaves), leaves, grad), self.device)

        return measure

    def _host(self) -> Iterator[Case]:
        config, length = self.sizes.config, self.sizes.short
        shape = (1, length, config.transformer_n_heads, config.head_dim)
        slots = (1, self.window.writes_before(length - 1), *shape[2:])

        def measure(function: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> Times:
            leaves = [torch.randn(s, device=self.device, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
            grad = torch.randn_like(leaves[0])
            return time_call(lambda: torch.autograd.grad(function(*leaves), leaves, grad), self.device, repeats=100)

        for name, function, n_inputs in self._attentions():
            shapes = ([shape] * 3 + [slots] * 2)[:n_inputs]
            section = "host cost of one attention, forward + backward"
            yield Case(section, name, f"1 x {length}", lambda f=function, s=shapes: measure(f, s))

    # The memory and decoding.

    def _memory(self, length: int) -> Iterator[Case]:
        short = self.sizes.lengths[1]
        for name, changes, of in (
            ("groups of 8", {"write_group": 8}, length),
            ("groups of 32", {"write_group": 32}, length),
            ("pools tokens", {"pool_source": "tokens"}, length),
            ("groups of 8", {"write_group": 8}, short),
        ):
            rows = max(1, self.sizes.tokens // of)

            def measure(changes: dict = changes, rows: int = rows, of: int = of) -> float:
                return time_kernels(self.writes(rows, of, **changes), self.device, calls=1)

            yield Case("all writes of a step, forward + backward", name, f"{rows} x {of:,}", measure, rows * of)

    def writes(self, rows: int, length: int, **changes: Any) -> Callable[[], object]:
        """All writes of rows of ``length`` tokens, forward and backward, of a fresh memory with ``changes`` to its fields."""
        model = self._model(**changes).train()
        config = model.config
        parameters = [*model.memory.parameters()]
        tokens = model.embedding(self.tokens_of(rows, length)).detach().requires_grad_()
        state = model.initial_state(rows)
        writes = range(config.window.writes_made(length))

        def run() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16):
                return model.memory(tokens, state.slots[:, :0], state.conv, state.ssm, first_step=0, writes=writes).slots

        grad = torch.randn_like(run())
        return lambda: torch.autograd.grad(run(), [tokens, *parameters], grad)

    def _decoding(self) -> Iterator[Case]:
        for rows in (1, 64):
            yield Case("a token of decoding", "SMT stream", f"{rows} rows", lambda rows=rows: self._decode_ours(rows), rows)

    def _decode_ours(self, rows: int) -> Times:
        model = self._model().to(torch.bfloat16).eval()
        with torch.no_grad():
            _, aux = model(self.tokens_of(rows, 256))
            state, token = aux.state, self.tokens_of(rows, 1)

            def sixteen() -> None:  # one of them writes
                nonlocal state
                for _ in range(self.window.stride):
                    _, stepped = model(token, state, overwrite_state=True)
                    state = stepped.state

            times = time_call(sixteen, self.device)
        return Times(times.call / self.window.stride, times.host / self.window.stride, times.peak_bytes)

    def _model(self, **changes: Any) -> StrideMemoryTransformer:
        with self.device:
            return StrideMemoryTransformer(dataclasses.replace(self.sizes.config, **changes))

    def tokens_of(self, rows: int, length: int, vocabulary: int | None = None) -> Tensor:
        """Token ids, of our vocabulary or another."""
        generator = torch.Generator().manual_seed(length)
        return torch.randint(vocabulary or self.sizes.config.vocab_size, (rows, length), generator=generator).to(self.device)


def _options(mode: str) -> dict[str, str]:
    """Those of ``compile`` for ``LAYERS`` or ``RECORDS``."""
    return {} if mode == LAYERS else {"mode": mode}


def _step(model: torch.nn.Module, loss: Callable[[], Tensor], mode: str = LAYERS) -> Callable[[], Tensor]:
    """``loss``, with its ``model`` as an attribute; where graphs are recorded, what they returned before may be overwritten."""

    def step() -> Tensor:
        if mode == RECORDS:
            torch.compiler.cudagraph_mark_step_begin()
        return loss()

    step.model = model
    return step


def release(device: torch.device) -> None:
    """Give back what the case before held, compiled code included: the next one's memory is its own."""
    import gc

    if "torch._dynamo" in sys.modules:  # else a program of two shapes would be one of any shape, and slower
        torch._dynamo.reset()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
