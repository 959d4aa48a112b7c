"""The pictures of docs/concepts.md, from real runs: influence, its sign, and what a rank means.

    python benchmarks/concepts.py [--publish]

Two moons, 80 training points with 5 flipped labels, show one example's influence along the run, and the
influence of all of them in the plane. Digits, 200 training samples with 20 flipped labels, show
estimates against exact replay, and what another seed does to the exact ranking.
"""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from common import (
    ROOT,
    Classifier,
    arguments,
    digits,
    loaders,
    machine,
    mlp,
    publish,
    quieten,
    trainer,
)
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from lightning_accie import InfluenceCallback, InfluenceEngine, LeaveOneOut
from lightning_accie.agreement import kendall_tau

HARMS, HELPS, PLAIN = "#d9713c", "#3f8fd2", "#8c959f"
INK, GRID = "#010203", "#040506"  # stand-ins: the SVG's style sheet says what they are
STYLE = """
svg { --ink: #24292f; --grid: #d0d7de }
@media (prefers-color-scheme: dark) { svg { --ink: #c9d1d9; --grid: #484f58 } }
"""
EPOCHS, EVERY = 60, 2  # of the moons, and how many epochs apart the curves are drawn
ENDS = 20  # samples at each end of the digits' ranking


@dataclass(frozen=True)
class Moons:
    """One run on two moons, and what leaving each point out does to it."""

    points: Tensor
    labels: Tensor
    flipped: Tensor
    influence: Tensor
    chosen: dict[str, int]
    """The most harmful and the most helpful point."""
    steps: list[int]
    loss: list[float]
    along: dict[str, list[float]]
    """The chosen points' influence on the validation loss after ``steps``."""


