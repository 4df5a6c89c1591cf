"""Where an agent keeps what it must not lose: a private folder, and files in it that are whole or absent."""

import contextlib
import os
import tempfile
from pathlib import Path

from shoal.runtime.errors import StorageError


def home() -> Path:
    """$SHOAL_HOME, else shoal in $XDG_STATE_HOME, else ~/.local/state/shoal; made for this user alone."""
    own = os.environ.get("SHOAL_HOME")
    state = os.environ.get("XDG_STATE_HOME")
    return private_folder(Path(own) if own else (Path(state) if state else Path.home() / ".local/state") / "shoal")


def private_folder(path: Path) -> Path:
    """`path`, made with all above it where it is missing, and for this user alone. Raises StorageError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise PermissionError("another user may write it")
    except OSError as error:
        raise StorageError(
            f"The folder {path} cannot be used.",
            f"{error}.",
            "Choose another with SHOAL_HOME, or mend its owner and mode.",
        ) from None
    return path


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """`path` holds `data` afterwards, or what it held before, whatever happens. Raises StorageError."""
    scratch = None
    try:
        descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(scratch, path)
        scratch = None
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"{path} could not be written.", f"{error}.", "Free space, or mend the folder.") from None
    finally:
        if scratch is not None:
            with contextlib.suppress(OSError):
                os.unlink(scratch)


def sync_folder(path: Path) -> None:
    """What was renamed or removed in `path` stays so after a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
