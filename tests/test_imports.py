"""The rooms of the house: imports run one way, and only some rooms know Lightning."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_accie

PACKAGE = Path(lightning_accie.__file__).parent
ORDER = (
    ("errors", "_compat", "processes"),
    ("trajectory",),
    ("agreement", "images"),
    ("replay",),
    ("data", "logged", "rendered"),
    ("query",),
    ("estimators",),
    ("accounts", "groups", "ranking", "scores_files", "embeddings_files", "unfinished"),
    ("scores", "plots", "notebook", "notebook_figure"),
    ("embeddings", "explanation"),
    ("progress", "reports", "described", "crew", "launch", "export", "comparison"),
    ("capture", "arguments"),
    ("matching", "doctor", "live"),
    ("engine",),
    ("callback",),
    ("cli",),
    ("__init__", "__main__"),
)
"""From the foundations up: a room may use its own floor and those below."""
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
WITHOUT_LIGHTNING = ("trajectory", "replay", "estimators", "agreement", "ranking", "scores")
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module or ""
            if node.module == "lightning_accie":
                yield from (f"lightning_accie.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "lightning_accie" and rest:
            used = rest.split(".")[0]
            assert FLOOR[used] <= FLOOR[room_of(path)], f"{path} imports {name}"


def test_the_core_knows_nothing_of_lightning() -> None:
    found = {
        str(path.relative_to(PACKAGE)): name
        for path in FILES
        for name in imports(path)
        if room_of(path) in WITHOUT_LIGHTNING
        and name.split(".")[0] in ("lightning", "pytorch_lightning")
    }
    assert found == {}


def test_every_public_name_is_there() -> None:
    for name in lightning_accie.__all__:
        assert getattr(lightning_accie, name) is not None
        assert name in dir(lightning_accie)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lightning_accie.nothing  # noqa: B018
