"""What is not exactly as it was written is never read as if it were."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory.manifest import VERSION
from lightning_accie.trajectory.reader import Trajectory

FILES = [
    "manifest.json",
    "steps-000000.safetensors",
    "steps-000001.safetensors",
    "steps-000003.safetensors",
    "checkpoints/step-000000000.safetensors",
    "checkpoints/step-000000040.safetensors",
]


def read_all(directory: Path) -> None:
    """Use everything in a trajectory."""
    trajectory = Trajectory.open(directory)
    list(trajectory.steps())
    for step in trajectory.checkpoint_steps:
        trajectory.checkpoint(step)


def flipped(content: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """The content with one byte changed, at 40 places: the ends, some of the header, anywhere."""
    places = [0, 7, 8, len(content) - 1, *rng.integers(0, len(content), 36).tolist()]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        yield bytes(changed)


def cut(content: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """The content with its end cut off, a byte cut out, or a byte too many, at 40 places."""
    for place in [0, 1, 8, len(content) - 1, *rng.integers(0, len(content), 16).tolist()]:
        yield content[:place]
        yield content[:place] + content[place + 1 :]
    yield content + b"\n"


@pytest.mark.parametrize("damaged", [flipped, cut])
@pytest.mark.parametrize("name", FILES)
def test_any_damage_is_found(
    recorded: Trajectory, rich_step: Any, same: Any, name: str, damaged: Any
) -> None:
    path = recorded.directory / name
    for content in damaged(path.read_bytes(), np.random.default_rng(0)):
        path.write_bytes(content)
        with pytest.raises(TrajectoryError) as caught:
            read_all(recorded.directory)
        assert str(path) in str(caught.value)
        if name.startswith("checkpoints"):
            assert_only_this_checkpoint_is_lost(recorded.directory, path, rich_step, same)


def assert_only_this_checkpoint_is_lost(
    directory: Path, path: Path, rich_step: Any, same: Any
) -> None:
    trajectory = Trajectory.open(directory)
    assert len(list(trajectory.steps())) == 40
    for step in trajectory.checkpoint_steps:
        if path.name == f"step-{step:09d}.safetensors":
            with pytest.raises(TrajectoryError, match=path.name):
                trajectory.checkpoint(step)
        else:
            assert trajectory.checkpoint(step).step == step
    with pytest.raises(TrajectoryError, match=path.name):
        trajectory.verify()


@pytest.mark.parametrize("instead", ["nothing", "a directory"])
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(recorded: Trajectory, name: str, instead: str) -> None:
    path = recorded.directory / name
    path.unlink()
    if instead == "a directory":
        path.mkdir()
    with pytest.raises(TrajectoryError) as caught:
        read_all(recorded.directory)
    assert path.name in str(caught.value)


def test_a_step_log_that_is_cut_is_found_when_opened(recorded: Trajectory) -> None:
    path = recorded.directory / "steps-000003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TrajectoryError, match="steps-000003"):
        Trajectory.open(recorded.directory)


def test_damage_since_it_was_opened_is_found(recorded: Trajectory) -> None:
    path = recorded.directory / "steps-000000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(TrajectoryError, match=r"steps-000000\.safetensors is damaged"):
        recorded.step(0)
    recorded.step(39)
    shutil.rmtree(recorded.directory)
    with pytest.raises(TrajectoryError, match=r"steps-000002\.safetensors is missing"):
        recorded.step(20)


def test_a_checkpoint_that_was_not_kept(recorded: Trajectory) -> None:
    with pytest.raises(TrajectoryError, match=r"no checkpoint at step 3\. .* steps 0, 16, 40"):
        recorded.checkpoint(3)


@pytest.mark.parametrize("kind", ["missing", "empty", "other files"])
def test_where_there_is_no_trajectory(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "run"
    if kind != "missing":
        directory.mkdir()
    if kind == "other files":
        (directory / "steps-000000.safetensors").write_bytes(b"unlisted")
    with pytest.raises(TrajectoryError, match=r"holds no trajectory: there is no manifest\.json"):
        Trajectory.open(directory)


# ---------------------------------------------------------------- manifests with a right checksum


def rewrite(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and give it the checksum that its new content has."""
    document = json.loads((directory / "manifest.json").read_text())
    del document["checksum"]
    change(document)
    text = json.dumps(document, indent=1) + "\n"
    document["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(document, indent=1) + "\n")


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A change: ``put("chunks", 0, "count", -1)`` sets that entry; the value None deletes it."""

    def change(document: dict[str, Any]) -> None:
        *parents, key, value = path
        target: Any = document
        for parent in parents:
            target = target[parent]
        if value is None:
            del target[key]
        else:
            target[key] = value

    return change


def test_the_same_manifest_written_anew_is_right(recorded: Trajectory) -> None:
    rewrite(recorded.directory, lambda document: None)
    read_all(recorded.directory)


CHECKPOINT = {"file": "", "bytes": 1000, "sha256": "0" * 64, "step": 0}

SENSELESS = [
    put("format", "another"),
    put("format", None),
    put("version", None),
    put("version", "1"),
    put("version", True),
    put("version", 1.0),
    put("version", 0),
    put("version", -1),
    put("writer", 1),
    put("status", "done"),
    put("status", ["finished"]),
    put("reason", None),
    put("reason", {}),
    put("header", []),
    put("header", None),
    put("more", 1),
    put("chunks", {}),
    put("chunks", None),
    put("chunks", 0, 5),
    put("chunks", 0, []),
    put("chunks", 0, None),
    put("chunks", 1, None),
    put("chunks", 0, "file", 5),
    put("chunks", 0, "file", None),
    put("chunks", 0, "more", 1),
    put("chunks", 0, "first", 1),
    put("chunks", 1, "first", 14),
    put("chunks", 1, "first", 16),
    put("chunks", 0, "count", -1),
    put("chunks", 0, "count", 0),
    put("chunks", 0, "count", 10**30),
    put("chunks", 0, "count", 15.0),
    put("chunks", 0, "count", "15"),
    put("chunks", 0, "count", True),
    put("chunks", 3, "count", 8),
    put("chunks", 3, "count", 10),
    put("chunks", 3, "count", 10**30),
    lambda document: document.update(checkpoints=[]) or put("chunks", 3, "count", 0)(document),
    lambda document: document.update(checkpoints=[]) or put("chunks", 3, "count", -1)(document),
    put("chunks", 0, "bytes", -1),
    put("chunks", 0, "bytes", 0),
    put("chunks", 0, "bytes", 10**30),
    put("chunks", 0, "sha256", "0"),
    put("chunks", 0, "sha256", "0" * 64),
    put("chunks", 0, "sha256", "G" * 64),
    put("checkpoints", "none"),
    put("checkpoints", 0, "step", -1),
    put("checkpoints", 0, "step", 16),
    put(
        "checkpoints",
        2,
        {**CHECKPOINT, "step": 41, "file": "checkpoints/step-000000041.safetensors"},
    ),
    lambda document: document["checkpoints"].reverse(),
    lambda document: document["checkpoints"].append(document["checkpoints"][2]),
    put("checkpoints", 2, "step", 41),
    put("checkpoints", 2, "step", None),
    put("checkpoints", 2, "file", "checkpoints/step-000000016.safetensors"),
]


@pytest.mark.parametrize("change", SENSELESS, ids=range(len(SENSELESS)))
def test_a_manifest_that_makes_no_sense_is_refused(recorded: Trajectory, change: Any) -> None:
    rewrite(recorded.directory, change)
    with pytest.raises(TrajectoryError) as caught:
        list(Trajectory.open(recorded.directory).steps())
    assert str(recorded.directory) in str(caught.value)


@pytest.mark.parametrize("size", [-1, 0, 10**9, 10**18])
def test_a_checkpoint_of_another_size_is_refused(recorded: Trajectory, size: int) -> None:
    rewrite(recorded.directory, put("checkpoints", 1, "bytes", size))
    with pytest.raises(TrajectoryError, match="step-000000016"):
        read_all(recorded.directory)


def test_exchanged_chunks_are_refused(recorded: Trajectory) -> None:
    def exchange(document: dict[str, Any]) -> None:
        one, other = document["chunks"][0], document["chunks"][2]  # 15 steps both
        for key in ("file", "bytes", "sha256"):
            one[key], other[key] = other[key], one[key]

    rewrite(recorded.directory, exchange)
    trajectory = Trajectory.open(recorded.directory)
    with pytest.raises(TrajectoryError, match="15 steps from 16, not 15 steps from 0"):
        trajectory.step(0)


def test_a_checkpoint_is_no_step_log(recorded: Trajectory) -> None:
    def exchange(document: dict[str, Any]) -> None:
        document["chunks"][0] |= {
            key: document["checkpoints"][0][key] for key in ("bytes", "sha256")
        }

    rewrite(recorded.directory, exchange)
    shutil.copy(
        recorded.directory / "checkpoints/step-000000000.safetensors",
        recorded.directory / "steps-000000.safetensors",
    )
    with pytest.raises(TrajectoryError, match=r"steps-000000\.safetensors: the step log lacks"):
        read_all(recorded.directory)


@pytest.mark.parametrize("version", [VERSION + 1, 1000])
def test_a_newer_format_asks_for_an_upgrade(recorded: Trajectory, version: int) -> None:
    path = recorded.directory / "manifest.json"
    document = {"format": "lightning_accie trajectory", "version": version, "unheard": "of"}
    path.write_text(json.dumps(document))
    with pytest.raises(TrajectoryError, match=f"version {version}, .*Upgrade lightning_accie"):
        Trajectory.open(recorded.directory)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"version":' + b"9" * 5000 + b"}"],
    ids=lambda content: content[:4],
)
def test_any_other_content_is_no_manifest(recorded: Trajectory, content: bytes) -> None:
    path = recorded.directory / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(TrajectoryError, match=r"manifest\.json is damaged"):
        Trajectory.open(recorded.directory)


@pytest.mark.parametrize("kind", ["chunks", "checkpoints"])
@pytest.mark.parametrize(
    "where", ["../secret/", "", "./", "checkpoints/../../secret/", "/", "..\\"]
)
def test_names_never_lead_out_of_the_directory(
    recorded: Trajectory, kind: str, where: str, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    original = json.loads((recorded.directory / "manifest.json").read_text())[kind][0]["file"]
    name = {"": f"{secret}/", "/": "/"}.get(where, where) + Path(original).name
    shutil.copy(recorded.directory / original, secret)  # right in content and checksum
    rewrite(recorded.directory, put(kind, 0, "file", name))
    with pytest.raises(TrajectoryError, match=r"manifest\.json is damaged"):
        Trajectory.open(recorded.directory)


def test_names_with_a_line_end_or_foreign_digits_are_refused(recorded: Trajectory) -> None:
    for name in ("steps-000000.safetensors\n", "steps-٠٠٠٠٠٠.safetensors", "steps-0.safetensors"):
        rewrite(recorded.directory, put("chunks", 0, "file", name))
        with pytest.raises(TrajectoryError, match="does not continue the step log"):
            Trajectory.open(recorded.directory)
