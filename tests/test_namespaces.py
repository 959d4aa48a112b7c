"""Both of Lightning's namespaces, from Python and from a YAML file."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_accie import AccSgdIE, InfluenceCallback, InfluenceEngine, Trajectory
from tests.cli_task import make
from tests.problems import classification

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Checkpoint directory .* exists and is not empty",
        # LightningCLI, under jsonargparse's later versions:
        "(?s).*:jsonargparse._deprecated.JsonargparseDeprecationWarning",
    )
]
NAMESPACES = ("lightning.pytorch", "pytorch_lightning")


@pytest.fixture(params=NAMESPACES)
def library(request: pytest.FixtureRequest) -> ModuleType:
    return pytest.importorskip(request.param)


def trainer_of(library: ModuleType, root: Path, callbacks: list[Any], **given: Any) -> Any:
    settings = dict(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    return library.Trainer(callbacks=callbacks, **{**settings, **given})


def test_resuming_and_the_best_checkpoint(tmp_path: Path, library: ModuleType) -> None:
    """A fit is resumed behind its best checkpoint, and ranked there."""
    make_module, make_data = make(library)

    def fit(ckpt: Path | None, epochs: int) -> tuple[InfluenceCallback, Any]:
        influence = InfluenceCallback(at="best", verify=4, top_k=2, console=False)
        saver = library.callbacks.ModelCheckpoint(
            tmp_path / "checkpoints", "{step}", monitor="val_loss", save_top_k=-1
        )
        torch.manual_seed(5)
        trainer = trainer_of(library, tmp_path, [influence, saver], max_epochs=epochs)
        # The second half goes up the slope, so that the best comes before its end.
        module = make_module() if ckpt is None else make_module(lr=0.2)
        if ckpt is not None:
            restores_rate(module, -0.2)
        trainer.fit(module, datamodule=make_data(), ckpt_path=ckpt)
        return influence, saver

    def restores_rate(module: Any, rate: float) -> None:
        def on_train_start() -> None:
            for group in module.optimizers().param_groups:
                group.update(lr=abs(rate), maximize=rate < 0)

        module.on_train_start = on_train_start

    first, _ = fit(None, 2)
    assert first.scores is not None
    influence, saver = fit(tmp_path / "checkpoints" / "step=8.ckpt", 4)
    scores = influence.scores
    assert scores is not None
    assert (scores.info["steps"], scores.info["recorded_steps"]) == (8, 16)
    assert scores.info["bit_exact_replay"]
    weights = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    x, y = classification(11, seed=3).tensors
    logits = F.linear(x, weights["net.weight"], weights["net.bias"])
    assert scores.info["query_value"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-12)
    trajectory = Trajectory.open(influence.directory / "trajectory")
    assert [entry["step"] for entry in trajectory.header["resumed"]] == [8]
    engine = InfluenceEngine(trajectory, make_module(), make_data(), progress=False)
    assert engine.estimate(verify=4, top_k=2).info["bit_exact_replay"]


CONFIG = """
seed_everything: 1
model:
  lr: 0.2
data:
  batch_size: 4
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: ROOT
  callbacks:
    - class_path: lightning_accie.InfluenceCallback
      init_args:
        monitor: MONITOR
        estimator:
          class_path: lightning_accie.AccSgdIE
          init_args:
            candidates: 5
            query: linear
        top_k: 3
        verify: 4
        disk_budget: 1 MB
        describe: tests.cli_task.describe
        console: false
"""


@pytest.mark.parametrize("monitor", ["val_loss", "tests.cli_task.loss_of_class_0"])
def test_a_run_from_a_yaml_file(
    tmp_path: Path,
    library: ModuleType,
    monitor: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # `seed_everything:` leaves them behind
        monkeypatch.setenv(name, "0")
    cli = importlib.import_module(f"{library.__name__}.cli")
    text = CONFIG.replace("ROOT", str(tmp_path)).replace("MONITOR", monitor)
    (tmp_path / "config.yaml").write_text(text)
    make_module, make_data = make(library)

    def run(*arguments: str) -> InfluenceCallback:
        done = cli.LightningCLI(
            make_module, make_data, args=["fit", *arguments], save_config_callback=None
        )
        (influence,) = (c for c in done.trainer.callbacks if isinstance(c, InfluenceCallback))
        return influence

    config = str(tmp_path / "config.yaml")
    influence = run("--config", config)
    assert isinstance(influence.estimator, AccSgdIE)
    scores = influence.scores
    assert scores is not None
    assert scores.info["query"] == monitor.rpartition(".")[2]
    assert scores.info["settings"] == AccSgdIE(candidates=5, query="linear").settings()
    assert scores.info["bit_exact_replay"]
    assert len(scores) == 5
    assert influence.directory == tmp_path / "influence"
    with (influence.directory / "scores.csv").open() as file:
        labels = {int(row["index"]): int(row["label"]) for row in csv.DictReader(file)}
    targets = classification(24).tensors[1]
    assert labels == {i: int(targets[i]) for i in labels}

    # What `--print_config` prints is a config of the same run.
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("--config", config, "--print_config")
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    again = run("--config", str(tmp_path / "printed.yaml"))
    assert again.scores is not None
    assert again.scores.index.tolist() == scores.index.tolist()
    torch.testing.assert_close(again.scores.influence, scores.influence, rtol=0, atol=0)
    # And the command line can change what the file says.
    changed = run("--config", config, "--trainer.callbacks.verify", "2")
    assert changed.verify == 2
