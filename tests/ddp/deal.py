"""Fit over the loaders of the capture tests as one of two processes, and note what was claimed."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.capture.indexed import LIGHTNING, fit
from tests.capture.test_indices import CASES, Case

UNEVEN = {"none", "none_ahead"}
"""A process without a batch does not take part in the step: training itself would hang."""
UNDISTRIBUTED = {
    "batch_sampler",
    "list_batch_sampler",
    "bulk",
    "no_length",
    "limit_no_length",
    "min_size_ahead",
    "max_size_ahead",
    "cycle_ahead",
}
"""Lightning cannot give these a distributed sampler; every process draws by itself."""
WITH_WORKERS = {"shuffle", "persistent", "reload_list", "peeking_persistent"}


def deal(case: Case, workers: int) -> dict[str, Any]:
    def loaders(_: Any) -> Any:
        found = case.loaders(workers)
        return LIGHTNING.utilities.CombinedLoader(found, case.mode) if case.mode else found

    others = [case.other(LIGHTNING)] if case.other else []
    torch.manual_seed(int(os.environ["LOCAL_RANK"]))
    callback, module = fit(
        LIGHTNING,
        loaders,
        *others,
        devices=2,
        strategy="ddp",
        use_distributed_sampler=case.name not in UNDISTRIBUTED,
        **case.options,
    )
    return {"claimed": callback.claimed, "seen": module.seen, "weight": module.weight.item()}


def main(root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same fits in one process let none pass
        found = {case.name: deal(case, 0) for case in CASES if case.name not in UNEVEN}
        for case in CASES:
            if case.name in WITH_WORKERS:
                found[f"{case.name}-workers"] = deal(case, 2)
    (root / f"dealt-{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(found))
