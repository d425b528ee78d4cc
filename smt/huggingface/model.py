"""The model as a causal language model of Hugging Face ``transformers``: Auto classes, ``generate``, ``Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smt.huggingface.cache import SMTCache
from smt.huggingface.config import SMTPreTrainedConfig, check_tied
from smt.huggingface.model_card import CARD_FILE, model_card
from smt.huggingface.packing import pop_text_bounds
from smt.huggingface.padding import right_padding_taken
from smt.huggingface.special_tokens import ends_of_text
from smt.huggingface.versions import STATE_NAME, STATE_NAMES, SMTOutput, in_library_terms, pop_state
from smt.model.batch import check_targets
from smt.model.checkpoint import CONFIG_FILE, read_config
from smt.model.loss import head_loss
from smt.model.transformer import StrideMemoryTransformer
from smt.model.weights import is_hooked
from smt.pretrained.sources import HF_CONFIG_FILE
from smt.runtime.device import from_host
from smt.runtime.extras import needs_extra
from smt.runtime.files import follow_umask
from smt.runtime.names import shown
from smt_kernels.linear_cross_entropy import IGNORE_INDEX

with needs_extra("hf"):
    from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel

# What other models of transformers take and this one cannot give a meaning.
_REFUSED = {
    "inputs_embeds": "the memory and the window are made of the embeddings of tokens: pass input_ids",
    "output_attentions": "attention is fused; StrideMemoryTransformer's return_weights gives the weights of the pooling",
    "output_hidden_states": "layers run over windows, not over the sequence; model.model.encode gives the last one's output",
}
# What is taken beside the arguments of ``forward``: for the loss; and what ``generate`` hands on to every model, which this one
# has no use for: the cache counts its columns itself, and tokenizers are for strings to stop at.
_HANDED_ON = {"cache_position", "tokenizer", "assistant_tokenizer"}
_OPTIONS = {"num_items_in_batch", *_HANDED_ON}


class SMTForCausalLM(PreTrainedModel, GenerationMixin):
    """A ``StrideMemoryTransformer``, at ``model.model``, with the interface of ``transformers``.

    Its names of weights are those of ``StrideMemoryTransformer`` behind ``model.``; ``from_pretrained`` reads both, and the
    folder of a run. The head is the embedding: there is no ``lm_head``.

    Args:
        config: whose ``smt`` is the configuration of the model inside.
        model: the model inside; None: a fresh one.
    """

    config_class = SMTPreTrainedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _is_stateful = True  # no assisted generation: the memory cannot take tokens back
    _keep_in_fp32_modules_strict = ("A_log",)  # its exponential is the rate at which the memory forgets

    def __init__(self, config: SMTPreTrainedConfig, model: StrideMemoryTransformer | None = None) -> None:
        super().__init__(config)
        check_tied(config.tie_word_embeddings)  # once more: from_pretrained sets it when the configuration is made
        self.model = StrideMemoryTransformer(config.smt) if model is None else model
        self.post_init()

    @classmethod
    def of(cls, model: StrideMemoryTransformer, **fields: Any) -> SMTForCausalLM:
        """Wrap a model, whose parameters and mode stay the same; ``fields`` of the configuration, like ``eos_token_id``."""
        wrapped = cls(SMTPreTrainedConfig(**model.config.to_dict(), dtype=model.embedding.weight.dtype, **fields), model)
        wrapped.training = model.training
        return wrapped

    @classmethod
    def from_pretrained(
        cls, source: str | Path | None, *arguments: Any, output_loading_info: bool = False, **options: Any
    ) -> Any:
        """As in ``transformers``; also from what ``StrideMemoryTransformer.save_pretrained`` or a training run left.

        The end of a document, and the padding, are those of the tokenizer beside a run's weights. With
        ``ignore_mismatched_sizes`` weights of another shape are drawn as fresh ones are, and ``mismatched_keys`` of the loading
        info names them.

        Raises:
            ValueError: weights that are not exactly the model's; the message names them. Or a map of several devices.
        """
        if "config" not in options and source is not None and _is_ours(Path(source)):
            ends = ends_of_text(source)
            options["config"] = SMTPreTrainedConfig(**read_config(Path(source) / CONFIG_FILE).to_dict(), **ends)
            options.setdefault("generation_config", GenerationConfig(**ends))  # else sought in the folder
        model, report = super().from_pretrained(source, *arguments, output_loading_info=True, **options)
        for problem, names in (("lacks", report["missing_keys"]), ("has unknown", report["unexpected_keys"])):
            if names:
                where = "state_dict" if source is None else f"the checkpoint {str(source)!r}"
                raise ValueError(f"{where} {problem} {shown(sorted(names))}")
        devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
        if len(devices) > 1:
            raise ValueError(f"device_map must be of one device, rows and memory of a step are together: got {sorted(devices)}")
        model._draw({key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]})
        return (model, report) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """As in ``transformers``; also writes a model card, ``README.md``, where there is none.

        Weights can be read by whom the umask says, where safetensors would let nobody else.
        """
        card = Path(save_directory) / CARD_FILE
        card.parent.mkdir(parents=True, exist_ok=True)
        if options.get("is_main_process", True) and not card.exists():
            card.write_text(model_card(self.model), encoding="utf-8")
        super().save_pretrained(save_directory, *arguments, **options)
        if options.get("is_main_process", True):
            for path in [path for path in card.parent.iterdir() if path.suffix == ".safetensors"]:
                follow_umask(path)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SMTCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: SMTCache | None = None,
        skip_logits: bool | None = None,
        **options: Any,
    ) -> SMTOutput | tuple[Any, ...]:
        """Next-token logits; rows are padded on the left, or on the right where no state is kept.

        Args:
            input_ids: (B, T) integer tokens.
            attention_mask: (B, T), 1 at tokens; or (B, columns so far + T), as ``generate`` passes it, whose last T columns
                count. Tokens of a row stand together. Padding behind them is harmless, as nothing before it sees it, but a
                state would take it in.
            past_key_values: what to continue, and what is advanced by the call.
            labels: (B, T), the tokens themselves, shifted inside; -100 is left out, and so are padding and what follows it.
            use_cache: return the state; None: as ``config.use_cache`` says, where it can be and is likely used: not in
                training, not beside labels, not with padding on the right, not of packed texts.
            logits_to_keep: how many last steps, or which steps (K,) int64, have logits; 0: all.
            return_dict: False: a tuple.
            cache: another name of ``past_key_values``, and that of newer releases of ``transformers``.
            skip_logits: return None in their place, and the loss without ever holding all of them; None: beside labels in
                training, where they would be the largest tensors of a step and only the loss is used.
            options: ``num_items_in_batch``, by which the sum of losses is divided instead of by their number; and, of packed
                texts, ``position_ids`` (B, T), which are 0 where one begins, or ``cu_seq_lens_q``, as
                ``DataCollatorWithFlattening`` makes them. Each is a text of its own, and its first token is no target.

        Raises:
            TypeError, ValueError: as ``StrideMemoryTransformer.forward``, of whose ``targets`` labels are; an input that the
                model does not know, or cannot give a meaning.
        """
        past_key_values = pop_state({"past_key_values": past_key_values, "cache": cache})
        bounds = None if input_ids is None else pop_text_bounds(options, input_ids)
        self._refuse(input_ids, past_key_values, labels, logits_to_keep, skip_logits, options)
        padded = False
        if bounds is not None:
            if use_cache or past_key_values is not None:
                raise ValueError(
                    "packed texts keep no state and go on from none: leave out position_ids and cu_seq_lens_q,"
                    " or use_cache must be off, past_key_values None"
                )
            if attention_mask is not None and not attention_mask.all():
                raise ValueError("attention_mask must be all ones, or None, beside packed texts: they have no padding")
            attention_mask = None
            if labels is not None:
                starts = from_host(bounds[:-1], labels.device)
                labels = labels.flatten().index_fill(0, starts, IGNORE_INDEX).view_as(labels)
        elif attention_mask is not None:
            seen = past_key_values.n_columns if past_key_values is not None else 0
            if attention_mask.ndim == 2 and attention_mask.shape[1] == seen + input_ids.shape[1]:
                if seen:
                    _check_taken(attention_mask[:, :seen], past_key_values)
                attention_mask = attention_mask[:, seen:]
            given = attention_mask
            attention_mask, padded = right_padding_taken(given)
            if labels is not None and labels.shape == attention_mask.shape:
                # Padding is no target, on whichever side it is, and nothing predicts the token behind it.
                behind = F.pad(attention_mask, (1, -1), value=1) == 0
                labels = labels.masked_fill((given == 0) | behind, IGNORE_INDEX)
            if padded and (use_cache or past_key_values is not None):
                raise ValueError("attention_mask must be padded on the left to keep a state, some rows end with padding")
        if labels is not None:  # the first of a row is nobody's
            check_targets("labels", labels[:, 1:], input_ids[:, 1:], self.model.config.vocab_size)
            labels = labels.long()
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None and not padded and bounds is None
        hidden, aux = self.model.encode(
            input_ids if bounds is None else input_ids.reshape(1, -1),
            None if past_key_values is None else past_key_values.state,
            attention_mask=attention_mask,
            cu_seqlens=bounds,
            overwrite_state=past_key_values is not None and not torch.is_grad_enabled(),
        )
        if bounds is not None:
            hidden = hidden.view(*input_ids.shape, -1)
        if past_key_values is None and use_cache:
            past_key_values = SMTCache()
        if past_key_values is not None:
            past_key_values.advance(aux.state, input_ids.shape[1])
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            hidden = hidden[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)]
        logits, loss = None, None
        if skip_logits or (skip_logits is None and labels is not None and self.training):
            loss = self._loss_without_logits(hidden, labels, **options)
        else:
            logits = F.linear(hidden, self.model.head())
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **options)
        output = SMTOutput(loss=loss, logits=logits, **{SMTOutput.kept_as: past_key_values})
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _loss_without_logits(self, hidden: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """As ``loss_function`` of the logits: the mean over no label is not a number."""
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        loss = head_loss(hidden, self.model.head(), targets)
        n_targets = (targets != IGNORE_INDEX).sum()
        if num_items_in_batch is None:
            num_items_in_batch = n_targets
        elif isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss * (n_targets / num_items_in_batch)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding, which is the head too."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding, and with it the head and the size of the vocabulary."""
        self.model.set_embedding(value)
        self.config.vocab_size = value.num_embeddings

    def get_output_embeddings(self) -> None:
        """None: no module is tied to the embedding, which itself is the head."""
        return None

    def generate(self, *arguments: Any, **kwargs: Any) -> Any:
        """As in ``transformers``; the state to go on from may be called ``past_key_values`` or ``cache``."""
        return super().generate(*arguments, **in_library_terms(kwargs))

    def prepare_inputs_for_generation(self, *arguments: Any, is_first_iteration: bool | None = False, **kwargs: Any) -> Any:
        """As in ``transformers``, without the mask of decoding steps: it is all ones, and reading it waits for the device."""
        # generate lets the arguments of forward through where it finds the name kwargs.
        kwargs = in_library_terms(kwargs)
        inputs = super().prepare_inputs_for_generation(*arguments, is_first_iteration=is_first_iteration, **kwargs)
        state, new = inputs.get(STATE_NAME), kwargs.get("next_sequence_length")  # which some releases take 0 of to be all
        nothing_new = not inputs["input_ids"].shape[1] or (new is not None and new < 1)
        if is_first_iteration and isinstance(state, SMTCache) and state.n_columns and nothing_new:
            got = tuple(arguments[0].shape)
            raise ValueError(f"input_ids must have a column behind the {state.n_columns} that the state has taken, got {got}")
        # Prompts in pieces are no decoding steps, and not every release says so. Padding stands before a row's first token.
        if not is_first_iteration and inputs["input_ids"].shape[1] == 1 and _all_rows_have_begun(inputs.get(STATE_NAME)):
            inputs["attention_mask"] = None
        return inputs

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation must be None, got {generation_config.cache_implementation!r}: the state is the cache"
            )
        state = pop_state(model_kwargs)
        if state is None and generation_config.use_cache is not False:
            state = SMTCache()
        if state is not None:
            _check_cache(state)
            model_kwargs.update(dict.fromkeys(STATE_NAMES, state))

    def init_continuous_batching(self, *arguments: Any, **options: Any) -> None:
        """Refused, and with it ``generate_batch``: its pages are of keys and values.

        Raises:
            ValueError: always.
        """
        raise ValueError("continuous batching pages keys and values: call generate, or join and slice states")

    def _init_weights(self, module: nn.Module) -> None:
        # The model inside has drawn its own weights when it was built; only an embedding that is being resized is not its.
        if isinstance(module, nn.Embedding) and module is not self.model.embedding:
            nn.init.normal_(module.weight, std=self.model.config.initializer_std)

    @torch.no_grad()
    def _draw(self, names: set[str]) -> None:
        """Give the parameters ``names`` fresh weights; loading has left them uninitialised."""
        if names:
            fresh = dict(StrideMemoryTransformer(self.config.smt).named_parameters(prefix=self.base_model_prefix))
            for name in names:
                self.get_parameter(name).copy_(fresh[name])

    def _refuse(
        self,
        input_ids: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        skip_logits: bool | None,
        options: dict[str, Any],
    ) -> None:
        for name, reason in _REFUSED.items():
            given = options.pop(name, None)
            if given is not None and given is not False:
                raise ValueError(f"{name} cannot be used: {reason}")
        for name in set(options) - _OPTIONS:
            if options.pop(name) is not None:
                raise TypeError(f"forward has no argument {name!r}")
        for name in _HANDED_ON:
            options.pop(name, None)
        if input_ids is None:
            raise ValueError("input_ids must be given")
        if is_hooked(self.model):
            raise ValueError("model is not called, and hooks on it have no effect: hook the model around it, or its parts")
        if past_key_values is not None:
            _check_cache(past_key_values)
        if labels is not None and (isinstance(logits_to_keep, Tensor) or logits_to_keep):
            raise ValueError("labels need all logits: logits_to_keep must be 0 beside them")
        if skip_logits and labels is None:
            raise ValueError("skip_logits needs labels: without them there is no loss to return")
        if labels is not None and labels.shape != input_ids.shape:
            shapes = tuple(input_ids.shape), tuple(labels.shape)
            raise ValueError(f"labels must have the shape of input_ids, {shapes[0]}, got {shapes[1]}")


def _is_ours(folder: Path) -> bool:
    """Whether the configuration in a folder is in our layout alone."""
    return (folder / CONFIG_FILE).is_file() and not (folder / HF_CONFIG_FILE).is_file()


def _check_cache(cache: Any) -> None:
    if not isinstance(cache, SMTCache):
        raise TypeError(f"past_key_values must be an SMTCache, got {type(cache).__name__}")


def _check_taken(mask: Tensor, cache: SMTCache) -> None:
    """Raise if ``mask`` (B, columns so far) leaves out what the state has taken, like padding behind a row that ended."""
    if cache.state is not None and len(mask) == cache.state.batch_size:
        for row, (count, steps) in enumerate(zip((mask != 0).sum(dim=1).tolist(), cache.state.steps, strict=True)):
            if count < steps:
                raise ValueError(
                    f"attention_mask has {count} tokens of row {row} in the columns so far, its state has taken {steps}:"
                    " they cannot be taken out again"
                )


def _all_rows_have_begun(cache: SMTCache | None) -> bool:
    return cache is not None and cache.state is not None and min(cache.state.steps) > 0


AutoModelForCausalLM.register(SMTPreTrainedConfig, SMTForCausalLM, exist_ok=True)
