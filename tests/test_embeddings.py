"""Stored embeddings: what they answer, in this process and another, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie import (
    AccDataValueEmbedding,
    DataValueEmbedding,
    EmbeddingStore,
    InfluenceEngine,
    InfluenceScores,
    LeaveOneOut,
    QueryError,
    UnsupportedError,
)
from lightning_accie.embeddings_files import JSON_FILE, TENSORS_FILE, EmbeddingsError
from lightning_accie.trajectory.sealed import Seal
from tests.problems import Classifier, adam, classification, fit, record, sgd, smooth_net

DATA, VALIDATION = classification(20), classification(11, seed=3)


def recorded(root: Path, **settings: Any) -> InfluenceEngine:
    module = Classifier(smooth_net(), sgd(lr=0.5))
    return record(root / "run", module, DATA, VALIDATION, **settings)


def again(engine: InfluenceEngine, module: Any = None) -> InfluenceEngine:
    return InfluenceEngine(
        engine.trajectory.directory,
        module or Classifier(smooth_net(), sgd(lr=0.5)),
        DataLoader(DATA, batch_size=6),
        val_dataloaders=DataLoader(VALIDATION, batch_size=7),
        progress=False,
    )


def margin(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return -module.net(x).gather(1, y[:, None]).mean()


# ---------------------------------------------------------------------- what they answer


@pytest.mark.parametrize("estimator", ["dvemb", "acc-dvemb", DataValueEmbedding(6, "empirical")])
def test_they_answer_as_the_estimator_does(tmp_path: Path, estimator: Any) -> None:
    engine = recorded(tmp_path)
    store = engine.embed(tmp_path / "store", estimator)
    assert isinstance(store, EmbeddingStore)
    for query in (None, margin):
        scores = store.scores(query)
        expected = engine.estimate(query, estimator, verify=0)
        assert isinstance(scores, InfluenceScores)
        assert torch.equal(scores.index, expected.index)
        assert torch.equal(scores.visits, expected.visits)
        assert torch.equal(scores.trusted, expected.trusted)
        torch.testing.assert_close(scores.influence, expected.influence, rtol=1e-12, atol=0.0)
        assert scores.estimator == expected.estimator
        for name in ("query", "query_value", "estimator"):
            assert scores.info[name] == expected.info[name]
    assert not torch.equal(store.scores(margin).influence, store.scores().influence)


def test_other_data_for_the_query(tmp_path: Path) -> None:
    engine = recorded(tmp_path)
    store = engine.embed(tmp_path / "store")
    other = DataLoader(classification(9, seed=7), batch_size=4)
    expected = engine.estimate(estimator="dvemb", query_dataloader=other, verify=0)
    found = store.scores(query_dataloader=other).influence
    torch.testing.assert_close(found, expected.influence, rtol=1e-12, atol=0.0)


def test_each_evaluation_sample_by_itself(tmp_path: Path) -> None:
    """A mean query is the mean of its samples' own; each is a query of that sample."""
    store = recorded(tmp_path).embed(tmp_path / "store")
    found = store.explain(list(VALIDATION.tensors))
    each = found.influence
    assert each.shape == found.trusted.shape == (11, 20)
    assert bool(found.exact.isnan().all())
    assert "11 queries on val_loss, 20 training samples by dvemb, 0 replayed" in repr(found)
    torch.testing.assert_close(each.mean(0), store.scores().influence, rtol=1e-9, atol=1e-15)
    x, y = VALIDATION.tensors
    one = DataLoader(TensorDataset(x[4:5], y[4:5]))
    alone = store.scores(query_dataloader=one)
    torch.testing.assert_close(each[4], alone.influence, rtol=1e-12, atol=0.0)
    assert float(found.value[4]) == pytest.approx(alone.info["query_value"], rel=1e-12)
    assert torch.equal(found.trusted[4], alone.trusted)
    three = DataLoader(TensorDataset(x[:3], y[:3]), batch_size=2)
    named = store.explain([x[:3], y[:3]], margin).influence.mean(0)
    torch.testing.assert_close(named, store.scores(margin, three).influence, rtol=1e-9, atol=0.0)


def test_positive_helps(tmp_path: Path) -> None:
    """The sign, against exact replays of the strongest."""
    engine = recorded(tmp_path, max_epochs=2)
    found = engine.embed(tmp_path / "store", DataValueEmbedding(None)).scores().influence
    exact = LeaveOneOut().estimate(engine.replay("val_loss")).influence
    strong = exact.abs() > exact.abs().median()
    assert torch.equal(found[strong] > 0, exact[strong] > 0)


def test_at_an_earlier_step(tmp_path: Path) -> None:
    engine = recorded(tmp_path)
    store = engine.embed(tmp_path / "store", at=3)
    expected = engine.estimate(estimator="dvemb", at=3, verify=0)
    torch.testing.assert_close(store.scores().influence, expected.influence)
    with pytest.raises(EmbeddingsError, match=r"after 3 steps, not after 12.*at=3"):
        engine.embeddings(tmp_path / "store")
    assert len(engine.embeddings(tmp_path / "store", at=3)) == len(store)


