"""What somebody has who installs the wheel and nothing else; to be run outside the repository."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_ASKED_FOR = (
    "sklearn",
    "pandas",
    "pyarrow",
    "matplotlib",
    "wandb",
    "PIL",
    "tests",
    "benchmarks",
)


def fit(out: Path) -> None:
    """A ranking with what a wheel brings."""
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_accie import InfluenceCallback

    class Line(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(3, 1)

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    torch.manual_seed(0)
    inputs = torch.randn(60, 3)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5]])
    targets[7] += 20.0
    train, val = TensorDataset(inputs[:40], targets[:40]), TensorDataset(inputs[40:], targets[40:])
    influence = InfluenceCallback(monitor="val_loss", dirpath=out, verify=4, top_k=3)
    trainer = Trainer(max_epochs=5, accelerator="cpu", callbacks=[influence], default_root_dir=out)
    trainer.fit(Line(), DataLoader(train, batch_size=10), DataLoader(val, batch_size=20))
    assert influence.scores is not None
    assert int(influence.scores.top_harmful(1).index[0]) == 7


def main() -> None:
    """Fail where something is missing, or there that does not belong."""
    there = [name for name in NOT_ASKED_FOR if find_spec(name) is not None]
    assert not there, f"installed besides the wheel: {there}"
    found = find_spec("lightning_accie")
    assert found is not None
    assert found.origin is not None
    package = Path(found.origin).parent
    assert ROOT not in package.parents, f"the repository's own package at {package}"
    files = {str(file) for file in distribution("lightning_accie").files or ()}
    for name in ("py.typed", "reports/html/assets/vendor/chart.umd.min.js"):
        assert f"lightning_accie/{name}" in files, name
    for name in ("LICENSE", "NOTICE"):
        assert any(file.endswith(f"licenses/{name}") for file in files), name
    outside = {file.split("/")[0] for file in files} - {"lightning_accie", ".."}
    assert all(name.endswith(".dist-info") for name in outside), outside

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "influence"
        fit(out)
        assert (out / "scores.csv").is_file()
        assert (out / "report.html").stat().st_size > 100_000
        program = str(Path(sys.executable).parent / "lightning-accie")
        subprocess.run([program, "show", str(out)], check=True)
        subprocess.run([program, "verify", str(out)], check=True)
    print(f"lightning_accie {version('lightning_accie')} works as a wheel")


if __name__ == "__main__":
    main()
