"""What the loggers wrote, read back from their files."""

from __future__ import annotations

import csv
import inspect
import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image
from pytorch_lightning import loggers as pytorch_lightning_loggers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_accie import InfluenceCallback
from lightning_accie.agreement import measure
from lightning_accie.reports import render_strongest, report_all, report_live
from lightning_accie.reports.metrics import scalars
from lightning_accie.reports.report import Report
from lightning_accie.scores import InfluenceScores
from tests.problems import Classifier, classification, quiet_trainer, sgd, smooth_net
from tests.reports.doubles import CometExperiment, NeptuneHandler, NeptuneRun
from tests.score_examples import INF, NAN, doubles, small_scores

NAMESPACES = [lightning_loggers, pytorch_lightning_loggers]
SCALARS = {
    "influence/query": 0.75,
    "influence/most_harmful": -3.0,
    "influence/most_helpful": 2.0,
    "influence/replayed": 2,
    "influence/untrusted": 1,
    "influence/agreement/count": 2,
    "influence/agreement/kendall_tau": 1,
    "influence/agreement/spearman": 1,
    "influence/agreement/relative_rmse": (0.3125 / 9.25) ** 0.5,
    "influence/agreement/jaccard": 1,
    "influence/agreement/sign_agreement": 1,
}


def report(
    logger: Any,
    scores: InfluenceScores,
    sample: Callable[[int], Any] | None = None,
    *,
    render: Any = None,
    top_k: int = 25,
    step: int = 12,
    **settings: Any,
) -> None:
    rendered = {} if sample is None else render_strongest(scores, top_k, sample, render)
    found = Report(scores, step=step, top_k=top_k, rendered=rendered, **settings)
    report_all([logger], found, console=False)


def picture(index: int) -> Any:
    """A sample whose image is as bright as its index says."""
    return torch.full((1, 8, 8), index, dtype=torch.uint8), index


