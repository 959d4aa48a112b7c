"""How data value embeddings are kept on disk.

    embeddings.safetensors   the embeddings, the samples and the projection; mapped into memory
    embeddings.json          the rest, with the checksums of the other file and of itself

Each is written whole or not at all, the JSON last: without it the other counts for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_accie.errors import InfluenceError
from lightning_accie.trajectory.files import read_regular, write, write_with
from lightning_accie.trajectory.sealed import Seal

TENSORS_FILE = "embeddings.safetensors"
JSON_FILE = "embeddings.json"
_ADVICE = "Make them anew with `InfluenceEngine.embed(..., overwrite=True)`."
_BLOCK = 2**22


class EmbeddingsError(InfluenceError):
    """Stored embeddings are missing, damaged, too new, or belong to another run or module."""


_SEAL = Seal("embeddings", 1, EmbeddingsError)


def check_free(directory: Path, *, overwrite: bool) -> None:
    """Look whether embeddings may be written, before they are made.

    Args:
        directory: where to.
        overwrite: whether embeddings that are there may be deleted.

    Raises:
        EmbeddingsError: where something is there that must not be deleted.
    """
    if directory.exists() and not directory.is_dir():
        raise EmbeddingsError(f"{directory} is a file. Choose a directory for the embeddings.")
    if (directory / JSON_FILE).exists() and not overwrite:
        raise EmbeddingsError(
            f"{directory} already holds embeddings. Choose another directory, or pass "
            "overwrite=True to replace them."
        )


def write_embeddings(
    directory: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]
) -> None:
    """Write both files, instead of those that are there.

    Args:
        directory: where to; made if it is not there.
        tensors: dense tensors by name, no two of one storage.
        content: JSON values by name.

    Raises:
        OSError: where the file system refuses.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / JSON_FILE).unlink(missing_ok=True)
    dense = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_with(directory, TENSORS_FILE, lambda path: save_file(dense, path, {"format": "pt"}))
    size, checksum = _measured(directory / TENSORS_FILE)
    text = _SEAL.seal({"bytes": size, "sha256": checksum, "content": content})
    write(directory, JSON_FILE, text)


def read_embeddings(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_embeddings` wrote; the tensors are mapped, and read when they are used.

    Args:
        directory: where it is.

    Returns:
        The tensors and the JSON values.

    Raises:
        EmbeddingsError: where a file is missing, damaged, too new, or not of the other's making.
    """
    path = directory / JSON_FILE
    try:
        document = _SEAL.unseal(path, read_regular(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        half = (directory / TENSORS_FILE).exists()
        raise EmbeddingsError(
            f"{path} is missing: writing the embeddings was interrupted. {_ADVICE}"
            if half
            else f"{path} is missing. Give the directory that InfluenceEngine.embed has written."
        ) from error
    except OSError as error:
        raise EmbeddingsError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise EmbeddingsError(f"{path} is damaged: {error}. {_ADVICE}") from error
    return _mapped(directory / TENSORS_FILE, document), document["content"]


def _mapped(path: Path, document: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        size, checksum = _measured(path)
    except OSError as error:
        raise EmbeddingsError(f"{path} cannot be read: {error.strerror}. {_ADVICE}") from error
    if size != document["bytes"]:
        raise EmbeddingsError(
            f"{path} has {size} bytes where {document['bytes']} were written: it is half-written or "
            f"damaged. {_ADVICE}"
        )
    if checksum != document["sha256"]:
        raise EmbeddingsError(
            f"{path} is not the file that {JSON_FILE} was written with: it is damaged, or one of "
            f"the two was replaced. {_ADVICE}"
        )
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:  # with a right checksum: nothing of `write_embeddings`
        raise EmbeddingsError(f"{path} does not hold embeddings: {error}.") from error


def _measured(path: Path) -> tuple[int, str]:
    """Size and checksum of a file."""
    found, size = sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
            size += len(block)
    return size, found.hexdigest()
