"""The module's and the optimiser's state as the tensors of a checkpoint.

| name in the checkpoint | tensor |
|---|---|
| ``params/NAME`` | a parameter that the optimiser updates |
| ``frozen/NAME`` | any other parameter; in the initial checkpoint only |
| ``buffers/NAME`` | a buffer |
| ``slots/NAME/KEY`` | what the optimiser keeps for a parameter |
| ``random/GENERATOR`` | a generator's state, where the run draws |

``meta["counts"]`` holds the number of updates of every parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_accie.replay.update_rules import rule_for
from lightning_accie.trajectory.records import Checkpoint, RandomState


def parameter_groups(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[tuple[str, ...], ...]:
    """Name the parameters of every group of the optimiser.

    Returns:
        One tuple of names per group; parameters that the module does not own are not among them.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return tuple(
        tuple(names[id(p)] for p in group["params"] if id(p) in names)
        for group in optimizer.param_groups
    )


def take(
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Sequence[str]],
    random: RandomState | None,
    *,
    copy: bool = False,
) -> Checkpoint:
    """Take the full state before step ``step``.

    Args:
        step: t.
        module: the user's module.
        optimizer: its optimiser.
        groups: the names of the parameters in every group.
        random: the generators' states to keep along, or None.
        copy: whether the tensors are copies rather than the live ones.

    Returns:
        The checkpoint.
    """
    rule = rule_for(type(optimizer))
    named = dict(module.named_parameters())
    optimised = [name for group in groups for name in group]
    tensors: dict[str, Tensor] = {f"params/{name}": named[name].detach() for name in optimised}
    counts: dict[str, int] = {}
    for name in optimised:
        slots, counts[name] = rule.slots_from(optimizer.state.get(named[name], {}))
        tensors |= {f"slots/{name}/{key}": value.detach() for key, value in slots.items()}
    tensors |= {f"buffers/{name}": b.detach() for name, b in module.named_buffers()}
    if step == 0:
        rest = named.keys() - set(optimised)
        tensors |= {f"frozen/{name}": named[name].detach() for name in sorted(rest)}
    if copy:
        tensors = {name: value.clone() for name, value in tensors.items()}
    tensors |= {f"random/{name}": value for name, value in (random or {}).items()}
    return Checkpoint(step, tensors, {"counts": counts})


def same_names(module: nn.Module, header: Mapping[str, object]) -> list[str]:
    """Compare a module with the parameters that a header records.

    Returns:
        What differs, in words; empty where nothing does.
    """
    recorded = {str(n): (tuple(s), str(d)) for n, s, d in header["parameters"]}  # type: ignore[attr-defined]
    present = {name: (tuple(p.shape), str(p.dtype)) for name, p in module.named_parameters()}
    differences = [f"`{name}` is missing" for name in recorded.keys() - present.keys()]
    differences += [f"`{name}` was not there" for name in present.keys() - recorded.keys()]
    differences += [
        f"`{name}` has shape {present[name][0]} and dtype {present[name][1]}, recorded "
        f"{recorded[name][0]} and {recorded[name][1]}"
        for name in recorded.keys() & present.keys()
        if recorded[name] != present[name]
    ]
    return sorted(differences)
