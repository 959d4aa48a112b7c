"""The examples run as a user runs them, each in a process of its own; they end in assertions."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
COMMANDS = {
    "annotators.py": "--out OUT",
    "ddp.py": "--out OUT",
    "explain_prediction.py": "--out OUT",
    "image_cnn.py": "--out OUT",
    "lightning_cli/main.py": "fit --config examples/lightning_cli/config.yaml "
    "--trainer.callbacks.dirpath OUT",
    "tabular_regression.py": "--out OUT",
    "text_classifier.py": "--out OUT",
}
NOTEBOOK = "walkthrough.ipynb"
BY_CI = "clean_digits.py"
"""README's first command, which ``.ci/run`` runs."""


def test_every_example_is_run_and_listed() -> None:
    found = [*EXAMPLES.rglob("*.py"), *EXAMPLES.rglob("*.ipynb")]
    examples = {str(path.relative_to(EXAMPLES)) for path in found}
    assert examples == {*COMMANDS, NOTEBOOK, BY_CI}
    assert f"python examples/{BY_CI}" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for page in (EXAMPLES / "README.md", ROOT / "docs" / "examples.md"):
        text = page.read_text(encoding="utf-8")
        assert [name for name in examples if name not in text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example(name: str, tmp_path: Path) -> None:
    arguments = COMMANDS[name].replace("OUT", str(tmp_path)).split()
    done = subprocess.run(
        [sys.executable, f"examples/{name}", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONOPTIMIZE": ""},  # its assertions count
        capture_output=True,
        text=True,
        timeout=240,
    )
    print(done.stdout, done.stderr)  # pytest shows them where the test fails
    assert done.returncode == 0
    (report,) = re.findall(r"^Report: (.*)$", done.stdout, re.MULTILINE)
    assert Path(report).is_relative_to(tmp_path)
    assert "<html" in Path(report).read_text(encoding="utf-8")
    assert "lightning_accie/" not in done.stderr.replace(str(tmp_path), "")  # it warns of nothing


def outputs(notebook: nbformat.NotebookNode) -> set[tuple[str, str]]:
    """What each cell shows: the streams it writes to, and the formats of its result."""
    return {
        (cell.id, name)
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for name in (output.get("data") or [output.get("name", output.output_type)])
    }


def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    committed = nbformat.read(EXAMPLES / NOTEBOOK, as_version=4)
    executed = copy.deepcopy(committed)
    NotebookClient(executed, resources={"metadata": {"path": tmp_path}}).execute()
    assert (tmp_path / "out" / "walkthrough" / "report.html").is_file()
    assert outputs(executed) == outputs(committed)  # those on file are of this notebook
    shown = {name for _, name in outputs(executed)}
    assert shown == {"stdout", "text/plain", "text/html", "image/png"}
