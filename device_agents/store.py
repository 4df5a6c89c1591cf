"""Models by digest, in a folder: `DIGEST.shoal` is whole and verified, `DIGEST.partial` is on its way.

The files are the truth. A bundle gets its name in the folder after every digest in it was compared, by a rename, so
what is there can be served; a database beside them holds names and last uses, and is made again where it is lost. Any
number of threads and processes may use one folder. It knows nothing about links or what a graph computes.
"""

import builtins
import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shoal.runtime.bundle import Bundle
from shoal.runtime.errors import BundleError, BusyError, ShoalError, StorageError, UsageError
from shoal.runtime.events import Event, Progress, silent

from .home import private_folder, sync_folder
from .messages import Mode, Model

STALE = 14 * 86400.0  # seconds after which a partial file that nobody continued is removed
_STEP = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TABLE = """CREATE TABLE IF NOT EXISTS models (
    digest TEXT PRIMARY KEY, name TEXT NOT NULL, role TEXT NOT NULL, encoder TEXT NOT NULL, tables TEXT NOT NULL,
    modes TEXT NOT NULL, bytes INTEGER NOT NULL, added_at REAL NOT NULL, used_at REAL NOT NULL)"""


@dataclass(frozen=True)
class Entry:
    """A bundle of the store. `role` is what its graphs are for, "head+tail" for one of both; moments are Unix
    seconds."""

    digest: str
    name: str
    role: str
    encoder: str  # digest of the device's part that a tail was made for, "" for any of its name
    tables: str  # digest of the codec's tables
    modes: tuple[Mode, ...]
    bytes: int
    added_at: float
    used_at: float

    def model(self) -> Model:
        """As it is said to a peer."""
        return Model(self.digest, self.name, self.role, self.encoder, self.tables, self.modes, self.bytes)