def test_batches_that_cannot_be_told_apart(tmp_path: Path) -> None:
    store = recorded(tmp_path).embed(tmp_path / "store")
    with pytest.raises(QueryError, match="cannot be taken apart by sample"):
        store.explain(torch.tensor(3.0))
    with pytest.raises(QueryError, match="has no batch"):
        store.explain(DataLoader(TensorDataset(torch.zeros(0, 4))))


def test_it_needs_no_validation_data(tmp_path: Path) -> None:
    engine = recorded(tmp_path)
    blind = InfluenceEngine(
        engine.trajectory.directory,
        Classifier(smooth_net(), sgd(lr=0.5)),
        DataLoader(DATA, batch_size=6),
        progress=False,
    )
    store = blind.embed(tmp_path / "store")
    with pytest.raises(QueryError, match="no validation data"):
        store.scores()
    found = store.scores(query_dataloader=DataLoader(VALIDATION, batch_size=7))
    torch.testing.assert_close(
        found.influence, engine.embeddings(store.directory).scores().influence
    )


# ---------------------------------------------------------------------- another process


def test_another_process_opens_them(tmp_path: Path) -> None:
    engine = recorded(tmp_path)
    expected = engine.embed(tmp_path / "store", AccDataValueEmbedding(6, seed=4)).scores()
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from tests.test_embeddings import *\n"
        "engine = InfluenceEngine(sys.argv[1], Classifier(smooth_net(), sgd(lr=0.5)),\n"
        "    DataLoader(DATA, batch_size=6), val_dataloaders=DataLoader(VALIDATION, batch_size=7),\n"
        "    progress=False)\n"
        "store = engine.embeddings(sys.argv[2])\n"
        "assert store.settings['estimator'] == 'acc-dvemb' and store.settings['seed'] == 4\n"
        "torch.save(store.scores().influence, sys.argv[3])\n"
    )
    where = [str(engine.trajectory.directory), str(tmp_path / "store"), str(tmp_path / "out.pt")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", program, *where]
    subprocess.run(command, check=True, env=environment)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected.influence)


def test_the_values_are_mapped(tmp_path: Path) -> None:
    store = recorded(tmp_path).embed(tmp_path / "store")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no list of mapped files on this system")
    assert str(store.directory / TENSORS_FILE) in maps.read_text()
    assert store.embeddings.values.dtype == torch.float64  # that of the model


# ---------------------------------------------------------------------- what is refused


def truncated(directory: Path) -> None:
    path = directory / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-100])


def changed(directory: Path) -> None:
    path = directory / TENSORS_FILE
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)


def blank(directory: Path) -> None:
    path = directory / JSON_FILE
    path.write_text(path.read_text() + " ")


def newer(directory: Path) -> None:
    document = json.loads((directory / JSON_FILE).read_text())
    content = {key: document[key] for key in ("bytes", "sha256", "content")}
    (directory / JSON_FILE).write_bytes(Seal("embeddings", 2, EmbeddingsError).seal(content))


def swapped(directory: Path) -> None:
    """With right checksums."""
    document = json.loads((directory / JSON_FILE).read_text())
    content = {key: document[key] for key in ("bytes", "sha256", "content")}
    content["content"]["projection"].reverse()
    content["content"]["projection"].pop()
    (directory / JSON_FILE).write_bytes(Seal("embeddings", 1, EmbeddingsError).seal(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, r"bytes where \d+ were written: it is half-written.*overwrite=True"),
        (changed, "not the file that embeddings.json was written with"),
        (blank, "embeddings.json is damaged: its checksum.*overwrite=True"),
        (lambda d: (d / JSON_FILE).unlink(), "interrupted.*overwrite=True"),
        (lambda d: (d / TENSORS_FILE).unlink(), "embeddings.safetensors cannot be read"),
        (newer, "format version 2.*Upgrade"),
        (swapped, "do not fit their projection"),
    ],
    ids=["truncated", "changed", "blank", "half", "missing", "newer", "swapped"],
)
def test_damage(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    engine = recorded(tmp_path)
    engine.embed(tmp_path / "store")
    damage(tmp_path / "store")
    with pytest.raises(EmbeddingsError, match=words):
        engine.embeddings(tmp_path / "store")
    engine.embed(tmp_path / "store", overwrite=True).scores()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(EmbeddingsError, match=r"is missing. Give the directory"):
        recorded(tmp_path).embeddings(tmp_path / "nowhere")


def test_another_run_is_refused(tmp_path: Path) -> None:
    engine = recorded(tmp_path)
    engine.embed(tmp_path / "store")
    other = record(tmp_path / "other", Classifier(smooth_net(), sgd(lr=0.4)), DATA, VALIDATION)
    with pytest.raises(EmbeddingsError, match=r"another run than .*other"):
        other.embeddings(tmp_path / "store")


def test_another_module_is_refused(tmp_path: Path) -> None:
    recorded(tmp_path).embed(tmp_path / "store")
    wide = Classifier(smooth_net(hidden=6), sgd())
    other = record(tmp_path / "other", wide, DATA, VALIDATION)
    with pytest.raises(EmbeddingsError, match=r"another module.*`net.0.weight` has shape \(5, 4\)"):
        other.embeddings(tmp_path / "store")


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    engine = recorded(tmp_path)
    first = engine.embed(tmp_path / "store", DataValueEmbedding(6)).scores().influence
    with pytest.raises(EmbeddingsError, match=r"already holds embeddings.*overwrite=True"):
        engine.embed(tmp_path / "store", DataValueEmbedding(7))
    assert torch.equal(engine.embeddings(tmp_path / "store").scores().influence, first)
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddingsError, match="is a file"):
        engine.embed(tmp_path / "file")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["tensors", "rename", "json"])
