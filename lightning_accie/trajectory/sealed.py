"""JSON documents that say what they are, in which version, and whether they are as they were written.

The JSON is Python's dialect, which has ``NaN`` and ``Infinity``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning_accie.errors import InfluenceError
from lightning_accie.trajectory.manifest import package_version


@dataclass(frozen=True)
class Seal:
    """A kind of document.

    Attributes:
        what: what it holds, in a word such as ``"scores"``.
        version: of its format, the highest that is read.
        error: what is raised for a version that is too new.
    """

    what: str
    version: int
    error: type[InfluenceError]

    @property
    def format(self) -> str:
        """The name of the format."""
        return f"lightning_accie {self.what}"

    def seal(self, entries: Mapping[str, Any]) -> bytes:
        """Write a document.

        Args:
            entries: JSON values by name.

        Returns:
            The content of the file.
        """
        return _sealed(
            {
                "format": self.format,
                "version": self.version,
                "writer": package_version(),
                **entries,
            }
        )

    def unseal(self, path: Path, content: bytes) -> dict[str, Any]:
        """Read what `seal` wrote.

        Args:
            path: the file, for messages.
            content: its content.

        Returns:
            The document.

        Raises:
            ValueError: if it is damaged, or something else; with the reason.
            InfluenceError: the error of this kind, if it is too new.
        """
        document = json.loads(content)
        if not isinstance(document, dict) or document.get("format") != self.format:
            raise ValueError(f"it does not hold {self.what}")
        written = document.get("version")
        if isinstance(written, int) and written > self.version:
            raise self.error(
                f"{path} has format version {written}, and this version of lightning_accie "
                f"({package_version()}) reads up to {self.version}. Upgrade lightning_accie."
            )
        document.pop("checksum", None)
        # Compared as a whole: a changed blank is a changed byte too.
        if written != self.version or content != _sealed(document):
            raise ValueError("its checksum is not the recorded one")
        return document


def _sealed(document: dict[str, Any]) -> bytes:
    checksum = sha256(_text(document)).hexdigest()
    return _text({**document, "checksum": checksum})


def _text(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode("ascii")
