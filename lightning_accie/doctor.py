"""What of an environment and of a user's own objects is supported, before anything is trained."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from types import SimpleNamespace
from typing import Any

import torch
from packaging.requirements import Requirement

from lightning_accie.capture.support import check_module, check_trainer, overridden_hooks
from lightning_accie.errors import InfluenceError, UnsupportedError

PACKAGE = "lightning_accie"
_EXTRAS = {
    "report": "pictures in report.html",
    "parquet": "export to Parquet",
    "plot": "InfluenceScores.plot",
    "pandas": "InfluenceScores.to_pandas",
    "tensorboard": "reports to TensorBoard",
    "wandb": "reports to W&B",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        state: ``"ok"``, ``"missing"`` (an optional part), ``"note"`` or ``"refused"``.
        words: what was found, and what to do about it.
    """

    what: str
    state: str
    words: str


def environment() -> list[Finding]:
    """Look at Python, the packages and the devices.

    Returns:
        What was found.
    """
    found = [Finding("Python", "ok", f"{platform.python_version()}, {platform.platform()}")]
    try:
        declared = [Requirement(text) for text in requires(PACKAGE) or ()]
    except PackageNotFoundError:
        note = "runs without being installed, so what it requires is not known"
        found.append(Finding(PACKAGE, "note", note))
        declared = []
    else:
        found.append(Finding(PACKAGE, "ok", version(PACKAGE)))
    found += [_package(one, "refused", "") for one in declared if _applies(one, "")]
    for extra, use in _EXTRAS.items():
        told = f"for {use}; in the extra `{extra}`"
        added = (one for one in declared if _applies(one, extra) and not _applies(one, ""))
        found += [_package(one, "missing", told) for one in added]
    return [*found, _devices()]


def _applies(wanted: Requirement, extra: str) -> bool:
    return wanted.marker is None or wanted.marker.evaluate({"extra": extra})


def _package(wanted: Requirement, otherwise: str, use: str) -> Finding:
    told = f" ({use})" if use else ""
    try:
        present = version(wanted.name)
    except PackageNotFoundError:
        return Finding(wanted.name, otherwise, f"not installed{told}")
    if wanted.specifier.contains(present, prereleases=True):
        return Finding(wanted.name, "ok", f"{present}{told}")
    words = f"{present} does not fit {wanted.specifier}: install another version{told}"
    return Finding(wanted.name, otherwise, words)


def _devices() -> Finding:
    count = torch.get_num_threads()
    threads = f"CPU with {count} thread{'s' if count > 1 else ''}"
    if not torch.cuda.is_available():
        return Finding("devices", "ok", threads)
    names = ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
    words = (
        f"{threads}; {names}. Replay is bit for bit on the CPU; this release was tested there only"
    )
    return Finding("devices", "note", words)


# ---------------------------------------------------------------------- the user's own objects


def load_object(path: str) -> Any:
    """Import what ``module:object`` names; the current directory counts as a place to import from.

    Args:
        path: such as ``train:Classifier`` or ``package.models:make_trainer``.

    Returns:
        The object; a class or function is called without arguments.

    Raises:
        InfluenceError: if it cannot be imported, found or called, with the reason.
    """
    name, separator, attribute = path.partition(":")
    if not (name and separator and attribute):
        raise InfluenceError(
            f"{path!r} is not of the form module:object, such as train:Classifier."
        )
    with _current_directory():
        try:
            found: Any = import_module(name)
        # Any error at all: it is the user's own code that runs, and perhaps a script's.
        except (Exception, SystemExit) as error:
            raise InfluenceError(
                f"The module {name!r} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise InfluenceError(f"{name!r} has no {attribute!r}.")
            found = getattr(found, part)
        made = isinstance(found, torch.nn.Module) or _is_trainer(found)
        if not callable(found) or (made and not isinstance(found, type)):
            return found
        try:
            return found()
        except (Exception, SystemExit) as error:
            raise InfluenceError(
                f"{path} cannot be made without arguments: {type(error).__name__}: {error}. Name a "
                "function that returns the module, or the module itself."
            ) from error


def examine(path: str) -> list[Finding]:
    """Say whether an object would be supported, as far as that can be told without a run.

    Args:
        path: see `load_object`; a LightningModule or a Trainer.

    Returns:
        What was found.

    Raises:
        InfluenceError: if there is no such object, or it is neither of the two.
    """
    found = load_object(path)
    if _is_trainer(found):
        return [_checked("Trainer", lambda: check_trainer(found))]
    if not _is_module(found):
        raise InfluenceError(
            f"{path} is a {type(found).__name__}. Name a LightningModule or a Trainer, or a function "
            "that returns one."
        )
    return list(_module_findings(found))


def _module_findings(module: Any) -> Iterator[Finding]:
    name = type(module).__name__
    trainer = _quiet_trainer(module)
    module.trainer = trainer
    try:
        trainer.strategy.connect(module)
        trainer.strategy.setup_optimizers(trainer)
        optimizers = trainer.strategy.optimizers
    # Any error at all: it is the user's own code that runs, without a `fit` around it.
    except Exception as error:
        said = f": {error}" if str(error) else ""
        words = (
            f"could not be called outside of `fit` ({type(error).__name__}{said}); what it returns "
            "is checked when `fit` starts"
        )
        yield Finding("configure_optimizers", "note", words)
        # One that is supported, of no parameters: the rest can be looked at all the same.
        optimizers = [torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)]
        optimizers[0].param_groups[0]["params"] = []
    else:
        names = ", ".join(type(one).__name__ for one in optimizers)
        yield Finding("configure_optimizers", "ok", names or "no optimiser")
    stand_in = SimpleNamespace(optimizers=optimizers, world_size=1)
    yield _checked(name, lambda: check_module(stand_in, module))
    if hooks := overridden_hooks(module):
        words = f"{', '.join(hooks)}: a replay does not run them; harmless where they only log"
        yield Finding("hooks", "note", words)
    yield Finding(
        "the rest",
        "note",
        "per-sample losses, random numbers and data are checked at the first step of `fit`",
    )


def _checked(what: str, check: Callable[[], None]) -> Finding:
    try:
        check()
    except UnsupportedError as error:
        return Finding(what, "refused", str(error))
    return Finding(what, "ok", "supported, as far as can be told without a run")


def _quiet_trainer(module: Any) -> Any:
    library = import_module(_namespace(module))
    with _without_announcements():  # which devices there are is told below
        return library.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


@contextmanager
def _without_announcements() -> Iterator[None]:
    names = ("lightning.pytorch", "pytorch_lightning")
    loggers = [logging.getLogger(f"{name}.utilities.rank_zero") for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _namespace(found: Any) -> str:
    for base in type(found).__mro__:
        if base.__name__ in {"LightningModule", "Trainer"}:
            if base.__module__.startswith("pytorch_lightning."):
                return "pytorch_lightning"
            if base.__module__.startswith("lightning.pytorch."):
                return "lightning.pytorch"
    return ""


def _is_module(found: Any) -> bool:
    return isinstance(found, torch.nn.Module) and bool(_namespace(found))


def _is_trainer(found: Any) -> bool:
    return not isinstance(found, torch.nn.Module) and bool(_namespace(found))


@contextmanager
def _current_directory() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
