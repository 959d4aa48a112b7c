"""The command line: what it prints, writes and refuses, and its exit codes."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from pyarrow import parquet
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from lightning_accie import InfluenceCallback, InfluenceScores, doctor
from lightning_accie.cli import app
from lightning_accie.comparison import compare
from lightning_accie.errors import InfluenceError
from lightning_accie.reports.html.samples import Shown, write_examples
from tests.problems import Classifier, classification, quiet_trainer, sgd, smooth_net
from tests.score_examples import INF, NAN, doubles, small_scores

ROOT = Path(__file__).parents[1]
COMMANDS = ("show", "export", "report", "compare", "verify", "doctor")
DAMAGED = Shown(picture="data:image/png;base64,AAAA", text="a text of the user's")


def run(*words: object) -> Result:
    return CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200", "TERM": "dumb"})


def done(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: object, code: int = 1) -> str:
    result = run(*words)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)  # no traceback
    return " ".join(result.stderr.split())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_scores().save(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    influence = InfluenceCallback(dirpath=root, console=False, top_k=3, verify=4)
    train, valid = classification(24), classification(11, seed=3)
    quiet_trainer(root, callbacks=[influence]).fit(
        Classifier(smooth_net(), sgd()), DataLoader(train, 6), DataLoader(valid, 7)
    )
    return root


# ---------------------------------------------------------------------- the whole


def test_help_waits_for_nothing_large() -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from lightning_accie.cli import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        "print([name for name in ('torch', 'lightning', 'numpy', 'pandas') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_it_runs_as_a_module() -> None:
    words = [sys.executable, "-m", "lightning_accie", "--version"]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", found.stdout)


def test_every_command_is_helped_with_and_documented() -> None:
    overview = done("--help")
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert {command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)
    for name in COMMANDS:
        assert name in overview
        assert "Usage" in done(name, "--help")
        assert f"## {name}\n" in page
        assert f"lightning-accie {name} " in page


@pytest.mark.parametrize(
    "words", [["nothing"], ["show"], ["show", "x", "-k", "0"], ["compare", "a"], ["export", "x"]]
)
def test_a_wrong_command_line(words: Sequence[str]) -> None:
    assert "Usage" in refused(*words, code=2)


@pytest.mark.parametrize("words", [["show"], ["export", "--csv", "x.csv"], ["report"]])
def test_where_there_are_no_scores(tmp_path: Path, words: Sequence[str]) -> None:
    assert "scores.json is missing" in refused(words[0], tmp_path, *words[1:])
    small_scores().save(tmp_path / "influence")
    assert f"There is one in {tmp_path / 'influence'}." in refused(words[0], tmp_path, *words[1:])


def test_an_error_that_nobody_expected_keeps_its_traceback(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("lightning_accie.reports.console.print_report", broken)
    assert isinstance(run("show", saved).exception, ZeroDivisionError)


def test_a_reader_that_has_seen_enough(saved: Path) -> None:
    words = f"{sys.executable} -m lightning_accie export {saved} --csv - | true"
    found = subprocess.run(words, shell=True, capture_output=True, text=True, check=True)
    assert "Traceback" not in found.stderr
    assert "Exception" not in found.stderr


# ---------------------------------------------------------------------- show, export, report


def test_show(saved: Path) -> None:
    text = done("show", saved, "-k", "1")
    assert "Influence of 7 training samples on val_loss = 0.75" in text
    assert "-3.00e+00" in text
    assert "-1.00e+00" not in text


def test_export_csv(saved: Path, tmp_path: Path) -> None:
    done("export", saved, "--csv", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == (saved / "scores.csv").read_bytes()
    result = run("export", saved, "--csv", "-")
    assert list(csv.reader(result.stdout.splitlines()))[1][:2] == ["1", "4"]


def test_export_json(saved: Path, tmp_path: Path) -> None:
    done("export", saved, "--json", tmp_path / "out.json")
    text = (tmp_path / "out.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found["info"]["query"] == "val_loss"
    assert [one["index"] for one in found["samples"]] == [4, 2, 9, 0, 7, 1, 5]
    assert found["samples"][0]["exact_influence"] == -3.0
    assert found["samples"][1]["exact_influence"] is None
    assert found["samples"][6]["influence"] is None
    assert found["agreement"][0]["estimator"] == "acc-sgd-ie"
    assert found["agreement"][0]["noise_floor"] is None


def test_export_parquet(tmp_path: Path) -> None:
    columns = {
        "mixed": [1, "a", None, True, 2.5, "b", "c"],
        "number": [1, 2.5, None, 3, 4, 5, 6],
        "large": [2**70, *range(6)],
        "path": ["\udcff", *"bcdefg"],
    }
    info = {"query": "val_loss", "noise": INF}
    small_scores(columns=columns, info=info).save(tmp_path)
    done("export", tmp_path, "--parquet", tmp_path / "out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    found = table.to_pydict()
    assert found["index"] == [4, 2, 9, 0, 7, 1, 5]
    assert found["exact_influence"] == [-3.0, None, None, None, 0.5, None, None]
    assert found["mixed"] == ["True", None, "c", "1", "b", "a", "2.5"]
    assert found["number"] == [3.0, None, 6.0, 1.0, 5.0, 2.5, 4.0]
    assert found["large"][3] == str(2**70)
    assert found["path"][3] == "\\udcff"
    metadata = json.loads(table.schema.metadata[b"lightning_accie"])
    assert metadata == {"query": "val_loss", "noise": None}


def test_parquet_without_pyarrow(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "lightning_accie[parquet]" in refused("export", saved, "--parquet", saved / "x")
    assert not (saved / "x").exists()


def test_a_file_that_cannot_be_written(saved: Path) -> None:
    assert "No such file" in refused("export", saved, "--csv", saved / "nowhere" / "x.csv")


def test_report(saved: Path, tmp_path: Path) -> None:
    write_examples(saved, {4: DAMAGED})
    done("report", saved)
    page = (saved / "report.html").read_text(encoding="utf-8")
    assert "a text of the user&#39;s" in page
    elsewhere = tmp_path / "elsewhere.html"
    done("report", saved, "-o", elsewhere, "--no-samples", "-k", "1")
    text = elsewhere.read_text(encoding="utf-8")
    assert "a text of the user" not in text
    assert text.count('id="example-') == 2


def test_report_of_damaged_examples(saved: Path) -> None:
    (saved / "examples.json").write_text("{}")
    assert "examples.json is damaged" in refused("report", saved)
    done("report", saved, "--no-samples")


def test_the_callbacks_own_report_is_made_again_to_the_byte(recorded: Path, tmp_path: Path) -> None:
    before = (recorded / "report.html").read_bytes()
    done("report", recorded, "-k", "3")
    assert (recorded / "report.html").read_bytes() == before


# ---------------------------------------------------------------------- compare


def test_compare_with_itself(saved: Path) -> None:
    text = done("compare", saved, saved)
    assert "6 samples in common; only in the first 1, in the second 1" in text  # one has no figure
    assert "Spearman 1.00, Kendall τ 1.00" in text
    assert "No sample moved." in text
    assert "differ" not in text


def test_compare_two(tmp_path: Path) -> None:
    one = small_scores()
    none = {"exact": doubles(*[NAN] * 7), "agreement": ()}
    reversed_ = small_scores(
        influence=-one.influence, info={**one.info, "query": "[bold]other"}, **none
    )
    one.save(tmp_path / "a")
    reversed_.save(tmp_path / "b")
    text = done("compare", tmp_path / "a", tmp_path / "b", "-k", "2")
    assert "They differ in the query: val_loss and [bold]other" in text
    assert "Spearman -1.00, Kendall τ -1.00" in text
    assert re.search(r"4 +1 +6 +-3\.00e\+00 ✓ +\+3\.00e\+00  ", text)


def test_compare_matches_by_id_where_both_have_one() -> None:
    ids = [*"abcdefg"]
    one = small_scores(columns={"sample_id": ids})
    # The same samples met in another order: their numbers are others.
    other = replace(one, index=one.index.flip(0))
    found = compare(one, other)
    assert (found.count, found.movers) == (6, ())
    assert found.order.spearman == pytest.approx(1, abs=1e-5)
    assert compare(small_scores(), replace(small_scores(), index=other.index)).movers


def test_compare_of_so_many_leaves_kendall_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_accie.comparison.MOST_PAIRS", 5)
    found = compare(small_scores(), small_scores())
    assert found.order.kendall_tau is None
    assert found.estimates is not None
    assert found.estimates.kendall_tau is None


def partly_replayed(*exact: int, **changes: Any) -> InfluenceScores:
    """Five samples, estimated at 1 to 5; by exact replay each is 10 times that, and negative."""
    estimate = torch.arange(1, 6).double()
    replayed = torch.isin(torch.arange(5), torch.tensor(exact))
    fields: dict[str, Any] = {
        "index": torch.arange(5),
        "influence": torch.where(replayed, -10 * estimate, estimate),
        "estimate": estimate,
        "visits": torch.ones(5, dtype=torch.int64),
        "exact": torch.where(replayed, -10 * estimate, NAN),
        "estimator": tuple("leave-one-out" if one else "sgd-ie" for one in replayed.tolist()),
        "trusted": torch.ones(5, dtype=torch.bool),
        "info": {"query": "val_loss"},
    }
    return InfluenceScores(**(fields | changes))


def test_compare_tells_exact_figures_from_estimates(tmp_path: Path) -> None:
    # The same estimates: whatever moves does so because one of the two has replayed it.
    partly_replayed(0, 4).save(tmp_path / "a")
    partly_replayed(0).save(tmp_path / "b")
    text = done("compare", tmp_path / "a", tmp_path / "b")
    # Ranks: 2 3 4 5 1 and 1 2 3 4 5. Of 10 pairs the 4 with the last sample are the other way round.
    assert "Spearman 0.00, Kendall τ 0.20" in text
    assert "Estimates with estimates alone: Spearman 1.00, Kendall τ 1.00" in text
    assert "They differ in samples replayed exactly: 2 and 1 (1 in both)" in text
    assert re.search(r"4 +1 +5 +-5\.00e\+01 ✓ +\+5\.00e\+00  ", text)
    assert re.search(r"0 +2 +1 +-1\.00e\+01 ✓ +-1\.00e\+01 ✓", text)
    assert "exact in one ranking alone may have moved by that" in text


def test_compare_of_estimates_alone_says_nothing_of_exact_figures(tmp_path: Path) -> None:
    partly_replayed().save(tmp_path / "a")
    partly_replayed(influence=doubles(5, 4, 3, 2, 1), estimate=doubles(5, 4, 3, 2, 1)).save(
        tmp_path / "b"
    )
    text = done("compare", tmp_path / "a", tmp_path / "b")
    assert "Spearman -1.00" in text
    for absent in ("Estimates with", "exact", "✓"):
        assert absent not in text


@pytest.mark.parametrize(
    "other",
    [
        partly_replayed(0, 1, 2, 3, 4, info={"estimator": "leave-one-out"}),
        partly_replayed(2, estimate=doubles(1, 2, NAN, 4, 5)),
    ],
    ids=["all are exact", "an estimate is missing"],
)
def test_compare_where_not_all_have_estimates(other: InfluenceScores) -> None:
    assert compare(partly_replayed(0), other).estimates is None
    assert compare(other, partly_replayed(0)).estimates is None


def test_compare_of_other_data(tmp_path: Path) -> None:
    small_scores().save(tmp_path / "a")
    replace(small_scores(), index=small_scores().index + 100).save(tmp_path / "b")
    assert "no sample in common" in refused("compare", tmp_path / "a", tmp_path / "b")


# ---------------------------------------------------------------------- verify


@pytest.mark.parametrize("folder", ["", "trajectory"])
def test_verify(recorded: Path, folder: str) -> None:
    text = done("verify", recorded / folder)
    assert "12 steps, " in text
    assert "finished. Every file is as it was written." in text
    assert "scores of 24 samples" in text


def test_verify_finds_damage(recorded: Path) -> None:
    (path,) = (recorded / "trajectory").glob("steps-*")
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert f"{path.name} is damaged" in refused("verify", recorded)
    finally:
        path.write_bytes(content)
    scores = recorded / "scores.safetensors"
    content = scores.read_bytes()
    try:
        scores.write_bytes(content + b"x")
        assert "scores.safetensors" in refused("verify", recorded)
    finally:
        scores.write_bytes(content)


def test_verify_of_nothing(tmp_path: Path) -> None:
    assert "holds no trajectory" in refused("verify", tmp_path)


# ---------------------------------------------------------------------- doctor


TASKS = """
import torch
from lightning.pytorch import LightningModule, Trainer
from pytorch_lightning import LightningModule as Other


