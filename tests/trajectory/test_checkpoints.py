from __future__ import annotations

from itertools import count, pairwise

import pytest

from lightning_accie.trajectory.checkpoints import is_candidate, is_kept, kept


def by_definition(step: int, room: int) -> set[int]:
    """The rule read literally: the candidates up to t, every 2^k-th, for the first k that fits."""
    candidates = [16 * i * i for i in range(1000) if 16 * i * i <= step]
    for k in count():
        chosen = candidates[:: 2**k]
        if len(chosen) <= room:
            return set(chosen)
    raise AssertionError


STEPS = [*range(0, 700), 9_999, 10_000, 10_001, 1_000_000]
ROOMS = [1, 2, 3, 4, 5, 8, 17, 1000]


@pytest.mark.parametrize("room", ROOMS)
def test_kept_is_the_definition(room: int) -> None:
    for step in STEPS:
        assert kept(step, room) == by_definition(step, room)


@pytest.mark.parametrize("room", ROOMS)
def test_kept_fits_and_has_the_initial_state(room: int) -> None:
    for step in STEPS:
        assert 0 in kept(step, room)
        assert len(kept(step, room)) <= room


@pytest.mark.parametrize("room", ROOMS)
def test_what_was_thinned_never_comes_back(room: int) -> None:
    for before, after in pairwise(STEPS):
        assert {step for step in kept(after, room) if step <= before} <= kept(before, room)


@pytest.mark.parametrize("room", ROOMS)
def test_one_step_is_decided_as_the_set_is(room: int) -> None:
    for step in STEPS:
        assert is_kept(step, room) == (step in kept(step, room))


def test_checkpoints_grow_with_the_square_root() -> None:
    for step in (10_000, 1_000_000, 100_000_000):
        assert len(kept(step, room=10**9)) == pytest.approx(step**0.5 / 4, rel=0.05)


def test_half_of_the_room_is_used_at_least() -> None:
    for room in ROOMS:
        assert len(kept(10**8, room)) >= min(room, 2501) / 2


def test_candidates_stay_exact_where_floats_do_not() -> None:
    large = 16 * (10**9 + 1) ** 2
    assert is_candidate(large)
    assert not is_candidate(large - 1)
    assert not is_candidate(large + 1)


@pytest.mark.parametrize(("step", "room"), [(0, 0), (5, -1), (-1, 3)])
def test_senseless_arguments_are_refused(step: int, room: int) -> None:
    with pytest.raises(ValueError):
        kept(step, room)
