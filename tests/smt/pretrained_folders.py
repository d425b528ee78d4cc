"""Folders of tiny pretrained models, as the hub has them, and a few texts to tune them on."""

from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from smt.data.tokenizer import END_OF_DOCUMENT, GPT2_END, Tokenizer

# A window that texts of a few tokens fill.
WINDOW = {"n_ssm_outputs": 3, "m_input_tokens": 6, "stride": 2}
GPT2_VOCABULARY, GPT2_TOKENS, MAMBA_VOCABULARY = 264, 257, 50


def gpt2_folder(folder: Path) -> Path:
    """With a tokenizer that ends texts as GPT-2's does, and an embedding with more rows than that has tokens."""
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": GPT2_VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    Tokenizer.train([], GPT2_TOKENS).save(folder)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace(END_OF_DOCUMENT, GPT2_END))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')  # all that GPT-2's on the hub says
    return folder


def mamba_folder(folder: Path) -> Path:
    """Without a tokenizer."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": MAMBA_VOCABULARY}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(folder)
    return folder


def text_folder(folder: Path) -> Path:
    for index in range(5):
        (folder / f"{index}.txt").write_text(" ".join(f"word{(index + j) % 7}" for j in range(20 + 9 * index)))
    return folder