class Good(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(Good):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Lbfgs(Good):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Later(Good):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1 / self.trainer.estimated_stepping_batches)


class Hooked(Good):
    def on_after_backward(self):
        pass


class OtherNamespace(Other):
    training_step, configure_optimizers = Good.training_step, Good.configure_optimizers

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)


class Needs(Good):
    def __init__(self, width):
        super().__init__()


plain = torch.nn.Linear(2, 1)
number = 3


def trainer(**settings):
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **settings)


def sixteen():
    return trainer(precision="bf16-true")
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_tasks.py").write_text(TASKS)
    (tmp_path / "own_script.py").write_text("raise SystemExit('no arguments')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_tasks", raising=False)
    monkeypatch.delitem(sys.modules, "own_script", raising=False)
    return "own_tasks:"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Good", "SGD"),
        ("OtherNamespace", "SGD"),
        ("Later", "could not be called outside of `fit` (AssertionError); what"),
        ("Hooked", "on_after_backward: a replay does not run them"),
        ("trainer", "supported, as far as"),
    ],
)
def test_doctor_of_what_is_supported(tasks: str, name: str, words: str) -> None:
    text = " ".join(done("doctor", tasks + name).split())
    assert words in text
    assert "refused" not in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Manual", "uses manual optimisation"),
        ("Lbfgs", "LBFGS"),
        ("sixteen", "cannot be replayed"),
    ],
)
def test_doctor_of_what_is_not(tasks: str, name: str, words: str) -> None:
    result = run("doctor", tasks + name)
    assert result.exit_code == 1
    assert "refused" in result.output
    assert words in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("own_tasks", "not of the form module:object"),
        ("own_tasks:Nothing", "has no 'Nothing'"),
        ("own_tasks:Needs", "cannot be made without arguments"),
        ("own_tasks:plain", "is a Linear"),
        ("own_tasks:number", "is a int"),
        ("own_script:x", "cannot be imported: SystemExit"),
        ("nowhere_at_all:x", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_doctor_of_what_is_nothing(tasks: str, path: str, words: str) -> None:
    assert words in refused("doctor", path)


def test_doctor_leaves_the_path_as_it_was(tasks: str) -> None:
    before = list(sys.path)
    with pytest.raises(InfluenceError):
        doctor.load_object("own_tasks:Nothing")
    assert sys.path == before


def test_doctor_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=2", "lightning>=99", "nowhere-at-all", "wandb>=0.1; extra == 'wandb'"]
    wanted += ["nothing-of-it>=1; extra == 'parquet'", "pytest; extra == 'test'"]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    found = {finding.what: finding for finding in doctor.environment()}
    assert found["torch"].state == "ok"
    assert found["torch"].words == version("torch")
    assert (found["lightning"].state, found["nowhere-at-all"].state) == ("refused", "refused")
    assert "does not fit >=99" in found["lightning"].words
    assert found["nothing-of-it"].state == "missing"
    assert "export to Parquet; in the extra `parquet`" in found["nothing-of-it"].words
    assert found["wandb"].state == "ok"
    assert "pytest" not in found
    assert run("doctor").exit_code == 1
