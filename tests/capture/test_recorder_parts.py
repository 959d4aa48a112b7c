"""Small parts of the recorder."""

from __future__ import annotations

import torch

from lightning_accie.capture.recorder import _read


def test_no_step_waits_for_another_devices_loss() -> None:
    """A meta tensor has no value: to ask for it would be an error."""
    loss = torch.ones((), device="meta", requires_grad=True)
    kept = _read(loss)
    assert kept.device.type == "meta"
    assert kept is not loss
    assert not kept.requires_grad
    assert _read(torch.tensor(0.25)) == 0.25
