"""Files from a stranger: opening them runs no code, leads nowhere else, and takes no memory.

Every file here has a right checksum: whoever makes a trajectory up can compute one.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_accie import InfluenceCallback, InfluenceEngine, InfluenceScores, Trajectory
from lightning_accie.errors import InfluenceError, TrajectoryError, UnsupportedError
from lightning_accie.scores_files import ScoresError
from lightning_accie.trajectory.manifest import VERSION
from lightning_accie.trajectory.tensors import dump, load
from lightning_accie.trajectory.writer import TrajectoryWriter
from tests.problems import Classifier, classification, quiet_trainer, sgd, smooth_net
from tests.steady import steady_choices

CHUNK, CHECKPOINT = "steps-000000.safetensors", "checkpoints/step-000000000.safetensors"


@pytest.fixture(autouse=True, scope="module")
def _steady() -> Iterator[None]:
    with steady_choices():
        yield


def loaders() -> tuple[Any, Any]:
    train = DataLoader(classification(24), batch_size=6, shuffle=True)
    return train, DataLoader(classification(11, seed=3), batch_size=7)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with its scores."""
    root = tmp_path_factory.mktemp("recorded")
    influence = InfluenceCallback(dirpath=root, console=False, verify=2, top_k=2)
    torch.manual_seed(5)
    quiet_trainer(root, callbacks=[influence]).fit(Classifier(smooth_net(), sgd()), *loaders())
    return root


