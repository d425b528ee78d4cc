"""WindowSpec: the arithmetic of windows, writes and blocks is that of the timeline, step by step, for ints and for tensors."""

from __future__ import annotations

import pytest
import torch

from smt_kernels import WindowSpec

SPECS = [WindowSpec(), WindowSpec(3, 7, 4), WindowSpec(1, 1, 1), WindowSpec(0, 6, 5), WindowSpec(4, 40, 40)]
N_STEPS = 100


def written_after(step: int, stride: int) -> bool:
    """``docs/model.md``: a write happens at every step t with t > 0 and t % S == 0, after the logits of step t."""
    return step > 0 and step % stride == 0


def write_steps(stride: int) -> list[int]:
    return [step for step in range(N_STEPS) if written_after(step, stride)]


def for_ints_and_tensors(function, arguments: list[int]) -> list:
    """The values at the arguments, after checking that a tensor of them gives the same."""
    values = [function(argument) for argument in arguments]
    many = function(torch.tensor(arguments))
    if isinstance(many, tuple):
        assert values == list(zip(*(x.tolist() for x in many), strict=True))
    else:
        assert values == many.tolist()
    return values


@pytest.fixture(params=SPECS, ids=lambda spec: f"n{spec.n_memory}m{spec.n_tokens}S{spec.stride}")
def spec(request) -> WindowSpec:
    return request.param


def test_a_step_sees_the_writes_made_after_earlier_steps(spec):
    steps = list(range(-20, N_STEPS))
    expected = [sum(written_after(earlier, spec.stride) for earlier in range(step)) for step in steps]
    assert for_ints_and_tensors(spec.writes_before, steps) == expected


def test_write_w_is_made_at_the_w_th_write_step(spec):
    expected = write_steps(spec.stride)
    assert for_ints_and_tensors(spec.write_step, list(range(len(expected)))) == expected


def test_a_sequence_makes_the_writes_that_some_later_step_of_it_could_see(spec):
    lengths = list(range(N_STEPS))
    expected = [sum(written_after(step, spec.stride) for step in range(length)) for length in lengths]
    assert for_ints_and_tensors(spec.writes_made, lengths) == expected


def test_a_hundred_steps_of_stride_16_make_6_writes():
    assert WindowSpec(15, 50, 16).writes_made(100) == 6


def test_the_window_holds_the_last_slots_and_the_last_tokens(spec):
    steps = list(range(-20, N_STEPS))
    tokens = for_ints_and_tensors(spec.visible_tokens, steps)
    slots = for_ints_and_tensors(spec.visible_slots, steps)
    for step, token_range, slot_range in zip(steps, tokens, slots, strict=True):
        assert list(range(*token_range)) == [token for token in range(-200, 200) if step - spec.n_tokens < token <= step]
        written = [w for w, at in enumerate(write_steps(spec.stride)) if at < step]
        assert [slot for slot in range(*slot_range) if slot >= 0] == written[len(written) - min(len(written), spec.n_memory) :]
        assert len(range(*slot_range)) == spec.n_memory


def test_masks_agree_with_the_ranges(spec):
    steps, keys = torch.arange(-20, N_STEPS), torch.arange(-150, 150)
    token_visible, slot_visible = spec.token_visible(steps, keys), spec.slot_visible(steps, keys)
    assert token_visible.shape == slot_visible.shape == (len(steps), len(keys))
    for row, step in enumerate(steps.tolist()):
        assert keys[token_visible[row]].tolist() == list(range(*spec.visible_tokens(step)))
        assert keys[slot_visible[row]].tolist() == list(range(*spec.visible_slots(step)))


def test_static_memory_is_visible_to_every_query():
    assert WindowSpec(2, 5, None).slot_visible(torch.arange(-3, 9), torch.arange(-4, 30)).all()


