from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.plan.costs import Costs
from fedtune.plan.ladder import global_rungs, make_ladders
from fedtune.plan.limits import device_peak, device_step, load_of
from fedtune.plan.settings import Pins
from fedtune.plan.task import Option, Task
from fedtune.records import BACKBONE_FORMATS
from tests.fedtune.plan.test_solve import MB, SETTINGS, TINY, device

RUN = replace(SETTINGS, tail=24)
RUNGS = global_rungs(TINY, RUN, RUN.rank_max)
LADDERS = make_ladders(RUNGS, TINY.layers, RUN.rank_max)
COSTS = Costs(TINY)
TASK = Task(device("d", 64 * MB, BACKBONE_FORMATS), TINY, RUN, Pins(), LADDERS)
CARD = replace(TASK, profile=replace(TASK.profile, accelerator="cuda", accelerator_memory_bytes=MB))

options = st.builds(
    Option,
    form=st.sampled_from([TASK.form(name) for name in BACKBONE_FORMATS]),
    micro_batch=st.sampled_from([1, 4, 16]),
    checkpointing=st.booleans(),
    sequence_length=st.sampled_from([16, 64]),
    depth=st.integers(0, 4),
)


@settings(max_examples=150, deadline=None)
@given(
    option=options,
    share=st.floats(0, 1),
    tail=st.sampled_from([0, 24]),
    task=st.sampled_from([TASK, CARD]),
)
def test_the_lines_are_the_cost_model(option: Option, share: float, tail: int, task: Task) -> None:
    ladder = LADDERS.above(option.depth)
    length = max(1, round(share * len(ladder)))
    if ladder.first_layer[length] != option.depth:
        return  # the lines take the depth for the first trained layer
    prefixes = COSTS.prefixes(task, option.depth)
    load = load_of(task, option, length, tail)
    if tail:
        assert prefixes.tail_elements[length] == load.tail_elements
        assert prefixes.tail_ranks[length] == load.tail_ranks
    forms = option.forms(TINY)
    line, offset = COSTS.peak(task, option)
    bare = load_of(task, option, length)
    found = line.of(prefixes.elements, prefixes.ranks, offset)[length]
    assert found == pytest.approx(device_peak(task, forms, bare), abs=64)
    more = line.of(prefixes.elements, prefixes.ranks + load.tail_ranks, offset)[length]
    more += line.tail * load.tail_elements
    assert more == pytest.approx(device_peak(task, forms, load), abs=64)
    step = COSTS.step(task, option)
    seconds = step.fixed + step.per_pass * RUN.batch_size / option.micro_batch
    seconds += step.trained * load.trained_elements + step.tail * load.tail_elements
    assert seconds == pytest.approx(device_step(task, forms, load), rel=1e-6)


@pytest.mark.parametrize("length", [1, 100, 320, 400, 560])
def test_two_lines_follow_the_head_and_the_block_that_take_turns(length: int) -> None:
    """At this vocabulary, logits take most up to rank 325, and a block's pass beyond."""
    task = replace(TASK, shapes=replace(TINY, vocabulary=1600))
    option = Option(TASK.form("nf4"), 16, True, 64)
    line, offset = Costs(task.shapes).peak(task, option)
    assert line.low[0] > line.high[0]
    assert line.low[1] < line.high[1]
    prefixes = COSTS.prefixes(TASK, 0)
    found = line.of(prefixes.elements, prefixes.ranks, offset)[length]
    load = replace(load_of(task, option, length), first_trained_layer=0)
    exact = device_peak(task, option.forms(TINY), load)
    assert found == pytest.approx(exact, abs=64)


def test_the_tail_that_has_room_fills_the_memory() -> None:
    option = Option(TASK.form("nf4"), 16, False, 64)
    prefixes, (line, offset) = COSTS.prefixes(TASK, 0), COSTS.peak(TASK, option)
    peaks = line.of(prefixes.elements, prefixes.ranks, offset)
    left = peaks[100] + 40_000 - offset - line.trained * prefixes.elements
    share = line.room(left, prefixes.ranks, prefixes.tail_elements, prefixes.tail_ranks)[100]
    assert 0 < share < 1
    elements, ranks = share * prefixes.tail_elements, share * prefixes.tail_ranks
    filled = line.of(prefixes.elements, prefixes.ranks + ranks, offset) + line.tail * elements
    assert filled[100] == pytest.approx(peaks[100] + 40_000)
