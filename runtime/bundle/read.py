"""A bundle opened for reading: one file descriptor, checked, then mapped.

`Bundle.open` reads the header and the index (at most 16 MiB) and trusts nothing in them before `verify` has passed.
Sections are handed out as views of the mapping, so weights cost no memory of their own. It knows nothing about what
is inside a section.

A file that somebody cuts short while it is mapped kills the process that touches the lost pages (SIGBUS, as for every
mapped file); shoal's own writer never changes a bundle in place, and `check_unchanged` tells when another program did.
"""

import builtins
import errno
import hashlib
import io
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import BundleError, StorageError, UsageError
from ..events import Event, Progress, silent
from . import layout, schema, verify
from .layout import Graph, Header, Section

_STEP = 1 << 20  # bytes read and hashed at a time


def parse(
    found: Header, header: bytes, index: bytes
) -> tuple[tuple[Section, ...], tuple[Graph, ...], list[tuple[int, int]]]:
    """The sections, the graphs and the gaps (start, end) of a bundle with this header, checked (`found`) and raw. Pure.

    Raises BundleError; nothing is read from the index before its digest and structure are right.
    """
    if verify.digest(header, index) != found.digest:
        raise verify.refuse("index or header does not have the digest that it was written with: it is damaged")
    verify.structure(index)
    root = schema.Index.GetRootAs(index)
    sections = tuple(_section(root.Sections(j)) for j in range(root.SectionsLength()))
    graphs = tuple(_graph(root.Graphs(j)) for j in range(root.GraphsLength()))
    return sections, graphs, verify.rules(found, sections, graphs)


def _section(entry: schema.Section) -> Section:
    return Section(
        entry.Kind().decode(),
        entry.Name().decode(),
        entry.Offset(),
        entry.Length(),
        entry.Alignment(),
        bool(entry.Required()),
        entry.Sha256AsBytes(),
    )


def _graph(entry: schema.Graph) -> Graph:
    return Graph(
        entry.Name().decode(),
        entry.Role().decode(),
        entry.Backend().decode(),
        entry.Chunk(),
        entry.FirstBlock(),
        entry.LastBlock(),
        entry.Section().decode(),
    )