def two_moons(n: int, flips: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.arange(n) % 2
    angle = torch.pi * torch.rand(n, generator=generator)
    across = torch.where(labels == 0, angle.cos(), 1 - angle.cos())
    up = torch.where(labels == 0, angle.sin(), 0.5 - angle.sin())
    noise = 0.2 * torch.randn(n, 2, generator=generator)
    flipped = torch.zeros(n, dtype=torch.bool)
    flipped[torch.randperm(n, generator=generator)[:flips]] = True
    return (
        (torch.stack([across, up], 1) + noise).double(),
        torch.where(flipped, 1 - labels, labels),
        flipped,
    )


def recorded(module: Classifier, data: Any, root: Path, epochs: int) -> InfluenceEngine:
    train, val = data
    influence = InfluenceCallback(run="manual", dirpath=root)
    trainer(root, max_epochs=epochs, callbacks=[influence]).fit(module, train, val)
    return InfluenceEngine(root / "trajectory", module, train, val_dataloaders=val, progress=False)


def moons() -> Moons:
    generator = torch.Generator().manual_seed(1)
    train, val = two_moons(80, 5, generator), two_moons(200, 0, generator)
    x, y = (torch.cat(pair) for pair in zip(train[:2], val[:2], strict=True))
    seed_everything(0, verbose=False)
    module = Classifier(mlp(2, 16, 2, activation=nn.Tanh).double(), 0.1)
    with tempfile.TemporaryDirectory() as root:
        engine = recorded(module, loaders(x, y, 80, 200, 10), Path(root), EPOCHS)
        scores = engine.estimate("val_loss", LeaveOneOut(), verify=0)
        influence = scores.influence[scores.index.argsort()]
        chosen = {"harms": int(influence.argmin()), "helps": int(influence.argmax())}
        steps = list(range(8 * EVERY, 8 * EPOCHS + 1, 8 * EVERY))
        loss: list[float] = []
        along: dict[str, list[float]] = {name: [] for name in chosen}
        for at in steps:
            found = engine.estimate("val_loss", LeaveOneOut(list(chosen.values())), at=at, verify=0)
            loss.append(found.info["query_value"])
            for name, number in chosen.items():
                along[name].append(found.influence[found.index == number].item())
    return Moons(train[0], train[1], train[2], influence, chosen, steps, loss, along)


def digit_runs(activation: type[nn.Module], seeds: int) -> list[tuple[Tensor, Tensor]]:
    """SGD-IE and exact influence of the same 200 digits in runs of several seeds."""
    x, y = digits(torch.float64, seed=0)
    generator = torch.Generator().manual_seed(0)
    flipped = torch.randperm(200, generator=generator)[:ENDS]
    y[flipped] = (y[flipped] + torch.randint(1, 10, (ENDS,), generator=generator)) % 10
    runs = []
    for seed in range(seeds):
        seed_everything(seed, verbose=False)
        module = Classifier(mlp(64, 32, 10, activation=activation).double(), 0.2)
        with tempfile.TemporaryDirectory() as root:
            engine = recorded(module, loaders(x, y, 200, 400, 20), Path(root), 20)
            pair = []
            for estimator in ("sgd-ie", LeaveOneOut()):
                scores = engine.estimate("val_loss", estimator, verify=0)
                pair.append(scores.influence[scores.index.argsort()])
        runs.append((pair[0], pair[1]))
    return runs


def parts(influence: Tensor) -> dict[str, set[int]]:
    """The samples at the two ends of a ranking, and as many in its middle."""
    order = influence.argsort().tolist()
    middle = (len(order) - ENDS) // 2
    return {
        "most harmful": set(order[:ENDS]),
        "middle": set(order[middle : middle + ENDS]),
        "most helpful": set(order[-ENDS:]),
    }


def overlap(rankings: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Which share of each part two rankings have in common, in the mean of the pairs."""
    shares: dict[str, list[float]] = {}
    for one, other in rankings:
        theirs = parts(other)
        for name, mine in parts(one).items():
            shares.setdefault(name, []).append(len(mine & theirs[name]) / ENDS)
    return {name: sum(found) / len(found) for name, found in shares.items()}


def comparisons(runs: list[tuple[Tensor, Tensor]]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    exact = [pair[1] for pair in runs]
    return {
        "SGD-IE and exact replay, same run": runs,
        "exact replay, two seeds": list(combinations(exact, 2)),
    }


def table(all_runs: dict[str, list[tuple[Tensor, Tensor]]]) -> str:
    lines = ["| | Kendall τ | most harmful | middle | most helpful |", "|---|---|---|---|---|"]
    for network, runs in all_runs.items():
        for name, rankings in comparisons(runs).items():
            tau = sum(kendall_tau(one, other) for one, other in rankings) / len(rankings)
            shares = " | ".join(f"{share:.0%}" for share in overlap(rankings).values())
            lines.append(f"| {network}: {name} | {tau:.2f} | {shares} |")
    seeds = len(next(iter(all_runs.values())))
    lines.append(
        f"\nWhich share of {ENDS} of 200 digits two rankings have in common at each end and in the "
        f"middle, means over {seeds} seeds and their pairs; {ENDS / 200:.0%} would be chance. {ENDS} "
        f"labels are flipped; 64-32-10, 20 epochs, batch 20. {machine()}."
    )
    return "\n".join(lines)


# ------------------------------------------------------------------ the pictures


def draw_influence(run: Moons, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=[1.15, 1])
    harmful = run.chosen["harms"]
    without = [loss + change for loss, change in zip(run.loss, run.along["harms"], strict=True)]
    left.plot(run.steps, run.loss, color=PLAIN, label="the recorded run")
    left.plot(run.steps, without, color=HARMS, label=f"the same run without example {harmful}")
    end = run.steps[-1]
    left.vlines(end + 8, without[-1], run.loss[-1], color=INK, linewidth=1.2)
    left.annotate(
        f"its influence:\n−{abs(run.along['harms'][-1]):.3f}",
        (end + 8, (run.loss[-1] + without[-1]) / 2),
        (6, 0),
        textcoords="offset points",
        va="center",
    )
    left.set_xlim(0, end * 1.28)
    left.set_xticks(range(0, end + 1, 100))
    left.set_ylabel("validation loss")
    left.legend(frameon=False, loc="upper right")
    left.set_title("Two runs that differ in one example")
    for name, color in (("helps", HELPS), ("harms", HARMS)):
        right.plot(run.steps, run.along[name], color=color)
        right.annotate(
            f"example {run.chosen[name]} {name}",
            (end, 0.4 * run.along[name][-1]),
            ha="right",
            va="center",
            color=color,
        )
    right.axhline(0, color=INK, linewidth=0.8)
    right.set_ylabel("loss without it − loss with it")
    right.set_title("The difference is the influence")
    for axis in (left, right):
        axis.set_xlabel("training step")
    save(figure, path)


def draw_sign(run: Moons, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.6, 4.2))
    sizes = 16 + 500 * run.influence.abs() / run.influence.abs().max()
    colors = [HARMS if value < 0 else HELPS for value in run.influence]
    for label, marker in ((0, "o"), (1, "s")):
        rows = (run.labels == label).nonzero()[:, 0].tolist()
        axis.scatter(
            *run.points[rows].T,
            s=sizes[rows],
            c=[colors[row] for row in rows],
            marker=marker,
            alpha=0.75,
            linewidths=0,
        )
    axis.scatter(
        *run.points[run.flipped].T,
        s=sizes[run.flipped] + 130,
        facecolors="none",
        edgecolors=INK,
        linewidths=1.1,
    )
    entries = [
        ("negative: harms", {"color": HARMS, "marker": "o"}),
        ("positive: helps", {"color": HELPS, "marker": "o"}),
        ("label flipped", {"color": "none", "marker": "o", "markeredgecolor": INK}),
        ("first class", {"color": PLAIN, "marker": "o"}),
        ("second class", {"color": PLAIN, "marker": "s"}),
    ]
    handles = [axis.plot([], [], linestyle="", label=name, **how)[0] for name, how in entries]
    axis.legend(handles=handles, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_title("80 training points; area: size of the influence")
    axis.axis("off")
    axis.margins(0.08)
    save(figure, path)


def draw_rank(all_runs: dict[str, list[tuple[Tensor, Tensor]]], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.9))
    runs = all_runs["ReLU"]
    places = [
        [influence.argsort().argsort() + 1 for influence in pair]
        for pair in (runs[0], (runs[0][1], runs[1][1]))
    ]
    names = [
        ("The estimate against the truth", "rank by exact replay", "rank by SGD-IE"),
        ("The truth of another seed", "exact rank, seed 0", "exact rank, seed 1"),
    ]
    pairs = [places[0][::-1], places[1]]
    for axis, (title, across, up), (one, other) in zip(axes, names, pairs, strict=False):
        colors = [
            HARMS if place <= ENDS else HELPS if place > len(one) - ENDS else PLAIN for place in one
        ]
        axis.scatter(one, other, s=13, c=colors, linewidths=0)
        axis.set(title=title, xlabel=across, ylabel=up, aspect="equal")
        axis.set_xticks([1, 100, 200])
        axis.set_yticks([1, 100, 200])
    last = axes[2]
    width = 0.38
    for number, (network, color) in enumerate((("ReLU", PLAIN), ("tanh", HELPS))):
        shares = overlap(comparisons(all_runs[network])["exact replay, two seeds"])
        spots = [place + (number - 0.5) * width for place in range(len(shares))]
        bars = last.bar(spots, shares.values(), width * 0.92, color=color, label=network)
        last.bar_label(bars, [f"{share:.0%}" for share in shares.values()], fontsize=9)
        last.set_xticks(range(len(shares)), list(shares))
    last.axhline(ENDS / 200, color=INK, linewidth=1, linestyle=":", label="chance")
    last.set_ylim(0, 1.3)
    last.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
    last.set_title(f"{ENDS} of 200: shared by two seeds")
    last.legend(frameon=False, ncols=3, loc="upper center")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write an SVG that takes its ink from the reader's colour scheme."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue().replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    svg = svg.replace('<style type="text/css">', f'<style type="text/css">{STYLE}', 1)
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")
    print(f"wrote {path}")


def main() -> None:
    options = arguments(__doc__)
    quieten()
    torch.set_num_threads(1)
    matplotlib.use("svg")
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plt.rcParams.update(dict.fromkeys(ink, INK))
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "concepts"})
    plt.rcParams.update({"font.family": "sans-serif", "font.size": 10, "axes.titlesize": 11})
    all_runs = {
        name: digit_runs(activation, options.repeats)
        for name, activation in (("ReLU", nn.ReLU), ("tanh", nn.Tanh))
    }
    text = table(all_runs)
    print(text)
    folder = ROOT / "docs" / "figures" if options.publish else Path(tempfile.mkdtemp())
    run = moons()
    draw_influence(run, folder / "influence.svg")
    draw_sign(run, folder / "sign.svg")
    draw_rank(all_runs, folder / "rank.svg")
    if options.publish:
        publish("seeds", text)


if __name__ == "__main__":
    main()
