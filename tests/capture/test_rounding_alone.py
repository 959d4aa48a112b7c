"""A bias in front of BatchNorm: its gradient is rounding, which Adam scales up."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.problems import Classifier, Configure, adam, fit, sgd
from tests.replay.test_bit_exact import float32_data

WORDS = r"gradient of `net\.0\.bias` is no more than rounding"


def run(root: Path, configure: Configure, *, bias: bool = True, double: bool = False) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(4, 8, bias=bias), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3)
    )
    train, val = float32_data(40, 0), float32_data(20, 1)
    if double:
        train.tensors = train.tensors[0].double(), train.tensors[1]
        val.tensors = val.tensors[0].double(), val.tensors[1]
    module = Classifier(net.double() if double else net, configure)
    loaders = DataLoader(train, batch_size=10), DataLoader(val, batch_size=10)
    fit(root, module, *loaders, max_steps=2)


def test_it_is_told_when_fit_starts(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=WORDS) as caught:
        run(tmp_path, adam())
    assert sum("rounding" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize(
    ("configure", "settings"),
    [(sgd(), {}), (adam(), {"bias": False}), (adam(), {"double": True})],
    ids=["sgd", "no bias", "double"],
)
def test_nothing_is_told_where_it_does_not_matter(
    tmp_path: Path, configure: Configure, settings: dict[str, bool]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, configure, **settings)
    assert not [warning for warning in caught if "rounding" in str(warning.message)]
