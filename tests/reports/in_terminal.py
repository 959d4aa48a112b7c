"""Train under a progress bar and report to the terminal; run in one by `test_terminal`."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader

from lightning_accie import InfluenceCallback
from tests.problems import Classifier, classification, quiet_trainer, sgd, smooth_net

BARS = {"rich": RichProgressBar, "tqdm": TQDMProgressBar}


def main(kind: str, root: Path) -> None:
    trainer = quiet_trainer(
        root,
        callbacks=[InfluenceCallback(top_k=3, verify=4, dirpath=root), BARS[kind]()],
        enable_progress_bar=True,
    )
    train, valid = classification(60), classification(11, seed=3)
    module = Classifier(smooth_net(), sgd())
    trainer.fit(module, DataLoader(train, 6, shuffle=True), DataLoader(valid, 7))
    print("BETWEEN")
    trainer.validate(module, DataLoader(valid, 7), verbose=False)
    print("THE END")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
