"""``smt generate`` continues prompts with a model from a folder, or says in one line what is wrong."""

import io
import json
import os
import sys

import pytest
import torch

from smt import SMTConfig, SMTForCausalLM, StrideMemoryTransformer
from smt.cli import continuation, main
from smt.cli.continuation import Continuer, Sampling, text_of
from smt.data.documents import Document
from smt.data.tokenizer import END_OF_DOCUMENT as END
from smt.data.tokenizer import Tokenizer
from smt.model.generation import LEAST_TEMPERATURE

PROMPTS = ["the cat", "a", "the cat sat on the mat, the dog", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train([Document("cats", "the cat sat on the mat with the dog " * 9)], 280)
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=tokenizer.vocab_size, d_model=16, d_k=16, transformer_n_layers=1, transformer_n_heads=2, ssm_n_layers=1,
        n_ssm_outputs=4, m_input_tokens=9, stride=3, initializer_range=0.3,
    )  # fmt: skip
    StrideMemoryTransformer(SMTConfig(**sizes)).save_pretrained(path)
    tokenizer.save(path)
    return path


def generate(folder, *arguments):
    return main(["generate", "--model", str(folder), "--device", "cpu", "--max-new-tokens", "20", *arguments])


@torch.no_grad()
def greedy(folder, prompt):
    """The continuation by full passes of the model, token by token."""
    model, tokenizer = StrideMemoryTransformer.from_pretrained(folder), Tokenizer.pretrained(folder)
    ids = torch.tensor([[tokenizer.end_of_document, *tokenizer.encode(prompt).tolist()]])
    n_prompt = ids.shape[1]
    for _ in range(20):
        token = model(ids)[0][:, -1].argmax(dim=-1, keepdim=True)
        if int(token) == tokenizer.end_of_document:
            break
        ids = torch.cat([ids, token], dim=1)
    return tokenizer.decode(ids[0, n_prompt:])


@pytest.mark.parametrize("prompt", PROMPTS, ids=["words", "letter", "longer", "empty"])
def test_greedy_text_is_that_of_full_passes(folder, prompt, capsys):
    assert generate(folder, "--prompt", prompt, "--greedy") == 0
    assert capsys.readouterr().out == greedy(folder, prompt) + "\n"


def test_a_batch_writes_a_json_line_per_prompt_in_their_order(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2] + PROMPTS[3:] + PROMPTS[2:3]) + "\n")
    assert generate(folder, "--file", str(tmp_path / "prompts.txt"), "--batch", "--batch-size", "3", "--greedy") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS[:2] + PROMPTS[3:] + PROMPTS[2:3]
    for line in lines:
        assert line["continuation"] == greedy(folder, line["prompt"])


def test_a_seed_gives_the_same_text_and_another_seed_another(folder, capsys):
    def drawn(seed):
        assert generate(folder, "--prompt", "the", "--seed", seed, "--temperature", "1.5", "--top-k", "50") == 0
        return capsys.readouterr().out

    assert drawn("1") == drawn("1") != drawn("2")


@pytest.mark.parametrize("bound", [("--top_k", "1"), ("--top_p", "1e-6")], ids=["k", "p"])
def test_a_bound_that_leaves_the_likeliest_token_alone_is_greedy(bound, folder, capsys):
    assert generate(folder, "--prompt", "the cat", "--temperature", "5", *bound) == 0
    assert capsys.readouterr().out == greedy(folder, "the cat") + "\n"


