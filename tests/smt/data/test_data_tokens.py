"""Text becomes tokens once: tokenizers that lose nothing, and a store that is complete, reused and shared."""

import json
import multiprocessing
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from splits import in_memory

from smt.data import store as store_module
from smt.data.documents import Document, Documents, hash_documents
from smt.data.store import TokenStore, made_once, tokenise
from smt.data.tokenizer import END_OF_DOCUMENT, GPT2_END, GPT2_FILES, LONGEST_PIECE, Tokenizer

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "Größe → ∑ 🙂", "return"]

VARIED = Path(__file__).read_text(encoding="utf-8")


def documents(texts=TEXTS):
    return [Document(f"{index}", text) for index, text in enumerate(texts)]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request):
    return Tokenizer.train(documents([VARIED]), 600, request.param)


@pytest.fixture
def gpt2_folder(request, tmp_path):
    """GPT-2's two files in small: its bytes, one merge and its end of text."""
    from tokenizers import pre_tokenizers

    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "re", GPT2_END]
    vocabulary, merges = request.param
    (tmp_path / vocabulary).write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (tmp_path / merges).write_text("#version: 0.2\nr e\n")
    return tmp_path


class TestTokenizer:
    @pytest.mark.parametrize(
        "text", ["def g(y):\n\treturn y", "Größe → ∑ 🙂", "\r\n \x00", END_OF_DOCUMENT, " a  b "], ids=repr
    )
    def test_any_text_survives_a_round_trip_without_ending_its_document(self, tokenizer, text):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.end_of_document not in tokens

    def test_trained_pieces_are_longer_than_bytes(self, tokenizer):
        assert 257 < tokenizer.vocab_size <= 600
        assert len(tokenizer.encode(VARIED)) < 0.7 * len(VARIED)

    @pytest.mark.parametrize("kind", ["bpe", "unigram"])
    def test_text_without_spaces_is_learnt_in_pieces_of_bounded_length(self, kind):
        text = "ab" * 4096
        trained = Tokenizer.train(documents([text]), 300, kind)
        pieces = [trained.decode(torch.tensor([token])) for token in range(trained.vocab_size)]
        assert max(len(piece) for piece in pieces if piece != END_OF_DOCUMENT) <= LONGEST_PIECE
        assert trained.decode(trained.encode(text)) == text

    def test_saved_and_loaded_it_encodes_the_same(self, tokenizer, tmp_path):
        tokenizer.save(tmp_path)
        loaded = Tokenizer.load(tmp_path)
        text = f"return x\n{END_OF_DOCUMENT}"
        assert loaded.encode(text).equal(tokenizer.encode(text))
        assert (loaded.vocab_size, loaded.end_of_document) == (tokenizer.vocab_size, tokenizer.end_of_document)
        assert loaded.hash == tokenizer.hash

    def test_transformers_reads_what_was_saved(self, tokenizer, tmp_path):
        from transformers import AutoTokenizer

        tokenizer.save(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded.eos_token_id == tokenizer.end_of_document
        assert loaded("return x", add_special_tokens=False)["input_ids"] == tokenizer.encode("return x").tolist()

    def test_a_tokenizer_of_transformers_is_read_with_its_own_end_and_adds_no_other_token(self, tmp_path):
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        backend = Backend(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "</s>": 2, "hello": 3}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A </s>", special_tokens=[("[CLS]", 1), ("</s>", 2)]
        )
        backend.enable_truncation(2)
        backend.enable_padding(length=9)
        backend.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        tokenizer = Tokenizer.pretrained(tmp_path)
        assert tokenizer.end_of_document == 2
        assert tokenizer.encode("hello hello hello world").tolist() == [3, 3, 3, 0]
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]").save_pretrained(tmp_path)
        assert Tokenizer.pretrained(tmp_path).encode("hello hello hello world").tolist() == [3, 3, 3, 0]

    def test_the_vocabulary_of_a_tokenizer_with_gaps_has_room_for_its_last_token(self, tmp_path):
        from tokenizers import Tokenizer as Backend
        from tokenizers import models

        Backend(models.WordLevel({"</s>": 0, "far": 9}, unk_token="</s>")).save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        assert Tokenizer.pretrained(tmp_path).vocab_size == 10

    def test_a_folder_with_a_model_and_no_tokenizer_is_refused(self, tmp_path):
        from transformers import GPT2Config, GPT2LMHeadModel

        GPT2LMHeadModel(GPT2Config(vocab_size=7, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="tokenizer"):
            Tokenizer.pretrained(tmp_path)

    @pytest.mark.parametrize("gpt2_folder", GPT2_FILES, ids="+".join, indirect=True)
    def test_the_two_files_of_gpt2_are_a_tokenizer_under_either_name(self, gpt2_folder):
        tokenizer = Tokenizer.pretrained(gpt2_folder)
        assert tokenizer.end_of_document == 257 and tokenizer.vocab_size == 258
        assert tokenizer.encode("re").tolist() == [256]
        assert 257 not in tokenizer.encode(GPT2_END)
        assert tokenizer.decode(tokenizer.encode(f"Größe {GPT2_END}")) == f"Größe {GPT2_END}"

    def test_documents_stand_between_two_ends_in_their_order(self, tokenizer):
        end = tokenizer.end_of_document
        for (document, tokens, counted), expected in zip(tokenizer.encode_documents(documents()), documents(), strict=True):
            assert document == expected and counted is None
            assert tokens == [end, *tokenizer.encode(expected.text).tolist(), end]

    def test_the_tokens_of_targets_are_those_with_a_character_in_them(self, tokenizer):
        text = "Größe: return 🙂 and ∑ return"
        targets = tuple((start, start + len(part)) for part in ("öß", "🙂", " ∑ r") for start in [text.index(part)])
        several = [Document("some", text, targets), Document("none", text, ()), Document("all", text)]
        some, none, every = tokenizer.encode_documents(several)
        assert some.tokens == none.tokens == every.tokens and every.counted is None and not any(none.counted)
        assert len(some.counted) == len(some.tokens) and not some.counted[0] and not some.counted[-1]
        position = 0  # in bytes: a character's bytes may be several tokens
        inside = {byte for start, stop in targets for byte in range(len(text[:start].encode()), len(text[:stop].encode()))}
        for token, counted in zip(some.tokens[1:-1], some.counted[1:-1], strict=True):
            size = len(tokenizer._tokenizer.id_to_token(token))  # byte-level tokens spell each byte as one character
            assert counted == (not inside.isdisjoint(range(position, position + size)))
            position += size
        assert position == len(text.encode())

    def test_more_documents_than_are_encoded_together_stay_in_order(self, tokenizer, monkeypatch):
        monkeypatch.setattr("smt.data.tokenizer._ENCODED_TOGETHER", 10)  # two documents
        many = documents([f"text {index}" for index in range(7)])
        assert [document for document, *_ in tokenizer.encode_documents(many)] == many

    def test_hashes_tell_tokenizers_apart(self):
        kinds = [(270, "bpe"), (271, "bpe"), (270, "unigram")]
        assert len({Tokenizer.train(documents(), vocab_size, kind).hash for vocab_size, kind in kinds}) == 3

    def test_a_vocabulary_without_room_for_bytes_is_refused(self):
        with pytest.raises(ValueError, match=r"vocab_size must be at least 257.*got 256"):
            Tokenizer.train(documents(), 256)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*: there is no tokenizer.json"):
            Tokenizer.load(tmp_path)

    def test_a_name_that_cannot_be_reached_is_said_with_what_was_tried(self):
        with pytest.raises(ValueError, match=r"tokenizer must be bpe, unigram, a folder .*got 'no/such'.*neither the Hub nor"):
            Tokenizer.pretrained("no/such")

    @pytest.mark.parametrize("settings", [None, '{"model_max_length": 1024}'], ids=["no-settings", "no-end"])
    def test_where_the_settings_name_no_end_that_of_gpt2_is_taken(self, tokenizer, tmp_path, settings):
        tokenizer.save(tmp_path)
        file = tmp_path / "tokenizer.json"
        file.write_text(file.read_text(encoding="utf-8").replace(tokenizer.end_name, "<|endoftext|>"), encoding="utf-8")
        (tmp_path / "tokenizer_config.json").unlink()
        if settings is not None:
            (tmp_path / "tokenizer_config.json").write_text(settings)
        loaded = Tokenizer.pretrained(tmp_path)
        assert (loaded.end_name, loaded.end_of_document) == ("<|endoftext|>", tokenizer.end_of_document)

    def test_a_tokenizer_that_can_end_no_text_is_refused(self, tokenizer, tmp_path):
        tokenizer.save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text("{}")
        with pytest.raises(ValueError, match="needs an eos_token, a sep_token or"):
            Tokenizer.pretrained(tmp_path)


def refuse_to_read(skipped):
    raise AssertionError("texts were read again")


def tokenise_in_another_process(cache, barrier, queue):
    read = []

    def reading(skipped):
        read.append(None)
        yield from documents()

    barrier.wait()
    store = tokenise(Documents(reading, in_memory(documents()).hash), Tokenizer.train(documents(), 270), cache)
    queue.put((len(read), [store[index].tolist() for index in range(len(store))]))


class TestStore:
    def test_it_holds_every_document_with_its_name_and_bytes(self, tokenizer, tmp_path):
        store = tokenise(in_memory(documents()), tokenizer, tmp_path)
        encoded = [tokens for _, tokens, _ in tokenizer.encode_documents(documents())]
        assert [tokens.tolist() for tokens in store] == encoded
        assert store.names == ["0", "1", "2"] and store.n_bytes == [len(text.encode()) for text in TEXTS]
        assert store.lengths == list(map(len, encoded)) and store.n_targets == sum(store.lengths) - 3
        for index in (-1, 3):
            with pytest.raises(IndexError, match=rf"document must lie in 0\.\.2, got {index}"):
                store[index]

    def test_documents_that_name_their_targets_have_them_counted_and_others_all_but_the_first(self, tokenizer, tmp_path):
        named = Document("named", "some Größe", ((4, 9),))
        (_, _, counted), (_, tokens, _) = tokenizer.encode_documents([named, *documents(["whole"])])
        store = tokenise(in_memory([named, *documents(["whole"])]), tokenizer, tmp_path)
        assert [flags.tolist() for flags in store.counted] == [counted, [False] + [True] * (len(tokens) - 1)]
        assert store.n_bytes == [7, 5] and store.n_targets == sum(counted) + len(tokens) - 1
        whole = tokenise(in_memory(documents()), tokenizer, tmp_path)
        assert whole.counted is None and not (whole.folder / store_module.COUNTED_FILE).exists()
        (store.folder / store_module.COUNTED_FILE).write_bytes(b"")
        with pytest.raises(ValueError, match=r"counted.bin must have \d+ bytes, it has 0; delete"):
            TokenStore(store.folder)

    @pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
    def test_tokens_take_no_more_bytes_than_their_vocabulary_needs(self, vocab_size, dtype, tmp_path):
        class Large:
            hash = "large"

            def __init__(self):
                self.vocab_size = vocab_size

            def encode_documents(self, some):
                return ((document, [vocab_size - 1, 0], None) for document in some)

        store = tokenise(in_memory(documents()), Large(), tmp_path)
        assert store[0].dtype == dtype and store[2].tolist() == [vocab_size - 1, 0]

    def test_equal_texts_and_tokenizer_are_tokenised_once(self, tokenizer, tmp_path):
        first = tokenise(in_memory(documents()), tokenizer, tmp_path)
        again = tokenise(Documents(refuse_to_read, in_memory(documents()).hash), tokenizer, tmp_path)
        assert again.folder == first.folder

    def test_other_texts_or_another_tokenizer_have_a_store_of_their_own(self, tokenizer, tmp_path):
        other = Tokenizer.train(documents(), 265)
        stores = [
            tokenise(in_memory(documents()), tokenizer, tmp_path),
            tokenise(in_memory(documents(["other"])), tokenizer, tmp_path),
            tokenise(in_memory(documents()), other, tmp_path),
        ]
        assert len({store.folder for store in stores}) == 3

    def test_what_was_left_out_is_remembered(self, tokenizer, tmp_path):
        def read(skipped):
            skipped["empty"] += 2
            yield from documents()

        for _ in range(2):
            assert tokenise(Documents(read, "hash"), tokenizer, tmp_path).skipped == Counter(empty=2)

    def test_an_interrupted_one_is_never_opened_and_made_again(self, tokenizer, tmp_path):
        def interrupted(skipped):
            yield documents()[0]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tokenise(Documents(interrupted, "hash"), tokenizer, tmp_path)
        assert not list(tmp_path.glob(f"*/{store_module.DOCUMENTS_FILE}"))
        assert len(tokenise(Documents(in_memory(documents()).read, "hash"), tokenizer, tmp_path)) == 3

    def test_of_several_processes_one_makes_it_and_all_read_the_same(self, tmp_path):
        context = multiprocessing.get_context("fork")
        barrier, queue = context.Barrier(3), context.Queue()
        arguments = (tmp_path, barrier, queue)
        processes = [context.Process(target=tokenise_in_another_process, args=arguments) for _ in range(3)]
        for process in processes:
            process.start()
        got = [queue.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert sum(n_reads for n_reads, _ in got) == 1
        assert got[0][1] == got[1][1] == got[2][1] and len(got[0][1]) == 3

    def test_sent_to_a_worker_it_is_its_folder(self, tokenizer, tmp_path):
        store = tokenise(in_memory(documents(["text " * 10000])), tokenizer, tmp_path)
        sent = pickle.dumps(store)
        assert len(sent) < 1000 < store.n_targets
        assert (pickle.loads(sent)[0] == store[0]).all()

    def test_mapped_tokens_cannot_be_written(self, tokenizer, tmp_path):
        store = tokenise(in_memory(documents()), tokenizer, tmp_path)
        with pytest.raises(ValueError, match="read-only"):
            store[0][0] = 1

    def test_damaged_or_foreign_ones_are_refused(self, tokenizer, tmp_path):
        store = tokenise(in_memory(documents()), tokenizer, tmp_path)
        tokens, info = store.folder / store_module.TOKENS_FILE, store.folder / store_module.DOCUMENTS_FILE
        tokens.write_bytes(tokens.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"tokens.bin must have \d+ bytes, it has \d+; delete"):
            TokenStore(store.folder)
        info.write_text(json.dumps({**json.loads(info.read_text()), "layout": 99}))
        with pytest.raises(ValueError, match="must have layout 4, got 99"):
            TokenStore(store.folder)
        with pytest.raises(FileNotFoundError, match="no tokens in"):
            TokenStore(tmp_path)

    @pytest.mark.parametrize("name", ["tokens.bin", "counted.bin", "documents.json"])
    @pytest.mark.parametrize("content", [None, b"", b"{}"], ids=["missing", "empty", "other"])
    def test_a_damaged_one_is_named_and_made_again(self, name, content, tokenizer, tmp_path):
        some = [Document("0", "one two", targets=((0, 3),)), Document("1", "two one", targets=((0, 3),))]
        store = tokenise(in_memory(some), tokenizer, tmp_path)
        expected = [tokens.tolist() for tokens in store]
        (store.folder / name).unlink()
        if content is not None:
            (store.folder / name).write_bytes(content)
        with pytest.warns(UserWarning, match=rf"{name}.*: it is made again"):
            again = tokenise(in_memory(some), tokenizer, tmp_path)
        assert [tokens.tolist() for tokens in again] == expected and again.folder == store.folder
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {store.folder.name}

    def test_a_full_disk_is_said_with_the_path_and_leaves_nothing_unfinished(self, tmp_path):
        def full(folder):
            (folder / "half").touch()
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match=r"No space left on device: '.*/store'"):
            made_once(tmp_path / "store", full)
        assert {path.name for path in tmp_path.iterdir()} <= {"store.lock"}

    def test_its_text_hash_is_of_names_and_texts_whatever_the_tokenizer(self, tokenizer, tmp_path):
        store = tokenise(in_memory(documents()), tokenizer, tmp_path)
        assert store.text_hash == hash_documents(documents()) != hash_documents(documents([*TEXTS, "more"]))

    def test_a_split_without_documents_is_refused_with_what_was_left_out(self, tokenizer, tmp_path):
        def read(skipped):
            skipped["empty"] += 2
            yield from ()

        with pytest.raises(ValueError, match="this one has none, 2 empty"):
            tokenise(Documents(read, "hash"), tokenizer, tmp_path)

    def test_a_folder_is_made_once(self, tmp_path):
        made = []
        for _ in range(2):
            made_once(tmp_path / "folder", lambda empty: made.append(empty))
        assert len(made) == 1 and (tmp_path / "folder").is_dir() and not made[0].exists()
