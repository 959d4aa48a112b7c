"""Which states a walk back keeps: against all schedules there are, and by walking."""

from __future__ import annotations

import weakref
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from lightning_accie.replay.schedule import anchors, split, steps_run
from lightning_accie.replay.walker import Kept, Snapshot, Visit
from tests.problems import Classifier, classification, record, sgd, smooth_net


@cache
def cheapest(length: int, room: int) -> int:
    """Of all places for the next anchor, the one with the fewest steps run in the end."""
    if length <= room:
        return length
    if room == 1:
        return length * (length + 1) // 2
    return min(
        place + cheapest(length - place, room - 1) + cheapest(place, room)
        for place in range(1, length)
    )


def walked(length: int, room: int) -> tuple[Counter[int], int]:
    """How often each step is run, and how many states are kept at most, beside that at hand."""
    runs: Counter[int] = Counter()
    places, stop, most = [0], length, 0
    while places:
        while (rest := stop - places[-1]) > (free := room - len(places) + 1) > 1:
            runs.update(range(places[-1], places[-1] + split(rest, free)))
            places.append(places[-1] + split(rest, free))
        begin = places[-1] if rest <= free else stop - 1
        runs.update(range(places[-1], stop))
        most = max(most, len(places) + (stop - begin) - 1)  # the last anchor is one of the two
        if begin == places[-1]:
            places.pop()
        stop = begin
    return runs, most


@pytest.mark.parametrize("room", [2, 3, 4, 7, 12, 30])
@pytest.mark.parametrize("length", [1, 2, 5, 13, 31, 60, 110])
def test_few_steps_are_run_again_and_no_more_is_kept(length: int, room: int) -> None:
    runs, most = walked(length, room)
    assert set(runs) == set(range(length))
    assert most <= room
    assert sum(runs.values()) == steps_run(length, room)
    assert cheapest(length, room) <= steps_run(length, room) <= 1.05 * cheapest(length, room) + 1


@pytest.mark.parametrize(
    ("length", "room", "most"),
    [(1200, 60, 2.0), (11_700, 8, 7.9), (100_000, 60, 3.7), (1500, 1000, 1.4)],
)
def test_long_runs(length: int, room: int, most: float) -> None:
    assert steps_run(length, room) <= most * length
    places = anchors(length, room)
    assert places[0] == 0
    assert places == sorted(set(places))
    assert len(places) <= room
    assert len(places) == room or length - places[-1] <= room - len(places) + 1


@pytest.mark.parametrize("room", [2, 3, 5, 9, 24])
@pytest.mark.parametrize("both_ways", [False, True])
def test_a_walk_holds_what_it_has_room_for(tmp_path: Path, room: int, both_ways: bool) -> None:
    """Beside the state at hand and the one after it."""
    module = Classifier(smooth_net(), sgd(momentum=0.9))
    engine = record(tmp_path, module, classification(48), classification(11))
    walker = engine._walker.without_tapes()
    walker.memory_budget = room * walker._snapshot_bytes()
    made: list[weakref.ref[Snapshot]] = []
    advance = walker._advance

    def noted(snapshot: Snapshot, **settings: bool) -> tuple[Visit, Snapshot]:
        found = advance(snapshot, **settings)
        made.append(weakref.ref(found[1]))
        return found

    walker._advance = noted  # type: ignore[method-assign]
    kept = Kept() if both_ways else None
    forwards = [visit.step for visit in walker.forwards(kept)] if kept is not None else []
    back = []
    for visit in walker.backwards(kept):
        assert sum(one() is not None for one in made) <= room + 2
        back.append(visit.step)
    assert forwards == (list(range(24)) if both_ways else [])
    assert back == list(range(24))[::-1]
    assert len(made) == steps_run(24, room)
