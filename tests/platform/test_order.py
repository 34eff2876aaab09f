"""The order of training: every epoch whole, every share kept, every place reachable without those before it."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom.errors import WorldloomError
from worldloom.order import Plan, Turns, permutation

seeds = st.integers(0, 2**40)


@given(samples=st.integers(1, 50), seed=seeds, epoch=st.integers(0, 1000), cell=st.integers(0, 3))
def test_an_epoch_is_a_permutation_and_a_pure_function(samples: int, seed: int, epoch: int, cell: int) -> None:
    first = permutation(samples, seed, epoch, cell)
    np.random.seed(0)  # noqa: NPY002  (global state must not matter)
    assert sorted(first) == list(range(samples))
    assert (permutation(samples, seed, epoch, cell) == first).all()


@given(samples=st.integers(1, 50), seed=seeds, epoch=st.integers(0, 1000))
def test_the_first_cell_keeps_the_order_of_a_single_dataset(samples: int, seed: int, epoch: int) -> None:
    """So that runs that began before there were cells go on unchanged."""
    alone = np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(samples)
    assert (permutation(samples, seed, epoch) == alone).all()


def test_epochs_seeds_and_cells_differ() -> None:
    orders = {tuple(permutation(20, seed, epoch, cell)) for seed in range(3) for epoch in range(3) for cell in range(3)}
    assert len(orders) == 27


@given(weights=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=seeds, start=st.integers(0, 500))
def test_each_choice_has_its_share_and_its_turns_in_order(weights: list[int], seed: int, start: int) -> None:
    turns = Turns(weights, seed)
    period = sum(weights)
    seen = [turns.at(place) for place in range(3 * period)]
    for choice in range(len(weights)):
        assert [nth for c, nth in seen if c == choice] == list(range(sum(c == choice for c, _ in seen)))
    block = -(-period // min(weights))
    for end in range(block, 3 * period, block):
        counts = Counter(choice for choice, _ in seen[:end])
        assert all(abs(counts[i] - Fraction(w * end, period)) <= 1 for i, w in enumerate(weights))
    assert Turns(weights, seed).at(start) == (seen[start] if start < len(seen) else turns.at(start))


def test_turns_are_shuffled_and_differ_by_seed_and_tag() -> None:
    def choices(*args: int) -> tuple[int, ...]:
        turns = Turns([3, 2, 1], *args)
        return tuple(turns.at(place)[0] for place in range(60))

    assert len({choices(0), choices(1), choices(0, 1)}) == 3


@given(
    samples=st.integers(1, 30), batch=st.integers(1, 7), world=st.integers(1, 3), epochs=st.integers(1, 3), seed=seeds
)
def test_ranks_together_see_each_epoch_exactly_once(
    samples: int, batch: int, world: int, epochs: int, seed: int
) -> None:
    plan = Plan(samples, batch, seed)
    rounds = -(-samples * epochs // (batch * world))
    seen = [key for rank in range(world) for number in range(rank, rounds * world, world) for key in plan.batch(number)]
    for epoch in range(epochs):
        assert sorted(sample for e, sample in seen if e == epoch) == list(range(samples))


def test_one_dataset_of_one_shape_is_its_shuffled_epochs_one_after_the_other() -> None:
    plan = Plan(10, 4, 3)
    seen = [key for number in range(10) for key in plan.batch(number)]
    assert seen == [(epoch, int(i)) for epoch in range(4) for i in permutation(10, 3, epoch)]


@given(
    shapes=st.lists(st.sampled_from("abc"), min_size=1, max_size=40), batch=st.integers(1, 5), seed=seeds,
    skip=st.integers(0, 60),
)  # fmt: skip
def test_a_batch_holds_one_shape_and_no_sample_is_lost(shapes: list[str], batch: int, seed: int, skip: int) -> None:
    plan = Plan(len(shapes), batch, seed, shapes=shapes)
    assert plan.counts() == dict(Counter(shapes))
    assert sum(plan.counts().values()) == len(shapes)
    numbers = range(4 * -(-len(shapes) // batch) + 2 * len(shapes))
    batches = [plan.batch(number) for number in numbers]
    for number, rows in zip(numbers, batches, strict=True):
        assert len(rows) == batch
        assert {shapes[i] for _, i in rows} == {plan.shape(number)}
    for label in plan.counts():
        members = [i for i, shape in enumerate(shapes) if shape == label]
        seen = [key for rows in batches for key in rows if shapes[key[1]] == label]
        whole = len(seen) // len(members)
        assert whole >= 1
        for epoch in range(whole):
            assert sorted(i for e, i in seen if e == epoch) == members
    # A batch far away is the same when it is asked for first.
    assert Plan(len(shapes), batch, seed, shapes=shapes).batch(skip) == plan.batch(skip)


def test_shapes_come_as_often_as_they_have_samples() -> None:
    plan = Plan(100, 4, 0, shapes=["wide"] * 80 + ["tall"] * 20)
    shapes = Counter(plan.shape(number) for number in range(500))
    assert shapes == {"wide": 400, "tall": 100}
    times = Counter(i for number in range(500) for _, i in plan.batch(number))
    assert set(times.values()) == {20}


def test_datasets_are_mixed_by_weight_and_each_is_reshuffled_when_exhausted() -> None:
    parts = [0] * 5 + [1] * 50
    plan = Plan(55, 8, 1, parts=parts, weights=[3, 1])
    seen = [key for number in range(100) for key in plan.batch(number)]
    drawn = Counter(parts[i] for _, i in seen)
    assert drawn == {0: 600, 1: 200}
    small = [key for key in seen if key[1] < 5]
    rounds = [tuple(i for e, i in small if e == epoch) for epoch in range(120)]
    assert all(sorted(once) == list(range(5)) for once in rounds)
    assert len(set(rounds)) > 40, "the small dataset keeps one order"
    assert {sum(parts[i] == 0 for _, i in plan.batch(n)) for n in range(50)} == {6}, "shares hold within a batch"


def test_weights_hold_across_shapes() -> None:
    parts = [0] * 6 + [1] * 6
    shapes = ["a"] * 4 + ["b"] * 2 + ["a"] * 1 + ["b"] * 5
    plan = Plan(12, 2, 0, shapes=shapes, parts=parts, weights=[1, 3])
    times = Counter(i for number in range(1200) for _, i in plan.batch(number))
    assert sum(times[i] for i in range(6)) == pytest.approx(600, abs=6)
    for i in range(12):
        assert times[i] == pytest.approx(100 if i < 6 else 300, abs=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "needs samples"),
        ({"batch": 0}, "at least one"),
        ({"weights": [1.0, 0.0], "parts": [0, 1, 1]}, "positive"),
        ({"weights": [1.0, float("nan")], "parts": [0, 1, 1]}, "positive"),
        ({"weights": [1.0], "parts": [0, 1, 1]}, "one weight for each dataset"),
        ({"weights": [1.0, 1.0], "parts": [1, 1, 1]}, "has no samples"),
        ({"shapes": ["a"]}, "one shape"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(WorldloomError, match=message):
        Plan(**({"samples": 3, "batch": 1, "seed": 0} | arguments))


def test_plans_of_other_data_have_other_digests() -> None:
    plans = [
        Plan(6, 2, 0),
        Plan(6, 3, 0),
        Plan(6, 2, 1),
        Plan(7, 2, 0),
        Plan(6, 2, 0, shapes=list("aaabbb")),
        Plan(6, 2, 0, shapes=list("ababab")),
        Plan(6, 2, 0, parts=[0, 0, 0, 1, 1, 1], weights=[1, 1]),
        Plan(6, 2, 0, parts=[0, 0, 0, 1, 1, 1], weights=[1, 2]),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)
    assert Plan(6, 2, 0, shapes=list("aaabbb")).digest == plans[4].digest