def test_a_prompt_comes_from_a_file_or_from_standard_input(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_text("the cat")
    assert generate(folder, "--file", str(tmp_path / "prompt.txt"), "--greedy") == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfthe cat"), encoding="ascii"))
    assert generate(folder, "--file", "-", "--greedy") == 0
    assert capsys.readouterr().out == 2 * (greedy(folder, "the cat") + "\n")


def test_a_folder_of_transformers_continues_the_same(folder, tmp_path, capsys):
    SMTForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    Tokenizer.pretrained(folder).save(tmp_path)
    assert generate(tmp_path, "--prompt", "the cat", "--greedy") == 0
    assert capsys.readouterr().out == greedy(folder, "the cat") + "\n"


def test_the_tokenizer_of_a_checkpoint_is_one_of_transformers(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    SMTForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    Tokenizer.pretrained(folder).save(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    prompts = [tokenizer.bos_token + prompt for prompt in PROMPTS[:3]]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**batch, max_new_tokens=20, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == [greedy(folder, prompt) for prompt in PROMPTS[:3]]


def test_text_streams_in_whole_characters(folder):
    tokenizer = Tokenizer.pretrained(folder)
    text = "a naïve 猫, 🐈‍⬛!"
    tokens = tokenizer.encode(text).tolist()
    pieces = list(text_of(tokenizer, [*tokens, tokenizer.end_of_document, *tokens]))
    assert "".join(pieces) == text and len(pieces) > 5 and not any("\ufffd" in piece for piece in pieces)
    broken = list(text_of(tokenizer, tokens[:-3]))
    assert broken[-1].endswith("\ufffd"), "what never becomes a character is shown at the end"


def spaced(kind):
    """A tokenizer that writes no space where a text begins, as SentencePiece's and WordPiece's do."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    words = ["hello", "world", "it", "is", "."]
    if kind == "sentencepiece":
        pieces = [END, *(f"\u2581{word}" for word in words), *("\u2581", "s", ".")]
        backend = Backend(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token=END))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        pieces = [END, *words, "##s"]
        backend = Backend(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token=END))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    backend.add_special_tokens([END])
    return Tokenizer(backend.to_str(), END)


@pytest.mark.parametrize("kind", ["sentencepiece", "wordpiece"])
def test_a_continuation_keeps_the_space_before_it(kind, tmp_path):
    tokenizer = spaced(kind)
    prompt, rest = tokenizer.encode("hello world").tolist(), tokenizer.encode("it is").tolist()
    assert "".join(text_of(tokenizer, rest, prompt)) == " it is"
    assert "".join(text_of(tokenizer, rest)) == "it is", "but none where the text begins"
    assert tokenizer.decode(torch.tensor(rest), after=torch.tensor(prompt)) == " it is"


@pytest.mark.parametrize("kind", ["sentencepiece", "wordpiece"])
def test_prompts_and_what_is_written_behind_them_are_one_text(kind, monkeypatch):
    tokenizer = spaced(kind)
    drawn = [tokenizer.encode(word).tolist()[0] for word in ("it", "is")]
    sizes = dict(
        vocab_size=tokenizer.vocab_size, d_model=16, d_k=8, transformer_n_layers=1, transformer_n_heads=2, ssm_n_layers=1
    )
    model = StrideMemoryTransformer(SMTConfig(**sizes))
    continuer = Continuer(model, tokenizer, Sampling(2, 0.0, None, None, 0))
    monkeypatch.setattr(model, "stream", lambda ids, **options: iter([torch.tensor([token] * len(ids)) for token in drawn]))
    assert "".join(continuer.stream("hello world")) == " it is"
    assert continuer.batch(["hello world", "", "hello"]) == [" it is", "it is", " it is"]


def test_prompts_are_what_line_feeds_end(folder, tmp_path, capsys):
    prompts = ["the\u2028cat", "the\x85cat\x0csat\x0b\x1c", "", "the\rcat"]
    (tmp_path / "prompts.txt").write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(prompts[:3]).encode() + b"\n" + prompts[3].encode() + b"\n"
    )
    assert generate(folder, "--file", str(tmp_path / "prompts.txt"), "--batch", "--max-new-tokens", "1") == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.split("\n")[:-1]] == prompts


def test_a_file_is_continued_as_it_is(folder, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfthe\r\ncat\r")
    prompts = []
    monkeypatch.setattr(Continuer, "stream", lambda continuer, prompt: prompts.append(prompt) or iter(()))
    assert generate(folder, "--file", str(tmp_path / "prompt.txt")) == 0
    assert prompts == ["the\r\ncat\r"]


def test_the_caller_computes_in_its_own_precision_between_two_tokens(folder, monkeypatch):
    monkeypatch.setattr(continuation, "precision", lambda device: torch.autocast(device.type, dtype=torch.bfloat16))
    continuer = Continuer.from_folder(folder, Sampling(3, 0.0, None, None, 0), torch.device("cpu"))
    dtypes = []
    encode = StrideMemoryTransformer.encode
    monkeypatch.setattr(
        StrideMemoryTransformer, "encode", lambda *a, **k: dtypes.append(torch.is_autocast_enabled("cpu")) or encode(*a, **k)
    )
    streams = [continuer.stream("the cat") for _ in range(2)]
    for stream in (*streams, *streams):
        next(stream, None)
        assert not torch.is_autocast_enabled("cpu")
    assert len(dtypes) >= 4 and all(dtypes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--model", "missing"], "missing is not a folder"),
        (["--prompt", "a", "--model", "empty"], "there is no tokenizer in empty: tokenizer.json is missing"),
        (["--prompt", "a", "--model", "bare"], "config.yaml"),
        (["--file", "missing.txt"], "there is no missing.txt"),
        (["--file", "latin.txt"], "latin.txt is not UTF-8 text"),
        (["--prompt", "a", "--batch"], "--batch needs --file"),
        (["--prompt", "a", "--greedy", "--temperature", "0.7"], "give one of them"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be 0, or finite and at least 1e-06, got -1.0"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p must lie in (0, 1], got 1.5"),
        (["--file", "latin.txt", "--batch", "--batch-size", "0"], "--batch_size must be at least 1, got 0"),
        (["--prompt", "a", "--temperature", "nan", "--model", "missing"], "temperature must be 0, or finite and at least"),
        (["--prompt", "a", "--temperature", "1e-42", "--model", "missing"], "finite and at least 1e-06, got 1e-42"),
        (["--prompt", "a", "--temperature", "inf", "--model", "missing"], "finite and at least 1e-06, got inf"),
        (["--prompt", "a", "--seed", str(2**64), "--model", "missing"], f"seed must lie in 0..{2**63 - 1}, got {2**64}"),
        (["--file", "missing.txt", "--max_new_tokens", "-1"], "max_new_tokens must be at least 0, got -1"),
        (["--prompt", "a", "--device", "abacus"], "device must be auto, cpu or cuda, got 'abacus'"),
    ],
    ids=[
        *("folder", "tokenizer", "config", "file", "bytes", "batch", "greedy", "temperature", "top-p", "size"),
        *("temperature-nan", "temperature-tiny", "temperature-inf", "seed", "tokens-before-file", "device"),
    ],
)
def test_errors_are_one_line_without_a_traceback(folder, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    for name in ("empty", "bare"):
        (tmp_path / name).mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_text("{}")
    assert generate(folder, *arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("smt: error: ") and message in captured.err
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err and not captured.out


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_that_is_not_utf_8_is_said_to_be_so(folder, errors, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors))
    assert generate(folder, "--file", "-") == 1
    assert capsys.readouterr().err.startswith("smt: error: standard input is not UTF-8 text")


def test_a_prompt_that_is_not_utf_8_is_refused_before_the_model_is_read(capsys):
    assert generate("missing", "--prompt", os.fsdecode(b"caf\xe9")) == 2
    assert capsys.readouterr().err == "smt: error: argument --prompt: must be UTF-8 text; see smt generate --help\n"


def test_the_least_temperature_takes_the_likeliest_token(folder, capsys):
    assert generate(folder, "--prompt", "the cat", "--temperature", str(LEAST_TEMPERATURE)) == 0
    assert capsys.readouterr().out == greedy(folder, "the cat") + "\n"
