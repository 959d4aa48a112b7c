"""The mutations still fit the package; running them takes long, and is done by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.stress import mutations
from tests.stress.mutations import MUTATIONS, Mutation


def test_every_mutation_stands_in_the_package_once() -> None:
    assert mutations.stale(MUTATIONS) == []
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_the_tests_that_they_name_are_there() -> None:
    for mutation in MUTATIONS:
        for path in mutation.tests.split():
            assert (mutations.ROOT / path).exists(), mutation.name


def test_a_mistake_is_found_and_taken_back(tmp_path: Path) -> None:
    """On a package of one function: one test sees the mistake, another does not."""
    (tmp_path / "lightning_accie").mkdir()
    (tmp_path / "lightning_accie" / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    load = "import runpy\nadd = runpy.run_path('lightning_accie/sums.py')['add']\n"
    (tmp_path / "test_sees.py").write_text(load + "def test_it():\n    assert add(1, 2) == 3\n")
    (tmp_path / "test_blind.py").write_text(load + "def test_it():\n    assert add(0, 0) == 0\n")
    for tests, code in (("test_sees.py", 1), ("test_blind.py", 0), ("test_missing.py", 4)):
        mistake = Mutation("the other sign", "sums.py", "a + b", "a - b", tests)
        with mutations.mutated(tmp_path, mistake):
            assert "a - b" in (tmp_path / "lightning_accie" / "sums.py").read_text()
            found, words = mutations.run_tests(tmp_path, tests)
        assert found == code, words
    assert "a + b" in (tmp_path / "lightning_accie" / "sums.py").read_text()


def test_a_name_that_is_no_longer_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = Mutation("gone", "errors.py", "this text stands nowhere", "", "tests")
    monkeypatch.setattr(mutations, "MUTATIONS", [gone])
    monkeypatch.setattr(sys, "argv", ["mutations"])
    assert mutations.main() == 1
    assert "no longer fit the package: gone" in capsys.readouterr().out
