"""Batches come back as they were, each distinct sample is on disk once, and damage shows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict, UserDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightning_accie.errors import TrajectoryError, UnsupportedError
from lightning_accie.trajectory.batch_building import Form
from lightning_accie.trajectory.batch_forms import take_apart
from lightning_accie.trajectory.reader import Trajectory
from lightning_accie.trajectory.records import Checkpoint, MicroBatch, Piece, Step
from lightning_accie.trajectory.writer import TrajectoryWriter
from tests.trajectory.test_damage import cut, flipped, put, rewrite

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    note: str = "n"
    more: Any = field(default=None)

    def __post_init__(self) -> None:
        CALLED.append("post_init")


class Pair(NamedTuple):
    a: Any
    b: Any


class Encoding(UserDict):
    """As the tokenisers' batches are made."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data)
        CALLED.append("encoding")
        self._encodings = None
        self.sizes = [1, 2]


@dataclass
class Output(OrderedDict):
    """As transformers' outputs are made: fields that are items too."""

    loss: Any = None

    def __post_init__(self) -> None:
        CALLED.append("output")
        self["loss"] = self.loss


CALLED: list[str] = []
g = torch.Generator().manual_seed(0)
x = torch.randn(4, 3, 2, 5, generator=g)

BATCHES: dict[str, Any] = {
    "tensor": x,
    "list": [x, torch.arange(4)],
    "tuple": (x[:, 0], (torch.arange(4), None)),
    "dtypes": {
        str(dtype): torch.ones(4, 2).to(dtype)
        for dtype in (
            *(torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8),
            *(torch.int16, torch.int32, torch.int64, torch.complex64, torch.float8_e5m2),
        )
    },
    "shapes": [
        torch.tensor(3.0),
        torch.zeros(4, 0),
        torch.zeros(0),
        torch.randn(7, 2, generator=g),
    ],
    "strides": [x.to(memory_format=torch.channels_last), x.transpose(0, 3), x[:, ::2], x.conj()],
    "special": torch.tensor([float("nan"), -0.0, float("inf"), 1e-42]),
    "numpy": [np.arange(8.0).reshape(4, 2), np.float32(2), np.array(5), np.array([True] * 4)],
    "plain": {"a": 1, 2: 2.5, None: "ü", True: None, 1.5: [float("nan"), True, -7], "e": []},
    "by sample": {
        "names": ["a", "b", "", "d"],
        "counts": (1, 2, 3, 4),
        "mixed": [None, 1, "x", 0.5],
    },
    "samples": (
        [torch.randn(3, n, generator=g) for n in (1, 2, 3, 4)],
        [{"b": torch.ones(n)} for n in range(4)],
    ),
    "named tuple": Pair(x, Pair(1, torch.arange(4))),
    "dataclass": Frozen(x, more=[Frozen(torch.ones(4))]),
    "user dict": Encoding({"ids": torch.arange(8).reshape(4, 2)}),
    "output": Output(torch.ones(4)),
    "ordered": OrderedDict(b=x, a=torch.ones(4)),
    "packed": pack_sequence([torch.ones(3), torch.zeros(2), torch.ones(2), torch.zeros(1)]),
}