class Recording(Logger):
    """Keeps what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[Any, int | None]] = []

    name = "recording"
    version = 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics.append((dict(metrics), step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        raise AssertionError


# ---------------------------------------------------------------------- scalars


def test_scalars() -> None:
    assert scalars(small_scores(), "influence") == pytest.approx(SCALARS, abs=1e-5)


def test_unknown_scalars_are_left_out() -> None:
    empty = {"influence": doubles(*[0.0] * 7), "exact": doubles(*[NAN] * 7)}
    found = scalars(small_scores(agreement=(), info={}, **empty), "mine")
    assert found == {"mine/replayed": 0, "mine/untrusted": 1}
    one = measure(doubles(1), doubles(1), estimator="x")
    assert [
        name for name in scalars(small_scores(agreement=(one,)), "a") if "agreement" in name
    ] == ["a/agreement/count"]


def test_any_other_logger_gets_the_scalars() -> None:
    logger = Recording()
    report(logger, small_scores())
    assert logger.metrics == [(scalars(small_scores(), "influence"), 12)]
    report(DummyLogger(), small_scores())


# ---------------------------------------------------------------------- CSVLogger


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda module: module.__name__)
def test_csv_logger(tmp_path: Path, namespace: Any) -> None:
    logger = namespace.CSVLogger(tmp_path, name="run")
    logger.log_metrics({"loss": 0.5}, step=3)
    report(logger, small_scores(columns={"note": ["é\r\n"] * 7}))
    directory = tmp_path / "run" / "version_0"
    with (directory / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "12"]
    assert {name: float(rows[1][name]) for name in SCALARS} == pytest.approx(SCALARS, abs=1e-5)
    with (directory / "scores.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert [row[1] for row in table[1:]] == ["4", "2", "9", "0", "7", "1", "5"]
    assert table[1][-1] == "é\r\n"


# ---------------------------------------------------------------------- TensorBoardLogger


def events(directory: Path) -> EventAccumulator:
    found = EventAccumulator(str(directory), size_guidance={"images": 0, "tensors": 0})
    found.Reload()
    return found


def text(found: EventAccumulator, tag: str) -> str:
    (event,) = found.Tensors(f"influence/{tag}/text_summary")
    assert event.step == 12
    return event.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda module: module.__name__)
def test_tensorboard_logger(tmp_path: Path, namespace: Any) -> None:
    logger = namespace.TensorBoardLogger(tmp_path, name=None, version="run")
    report(logger, small_scores(), top_k=2, sample=picture)
    found = events(tmp_path / "run")
    for tag, value in SCALARS.items():
        (event,) = found.Scalars(tag)
        assert (event.step, event.value) == (12, pytest.approx(value, abs=1e-5))
    (histogram,) = found.Histograms("influence/distribution")
    assert histogram.histogram_value.num == 6  # the seventh is NaN
    assert (histogram.histogram_value.min, histogram.histogram_value.max) == (-3, 2)
    assert text(found, "summary").startswith("Influence of 7 training samples on val\\_loss = 0.75")
    assert "acc-sgd-ie against exact replay of 2 samples" in text(found, "summary")
    assert text(found, "top_harmful").splitlines()[2:6] == [
        "| \\# | sample | influence | exact | visits | label | data |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 1 | 4 | -3.00e+00 | ✓ | 2 | d | \\[1\\]: 4 |",
        "| 2 | 2 | -1.00e+00 |  | 3 | c | \\[1\\]: 2 |",
    ]
    assert "| 1 | 1 | +2.00e+00 | ? | 3 | b |" in text(found, "top_helpful")


def test_tensorboard_images(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    report(logger, small_scores(), top_k=2, sample=picture)
    found = events(tmp_path / "run")
    shown = {}
    for tag in found.Tags()["images"]:
        (event,) = found.Images(tag)
        (tmp_path / "image.png").write_bytes(event.encoded_image_string)
        image = np.asarray(Image.open(tmp_path / "image.png"))
        assert image.shape[:2] == (64, 64)
        assert (image == image[0, 0, 0]).all()
        shown[tag] = int(image[0, 0, 0])
    assert shown == {
        "influence/top_harmful/01 sample 4 -3.00e+00 label=d": 4,
        "influence/top_harmful/02 sample 2 -1.00e+00 label=c": 2,
        "influence/top_helpful/01 sample 1 +2.00e+00 label=b": 1,
        "influence/top_helpful/02 sample 7 +5.00e-01 label=f": 7,
    }


def test_tensorboard_tables_have_texts_and_values(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    report(logger, small_scores(), lambda index: (f"text {index}\nand more", index), top_k=2)
    found = events(tmp_path / "run")
    assert text(found, "top_harmful").splitlines()[2:5] == [
        "| \\# | sample | influence | exact | visits | label | text | data |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 1 | 4 | -3.00e+00 | ✓ | 2 | d | text 4 and more | \\[1\\]: 4 |",
    ]


def test_tensorboard_says_first_what_speaks_against_a_ranking(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    report(logger, small_scores(info={"query": "val_loss", "noise_floor": 5.0}))
    lines = text(events(tmp_path / "run"), "summary").splitlines()
    assert lines[2].startswith("**Do not rely on this ranking: the strongest influence (3e+00)")


def test_tensorboard_without_images_or_figures(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    wild = (NAN, INF, -INF, NAN, NAN, INF, NAN)
    blank = {"influence": doubles(*wild), "exact": doubles(*[NAN] * 7)}
    report(logger, small_scores(**blank), sample=lambda index: (torch.rand(64), index))
    tags = events(tmp_path / "run").Tags()
    assert (tags["images"], tags["histograms"]) == ([], [])
    assert "influence/top_harmful/text_summary" in tags["tensors"]


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
def test_tensorboard_tables_show_texts_as_they_are(tmp_path: Path) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    labels = ["a|b", "*x*", "<b>", "a_b_c", "back\\slash", "two\nlines", "`code` & [l](u)"]
    scores = small_scores(
        influence=doubles(*range(-7, 0)), exact=doubles(*[NAN] * 7), columns={"a|b": labels}
    )
    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    report(logger, scores)
    page = markdown_to_safe_html(text(events(tmp_path / "run"), "top_harmful"))
    shown = [
        "a|b", "*x*", "&lt;b&gt;", "a_b_c", "back\\slash", "two lines", "`code` &amp; [l](u)"
    ]  # fmt: skip
    for label in shown:
        assert f"<td>{label}</td>" in page
    assert "<th>a|b</th>" in page
    assert page.count("<tr>") == 8


# ---------------------------------------------------------------------- WandbLogger


@pytest.fixture
def start_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))

    def start(namespace: Any = lightning_loggers) -> Any:
        return namespace.WandbLogger(save_dir=tmp_path, project="test", offline=True)

    yield start
    wandb.teardown()


def written(logger: Any) -> tuple[dict[str, Any], Path]:
    """The summary as W&B's own process holds it, and the directory of the run's files."""
    run = logger.experiment
    summary = dict(run.summary)
    run.finish()  # which moves the files to where the summary says
    return summary, Path(run.dir)


def table_of(summary: dict[str, Any], files: Path, name: str) -> list[dict[str, Any]]:
    assert summary[name]["_type"] == "table-file"
    table = json.loads((files / summary[name]["path"]).read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda module: module.__name__)
def test_wandb_logger(start_run: Callable[..., Any], namespace: Any) -> None:
    logger = start_run(namespace)
    columns = {"mixed": ["a", 2, None, 0.5, True, "x", "y"], "n": [1, 2, None, 0.5, 5, 6, 7]}
    report(logger, small_scores(columns=columns), top_k=2)
    summary, files = written(logger)
    assert {name: summary[name] for name in SCALARS} == pytest.approx(SCALARS, abs=1e-5)
    assert summary["trainer/global_step"] == 12
    assert summary["influence/distribution"]["_type"] == "histogram"
    assert sum(summary["influence/distribution"]["values"]) == 6
    harmful = table_of(summary, files, "influence/top_harmful")
    assert list(harmful[0]) == [
        "rank", "index", "influence", "visits", "estimator", "exact_influence", "estimate",
        "trusted", "mixed", "n",
    ]  # fmt: skip
    assert [list(row.values()) for row in harmful] == [
        [1, 4, -3.0, 2, "leave-one-out", -3.0, -2.5, True, 0.5, 0.5],
        [2, 2, -1.0, 3, "acc-sgd-ie", None, -1.0, True, None, None],
    ]
    helpful = table_of(summary, files, "influence/top_helpful")
    assert [(row["index"], row["mixed"], row["n"]) for row in helpful] == [(1, "2", 2), (7, "x", 6)]


def test_wandb_images(start_run: Callable[..., Any], tmp_path: Path) -> None:
    logger = start_run()
    report(logger, small_scores(), top_k=2, sample=picture)
    written(logger)
    staged = [
        path for path in (tmp_path / "data" / "artifacts" / "staging").iterdir() if path.is_file()
    ]
    images, shown = {}, {}
    for path in staged:
        if path.read_bytes().startswith(b"\x89PNG"):
            images[sha256(path.read_bytes()).hexdigest()] = np.asarray(Image.open(path))
    for path in staged:
        if path.read_bytes().startswith(b"{"):
            table = json.loads(path.read_text())
            rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
            shown |= {row["index"]: images[row["image"]["sha256"]] for row in rows}
    assert sorted(shown) == [1, 2, 4, 7]
    for index, image in shown.items():
        assert image.shape == (64, 64)
        assert (image == index).all()


def test_wandb_tables_have_texts_and_values(start_run: Callable[..., Any]) -> None:
    logger = start_run()
    report(logger, small_scores(), lambda index: {"review": f"no. {index}", "age": index}, top_k=2)
    summary, files = written(logger)
    rows = table_of(summary, files, "influence/top_harmful")
    assert [(row["index"], row["text"], row["data.age"]) for row in rows] == [
        (4, "no. 4", 4),
        (2, "no. 2", 2),
    ]


def test_wandb_without_images_or_figures(start_run: Callable[..., Any]) -> None:
    logger = start_run()
    wild = (NAN, INF, -INF, NAN, NAN, INF, NAN)
    blank = {"influence": doubles(*wild), "exact": doubles(*[NAN] * 7)}
    report(logger, small_scores(**blank), sample=lambda index: (torch.rand(64), index))
    summary, files = written(logger)
    assert "influence/distribution" not in summary
    assert table_of(summary, files, "influence/top_harmful") == []


# ---------------------------------------------------------------------- MLFlowLogger


# MLflow's `log_table` under pandas 3:
OF_MLFLOW = pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return (
        f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"  # made once: it takes long
    )


@pytest.fixture
def start_mlflow(tmp_path: Path, store: str) -> Iterator[Callable[..., Any]]:
    import mlflow

    def start(namespace: Any = lightning_loggers) -> Any:
        name, files = str(tmp_path), (tmp_path / "artifacts").as_uri()
        mlflow.MlflowClient(store).create_experiment(name, artifact_location=files)
        return namespace.MLFlowLogger(experiment_name=name, tracking_uri=store)

    yield start
    mlflow.set_tracking_uri(None)


def artifacts(logger: Any) -> Path:
    return Path(logger.experiment.download_artifacts(logger.run_id, ""))


@OF_MLFLOW
@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda module: module.__name__)
def test_mlflow_logger(tmp_path: Path, start_mlflow: Callable[..., Any], namespace: Any) -> None:
    logger = start_mlflow(namespace)
    (tmp_path / "scores.csv").write_text("rank")
    scores = small_scores(columns={"mixed": ["a", 2, None, 0.5, True, "x", "y"]})
    report(logger, scores, picture, top_k=2, files=[tmp_path / "scores.csv"])
    metrics = logger.experiment.get_run(logger.run_id).data.metrics
    assert metrics == pytest.approx(SCALARS, abs=1e-5)
    (point,) = logger.experiment.get_metric_history(logger.run_id, "influence/query")
    assert point.step == 12
    files = artifacts(logger) / "influence"
    assert (files / "scores.csv").read_text() == "rank"
    table = json.loads((files / "top_harmful.json").read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["index"], row["influence"], row["data[1]"]) for row in rows] == [
        (4, -3.0, 4),
        (2, -1.0, 2),
    ]
    assert [row["exact_influence"] for row in rows] == [-3.0, None]
    for name, index in (
        ("top_harmful/01-sample-4", 4),
        ("top_harmful/02-sample-2", 2),
        ("top_helpful/01-sample-1", 1),
        ("top_helpful/02-sample-7", 7),
    ):
        image = np.asarray(Image.open(files / f"{name}.png"))
        assert image.shape == (64, 64)
        assert (image == index).all()


def test_mlflow_without_images_or_figures(start_mlflow: Callable[..., Any]) -> None:
    logger = start_mlflow()
    wild = (NAN, INF, -INF, NAN, NAN, INF, NAN)
    blank = {"influence": doubles(*wild), "exact": doubles(*[NAN] * 7)}
    report(logger, small_scores(**blank))
    assert "influence/query" in logger.experiment.get_run(logger.run_id).data.metrics
    assert logger.experiment.list_artifacts(logger.run_id) == []


# ---------------------------------------------------------------------- Comet, Neptune


class CometLogger(Recording):
    experiment = CometExperiment()


class NeptuneLogger(Recording):
    experiment = NeptuneRun()


@pytest.mark.parametrize(
    ("double", "package", "name"),
    [
        (CometExperiment, "comet_ml", "CometExperiment"),
        (NeptuneHandler, "neptune.handler", "Handler"),
        (NeptuneRun, "neptune", "Run"),
    ],
)
def test_the_doubles_have_the_signatures_of_the_packages(
    double: type, package: str, name: str
) -> None:
    real = getattr(pytest.importorskip(package), name)
    methods = [n for n in vars(double) if n == "__getitem__" or not n.startswith("_")]
    assert methods
    for method in methods:
        ours, theirs = (inspect.signature(getattr(c, method)).parameters for c in (double, real))
        assert [(p.name, p.kind) for p in ours.values()] == [
            (p.name, p.kind) for p in theirs.values()
        ]


def test_comet_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = CometExperiment()
    monkeypatch.setattr(CometLogger, "experiment", experiment)
    (tmp_path / "scores.csv").write_text("rank")
    logger = CometLogger()
    for _ in range(2):
        report(logger, small_scores(), picture, top_k=2, files=[tmp_path / "scores.csv"])
    assert logger.metrics[0] == (scalars(small_scores(), "influence"), 12)
    assert experiment.assets == {"influence/scores.csv": b"rank", "influence-1/scores.csv": b"rank"}
    headers, rows = experiment.tables["influence/top_harmful.csv"]
    found = [dict(zip(headers, row, strict=True)) for row in rows]
    assert [(row["index"], row["exact_influence"], row["label"]) for row in found] == [
        (4, -3.0, "d"),
        (2, None, "c"),
    ]
    assert len(experiment.images) == 8
    image = experiment.images["influence/top_helpful/02-sample-7"]
    assert image.shape == (64, 64)
    assert (image == 7).all()
    assert experiment.steps == {12}


def test_neptune_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = NeptuneRun()
    monkeypatch.setattr(NeptuneLogger, "experiment", run)
    (tmp_path / "report.html").write_text("<p>")
    logger = NeptuneLogger()
    for _ in range(2):
        report(logger, small_scores(), picture, top_k=2, files=[tmp_path / "report.html"])
    assert logger.metrics[0] == (scalars(small_scores(), "influence"), 12)
    assert run.files["influence/report"] == run.files["influence-1/report"] == b"<p>"
    rows = list(csv.DictReader(run.files["influence/top_harmful/table"].decode().splitlines()))
    assert [(row["index"], row["exact_influence"], row["label"]) for row in rows] == [
        ("4", "-3.0", "d"),
        ("2", "", "c"),
    ]
    (tmp_path / "image.png").write_bytes(run.files["influence-1/top_helpful/02-sample-7"])
    assert (np.asarray(Image.open(tmp_path / "image.png")) == 7).all()


@pytest.mark.parametrize("name", ["CometLogger", "NeptuneLogger"])
def test_the_live_view_has_a_table_for_each_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    comet, neptune = CometExperiment(), NeptuneRun()
    monkeypatch.setattr(CometLogger, "experiment", comet)
    monkeypatch.setattr(NeptuneLogger, "experiment", neptune)
    logger = {"CometLogger": CometLogger, "NeptuneLogger": NeptuneLogger}[name]()
    scores = small_scores(info={"query": "val_loss", "query_value": 0.5, "window": [1, 6]})
    for step in (6, 12):
        report_live([logger], scores, scores.top_harmful(2), step=step, run=logger)
    assert [sorted(metrics) for metrics, _ in logger.metrics] == [
        ["influence/live/most_harmful", "influence/live/most_helpful", "influence/live/query"]
    ] * 2
    tables = comet.tables or neptune.files
    assert [Path(name).stem for name in tables] == ["step-000006", "step-000012"]
    assert all(name.startswith("influence/live/top_harmful/") for name in tables)


# ---------------------------------------------------------------------- several runs


@OF_MLFLOW
def test_two_callbacks_and_a_second_fit_keep_every_report(
    tmp_path: Path, start_run: Callable[..., Any], start_mlflow: Callable[..., Any]
) -> None:
    loggers = [
        TensorBoardLogger(tmp_path, name=None, version="run"),
        start_run(),
        start_mlflow(),
        CSVLogger(tmp_path, name="csv", version="run"),
    ]
    settings = dict(estimator="sgd-ie", verify=0, top_k=2, console=False)
    values = []
    for seed in (0, 1):
        callbacks = [
            InfluenceCallback(**settings),
            InfluenceCallback(monitor=twice_the_loss, **settings),
        ]
        module = Classifier(smooth_net(), sgd())
        torch.manual_seed(seed)
        loader = DataLoader(classification(12), batch_size=6, shuffle=True)
        valid = DataLoader(classification(7, seed=3), batch_size=7)
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks, logger=loggers)
        trainer.fit(module, loader, valid)
        values += [callback.scores.info["query_value"] for callback in callbacks]
    assert len(set(values)) == 4
    names = ["influence", "influence-1", "influence-2", "influence-3"]
    _, wandb_logger, mlflow_logger, _ = loggers
    found = events(tmp_path / "run")
    for name in names:
        assert len(found.Tensors(f"{name}/summary/text_summary")) == 1
    assert [found.Scalars(f"{name}/query")[0].value for name in names] == pytest.approx(values)
    metrics = mlflow_logger.experiment.get_run(mlflow_logger.run_id).data.metrics
    assert [metrics[f"{name}/query"] for name in names] == pytest.approx(values)
    for name in names:
        kept = {path.name for path in (artifacts(mlflow_logger) / name).iterdir()}
        assert kept == {"scores.csv", "report.html", "top_harmful.json", "top_helpful.json"}
    contents = [(artifacts(mlflow_logger) / name / "scores.csv").read_text() for name in names]
    assert len(set(contents)) == 4
    tables = ["scores.csv", "scores-1.csv", "scores-2.csv", "scores-3.csv"]
    assert [(tmp_path / "csv" / "run" / file).read_text() for file in tables] == contents
    summary, files = written(wandb_logger)
    assert [summary[f"{name}/query"] for name in names] == pytest.approx(values)
    for name in names:
        assert len(table_of(summary, files, f"{name}/top_harmful")) == 2


def twice_the_loss(module: Any, batch: Any) -> Any:
    x, y = batch
    return 2 * module.loss(module.net(x), y)


# ---------------------------------------------------------------------- all of them


class Failing(Recording):
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise OSError("no space left")


def test_a_logger_that_fails_is_named_and_costs_no_other() -> None:
    first, last = Recording(), Recording()
    with pytest.warns(UserWarning, match="report to Failing is incomplete: OSError: no space left"):
        report_all([first, Failing(), last], Report(small_scores(), step=12), console=False)
    assert first.metrics == last.metrics != []


def test_a_dataset_that_fails_costs_only_what_is_shown_of_it(tmp_path: Path) -> None:
    def unreadable(index: int) -> Any:
        raise FileNotFoundError("gone.png")

    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    with pytest.warns(UserWarning, match=r"no pictures or texts: .*FileNotFoundError: gone.png"):
        report(logger, small_scores(), unreadable)
    logger.finalize("success")
    found = events(tmp_path / "run")
    assert set(found.Tags()["scalars"]) >= set(SCALARS)
    assert "| 1 | 4 |" in text(found, "top_harmful")


def test_a_class_of_its_own_is_known_by_its_base(tmp_path: Path) -> None:
    class MyLogger(CSVLogger):
        pass

    report(MyLogger(tmp_path, name=None, version="run"), small_scores())
    assert (tmp_path / "run" / "scores.csv").exists()


def test_each_run_has_names_of_its_own_in_a_logger() -> None:
    logger, other = Recording(), Recording()
    one, two = object(), object()
    found = Report(small_scores(), step=12)
    for run in (one, two, one, None):
        report_all([logger], found, run=run, console=False)
    report_all([other], found, run=two, console=False)
    names = [{name.split("/")[0] for name in metrics} for metrics, _ in logger.metrics]
    assert names == [{"influence"}, {"influence-1"}, {"influence"}, {"influence-2"}]
    assert "influence/query" in other.metrics[0][0]


def test_the_console_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    report_all([], Report(small_scores(), step=12))
    assert "Most harmful" in capsys.readouterr().out
    report_all([], Report(small_scores(), step=12), console=False)
    assert capsys.readouterr().out == ""


def test_only_rank_zero_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = Recording()
    report_all([logger], Report(small_scores(), step=12))
    assert logger.metrics == []
    assert capsys.readouterr().out == ""
