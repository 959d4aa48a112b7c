"""``python -m lightning_accie``: the command line."""

from __future__ import annotations

from lightning_accie.cli import main

if __name__ == "__main__":
    main()
