"""What the benchmark scripts share: problems, timing, the machine, and writing figures down."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import platform
import re
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parent.parent


class Classifier(LightningModule):
    """A plain classifier trained by SGD."""

    def __init__(self, net: nn.Module, rate: float, momentum: float = 0.0) -> None:
        super().__init__()
        self.net, self.rate, self.momentum = net, rate, momentum

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=self.momentum)


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """A multi-layer perceptron."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def digits(dtype: torch.dtype = torch.float32, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, in the order of the file or shuffled."""
    data = load_digits()
    x, y = torch.tensor(data.data / 16.0, dtype=dtype), torch.tensor(data.target)
    if seed is None:
        return x, y
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return x[order], y[order]


def mnist_like(n: int) -> tuple[Tensor, Tensor]:
    """Images of 784 pixels made of ten noisy prototypes."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(10, 784, generator=generator)
    y = torch.randint(0, 10, (n,), generator=generator)
    return (prototypes[y] + 0.5 * torch.randn(n, 784, generator=generator)).clamp(0, 1), y


def loaders(
    x: Tensor, y: Tensor, train: int, val: int, batch_size: int
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The first ``train`` samples to train on, the next ``val`` to validate on."""
    parts = (
        TensorDataset(x[:train], y[:train]),
        TensorDataset(x[train : train + val], y[train : train + val]),
    )
    return DataLoader(parts[0], batch_size, shuffle=True), DataLoader(parts[1], 250)


def trainer(root: Path, **settings: Any) -> Trainer:
    """One process, by default on the CPU, without loggers and bars."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
    }
    return Trainer(**{**defaults, **settings})


def seconds(action: Callable[[], object]) -> float:
    """Time one call, the work that it has left to a GPU included."""
    start = now()
    action()
    return now() - start


def now() -> float:
    """The clock, once what a GPU was given to do is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def resident_bytes() -> int:
    """The resident memory of this process; on Linux."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that was resident since `forget_peak`, or since the process began; on Linux."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Begin `peak_bytes` anew, with what was freed given back to the system; on Linux with glibc."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def quieten() -> None:
    """Keep Lightning's advice out of the output."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        for part in ("", ".utilities.rank_zero"):
            logging.getLogger(name + part).setLevel(logging.ERROR)


def machine() -> str:
    """The machine in a line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        model = found.group(1) if found else model
    if torch.cuda.is_initialized():
        model = f"{torch.cuda.get_device_name()}, {model}"
    return (
        f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def publish(name: str, text: str) -> None:
    """Write figures between the markers ``<!-- name -->`` of README.md and the pages in docs/."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        old = path.read_text()
        new = pattern.sub(lambda match: match.group(1) + text.strip() + "\n" + match.group(2), old)
        if new != old:
            path.write_text(new)
            print(f"wrote `{name}` into {path.name}")


def kept_rows(path: Path) -> list[dict[str, Any]]:
    """What a script has finished, line by line; what was cut off while it was written is done again."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def arguments(description: str | None, *, device: bool = False) -> argparse.Namespace:
    """The options every script has, and for those that can measure elsewhere ``--device``."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    if device:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--publish", action="store_true", help="write the figures into the docs")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if device and options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "there is no CUDA device: torch sees none on this machine, or this torch is a CPU build. "
            "Leave --device out to measure on the CPU."
        )
    return options
