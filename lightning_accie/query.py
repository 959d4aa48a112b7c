"""What influence is measured on: q(θ), a differentiable scalar where lower is better.

The usual query is a value that the module logs in ``validation_step``. Lightning's own validation
runs without gradients, so the step is run again, in evaluation mode, with ``self.log`` replaced by a
catcher; the mean over the batches is weighted as Lightning weights it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lightning_accie.data import first_batches, kept_generators
from lightning_accie.errors import QueryError
from lightning_accie.logged import LogCatcher, Logged, WeightedMean
from lightning_accie.replay import random_state
from lightning_accie.replay.module import TrainingProgram
from lightning_accie.replay.neutral import StandInTrainer, is_metric, neutral_copy
from lightning_accie.replay.operators import Differentiable
from lightning_accie.replay.random_state import Restorable
from lightning_accie.replay.state import Params, tree_bytes
from lightning_accie.replay.walker import Snapshot

_TRIED = 32
"""First batches of every loader that are searched for a monitor, before it is refused."""
QueryFunction = Callable[[Any, Any], Tensor]
"""``query(module, batch) -> scalar``: the user's own query on one batch."""


class _Evaluation(nn.Module):
    """One batch's share of the query, callable through `functional_call`."""

    def __init__(self, module: Any, evaluate: Callable[[Any, _Place], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.evaluate = evaluate

    def forward(self, place: _Place) -> Tensor:
        return self.evaluate(self.module, place)


class ModuleQuery:
    """A query that runs a copy of the user's module over evaluation batches.

    Args:
        program: the replayed run; gives precision, transfer hooks and device.
        module: the user's module; a copy in evaluation mode is run.
        monitor: a name that ``validation_step`` logs, or ``query(module, batch) -> scalar``, whose
            batches are weighted by their size.
        loaders: the evaluation dataloaders.
        limits: batches to take from each, or None for all.
        buffers: the module's buffers at s_T; those that are given with the parameters take their
            place.
        memory_budget: bytes for kept batches and for evaluating many parameter sets at once.
    """

    def __init__(
        self,
        program: TrainingProgram,
        module: Any,
        monitor: str | QueryFunction,
        loaders: Sequence[Iterable[Any]],
        *,
        limits: Sequence[int | float] | None = None,
        buffers: Mapping[str, Tensor],
        memory_budget: int,
    ) -> None:
        self.name = monitor if isinstance(monitor, str) else _function_name(monitor)
        self.monitor = monitor
        self.loaders = list(loaders)
        self.limits = [float("inf")] * len(self.loaders) if limits is None else list(limits)
        self.memory_budget = memory_budget
        self._program = program
        self._catcher = LogCatcher()
        self.vectorize = program.untransformed is None
        """Whether `values` runs parameter sets side by side, or one by one."""
        self._kept: list[_Place] | None = None
        self._may_be_flat = False
        """Whether a gradient of 0 is a finding, as that of a single sample's hinge loss may be."""
        self._rows: int | None = None
        self._random = self._seeded()
        self.module = self._copy(module, buffers)
        self._call = _Evaluation(self.module, self._evaluate)
        named = dict(self.module.named_parameters())
        for parameter in named.values():
            parameter.requires_grad_(False)
        self._parameters = {name: named[name].requires_grad_() for name in program.names}
        self._statistics = {
            name: (owner._buffers, key, owner.get_buffer(key))
            for name in program.statistics.names
            for owner, key in [_owner(self.module, name)]
        }
        """Where the copy keeps the running statistics that come with the parameters, and its own."""

    @property
    def _cuda(self) -> torch.device | None:
        return self._program.device if self._program.device.type == "cuda" else None

    def _seeded(self) -> Restorable:
        """Where the generators stand at every evaluation, in this process as in another."""
        with random_state.isolated(self._cuda):
            random_state.seed(0, cuda=self._cuda)
            return Restorable.of(random_state.capture(cuda=self._cuda, host=True))

    def _copy(self, module: Any, buffers: Mapping[str, Tensor]) -> Any:
        trainer = StandInTrainer(self._program.header["trainer"], self._program.live)
        trainer.training, trainer.validating = False, True
        twin = neutral_copy(module, trainer).to(self._program.device).eval()
        for part in twin.modules():
            if "log_dict" in part.__dict__:
                part.__dict__.update(log=self._catcher.log, log_dict=self._catcher.log_dict)
        with torch.no_grad():
            for name, buffer in twin.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        return twin

    # ------------------------------------------------------------------ the query

    def each(self) -> list[ModuleQuery]:
        """Make a query of every batch.

        Returns:
            Queries on one batch each, which share the module.
        """
        return [self._on(place) for place in list(self._places())]

    def _on(self, place: _Place) -> ModuleQuery:
        one = copy(self)
        one._kept, one._may_be_flat = [place], True
        return one

    def value(self, params: Params) -> float:
        """q(θ).

        Args:
            params: θ, and the running statistics where they are not those of s_T.

        Returns:
            The value; for a logged name, what `Trainer.validate` reports.
        """
        return self._finished(self._mean(params))

    def logged(self, params: Params) -> bool:
        """Tell whether any batch gives a value.

        Args:
            params: θ.

        Returns:
            Whether there is one; a name may be logged for some batches only.
        """
        return self._mean(params).weight != 0.0

    def _mean(self, params: Params) -> WeightedMean:
        self._bind(params)
        mean = WeightedMean()
        with torch.no_grad(), self._same_draws():
            for place in self._places():
                mean.add(float(self._run(place)), self._weight(place))
        return mean

    def gradient(self, params: Params) -> Params:
        """∇q(θ).

        Args:
            params: θ, and the running statistics that are to be differentiated for.

        Returns:
            The gradient by name.

        Raises:
            QueryError: if the value does not depend on the parameters.
        """
        self._bind(params)
        leaves = dict(self._parameters)
        for name, (holder, key, _) in self._statistics.items():
            if name in params:
                holder[key] = leaves[name] = params[name].detach().requires_grad_()
        inputs = list(leaves.values())
        means = [WeightedMean() for _ in inputs]
        with self._same_draws():
            for place in self._places():
                with torch.enable_grad():
                    value = self._run(place)
                weight = self._weight(place)
                if weight == 0.0:
                    continue
                for mean, part in zip(means, self._slopes(value, inputs), strict=True):
                    mean.add(part, weight)
        total = [self._finished(mean) for mean in means]
        if not self._may_be_flat and not any(bool(part.any()) for part in total):
            raise QueryError(
                f"The gradient of `{self.name}` is zero everywhere: a metric such as accuracy has "
                f"no slope. {self._way_out()}"
            )
        return dict(zip(leaves, total, strict=True))

    def _slopes(self, value: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        if not value.requires_grad:
            raise QueryError(
                f"`{self.name}` has no gradient: it was computed under `torch.no_grad()` or detached, "
                "or it is a count, such as accuracy, or it does not depend on the weights. "
                f"{self._way_out()}"
            )
        return torch.autograd.grad(value, inputs, materialize_grads=True)

    def hessian_products(self, params: Params, directions: Params) -> Params:
        """∇²q(θ) times K directions, by differentiating the gradient once more.

        Args:
            params: θ, and the running statistics where they are not those of s_T.
            directions: by parameter name, K of them stacked.

        Returns:
            The products by parameter name, K of them stacked.
        """
        self._bind(params)
        inputs = list(self._parameters.values())
        count = len(next(iter(directions.values())))
        along = [[directions[name][k] for name in self._parameters] for k in range(count)]
        means = [WeightedMean() for _ in inputs]
        with self._same_draws():
            for place in self._places():
                with torch.enable_grad():
                    value = self._run(place)
                weight = self._weight(place)
                if weight == 0.0:
                    continue
                for mean, part in zip(means, _products(value, inputs, along), strict=True):
                    mean.add(part, weight)
        return {
            name: self._finished(mean) for name, mean in zip(self._parameters, means, strict=True)
        }

    def values(self, params: Params, rest: Params | None = None) -> Tensor:
        """Q at K parameter sets.

        Args:
            params: stacked, ``[K, …]`` each.
            rest: parameters that all K have in common, where ``params`` are some only.

        Returns:
            ``[K]`` float64.
        """
        rest = rest or {}
        rows = self._rows_at_once({**rest, **{name: value[0] for name, value in params.items()}})
        size = len(next(iter(params.values())))
        starts = range(0, size, rows)
        chunks = ({n: v[i : i + rows] for n, v in params.items()} for i in starts)
        return torch.cat([self._values(chunk, rest) for chunk in chunks])

    def _values(self, params: Params, rest: Params) -> Tensor:
        if not self.vectorize:
            rows = len(next(iter(params.values())))
            each = ({**rest, **{n: v[k] for n, v in params.items()}} for k in range(rows))
            return torch.tensor([self.value(one) for one in each], dtype=torch.float64)
        for name in self._parameters.keys() & rest.keys():
            self._parameters[name].data = rest[name]
        self._bind_statistics(rest)  # what is not given is as it was at s_T
        prefixed = {f"module.{name}": value for name, value in params.items()}
        mean = WeightedMean()
        with torch.no_grad(), self._same_draws():
            for place in self._places():

                def one(values: Params, place: _Place = place) -> Tensor:
                    return functional_call(self._call, values, (place,))

                with self._context():
                    values = vmap(one, randomness="same")(prefixed)
                mean.add(values.double().cpu(), self._weight(place))
        return self._finished(mean)

    def _rows_at_once(self, params: Params) -> int:
        """How many parameter sets like this one fit, by what its evaluation's graph holds."""
        if self._rows is None:
            self._bind(params)
            held = 0

            def count(tensor: Tensor) -> Tensor:
                nonlocal held
                held += tensor.numel() * tensor.element_size()
                return tensor

            saved = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
            with self._same_draws(), torch.enable_grad(), saved:
                for place in islice(self._places(), 1):
                    self._run(place)
            self._rows = max(1, self.memory_budget // (2 * max(held, 1)))
        return self._rows

    # ------------------------------------------------------------------ one batch

    def _bind(self, params: Params) -> None:
        for name, parameter in self._parameters.items():
            parameter.data = params[name]
        self._bind_statistics(params)

    def _bind_statistics(self, params: Params) -> None:
        for name, (holder, key, own) in self._statistics.items():
            holder[key] = params.get(name, own)

    def _run(self, place: _Place) -> Tensor:
        with self._context():
            return self._call(place)

    def _evaluate(self, module: Any, place: _Place) -> Tensor:
        if not isinstance(self.monitor, str):
            return self._checked(self.monitor(module, place.batch))
        several = len(self.loaders) > 1
        self._catcher.begin(f"/dataloader_idx_{place.loader}" if several else "")
        module.validation_step(*self._arguments(place, several))
        entry = self._entry()
        if entry is None:  # logged for other batches or loaders only: it has no weight here
            return torch.zeros(())
        return self._checked(entry.value)

    def _arguments(self, place: _Place, several: bool) -> list[Any]:
        """What Lightning passes to this ``validation_step``."""
        arguments = [place.batch]
        if is_param_in_hook_signature(self.module.validation_step, "batch_idx", min_args=2):
            arguments.append(place.index)
        if several:
            arguments.append(place.loader)
        return arguments

    def _entry(self) -> Logged | None:
        """What the step just run logged as the monitor."""
        entries = self._catcher.logged.get(self.name, [])
        if len(entries) > 1:
            raise QueryError(
                f"`{self.name}` is logged {len(entries)} times in one `validation_step`. Log each "
                "value under a name of its own."
            )
        return entries[0] if entries else None

    def _checked(self, value: Any) -> Tensor:
        if is_metric(value):
            raise QueryError(
                f"`{self.name}` is a torchmetrics metric, which cannot be "
                f"differentiated. {self._way_out()}"
            )
        if not isinstance(value, Tensor):
            raise QueryError(
                f"`{self.name}` is a {type(value).__name__}, not a tensor: it cannot be "
                f"differentiated. Do not call `.item()` or `float()` on it. {self._way_out()}"
            )
        if value.numel() != 1:
            raise QueryError(
                f"`{self.name}` must be a scalar, but has shape {tuple(value.shape)}. Take its mean."
            )
        return value.reshape(())

    def _way_out(self) -> str:
        """What can be measured instead."""
        if not isinstance(self.monitor, str):
            return "Return the mean loss of the batch, or another smooth function of the weights."
        logged = self._catcher.logged.items()
        losses = [name for name, (entry, *_) in logged if name != self.name and _has_slope(entry)]
        if losses:
            shown = ", ".join(f'`monitor="{name}"`' for name in sorted(losses))
            return f"What `validation_step` logs with a gradient: use {shown}."
        return (
            "Log the loss tensor itself and name it, or pass a callable `monitor(module, batch)`."
        )

    def _weight(self, place: _Place) -> float:
        """The weight of the batch just evaluated, as Lightning gives it."""
        if not isinstance(self.monitor, str):
            return float(extract_batch_size(place.batch))
        entry = self._entry()
        return 0.0 if entry is None else entry.weight(self.name, place.batch)

    def _finished(self, mean: WeightedMean) -> Any:
        if mean.weight != 0.0:
            return mean.result()
        if next(iter(self._places()), None) is None:
            raise QueryError(
                f"There is no validation data to measure `{self.name}` on. Give the Trainer a "
                "validation dataloader, or pass `query_dataloader=`."
            )
        names = ", ".join(f"`{name}`" for name in sorted(self._catcher.seen))
        advice = (
            "Use one of these"
            if names
            else "Log it there with `self.log` (not in `on_validation_epoch_end`)"
        )
        raise QueryError(
            f'`monitor="{self.name}"` is not logged in `validation_step`, which logs '
            f"{names or 'nothing'}. {advice}, or pass a callable `monitor(module, batch)`."
        )

    # ------------------------------------------------------------------ batches

    @contextmanager
    def _same_draws(self) -> Iterator[None]:
        """Let every pass over the data draw the same, and leave all generators as they were found.

        The query must be one function: the same batches, where they are shuffled and limited, and
        the same noise, where ``validation_step`` draws some.
        """
        with random_state.isolated(self._cuda), kept_generators(self.loaders):
            self._random.restore(self._cuda)
            yield

    @contextmanager
    def _context(self) -> Iterator[None]:
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it has neither derivatives nor vmap
        self._random.restore(
            self._cuda
        )  # the same noise, whether the batch was just loaded or kept
        try:
            with self._program.precision(), Differentiable():
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)

    def _places(self) -> Iterable[_Place]:
        """The evaluation batches; kept in memory where they fit."""
        if self._kept is not None:
            return self._kept
        return self._load()

    def _load(self) -> Iterator[_Place]:
        kept: list[_Place] | None = []
        held = 0
        pairs = zip(self.loaders, self.limits, strict=True)
        for number, (loader, limit) in enumerate(pairs):
            stop = None if limit == float("inf") else int(limit)
            for index, batch in enumerate(islice(iter(loader), stop)):
                place = _Place(self._program.transfer(batch), index, number)
                held += tree_bytes(place.batch)
                if kept is not None and held <= self.memory_budget // 4:
                    kept.append(place)
                else:
                    kept = None
                yield place
        self._kept = kept


def check_query(
    program: TrainingProgram,
    module: Any,
    monitor: str | QueryFunction,
    loaders: Sequence[Any],
    snapshot: Snapshot,
) -> None:
    """Measure the query and its gradient on one batch of every loader, or on the first few.

    A name may be logged for some batches only, and not for the first ones.

    Args:
        program: the module's training step.
        module: the user's module.
        monitor: see `ModuleQuery`.
        loaders: the evaluation dataloaders; their workers are not started.
        snapshot: the state to measure at.

    Raises:
        QueryError: if the query will not be measurable at the end of the run.
    """
    params = snapshot.state.visible
    for count in (1, _TRIED):
        with random_state.isolated(), kept_generators(loaders):
            batches = [first_batches(loader, count) for loader in loaders]
        query = ModuleQuery(
            program, module, monitor, batches, buffers=snapshot.buffers, memory_budget=2**26
        )
        if query.logged(params):
            break
    query.value(params)
    query.gradient(params)


@dataclass(frozen=True)
class _Place:
    """One evaluation batch, its index, and the number of its loader."""

    batch: Any
    index: int
    loader: int


def _has_slope(entry: Logged) -> bool:
    value = entry.value
    return isinstance(value, Tensor) and value.requires_grad and value.numel() == 1


def _products(
    value: Tensor, inputs: list[Tensor], along: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """The Hessian of a value times directions, those stacked, by input."""
    grads = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
    curved = [place for place, slope in enumerate(grads) if slope.requires_grad]

    def product(direction: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if not curved:
            return tuple(torch.zeros_like(one) for one in inputs)
        outputs, vectors = [grads[i] for i in curved], [direction[i] for i in curved]
        return torch.autograd.grad(
            outputs, inputs, vectors, retain_graph=True, materialize_grads=True
        )

    return [torch.stack(column) for column in zip(*map(product, along), strict=True)]


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The part of a module that has a buffer, and what it calls it."""
    prefix, _, key = name.rpartition(".")
    return module.get_submodule(prefix), key


def _function_name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
