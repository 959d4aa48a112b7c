"""The documentation's Python blocks run, and its lists are those of the code.

The blocks of a page run in order, in a directory of their own: a block fenced as ``python`` in one
namespace of the page, one fenced as ``bash`` where a line ``<!-- run -->`` stands before it. A block
with ``title="train.py"`` is written to that file. After ``<!-- not run -->`` Python is only compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import pytest

import lightning_accie
from lightning_accie.capture import support
from lightning_accie.replay import per_sample, update_rules
from lightning_accie.scores import CSV_HEADER

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
NOT_RUN, RUN = "<!-- not run -->", "<!-- run -->"
RUNNING_HOW_TO = [
    "augmentation-and-streams",
    "clean-and-retrain",
    "compare-groups",
    "explain-predictions",
    "find-harmful-data",
    "interruptions",
    "live",
    "notebooks",
    "own-losses",
    "own-optimiser",
    "queries",
    "report",
]
FENCE = "```"


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    title: str | None
    source: str
    runs: bool

    def compiled(self) -> CodeType:
        # With blank lines in front, a traceback names the page's own line.
        return compile("\n" * (self.line - 1) + self.source, str(self.page), "exec")

    def run(self, namespace: dict[str, object]) -> None:
        if self.title is not None:
            Path(self.title).write_text(self.source, encoding="utf-8")
        elif self.language == "python":
            exec(self.compiled(), namespace)
        else:
            run_in_shell(self.source)


def run_in_shell(source: str) -> None:
    """Run shell commands with this Python, and this checkout of the package, in front."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-euo", "pipefail", "-c", source]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{source}{done.stdout[-3000:]}{done.stderr[-3000:]}"


def blocks_of(page: Path) -> list[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    blocks = []
    opened: int | None = None
    for number, line in enumerate(lines):
        if not line.strip().startswith(FENCE):
            continue
        if opened is None:
            opened = number
            continue
        blocks.append(block_of(page, lines, opened, number))
        opened = None
    assert opened is None, f"{page}:{opened} opens a block that nothing closes"
    return blocks


def block_of(page: Path, lines: list[str], opened: int, closed: int) -> Block:
    found = re.fullmatch(
        r'(\w*)(?: title="([\w./-]+)")?', lines[opened].strip().removeprefix(FENCE)
    )
    assert found, f"{page}:{opened + 1}"
    language, title = found.groups()
    assert language == "python" or not language.startswith("py"), f"{page}:{opened + 1}"
    before = lines[opened - 1].strip() if opened else ""
    runs = before == RUN or title is not None or (language == "python" and before != NOT_RUN)
    source = textwrap.dedent("\n".join(lines[opened + 1 : closed])) + "\n"
    return Block(page, opened + 2, language, title, source, runs)


BLOCKS = {page.relative_to(ROOT).as_posix(): blocks_of(page) for page in PAGES}
RUNNABLE = [name for name, blocks in BLOCKS.items() if any(block.runs for block in blocks)]


def page_text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_compiles(name: str) -> None:
    for block in BLOCKS[name]:
        if block.language == "python":
            block.compiled()


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_blocks_of_a_page_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(update_rules, "_RULES", dict(update_rules._RULES))
    namespace = {"__name__": f"docs_{Path(name).stem}"}
    for block in BLOCKS[name]:
        if block.runs:
            block.run(namespace)


def test_the_pages_that_teach_by_running_do_run() -> None:
    pages = [*RUNNING_HOW_TO, "lightning-cli", "several-devices"]
    how_to = {f"docs/how-to/{page}.md" for page in pages}
    assert {"docs/quickstart.md", "docs/files.md", *how_to} <= set(RUNNABLE)


def test_the_how_to_pages_share_one_set_up() -> None:
    set_ups = {BLOCKS[f"docs/how-to/{page}.md"][0].source for page in RUNNING_HOW_TO}
    assert len(set_ups) == 1


def test_the_pages_show_on_a_code_host_as_well() -> None:
    """The README links into docs/, where syntax of the site alone shows as text."""
    only_here = re.compile(r"^ *(\?\?\?|!!!|===) |\{ *[.#]", re.MULTILINE)
    assert [page.name for page in PAGES if only_here.search(page.read_text("utf-8"))] == []


def test_what_is_supported_is_listed() -> None:
    text = page_text("support.md")
    losses = [f"`{loss.__name__}`" for loss in per_sample._LOSSES]
    optimisers = [f"`{optimiser.__name__}`" for optimiser in update_rules._RULES]
    precisions = [f'`"{precision}"`' for precision in support.PRECISIONS]
    callbacks = [f"`{callback}`" for callback in support._CALLBACKS]
    hooks = [f"`{hook}`" for hook in support._MODULE_HOOKS]
    listed = [*losses, *optimisers, *precisions, *callbacks, *hooks]
    assert [name for name in listed if name not in text] == []


def test_the_columns_of_the_csv_file_are_listed_in_order() -> None:
    assert ",".join(CSV_HEADER) in page_text("files.md")


def test_the_api_page_has_every_public_name() -> None:
    text = page_text("api.md")
    # The errors stand there as a module.
    missing = [
        name
        for name in lightning_accie.__all__
        if not name.startswith("__") and not name.endswith("Error") and f".{name}\n" not in text
    ]
    assert missing == []
