"""Which samples are pictures, and what is shown of them."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_accie.images import as_image

Pair = namedtuple("Pair", ["image", "label"])


def ramp(*shape: int) -> torch.Tensor:
    """Values from 0 to 1."""
    return torch.linspace(0, 1, int(np.prod(shape))).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "shown"),
    [
        ((64, 80), (64, 80, 1)),
        ((1, 64, 80), (64, 80, 1)),
        ((3, 64, 80), (64, 80, 3)),
        ((4, 64, 80), (64, 80, 4)),
        ((64, 80, 3), (64, 80, 3)),
        ((64, 80, 1), (64, 80, 1)),
        ((4, 4, 3), (64, 64, 3)),
        ((8, 8), (64, 64, 1)),
        ((3, 28, 28), (84, 84, 3)),
        ((4, 200), (4, 200, 1)),
        ((3, 1024, 600), (512, 300, 3)),
        ((1025, 100), (342, 34, 1)),
    ],
)
def test_shapes_that_are_images(shape: tuple[int, ...], shown: tuple[int, ...]) -> None:
    for image in (ramp(*shape), ramp(*shape).numpy(), (ramp(*shape) * 255).to(torch.uint8)):
        found = as_image(image)
        assert found.shape == shown
        assert found.dtype == np.uint8


@pytest.mark.parametrize(
    "sample",
    [
        torch.rand(64),
        torch.rand(2, 64, 64),
        torch.rand(5, 64, 64, 3),
        torch.rand(3, 64),
        torch.rand(3, 3, 64),
        torch.zeros(64, 64, dtype=torch.int64),
        np.zeros((64, 64), dtype=bool),
        torch.tensor(3),
        "a text",
        b"bytes",
        {"a": 1, "b": None},
        (),
        None,
    ],
)
def test_what_is_no_image(sample: Any) -> None:
    assert as_image(sample) is None


def test_the_first_image_of_a_sample_is_found() -> None:
    image, mask = torch.zeros(3, 64, 64), torch.ones(64, 64)
    for sample in (
        (image, 3, mask),
        [torch.rand(10), image],
        {"id": "x", "views": [image, mask]},
        Pair(image, 3),
        (3, {"deep": (image,)}),
    ):
        found = as_image(sample)
        assert found.shape == (64, 64, 3)
        assert not found.any()


def test_channels_come_last_in_their_order() -> None:
    image = torch.zeros(3, 64, 64)
    image[0, 10, 20] = 1
    found = as_image(image)
    assert found[10, 20].tolist() == [255, 0, 0]
    assert found.sum() == 255


def test_an_enlarged_image_has_whole_blocks() -> None:
    found = as_image(ramp(8, 8) * 16)[:, :, 0]  # like scikit-learn's digits
    blocks = found.reshape(8, 8, 8, 8)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert found[::8, ::8].ravel().tolist() == np.rint(np.linspace(0, 255, 64)).tolist()


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.0, 1.0, (0, 255)),
        (0.0, 0.5, (0, 128)),
        (0.25, 0.5, (64, 128)),
        (0.0, 255.0, (0, 255)),
        (10.0, 200.0, (10, 200)),
        (0.0, 16.0, (0, 255)),
        (-2.0, 3.0, (0, 255)),
        (-0.5, 0.5, (0, 255)),
        (0.0, 1000.0, (0, 255)),
        (0.0, 0.0, (0, 0)),
        (1.0, 1.0, (255, 255)),
        (-3.0, -3.0, (0, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_ranges(low: float, high: float, shown: tuple[int, int], dtype: torch.dtype) -> None:
    image = (low + (high - low) * ramp(64, 64)).to(dtype)
    found = as_image(image)
    assert (found.min(), found.max()) == shown
    assert (np.diff(found.ravel().astype(int)) >= 0).all()


def test_bytes_are_shown_as_they_are() -> None:
    image = torch.randint(3, 90, (64, 64), dtype=torch.uint8)
    assert np.array_equal(as_image(image)[:, :, 0], image.numpy())


@pytest.mark.parametrize("wild", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_dark(wild: float) -> None:
    image = 0.5 + 0.5 * ramp(64, 64)
    image[3, 3] = wild
    found = as_image(image)
    assert found[3, 3, 0] == found.min() == 128
    assert found.max() == 255
    assert not as_image(torch.full((64, 64), wild)).any()


@pytest.mark.parametrize(
    ("mode", "color", "shown"),
    [
        ("RGB", (10, 20, 30), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 40), [10, 20, 30, 40]),
        ("L", 9, [9]),
        ("1", 1, [255, 255, 255]),
        ("P", 0, [0, 0, 0]),
    ],
)
def test_pillow_images(mode: str, color: Any, shown: list[int]) -> None:
    found = as_image((Image.new(mode, (80, 64), color), 1))
    assert found.shape == (64, 80, len(shown))
    assert found[0, 0].tolist() == shown


def test_a_gradient_does_not_get_in_the_way() -> None:
    assert as_image(torch.rand(64, 64, requires_grad=True)) is not None