def same(one: Any, other: Any) -> bool:
    """Type by type and bit by bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        bits = [t.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, (np.ndarray, np.generic)):
        kinds = [(array.dtype, array.shape, array.tobytes()) for array in (one, other)]
        return kinds[0] == kinds[1]
    if isinstance(one, UserDict):
        return same(vars(one), vars(other))
    if isinstance(one, dict):
        keys = [[(key, type(key)) for key in each] for each in (one, other)]
        values = zip(one.values(), other.values(), strict=True)
        own = same(getattr(one, "__dict__", None), getattr(other, "__dict__", None))
        return own and keys[0] == keys[1] and all(same(*pair) for pair in values)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dataclass_fields__"):
        return same(vars(one), vars(other))
    return repr(one) == repr(other)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("sizes", [[4], [2, 4], [3]])
def test_a_batch_comes_back_as_it_was(name: str, sizes: list[int]) -> None:
    CALLED.clear()
    parts = take_apart(BATCHES[name], sizes)
    form = Form(parts.form)
    assert same(BATCHES[name], form.build(parts.groups, CPU))
    if form.has_samples:
        for place in range(sizes[0]):
            one = [
                g[place : place + 1] if s else g
                for g, s in zip(parts.groups, form.split, strict=True)
            ]
            form.sample(one, place)
    assert CALLED == []


def test_channels_last_stays_channels_last() -> None:
    image = x.to(memory_format=torch.channels_last)
    parts = take_apart([image], [4])
    (again,) = Form(parts.form).build(parts.groups, CPU)
    assert again.is_contiguous(memory_format=torch.channels_last)
    assert again.stride() == image.stride()


def test_samples() -> None:
    batch = {"x": x, "name": ["a", "b", "c", "d"], "all": torch.ones(7), "n": 3}
    parts = take_apart(batch, [4])
    form = Form(parts.form)
    assert form.has_samples
    one = [g[2:3] if s else g for g, s in zip(parts.groups, form.split, strict=True)]
    found = form.sample(one, 2)
    assert torch.equal(found["x"], x[2])
    assert (found["name"], found["n"], len(found["all"])) == ("c", 3, 7)
    images, targets = BATCHES["samples"]
    parts = take_apart((images, targets), [4])
    found = Form(parts.form).sample(parts.groups, 3)
    assert torch.equal(found[0], images[3])
    assert torch.equal(found[1]["b"], targets[3]["b"])
    for unclear in ([torch.ones(2, 3), torch.zeros(2)], [torch.ones(3), torch.ones(3)]):
        assert not Form(take_apart(unclear, [2 if unclear[0].dim() > 1 else 5]).form).has_samples


class Unknown:
    pass


def local() -> Any:
    class Local(NamedTuple):
        x: Any

    return Local(1)


ODD: dict[str, tuple[Any, str]] = {
    "object": ({"a": [Unknown()]}, r"batch\['a'\]\[0\] is a `[\w.]*Unknown`"),
    "bytes": ([b"x"], r"batch\[0\] is a `builtins.bytes`"),
    "set": ({"s": {1}}, r"batch\['s'\] is a `builtins.set`"),
    "sparse": (torch.eye(3).to_sparse(), "`torch.Tensor`"),
    "parameter": (torch.nn.Parameter(x), "Parameter"),
    "graph": ([x.clone().requires_grad_()], "requires a gradient"),
    "key": ({(1, 2): x}, "a key of batch"),
    "texts": (np.array(["a", "b"]), "numpy.ndarray"),
    "objects": (np.array([None, 1]), "numpy.ndarray"),
    "local": (local(), "cannot be found again by this name"),
    "attribute": (Encoding({"x": x}), r"batch\._encodings is a .*Unknown"),
    "str subclass": ({"a": type("Text", (str,), {})("x")}, "Text"),
}
ODD["attribute"][0]._encodings = Unknown()


@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_stored_is_named(name: str) -> None:
    batch, message = ODD[name]
    with pytest.raises(UnsupportedError, match=message):
        take_apart(batch, [4])


# ---------------------------------------------------------------------- on disk


def batch_of(t: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(t % 5)
    return {
        "x": torch.randn(3, 2, generator=rng),
        "t": t % 5,
        "n": [f"s{t % 5}.{i}" for i in range(3)],
    }


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trajectory:
    """Thirty batches, six times the same five, in several files."""
    monkeypatch.setattr("lightning_accie.trajectory.writer._LARGEST_FILE", 200)
    writer = TrajectoryWriter(
        tmp_path / "run", {"loaders": []}, disk_budget=10**6, flush_steps=7, keeps_batches=True
    )
    writer.checkpoint(Checkpoint(0, {"w": torch.zeros(2)}))
    for t in range(30):
        names = [f"s{t}.{i}" for i in range(3)] if t < 5 else []
        number = writer.keep_batch(take_apart(batch_of(t), [3]), names)
        piece = Piece(0, np.arange(3) + 3 * (t % 5))
        writer.append(Step(t, (MicroBatch((piece,), t, 0, t, 0.5, batch=number),), ({"lr": 0.1},)))
    writer.checkpoint(Checkpoint(30, {"w": torch.zeros(2)}))
    writer.close()
    return Trajectory.open(tmp_path / "run")


def use(directory: Path) -> None:
    trajectory = Trajectory.open(directory)
    assert trajectory.batches is not None
    for step in trajectory.steps():
        assert same(
            batch_of(step.number), trajectory.batches.batch(step.micro_batches[0].batch, CPU)
        )
    assert trajectory.batches.ids() == [f"s{t}.{i}" for t in range(5) for i in range(3)]


def test_what_is_stored_is_there_once(stored: Trajectory) -> None:
    use(stored.directory)
    stored.verify()
    entries = stored.batches._stored  # type: ignore[union-attr]
    assert len(entries) >= 3
    assert sum(entry.records for entry in entries) == 5 * 3 + 5  # samples, and the values of `t`
    assert stored.version == 3


FILES = ["batches-000000.safetensors", "batches-000001.safetensors", "manifest.json"]


@pytest.mark.parametrize("damaged", [flipped, cut])
@pytest.mark.parametrize("name", FILES)
def test_any_damage_is_found(stored: Trajectory, name: str, damaged: Any) -> None:
    path = stored.directory / name
    for content in damaged(path.read_bytes(), np.random.default_rng(0)):
        path.write_bytes(content)
        with pytest.raises(TrajectoryError, match=name):
            use(stored.directory)
        with pytest.raises(TrajectoryError, match=name):
            Trajectory.open(stored.directory).verify()


@pytest.mark.parametrize("name", FILES[:2])
def test_a_missing_file_is_named(stored: Trajectory, name: str) -> None:
    (stored.directory / name).unlink()
    with pytest.raises(TrajectoryError, match=f"{name} is missing"):
        Trajectory.open(stored.directory)


SENSELESS = [
    put("version", 1),
    put("batches", None),
    put("batches", {}),
    put("batches", 0, "first", 1),
    put("batches", 1, "first", 0),
    put("batches", 0, "count", 0),
    put("batches", 0, "count", 10**30),
    put("batches", 0, "records", -1),
    put("batches", 0, "records", 10**30),
    put("batches", 0, "records", True),
    put("batches", 0, "file", "../batches-000000.safetensors"),
    put("batches", 0, "file", "steps-000000.safetensors"),
    put("batches", 0, "more", 1),
    put("batches", 0, "records", 3),
    lambda document: document["batches"].pop(),
]


@pytest.mark.parametrize("change", SENSELESS, ids=range(len(SENSELESS)))
def test_a_manifest_that_makes_no_sense_is_refused(stored: Trajectory, change: Any) -> None:
    rewrite(stored.directory, change)
    with pytest.raises(TrajectoryError, match=str(stored.directory)):
        use(stored.directory)


def test_a_trajectory_of_indices_alone_has_version_1(recorded: Trajectory) -> None:
    assert recorded.version == 1
    assert recorded.batches is None
    assert json.loads((recorded.directory / "manifest.json").read_text())["version"] == 1


def test_forms_that_are_not_ours() -> None:
    for text in ("", "[]", "{}", '{"tree": 1, "groups": 3, "unclear": false}'):
        with pytest.raises(ValueError, match="no form"):
            Form(text)


# ---------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("dict", "subprocess:Popen"),
        ("dataclass", "os:system"),
        ("named tuple", "builtins:eval"),
        ("user dict", "weakref:WeakValueDictionary"),
        ("dict", "antigravity:anything"),
        ("dict", "no.such.module:Class"),
        ("dict", "builtins:print.__call__"),
    ],
)
def test_only_imported_classes_of_their_kind_are_built(kind: str, path: str) -> None:
    tree = ["instance", kind, path, [], []]
    form = Form(json.dumps({"tree": tree, "groups": [], "unclear": False}))
    before = set(sys.modules)
    with pytest.raises(TrajectoryError, match=f"made of `{path}`.*Import it"):
        form.build([], CPU)
    assert set(sys.modules) == before


ELSEWHERE = """
import sys, torch
from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory.reader import Trajectory
trajectory = Trajectory.open(sys.argv[1])
try:
    trajectory.batches.batch(0, torch.device("cpu"))
except TrajectoryError as error:
    print("refused:", error)
sys.path.insert(0, sys.argv[2])
import own_batches
batch = trajectory.batches.batch(0, torch.device("cpu"))
print(type(batch).__name__, batch.x.tolist(), own_batches.CALLED)
"""


def test_another_process_imports_the_class_itself(tmp_path: Path) -> None:
    (tmp_path / "own_batches.py").write_text(
        "from dataclasses import dataclass\nCALLED = []\n\n@dataclass\nclass Batch:\n    x: object\n"
        "    def __post_init__(self):\n        CALLED.append(1)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        import own_batches  # type: ignore[import-not-found]

        writer = TrajectoryWriter(tmp_path / "run", {}, disk_budget=10**6, keeps_batches=True)
        writer.keep_batch(take_apart(own_batches.Batch(torch.arange(3)), [3]))
        writer.close()
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["own_batches"]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "run"), str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=200,
    )
    first, second = done.stdout.strip().splitlines()
    assert first.startswith("refused: The stored batches are made of `own_batches:Batch`")
    assert second == "Batch [0, 1, 2] []"