class Bundle:
    """An open bundle. `sections` and `graphs` are in the file's order; `digest` (hex) identifies every byte of it;
    `version` is (major, minor) of its format; `path` is absolute.

    Safe to use from several threads. Views stay valid after `close`, which only drops what the bundle itself holds.
    """

    def __init__(self, path: Path, file: io.FileIO):
        """For `open`, which names the file in errors and closes it after one."""
        self.path, self._file = path, file
        self._status = _regular(os.fstat(file.fileno()))
        size = self._status.st_size
        header = self._read(0, min(size, layout.HEADER.size))
        found = verify.header(header, size)
        index = self._read(found.index_offset, found.index_length)
        self.sections, self.graphs, gaps = parse(found, header, index)
        for start, stop in gaps:
            if self._read(start, stop - start) != bytes(stop - start):
                raise verify.refuse(f"gap from byte {start} to {stop} is not zero")
        self.version = (found.major, found.minor)
        self.digest = found.digest.hex()
        self._by_name = {(section.kind, section.name): section for section in self.sections}
        try:
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except ValueError:
            raise verify.refuse("file was cut while it was opened") from None

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Bundle":
        """Opens and checks the bundle at `path` without reading its sections.

        Refused with BundleError: a symbolic link, anything but a regular file, a file with a second name (a hard
        link: what is mapped could be changed under a name that nobody watches), and every byte that `verify` refuses.
        Folders above the file may be symbolic links. Raises StorageError when the disk fails.
        """
        name = os.fsdecode(path)
        if "\0" in name:
            raise BundleError("The bundle cannot be opened.", "Its path contains a zero byte.", "Check the path.")
        where = Path(os.path.abspath(name))
        with _named(where):
            file = _open(where)
            try:
                return cls(where, file)
            except BaseException:
                file.close()
                raise

    def section(self, kind: str, name: str = "") -> Section:
        """The section of that kind and name. Raises BundleError when there is none."""
        found = self.find(kind, name)
        if found is None:
            what = f"The bundle {self.path} cannot be used for this."
            why = f"It has no section of the kind {kind!r}" + (f" with the name {name!r}." if name else ".")
            raise BundleError(what, why, "Convert the checkpoint again.")
        return found

    def find(self, kind: str, name: str = "") -> Section | None:
        """The section of that kind and name, or None."""
        return self._by_name.get((kind, name))

    def view(self, section: Section) -> memoryview:
        """The section's bytes in the mapping, read-only, zero copy, not compared with the digest (`verify` does)."""
        self._own(section)
        return memoryview(self._map)[section.offset : section.offset + section.length]

    def verify(self, progress: Progress = silent) -> None:
        """Reads the whole file once and compares every section with its digest; `progress` gets stage "verify" in
        bytes. Raises BundleError naming the section. Uses about a MiB of memory whatever the size."""
        total, done = sum(section.length for section in self.sections), 0
        self._check_open()
        with _sequential(self._file.fileno()):
            for section in self.sections:
                label = f"{section.kind} {section.name}".rstrip()
                digest, end = hashlib.sha256(), section.offset + section.length
                for offset in range(section.offset, end, _STEP):
                    progress(Event("verify", done, total, label, "B"))
                    with _named(self.path):
                        part = self._read(offset, min(_STEP, end - offset))
                    digest.update(part)
                    done += len(part)
                with _named(self.path):
                    _check_digest(section, digest.digest())
        progress(Event("verify", total, total, "", "B"))

    def check_unchanged(self) -> None:
        """Raises BundleError unless `path` still leads to the file that was opened, unchanged and with one name.

        To be called around handing the path to a library that opens files by name.
        """
        with _named(self.path):
            try:
                now = os.lstat(self.path)
            except OSError as error:
                raise verify.refuse(f"path no longer leads to it ({error.strerror})", "Open it again.") from None
            was = self._status
            if (now.st_dev, now.st_ino) != (was.st_dev, was.st_ino):
                raise verify.refuse("path leads to another file now", "Open it again.")
            if (now.st_size, now.st_mtime_ns) != (was.st_size, was.st_mtime_ns):
                raise verify.refuse("file was changed after it was opened")
            _one_name(now)

    def fileno(self) -> int:
        """The open descriptor, for a library that can be given one: whatever the path leads to, it is this file."""
        self._check_open()
        return self._file.fileno()

    def close(self) -> None:
        """Closes the file. The mapping goes when the last view of it does."""
        self._file.close()
        try:
            self._map.close()
        except BufferError:  # somebody still holds a view
            pass

    def __enter__(self) -> "Bundle":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Bundle {self.path} {self.digest[:12]} {len(self.sections)} sections>"

    def bytes(self, section: Section, most: int = 256 << 20) -> builtins.bytes:
        """A private copy of a section of at most `most` bytes, compared with its digest every time."""
        self._own(section)
        with _named(self.path):
            if section.length > most:
                raise verify.refuse(f"{section.kind} {section.name!r} is {section.length} bytes, over {most}")
            data = self._read(section.offset, section.length)
            _check_digest(section, hashlib.sha256(data).digest())
            return data

    def _check_open(self) -> None:
        if self._file.closed:
            raise UsageError("The bundle is closed.", f"{self.path} was closed before.", "Open it again.")

    def _own(self, section: Section) -> None:
        self._check_open()
        if self._by_name.get((section.kind, section.name)) != section:
            raise UsageError("The section is not of this bundle.", f"{section!r}", "Take it from bundle.sections.")

    def _read(self, offset: int, length: int) -> builtins.bytes:
        # pread, not the mapping: a file that lost its end answers short here, where the mapping would kill the process.
        parts = []
        while length:
            part = os.pread(self._file.fileno(), length, offset)
            if not part:
                raise verify.refuse(f"file ends at byte {offset}: it was cut while it was open")
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)


def _open(path: Path) -> io.FileIO:
    """Opens the file itself: no symbolic link is followed, a FIFO does not wait for a writer."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)

    try:
        return io.FileIO(os.fspath(path), "r", opener=opener)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise verify.refuse("path leads to no file", "Check the path.") from None
        if error.errno == errno.ELOOP:
            fix = f"Give the path of the file itself (readlink -f {path})."
            raise verify.refuse("path is a symbolic link", fix) from None
        if error.errno in (errno.EISDIR, errno.ENXIO):  # a folder; a socket or a device without a driver
            raise verify.refuse("path leads to a folder or a device", "Give a .shoal file.") from None
        raise


def _regular(status: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(status.st_mode):
        raise verify.refuse("path does not lead to a regular file", "Give a .shoal file.")
    return _one_name(status)


def _one_name(status: os.stat_result) -> os.stat_result:
    if status.st_nlink > 1:
        fix = "Copy it to a file of its own (cp FILE COPY) and open the copy."
        raise verify.refuse(f"file has {status.st_nlink} names (hard links)", fix)
    return status


def _check_digest(section: Section, digest: bytes) -> None:
    if digest != section.sha256:
        phrase = f"section {section.kind} {section.name!r} does not have the digest that it was written with"
        raise verify.refuse(f"{phrase}: it is damaged")


@contextmanager
def _sequential(fd: int) -> Iterator[None]:
    """Lets the system read further ahead, so that the disk works while the processor hashes."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        yield
        return
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    try:
        yield
    finally:  # the mapping shares this setting
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the path into what leaves, and makes a StorageError of what the system refuses."""
    try:
        yield
    except BundleError as error:
        raise BundleError(f"The bundle {path} cannot be used.", error.why, error.fix) from None
    except OSError as error:
        why = f"The system says: {error.strerror}."
        raise StorageError(f"The bundle {path} cannot be read.", why, "Check the disk and who may read it.") from None