class Store:
    """The models in `folder`, of at most `most` bytes together (None: as the disk allows)."""

    def __init__(self, folder: Path, most: int | None = None):
        """Opens the store, made on first use. Raises StorageError."""
        self.folder, self.most = private_folder(Path(folder)), most
        self._index()

    def list(self) -> builtins.list[Entry]:
        """Every model, newest first."""
        with self._database() as database:
            rows = database.execute("SELECT * FROM models ORDER BY added_at DESC, digest").fetchall()
        return [_entry(row) for row in rows if self.path(row[0]).exists()]

    def get(self, digest: str) -> Entry | None:
        """The model of that digest, or None."""
        with self._database() as database:
            row = database.execute("SELECT * FROM models WHERE digest = ?", (digest,)).fetchone()
        return _entry(row) if row and self.path(row[0]).exists() else None

    def find(self, text: str) -> Entry:
        """By digest, by a prefix of one (8 characters or more) or by name, of which the newest counts."""
        entries = self.list()
        found = [entry for entry in entries if entry.digest == text or entry.name == text][:1]
        if not found and len(text) >= 8:
            found = [entry for entry in entries if entry.digest.startswith(text)]
        if len(found) != 1:
            names = ", ".join(sorted({entry.name for entry in entries})[:20]) or "nothing"
            why = "Several have it." if found else f"The store has {names}."
            raise UsageError(f"No model is {text!r:.80}.", why, "Add it: shoal edge add BUNDLE.")
        return found[0]

    def path(self, digest: str) -> Path:
        """Where the bundle is or would be. Raises UsageError for what is no digest: it becomes a file's name."""
        if not _DIGEST.fullmatch(digest):
            raise UsageError(f"{digest!r:.80} is no digest.", "It is not 64 hexadecimal characters.", "Correct it.")
        return self.folder / f"{digest}.shoal"

    def open(self, digest: str) -> Bundle:
        """The open bundle, noted as used. It stays readable when the store removes it. Raises BundleError."""
        bundle = Bundle.open(self.path(digest))
        if bundle.digest != digest:
            bundle.close()
            raise BundleError(f"{self.path(digest)} is another model.", "Its digest differs.", "Add it again.")
        with self._database() as database:
            database.execute("UPDATE models SET used_at = ? WHERE digest = ?", (time.time(), digest))
        return bundle

    def add(self, path: str | os.PathLike, name: str = "", progress: Progress = silent) -> Entry:
        """Copies the bundle at `path` into the store, verified. Under its own name if none is given."""
        with Bundle.open(path) as bundle:
            entry = self.get(bundle.digest)
            if entry is None:
                length = os.fstat(bundle.fileno()).st_size
                with self.partial(bundle.digest, length, name) as partial:
                    partial.restart()
                    while part := os.pread(bundle.fileno(), min(_STEP, length - partial.offset), partial.offset):
                        partial.write(part)
                        progress(Event("copy", partial.offset, length, str(path), "B"))
                    return partial.finish(progress)
        if name and name != entry.name:
            with self._database() as database:
                database.execute("UPDATE models SET name = ? WHERE digest = ?", (_name(name), entry.digest))
        return self.get(entry.digest) or entry

    def partial(self, digest: str, length: int, name: str = "") -> "Partial":
        """The file for a bundle of that digest and length that comes in pieces, with what came before.

        Makes room under the size cap. Raises StorageError where it cannot fit, BusyError while another writes it.
        """
        target = self.path(digest)
        if not 0 < length < 1 << 50 or (self.most is not None and length > self.most):
            why = f"It has {length:,} bytes; the store takes {self.most or 1 << 50:,}."
            raise StorageError("The model does not fit the store.", why, "Allow the store more.")
        if self.most is not None:
            self.collect(self.most - length, keep=(digest,))
        if length > shutil.disk_usage(self.folder).free + _size(target.with_suffix(".partial")):
            why = f"It has {length:,} bytes; the disk has less left."
            raise StorageError("The model does not fit the disk.", why, "Free some space.")
        return Partial(self, digest, length, name)

    def remove(self, digest: str) -> None:
        """Removes a model; whoever has it open may go on."""
        with self._database() as database, _storage(self.folder):
            self.path(digest).unlink(missing_ok=True)
            database.execute("DELETE FROM models WHERE digest = ?", (digest,))

    def collect(self, most: int, keep: Collection[str] = ()) -> builtins.list[Entry]:
        """Removes the models longest unused until the rest has at most `most` bytes, never one of `keep`, and partial
        files that nobody continued for two weeks. Returns the models that went."""
        for path in self.folder.glob("*.partial"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()
        entries, gone = sorted(self.list(), key=lambda entry: entry.used_at), []
        total = sum(entry.bytes for entry in entries)
        for entry in entries:
            if total <= most:
                break
            if entry.digest not in keep:
                self.remove(entry.digest)
                gone.append(entry)
                total -= entry.bytes
        return gone

    def _index(self) -> None:
        """Makes the database agree with the folder: a crash may have come between a rename and its note."""
        try:
            with self._database() as database:
                database.execute("PRAGMA journal_mode = WAL")
                database.execute(_TABLE)
                noted = {row[0] for row in database.execute("SELECT digest FROM models")}
        except StorageError as error:
            if not isinstance(error.__cause__, sqlite3.DatabaseError) or isinstance(
                error.__cause__, sqlite3.OperationalError
            ):
                raise
            for path in self.folder.glob("store.db*"):  # damaged; the files say everything but names given by hand
                path.unlink(missing_ok=True)
            return self._index()
        there = {path.stem for path in self.folder.glob("*.shoal") if _DIGEST.fullmatch(path.stem)}
        for digest in there - noted:
            with contextlib.suppress(ShoalError), Bundle.open(self.path(digest)) as bundle:
                self._note(bundle, "")
        with self._database() as database:
            database.executemany("DELETE FROM models WHERE digest = ?", [(digest,) for digest in noted - there])

    def _note(self, bundle: Bundle, name: str) -> Entry:
        about, now = describe(bundle), time.time()
        size = os.fstat(bundle.fileno()).st_size
        row = (bundle.digest, _name(name) or about["name"], about["role"], about["encoder"], about["tables"],
               json.dumps([vars(mode) for mode in about["modes"]]), size, now, now)  # fmt: skip
        with self._database() as database:
            database.execute("INSERT OR REPLACE INTO models VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        return _entry(row)

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A connection of one transaction: threads and processes take turns."""
        try:
            with contextlib.closing(sqlite3.connect(self.folder / "store.db", timeout=10)) as database, database:
                yield database
        except sqlite3.Error as error:
            fix = "Free some space, or mend the folder."
            raise StorageError(f"The store {self.folder} cannot be used.", f"{error}.", fix) from error


class Partial:
    """A bundle on its way. `offset` is where to continue; a context manager that keeps what came."""

    def __init__(self, store: Store, digest: str, length: int, name: str):
        """For Store.partial."""
        self._store, self.digest, self.length, self._name = store, digest, length, name
        self.path = store.path(digest).with_suffix(".partial")
        with _storage(self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise BusyError("The model is being fetched.", "Somebody else writes it.", "Wait for that.") from None
        self.offset = os.fstat(self._fd).st_size
        if self.offset > length:
            self.restart()

    def restart(self) -> None:
        """Forgets what came."""
        with _storage(self.path):
            os.ftruncate(self._fd, 0)
        self.offset = 0

    def write(self, data: bytes | memoryview) -> None:
        """Appends. Raises BundleError for more than the promised length, StorageError when the disk refuses."""
        if len(data) > self.length - self.offset:
            why = f"More than the {self.length:,} bytes that were announced came."
            raise BundleError(f"Model {self.digest[:12]} is not what was announced.", why, "Fetch it again.")
        view = memoryview(data)
        with _storage(self.path):
            while view:
                count = os.pwrite(self._fd, view, self.offset)
                self.offset, view = self.offset + count, view[count:]

    def finish(self, progress: Progress = silent) -> Entry:
        """Verifies all of it and gives it its name. What is not the promised bundle is removed, with BundleError."""
        if self.offset != self.length:
            why = f"{self.offset:,} of {self.length:,} bytes came."
            raise BundleError(f"Model {self.digest[:12]} is not complete.", why, "Continue from there.")
        try:
            with Bundle.open(self.path) as bundle:
                if bundle.digest != self.digest:
                    why = f"Its digest is {bundle.digest[:12]}."
                    raise BundleError(f"Model {self.digest[:12]} is another one.", why, "Fetch it again.")
                bundle.verify(progress)
                with _storage(self.path):
                    os.fsync(self._fd)
                    os.replace(self.path, self._store.path(self.digest))
                    sync_folder(self.path.parent)
                return self._store._note(bundle, self._name)
        except BundleError:
            self.path.unlink(missing_ok=True)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Lets go of the file, which keeps what came."""
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def describe(bundle: Bundle) -> dict:
    """name, role, encoder, tables and modes of a bundle; what it does not say, or says wrongly, is empty."""
    roles = "+".join(sorted({graph.role for graph in bundle.graphs}))[:80]
    about: dict = {"name": "", "role": roles, "encoder": "", "tables": "",
                   "modes": ()}  # fmt: skip
    for kind in ("card", "modes"):
        section = bundle.find(kind)
        if section is None:
            continue
        try:
            said = json.loads(bundle.bytes(section, most=1 << 20))
            about["name"] = _name(str(said.get("name", ""))) or about["name"]
            if kind == "modes":
                about |= {key: said[key] if _DIGEST.fullmatch(said[key]) else "" for key in ("encoder", "tables")}
                about["modes"] = tuple(_mode(mode) for mode in said["modes"][:256])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
    about["name"] = about["name"] or bundle.digest[:12]
    return about


def _mode(said: dict) -> Mode:
    numbers = [said["id"], said.get("bits", 0), said.get("bytes", 0)]
    figures = [float(said.get(key, math.nan)) for key in ("device_ms", "accuracy")]
    if not all(type(number) is int and 0 <= number < 1 << 31 for number in numbers):
        raise ValueError("not a count")
    return Mode(*numbers, *figures)


def _entry(row: tuple) -> Entry:
    modes = tuple(Mode(**mode) for mode in json.loads(row[5]))
    return Entry(row[0], row[1], row[2], row[3], row[4], modes, row[6], row[7], row[8])


def _name(text: str) -> str:
    """The name as it may reach a terminal."""
    return "".join(character for character in text if character.isprintable())[:80]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = f"The system says: {error.strerror}."
        raise StorageError(f"{path} could not be written.", why, "Free space, or mend the folder.") from None