def test_an_interrupted_write_leaves_nothing_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Also where other embeddings were there before: half of the old is no store either."""
    engine = recorded(tmp_path)
    engine.embed(tmp_path / "store", DataValueEmbedding(5))

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise Killed

    def stop(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "tensors":
            patch.setattr("lightning_accie.embeddings_files.save_file", half)
        elif moment == "rename":
            patch.setattr("lightning_accie.trajectory.files._sync", stop)
        else:
            patch.setattr("lightning_accie.embeddings_files.write", stop)
        with pytest.raises(Killed):
            engine.embed(tmp_path / "store", overwrite=True)
    with pytest.raises(EmbeddingsError, match="interrupted"):
        engine.embeddings(tmp_path / "store")
    assert {path.name for path in (tmp_path / "store").iterdir()} == {TENSORS_FILE}
    engine.embed(tmp_path / "store")
    assert len(again(engine).embeddings(tmp_path / "store")) == 20


def test_a_failed_embedding_leaves_the_old_one(tmp_path: Path) -> None:
    engine = recorded(tmp_path)
    engine.embed(tmp_path / "store")
    poor = InfluenceEngine(
        engine.trajectory.directory,
        Classifier(smooth_net(), sgd(lr=0.5)),
        DataLoader(DATA, batch_size=6),
        progress=False,
        memory_budget=1000,
    )
    with pytest.raises(UnsupportedError, match="memory_budget"):
        poor.embed(tmp_path / "store", overwrite=True)
    assert len(engine.embeddings(tmp_path / "store")) == 20


@pytest.mark.parametrize("estimator", ["sgd-ie", "auto", LeaveOneOut()])
def test_other_estimators_embed_nothing(tmp_path: Path, estimator: Any) -> None:
    with pytest.raises(ValueError, match="DataValueEmbedding"):
        recorded(tmp_path).embed(tmp_path / "store", estimator)


def test_adam_is_refused(tmp_path: Path) -> None:
    module = Classifier(smooth_net(), adam())
    engine = record(tmp_path / "run", module, DATA, VALIDATION)
    with pytest.raises(UnsupportedError, match=r"`Adam`.*estimator=\"sgd-ie\""):
        engine.embed(tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_the_callback_refuses_at_fit_start(tmp_path: Path) -> None:
    module = Classifier(smooth_net(), adam())
    train, valid = DataLoader(DATA, batch_size=6), DataLoader(VALIDATION, batch_size=7)
    with pytest.raises(UnsupportedError, match="`Adam`"):
        fit(tmp_path, module, train, valid, callback={"estimator": "acc-dvemb"})


def test_by_name_at_the_end_of_fit(tmp_path: Path) -> None:
    module = Classifier(smooth_net(), sgd(lr=0.5))
    train, valid = DataLoader(DATA, batch_size=6), DataLoader(VALIDATION, batch_size=7)
    callback = {"run": "fit_end", "estimator": "dvemb", "layers": "net.2", "verify": 4}
    scores = fit(tmp_path, module, train, valid, callback=callback).scores
    assert scores is not None
    assert set(scores.estimator) == {"dvemb", "leave-one-out"}
    assert scores.main_agreement is not None


def test_a_module_in_float32(tmp_path: Path) -> None:
    x, y = DATA.tensors
    data = TensorDataset(x.float(), y)
    module = Classifier(smooth_net().float(), sgd(lr=0.5))
    engine = record(
        tmp_path / "run",
        module,
        data,
        TensorDataset(VALIDATION.tensors[0].float(), VALIDATION.tensors[1]),
    )
    store = engine.embed(tmp_path / "store", DataValueEmbedding(None))
    assert store.embeddings.values.dtype == torch.float32
    double = recorded(tmp_path).embed(tmp_path / "double", DataValueEmbedding(None)).scores()
    found = store.scores().influence
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, double.influence, rtol=1e-3, atol=1e-6)