@pytest.fixture
def run(tmp_path: Path, recorded: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(recorded, tmp_path / "run")
    return tmp_path / "run"


def rank(run: Path) -> InfluenceScores:
    train, valid = loaders()
    module = Classifier(smooth_net(), sgd())
    engine = InfluenceEngine(
        run / "trajectory", module, train, val_dataloaders=valid, progress=False
    )
    return engine.estimate(verify=2, top_k=2)


def seal(document: dict[str, Any]) -> str:
    """A JSON document with the checksum that it has."""
    document.pop("checksum", None)
    text = json.dumps(document, indent=1) + "\n"
    document["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(document, indent=1) + "\n"


def change_manifest(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = run / "trajectory" / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(seal(document))


def replace_file(run: Path, name: str, content: bytes) -> None:
    """Another content under the name, and its size and checksum in the manifest."""
    (run / "trajectory" / name).write_bytes(content)

    def change(document: dict[str, Any]) -> None:
        for entry in (*document["chunks"], *document["checkpoints"]):
            if entry["file"] == name:
                entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    change_manifest(run, change)


def replace_scores(run: Path, content: bytes) -> None:
    (run / "scores.safetensors").write_bytes(content)
    document = json.loads((run / "scores.json").read_text())
    document["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    (run / "scores.json").write_text(seal(document))


def test_what_is_sealed_anew_is_right(run: Path, recorded: Path) -> None:
    """Otherwise the other tests would find wrong checksums, and nothing else."""
    for name in (CHUNK, CHECKPOINT):
        replace_file(run, name, (run / "trajectory" / name).read_bytes())
    replace_scores(run, (run / "scores.safetensors").read_bytes())
    assert torch.equal(rank(run).influence, InfluenceScores.load(recorded).influence)
    assert len(InfluenceScores.load(run)) == 24


# ------------------------------------------------------------------ code


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.flag),)


def pickled(flag: Path) -> list[bytes]:
    """A pickle, and a file of torch's with one in it."""
    torch.save(Payload(flag), flag.with_suffix(".pt"))
    found = [pickle.dumps(Payload(flag)), flag.with_suffix(".pt").read_bytes()]
    for content in found:  # they would do it
        flag.with_suffix(".pt").write_bytes(content)
    pickle.loads(found[0])
    flag.rmdir()
    return found


@pytest.mark.parametrize("name", [CHUNK, CHECKPOINT, "manifest.json", "scores.json", "scores"])
def test_a_pickle_is_not_unpickled(tmp_path: Path, run: Path, name: str) -> None:
    flag = tmp_path / "flag"
    for content in pickled(flag):
        if name == "scores":
            replace_scores(run, content)
        elif name == "scores.json":
            (run / name).write_bytes(content)
        elif name == "manifest.json":
            (run / "trajectory" / name).write_bytes(content)
        else:
            replace_file(run, name, content)
        with pytest.raises(InfluenceError, match=r"safetensors|damaged"):
            InfluenceScores.load(run) if name.startswith("scores") else rank(run)
        assert not flag.exists()


def test_classes_that_the_header_names_are_never_imported(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def rename(key: str) -> None:
        change_manifest(run, lambda document: document["header"].update({key: "stranger.Evil"}))

    rename("module")
    assert rank(run).info["module"] == "stranger.Evil"  # words, and nothing else
    rename("optimizer")
    with pytest.raises(UnsupportedError, match=r"optimiser `stranger\.Evil`, which has no update"):
        rank(run)
    assert "stranger" not in sys.modules


# ------------------------------------------------------------------ ways out of the directory


@pytest.mark.parametrize("kind", ["chunks", "checkpoints"])
@pytest.mark.parametrize(
    "name", ["../../outside/{}", "/{}", "{}/../../../outside/{}", "\\\\host\\{}"]
)
def test_a_manifest_names_files_of_its_directory_only(run: Path, kind: str, name: str) -> None:
    own = {"chunks": CHUNK, "checkpoints": CHECKPOINT}[kind]
    outside = run.parent / "outside" / own
    outside.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "trajectory" / own, outside)
    change_manifest(run, lambda d: d[kind][0].update(file=name.replace("{}", own)))
    with pytest.raises(TrajectoryError, match=r"manifest\.json is damaged"):
        rank(run)


def test_a_link_is_read_but_never_written_through(run: Path, recorded: Path) -> None:
    """What it leads to must have the recorded content; writers replace the link, not the target."""
    outside = run.parent / "outside.safetensors"
    shutil.move(run / "trajectory" / CHUNK, outside)
    (run / "trajectory" / CHUNK).symlink_to(outside)
    assert torch.equal(rank(run).influence, InfluenceScores.load(recorded).influence)
    content = outside.read_bytes()
    (run / "trajectory" / f"{CHUNK}.tmp").symlink_to(outside)
    TrajectoryWriter(run / "trajectory", {}, disk_budget=1, overwrite=True).close()
    assert outside.read_bytes() == content
    outside.write_bytes(content[:-1])
    shutil.rmtree(run)
    shutil.copytree(recorded, run)
    (run / "trajectory" / CHUNK).unlink()
    (run / "trajectory" / CHUNK).symlink_to(outside)
    with pytest.raises(TrajectoryError, match="damaged"):
        rank(run)


def test_overwriting_follows_no_link_to_a_directory(run: Path) -> None:
    outside = run.parent / "outside"
    shutil.move(run / "trajectory" / "checkpoints", outside)
    (run / "trajectory" / "checkpoints").symlink_to(outside)
    before = sorted(outside.iterdir())
    with pytest.raises(TrajectoryError, match="something else than a trajectory: checkpoints"):
        TrajectoryWriter(run / "trajectory", {}, disk_budget=1, overwrite=True)
    assert sorted(outside.iterdir()) == before


# ------------------------------------------------------------------ sizes and depths


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def huge(*shape: int) -> bytes:
    """A header that promises a tensor of this shape, with eight bytes behind it."""
    size = 8 * int(torch.tensor(shape, dtype=torch.float64).prod())
    entry = {"dtype": "F64", "shape": list(shape), "data_offsets": [0, size]}
    return safetensors({"__metadata__": {"lightning_accie": "{}"}, "params/x": entry}, b"\0" * 8)


DEEP = b"[" * 100_000
BOMBS = {
    "length": safetensors({}, length=10**15),
    "length-64": safetensors({}, length=2**64 - 1),
    "tensor": huge(10**15),
    "square": huge(10**7, 10**8),
    "overflow": safetensors(
        {"x": {"dtype": "F64", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, b"\0" * 8
    ),
    "negative": safetensors({"x": {"dtype": "F64", "shape": [-1], "data_offsets": [8, 0]}}),
    "deep": safetensors(DEEP),
    "deep-meta": safetensors({"__metadata__": {"lightning_accie": DEEP.decode()}}),
    "no-meta": safetensors({}),
    "empty": b"",
}


@pytest.mark.parametrize("name", [CHUNK, CHECKPOINT, "scores"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_header_that_promises_too_much_is_refused_before_anything_is_allocated(
    run: Path, bomb: str, name: str
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name == "scores":
        replace_scores(run, BOMBS[bomb])
        with pytest.raises(ScoresError):
            InfluenceScores.load(run)
    else:
        replace_file(run, name, BOMBS[bomb])
        with pytest.raises(TrajectoryError):
            rank(run)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000  # kilobytes


def test_a_manifest_may_not_be_deep(run: Path) -> None:
    text = (run / "trajectory" / "manifest.json").read_text()
    deep = text.replace('"header": {', '"header": {"x": ' + "[" * 50_000 + "]" * 50_000 + ",", 1)
    (run / "trajectory" / "manifest.json").write_text(deep)
    with pytest.raises(TrajectoryError, match=r"manifest\.json is damaged"):
        rank(run)


def nested(depth: int) -> Any:
    form: Any = ["float"]
    for _ in range(depth):
        form = ["list", form]
    return form


def columns(**changes: Any) -> Callable[[dict[str, Any], Any], None]:
    """A change of the step log's tensors; names as keywords, ``__`` for ``/``."""

    def change(tensors: dict[str, Any], meta: Any) -> None:
        tensors.update({name.replace("__", "/"): value for name, value in changes.items()})

    return change


def settings(entry: str, value: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda tensors, meta: meta["settings"][0].update({entry: value})


BAD_CHUNKS: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "counts of 10^15": columns(step__micro_batches=torch.tensor([10**15] * 12)),
    "a count below 0": columns(step__micro_batches=torch.tensor([3, -1, *[1] * 10])),
    "counts that are floats": columns(step__micro_batches=torch.ones(12)),
    "sizes of 10^15": columns(piece__size=torch.tensor([10**15] * 12)),
    "numbers of another length": settings("varies", [True] * 10**6),
    "many numbers that do not vary": columns(settings__0__constant=torch.zeros(10**6).double()),
    "a form of great depth": settings("form", nested(900)),
    "a form without numbers": settings("form", None),
    "a form that is empty": settings("form", []),
    "a form that is not there": columns(settings__form=torch.full((12,), 7)),
    "no forms": lambda tensors, meta: meta.update(settings=[]),
    "forms that are a number": lambda tensors, meta: meta.update(settings=3),
    "a first step that is text": lambda tensors, meta: meta.update(first="0"),
}


@pytest.mark.parametrize("case", BAD_CHUNKS)
def test_a_step_log_that_makes_no_sense_is_refused(run: Path, case: str) -> None:
    tensors, meta = load((run / "trajectory" / CHUNK).read_bytes())
    BAD_CHUNKS[case](tensors, meta)
    replace_file(run, CHUNK, dump(tensors, meta))
    with pytest.raises(TrajectoryError, match=r"steps-000000\.safetensors"):
        list(Trajectory.open(run / "trajectory").steps())


# ------------------------------------------------------------------ headers

NEEDED = (
    *("module", "parameters", "groups", "frozen", "optimizer", "clip", "precision"),
    *("eval_modules", "step_arguments", "trainer", "loaders", "monitor"),
)
DISPENSABLE = (
    *("overridden_hooks", "capture", "device", "threads", "versions", "id", "resumed", "saved"),
    *("best", "loss_form"),
)
HEADER = (*NEEDED, *DISPENSABLE)


def test_these_are_the_headers_entries(recorded: Path) -> None:
    assert set(HEADER) == Trajectory.open(recorded / "trajectory").header.keys()


@pytest.mark.parametrize("key", HEADER)
def test_a_header_that_lacks_something(run: Path, recorded: Path, key: str) -> None:
    """Either it is dispensable, and the ranking the same, or it is named."""
    change_manifest(run, lambda document: document["header"].pop(key))
    if key in DISPENSABLE:
        assert torch.equal(rank(run).influence, InfluenceScores.load(recorded).influence)
        return
    with pytest.raises(TrajectoryError, match=f"lacks `{key}`"):
        rank(run)


@pytest.mark.parametrize("value", [7, "x", [["x"]], {"x": -1}, None], ids=str)
def test_a_header_with_something_else_there(run: Path, value: Any) -> None:
    """Nothing but errors with a reason, and never another ranking."""
    manifest = (run / "trajectory" / "manifest.json").read_text()
    for key in HEADER:
        (run / "trajectory" / "manifest.json").write_text(manifest)
        change_manifest(run, lambda document, key=key: document["header"].update({key: value}))
        harmless = key in {"capture", "device", "threads", "versions", "id", "saved"}
        if harmless or (key, value) in [
            *[("module", "x"), ("monitor", "x"), ("clip", None), ("best", None), ("trainer", None)],
            *[("optimizer", "x"), ("trainer", {"x": -1})],
        ]:
            continue  # words, or what may stand there
        with pytest.raises(TrajectoryError, match=f"lacks `{key}`"):
            rank(run)


def test_a_header_that_names_a_part_that_is_not_there(run: Path) -> None:
    change_manifest(run, lambda document: document["header"].update(eval_modules=["head"]))
    with pytest.raises(TrajectoryError, match=r"another module.*`head` is missing"):
        rank(run)


# ------------------------------------------------------------------ other versions


@pytest.mark.parametrize("version", [VERSION + 1, 10**9])
def test_newer_files_ask_for_an_upgrade(run: Path, version: int) -> None:
    change_manifest(run, lambda document: document.update(version=version, more="fields"))
    with pytest.raises(TrajectoryError, match=f"format version {version}.*Upgrade"):
        rank(run)
    document = json.loads((run / "scores.json").read_text())
    (run / "scores.json").write_text(seal({**document, "version": version}))
    with pytest.raises(ScoresError, match=f"format version {version}.*Upgrade"):
        InfluenceScores.load(run)
