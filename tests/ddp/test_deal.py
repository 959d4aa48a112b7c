"""Each process pairs its batches with their indices, over the loaders that Lightning deals out."""

from __future__ import annotations

import json
from pathlib import Path

from tests.capture.test_indices import CASES
from tests.ddp.deal import UNEVEN, WITH_WORKERS


def test_every_process_knows_its_own_batches(whole: Path) -> None:
    first, second = (json.loads((whole / f"dealt-{rank}.json").read_text()) for rank in range(2))
    assert len(first) == len(CASES) - len(UNEVEN) + len(WITH_WORKERS) == 38
    for name, told in first.items():
        assert told["claimed"] == told["seen"], name
        assert second[name]["claimed"] == second[name]["seen"], name
        assert len(told["seen"]) == len(second[name]["seen"]) > 0, name
        assert told["weight"] == second[name]["weight"], name
    shares = [told["shuffle"]["seen"][:2] for told in (first, second)]  # of the first epoch
    drawn = [index for share in shares for ((_, indices),) in share for index in indices]
    assert sorted(drawn) == list(range(10))
