"""Print the lowest versions that pyproject.toml allows, as a file of constraints for pip."""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def lowest(requirement: str) -> str | None:
    """The lowest version of a requirement; None where it has no lower bound."""
    wanted = Requirement(requirement)
    bounds = [bound.version for bound in wanted.specifier if bound.operator == ">="]
    return f"{wanted.name}=={bounds[0]}" if bounds else None


def main(without: set[str]) -> None:
    """Print a line for each dependency, optional ones too, but for those named."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(each for extra in optional for each in extra)]
    pins = {pin for each in wanted if (pin := lowest(each)) is not None}
    print("\n".join(sorted(pin for pin in pins if pin.split("==")[0] not in without)))


if __name__ == "__main__":
    main(set(sys.argv[1:]))
