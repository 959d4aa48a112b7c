"""Stand-ins for services that need an account: what Lightning's loggers give as ``experiment``.

Methods and their parameters are those of the packages in the versions named; a test compares them where
a package is installed. Both keep what they get.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


class CometExperiment:
    """Of comet_ml 3.58.8, ``comet_ml.CometExperiment``."""

    def __init__(self) -> None:
        self.assets: dict[str, bytes] = {}
        self.tables: dict[str, tuple[list[str], list[list[Any]]]] = {}
        self.images: dict[str, np.ndarray] = {}
        self.steps: set[int | None] = set()

    def log_asset(
        self,
        file_data: Any,
        file_name: str | None = None,
        overwrite: bool = False,
        copy_to_tmp: bool = True,
        step: int | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, str] | None:
        assert file_name not in self.assets
        self.assets[str(file_name)] = Path(file_data).read_bytes()
        self.steps.add(step)
        return None

    def log_table(
        self,
        filename: str,
        tabular_data: Any = None,
        headers: str | list[str] | bool = False,
        **format_kwargs: Any,
    ) -> dict[str, str] | None:
        assert isinstance(headers, list)
        assert filename not in self.tables
        assert not format_kwargs
        self.tables[filename] = (headers, tabular_data)
        return None

    def log_image(
        self,
        image_data: Any,
        name: str | None = None,
        overwrite: bool = False,
        image_format: str = "png",
        image_scale: float = 1.0,
        image_shape: tuple[int, int] | None = None,
        image_colormap: str | None = None,
        image_minmax: tuple[int, int] | None = None,
        image_channels: str = "last",
        copy_to_tmp: bool = True,
        step: int | None = None,
        annotations: Any = None,
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, str] | None:
        self.images[str(name)] = np.asarray(image_data)
        self.steps.add(step)
        return None


class NeptuneHandler:
    """Of neptune 1.14.0, ``neptune.handler.Handler``: a place in a run."""

    def __init__(self, files: dict[str, bytes], path: str) -> None:
        self._files = files
        self._path = path

    def upload(self, value: Any, *, wait: bool = False, **kwargs: Any) -> None:
        assert wait, "the file may be gone before it is read"
        assert self._path not in self._files
        self._files[self._path] = Path(value).read_bytes()


class NeptuneRun:
    """Of neptune 1.14.0, ``neptune.Run``."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def __getitem__(self, path: str) -> NeptuneHandler:
        return NeptuneHandler(self.files, path)
