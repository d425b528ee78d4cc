"""``SMTForCausalLM`` under both names of its state, with the installed ``transformers`` and as other releases would call it."""

import pickle
import sys
from dataclasses import make_dataclass
from typing import Any

import pytest
import torch
from hf_models import VOCAB, build, padded
from hf_stand_ins import Newer, Older
from transformers import GenerationMixin, modeling_outputs
from transformers.modeling_outputs import CausalLMOutputWithPast

from smt import SMTCache
from smt.huggingface import model as hf_model
from smt.huggingface import registration, versions
from smt.huggingface.versions import STATE_NAMES, EitherName, SMTOutput, in_library_terms, state_name

NEW = 6
LIBRARIES = pytest.mark.parametrize("library", [Older, Newer], ids=lambda library: library.__name__.lower())
NAMES = pytest.mark.parametrize("name", STATE_NAMES)


@pytest.fixture
def called_by(monkeypatch):
    """Puts a stand-in between the model and ``transformers``."""

    def install(library):
        monkeypatch.setattr(
            GenerationMixin, "generate", lambda model, *given, **named: library.generate(model, *given, **named)
        )
        monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", library.prepare)
        for module in (hf_model, versions):
            monkeypatch.setattr(module, "STATE_NAME", state_name(library.output))

    return install


@torch.no_grad()
def likeliest(model, whole):
    """The tokens (B, NEW) that full passes over ``whole`` (B, T) find likeliest where its last ones stand."""
    return model.model(whole)[0][:, -NEW - 1 : -1].argmax(dim=-1)


@LIBRARIES
@pytest.mark.parametrize("name", [None, *STATE_NAMES], ids=["fresh", *STATE_NAMES])
def test_generate_keeps_its_state_whatever_a_release_calls_it(library, name, called_by):
    model = build()
    called_by(library)
    ids, mask, alone = padded([3, 17])
    output = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **({name: SMTCache()} if name else {}))
    for prompt, new in zip(alone, output[:, ids.shape[1] :], strict=True):
        assert torch.equal(new, likeliest(model, torch.cat([prompt, new])[None])[0])


@LIBRARIES
@NAMES
def test_a_conversation_goes_on_whatever_a_release_calls_its_state(library, name, called_by):
    model, state = build(), SMTCache()
    called_by(library)
    first = torch.randint(VOCAB, (2, 10))
    answered = model.generate(first, torch.ones_like(first), NEW, **{name: state})
    assert state.get_seq_length() == 10 + NEW - 1
    whole = torch.cat([answered, torch.randint(VOCAB, (2, 5))], dim=1)
    again = model.generate(whole, torch.ones_like(whole), NEW, **{name: state})
    assert torch.equal(again[:, whole.shape[1] :], likeliest(model, again))


@pytest.mark.parametrize("size", [1, 7])
def test_a_padded_prompt_in_pieces_is_the_same_when_nobody_says_that_it_is_one(size):
    model, state = build(), SMTCache()
    ids, mask, _ = padded([3, 17])
    with torch.no_grad():
        for start in range(0, 17, size):
            place = torch.arange(start, min(start + size, 17))
            inputs = model.prepare_inputs_for_generation(
                ids[:, place], attention_mask=mask[:, : start + len(place)], cache_position=place, cache=state
            )  # as 5.0 does
            output = model(**inputs)
        torch.testing.assert_close(output.logits[:, -1], model(ids, attention_mask=mask).logits[:, -1])


@NAMES
def test_the_installed_release_takes_both_names_without_a_warning(name):
    model, state = build(), SMTCache()
    ids = torch.randint(VOCAB, (2, 10))
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, return_dict_in_generate=True)
    output = model.generate(ids, max_new_tokens=NEW, **options, **{name: state})
    assert output[versions.STATE_NAME] is state and state.get_seq_length() == 10 + NEW - 1
    assert torch.equal(output.sequences[:, 10:], likeliest(model, output.sequences))
    with torch.no_grad():
        pieces = [model(ids[:, :4], **{name: SMTCache()})]
        pieces.append(model(ids[:, 4:], **{name: getattr(pieces[0], name)}))
        torch.testing.assert_close(torch.cat([piece.logits for piece in pieces], dim=1), model(ids).logits)
    inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, cache_position=torch.arange(10), **{name: state})
    assert inputs[versions.STATE_NAME] is state and len(set(STATE_NAMES) & set(inputs)) == 1


def test_an_output_answers_to_both_names_and_is_otherwise_the_library_s():
    with torch.no_grad():
        output = build()(torch.randint(VOCAB, (2, 10)))
    state = output.cache
    assert isinstance(output, CausalLMOutputWithPast) and isinstance(state, SMTCache)
    for name in STATE_NAMES:
        assert getattr(output, name) is output[name] is output.get(name) is state and name in output
    assert list(output) == ["logits", versions.STATE_NAME] and output.to_tuple() == (output.logits, state)
    assert output[1] is output[1:][0] is state and output["logits"] is output[0]
    assert list(pickle.loads(pickle.dumps(output))) == list(output)
    bare = SMTOutput(logits=output.logits)
    for name in STATE_NAMES:
        assert getattr(bare, name) is None and name not in bare and bare.get(name, 7) == 7
    with pytest.raises(KeyError):
        bare["cache"]


@LIBRARIES
def test_an_output_of_any_release_answers_to_both_names(library):
    class Output(EitherName, library.output):
        pass

    output = Output(**{library.state: "state"})
    assert state_name(Output) == library.state
    for name in STATE_NAMES:
        assert getattr(output, name) == output[name] == output.get(name) == "state" and name in output


def test_a_release_with_a_third_name_is_refused_by_name():
    with pytest.raises(TypeError, match=r"BaseModelOutput must have one field of \('past_key_values', 'cache'\), it has \[\]"):
        from transformers.modeling_outputs import BaseModelOutput

        state_name(BaseModelOutput)


def test_a_release_that_the_model_cannot_follow_is_imported_with_a_warning(monkeypatch):
    fields = [("loss", Any, None), ("logits", Any, None), ("memory", Any, None)]
    monkeypatch.setattr(modeling_outputs, "CausalLMOutputWithPast", make_dataclass("Unknown", fields))
    monkeypatch.delitem(sys.modules, "smt.huggingface.versions")
    with pytest.warns(UserWarning, match=r"not registered with transformers: SMTOutput must have one field of .*, it has \[\]"):
        registration._load("smt.huggingface.versions")


def test_two_states_at_once_are_refused():
    model, ids = build(), torch.ones(1, 3, dtype=torch.long)
    two = {name: SMTCache() for name in STATE_NAMES}
    for call in (model, model.generate, model.prepare_inputs_for_generation):
        with pytest.raises(ValueError, match="past_key_values and cache are two names of one argument"):
            call(ids, **two)
    state = SMTCache()
    same = dict.fromkeys(STATE_NAMES, state)
    assert model(ids, **same).cache is state and in_library_terms(same) == {versions.STATE_NAME: state}
    with pytest.raises(TypeError, match="past_key_values must be an SMTCache, got tuple"):
        model(ids, cache=())
