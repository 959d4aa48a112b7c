"""The runs of two processes that the tests look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.ddp.launch import launch


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """As many threads as each rank had: another number rounds otherwise, in BatchNorm for one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all went well, until rank 0 was killed in the last analysis."""
    directory = tmp_path_factory.mktemp("whole")
    ended = launch("tests.ddp.runs", str(directory), "whole")
    assert [one.code for one in ended] == [-9, 0]
    return directory


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything went wrong, until rank 1 was killed in training."""
    directory = tmp_path_factory.mktemp("faulty")
    ended = launch("tests.ddp.runs", str(directory), "faults")
    assert [one.code for one in ended] == [0, -9]
    return directory