@pytest.mark.parametrize("group", [1, 3, 8])
def test_a_write_pools_the_last_slots_of_earlier_groups(spec, group):
    writes = list(range(60))
    for write, pooled in zip(writes, for_ints_and_tensors(lambda w: spec.pooled_slots(w, group), writes), strict=True):
        earlier = [slot for slot in writes if slot // group < write // group]
        assert [slot for slot in range(*pooled) if slot >= 0] == earlier[len(earlier) - min(len(earlier), spec.n_memory) :]
        assert len(range(*pooled)) == spec.n_memory


def test_blocks_end_at_the_write_steps_and_their_queries_see_the_same_slots(spec):
    steps = list(range(-60, N_STEPS))
    blocks = for_ints_and_tensors(spec.block_of, steps)
    for_ints_and_tensors(spec.block_end, list(range(-5, 20)))
    assert spec.block_of(0) == 0
    for step, block in zip(steps, blocks, strict=True):
        assert spec.stride * (block - 1) < step <= spec.stride * block == spec.block_end(block)
        if block > 0:
            assert spec.visible_slots(step) == spec.visible_slots(spec.block_end(block))
            assert step == spec.block_end(block) or not written_after(step, spec.stride)


@pytest.mark.parametrize("valid", [(None, None), ([0, 2, 1], [5, 0, 3]), (None, [1, 2, 3]), ([2, 1, 0], None)], ids=str)
def test_a_query_in_a_window_sees_the_entries_that_exist_and_are_not_later(valid):
    window = WindowSpec(2, 5, None)
    memory, tokens = (None if counts is None else torch.tensor(counts) for counts in valid)
    assert window.size == 7
    for n_queries in range(1, 8):
        visible = window.window_visible(n_queries, memory, tokens, torch.device("cpu"))
        assert visible.shape == (1 if memory is tokens is None else 3, n_queries, 7)
        for row in range(visible.shape[0]):
            n_slots, n_tokens = (most if c is None else c[row] for c, most in zip(valid, (2, 5), strict=True))
            existing = [*range(2 - n_slots, 2), *range(7 - n_tokens, 7)]
            for i in range(n_queries):
                position = 7 - n_queries + i
                assert visible[row, i].nonzero().flatten().tolist() == [j for j in existing if j <= position]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 50, 16), ValueError, "n_memory must be at least 0, got -1"),
        ((15, -1, None), ValueError, "n_tokens must be at least 0, got -1"),
        ((15, 50, 0), ValueError, "stride must lie in 1..n_tokens = 1..50, got 0"),
        ((15, 50, 51), ValueError, "stride must lie in 1..n_tokens = 1..50, got 51"),
        ((15.0, 50, 16), TypeError, "n_memory must be an int, got 15.0"),
        ((15, True, 1), TypeError, "n_tokens must be an int, got True"),
        ((15, None, 16), TypeError, "n_tokens must be an int, got None"),
        ((15, 50, "16"), TypeError, "stride must be an int, got '16'"),
    ],
    ids=str,
)
def test_bad_sizes_are_named(arguments, error, message):
    with pytest.raises(error) as raised:
        WindowSpec(*arguments)
    assert str(raised.value) == message


@pytest.mark.parametrize("function", ["writes_before", "write_step", "writes_made", "visible_slots", "block_of", "block_end"])
def test_static_memory_has_no_write_steps(function):
    with pytest.raises(ValueError, match="static memory"):
        getattr(WindowSpec(15, 50, None), function)(3)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_what_is_made_for_the_canonical_step_serves_at_every_later_one_of_its_kind(spec, group):
    length = 2 * spec.stride * group + 1
    complete = max(spec.n_tokens, spec.stride * (spec.n_memory + group - 1) + 1)

    def from_there(first):
        """What exists before a step, and what the next ones and their writes see of it, counted from the step and its slots."""
        written = spec.writes_made(first)
        exist = min(first, spec.n_tokens), min(written, spec.n_memory + group - 1)
        writes = range(written, spec.writes_made(first + length))
        return (
            exist,
            [[max(0, token) - first for token in spec.visible_tokens(step)] for step in range(first, first + length)],
            [[max(0, slot) - written for slot in spec.visible_slots(step)] for step in range(first, first + length)],
            [[max(0, slot) - written for slot in spec.pooled_slots(write, group)] for write in writes],
            [spec.write_step(write) - first for write in writes],
            [spec.block_end(spec.block_of(step)) - first for step in range(first, first + length)],
        )

    for first in [*range(0, 60, 7), *range(complete - 2, complete + 3), 10**6 + 17, 10**6 + 17 + spec.stride, 2**40 + 5]:
        canonical = spec.canonical_step(first, group)
        assert canonical <= first and spec.canonical_step(canonical, group) == canonical
        assert from_there(canonical) == from_there(first)
        assert spec.canonical_step(canonical) == spec.canonical_step(first), "and in groups of one they are of one kind"
    steps = range(complete, complete + 3 * spec.stride * group)
    assert len({spec.canonical_step(step, group) for step in steps}) == spec.stride * group
    assert {spec.canonical_step(step, group) for step in steps[:: spec.stride * group]} == {complete}


def test_static_memory_looks_the_same_from_every_step_that_sees_all_tokens():
    static = WindowSpec(4, 7, None)
    assert [static.canonical_step(step) for step in (0, 6, 7, 8, 10**9)] == [0, 6, 7, 7, 7]
