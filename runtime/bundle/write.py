"""Writes a bundle so that its name never leads to half of one.

The bytes go to `.NAME.XXXXXXXX.partial` beside the target, are flushed to the disk and then renamed, so a crash leaves
the old file, the new file, or a partial one that the next `create` of the same target removes, with the scratch folder
of its name: the writer holds a lock on it for as long as it lives. The same sections in the same order give the same
bytes. It knows nothing about what is inside a section.
"""

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from flatbuffers.builder import Builder

from ..errors import BundleError, StorageError, UsageError
from . import layout, schema, verify
from .layout import Graph, Header, Section

_STEP = 1 << 20  # bytes hashed and then written while the cache still holds them
_RENAME_NOREPLACE, _AT_FDCWD = 1, -100  # linux/fs.h, fcntl.h
_RENAME_EXCL = 4  # macOS: sys/stdio.h


@contextmanager
def create(path: str | os.PathLike, overwrite: bool = False) -> Iterator["Writer"]:
    """Begins a bundle that appears at `path` when `commit` is called; leaving the block without it leaves nothing.

    An existing file is refused with UsageError, now and again at commit, unless `overwrite`. Raises StorageError when
    the disk is full, read-only or fails.
    """
    name = os.fsdecode(path)
    if "\0" in name:
        raise UsageError("The bundle cannot be written.", "Its path contains a zero byte.", "Check the path.")
    target = Path(os.path.abspath(name))
    if os.path.isdir(target) or (not overwrite and os.path.lexists(target)):
        raise _exists(target)
    with _storage(target):
        _remove_stale(target)
        fd, partial = _reserve(target)
    writer = Writer(target, fd, partial, overwrite)
    try:
        yield writer
    finally:
        writer._close()


class SectionWriter:
    """The section that is being written: give it the bytes in order. It begins at `offset` of the writer's file."""

    def __init__(self, writer: "Writer"):
        self._writer, self._length, self._sha256 = writer, 0, hashlib.sha256()
        self.offset = writer._end

    def write(self, buffer) -> None:
        """Appends a contiguous buffer (bytes, memoryview, C-ordered array). Raises StorageError when it cannot."""
        if self._writer._current is not self:
            raise UsageError("The section is finished.", "Its block was left.", "Write inside the block.")
        view = memoryview(buffer)
        if not view.c_contiguous:
            raise UsageError("The section cannot take this buffer.", "It is not contiguous.", "Pass a copy in C order.")
        view = view.cast("B") if view.nbytes else memoryview(b"")
        try:
            for start in range(0, len(view), _STEP):
                part = view[start : start + _STEP]
                self._sha256.update(part)
                self._writer._append(part)
                self._length += len(part)
        except BaseException:  # digest and file may differ by this part now
            self._writer._failed = True
            raise

    def tell(self) -> int:
        """Bytes written to this section so far."""
        return self._length


class Writer:
    """A bundle in the making. `path` is the partial file: sections that are finished may already be mapped from it."""

    def __init__(self, target: Path, fd: int, path: Path, overwrite: bool):
        """For `create`, which closes it. Takes over `fd`, open for writing on the empty file at `path`."""
        self.path = path
        self._target, self._fd, self._overwrite = target, fd, overwrite
        self._sections: list[Section] = []
        self._graphs: list[Graph] = []
        self._current: SectionWriter | None = None
        self._failed = False
        self._end = layout.HEADER.size

    @property
    def sections(self) -> tuple[Section, ...]:
        """The finished sections, in the file's order."""
        return tuple(self._sections)

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The recorded graphs, in the order they came."""
        return tuple(self._graphs)

    @contextmanager
    def section(
        self, kind: str, name: str = "", alignment: int = 4096, required: bool = False
    ) -> Iterator[SectionWriter]:
        """Begins a section; it is finished when the block ends, and there is one at a time.

        Raises UsageError for a second section of the same kind and name, and for what docs/format.md does not allow.
        """
        self._check_writable()
        entry = Section(kind, name, 0, 0, alignment, required, b"")
        if problem := entry.problem():
            raise self._misuse(f"The section's {problem}.")
        if any((kind, name) == (section.kind, section.name) for section in self._sections):
            raise self._misuse(f"There is a section {kind!r} of the name {name!r} already.")
        offset = layout.align(self._end, alignment)
        self._append(bytes(offset - self._end))
        self._current = SectionWriter(self)
        yield self._current  # an exception leaves the section open for good, and commit refuses
        written, self._current = self._current, None
        sha256 = written._sha256.digest()
        self._sections.append(replace(entry, offset=offset, length=written.tell(), sha256=sha256))

    def add(self, kind: str, name: str, data, alignment: int = 64, required: bool = False) -> Section:
        """Writes a section whose bytes are at hand. Raises as `section` does."""
        with self.section(kind, name, alignment, required) as section:
            section.write(data)
        return self._sections[-1]

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder beside the target for files that are needed on the way; it goes when the block ends.

        What the system refuses meanwhile leaves as StorageError.
        """
        folder = _scratch(self.path)
        with _storage(self._target):
            folder.mkdir(mode=0o700)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def graph(self, graph: Graph) -> None:
        """Records a graph; its section may be written before or after."""
        if problem := graph.problem():
            raise self._misuse(f"The graph's {problem}.")
        self._graphs.append(graph)

    def commit(self) -> None:
        """Writes the index, flushes everything to the disk and gives the file its name, in one step of the system's.

        Raises UsageError when the target has come to exist meanwhile or the entries break a rule of the format.
        """
        self._check_writable()
        header, index = seal(self._sections, self._graphs, self._end)
        found = Header(*layout.HEADER.unpack(header))
        try:
            verify.header(header, found.file_length)
            verify.structure(index)
            verify.rules(found, self._sections, self._graphs)
        except BundleError as error:
            raise self._misuse(error.why) from None
        self._append(bytes(found.index_offset - self._end))
        self._append(memoryview(index))
        with _storage(self._target):
            os.pwrite(self._fd, header, 0)
            os.fsync(self._fd)
            if self._overwrite:
                os.replace(self.path, self._target)
            else:
                _rename_new(self.path, self._target)
            self._close()
            _sync_folder(self._target.parent)

    def _append(self, part) -> None:
        with _storage(self._target):
            while part:
                count = os.pwrite(self._fd, part, self._end)
                self._end, part = self._end + count, part[count:]

    def _check_writable(self) -> None:
        if self._fd < 0:
            raise self._misuse("It was committed or given up before.")
        if self._failed:
            raise self._misuse("A write to it failed.")
        if self._current:
            raise self._misuse("A section of it is not finished.")

    def _misuse(self, why: str) -> UsageError:
        return UsageError(f"The bundle {self._target} cannot be written.", why, "Correct what writes it.")

    def _close(self) -> None:
        """Removes the scratch folder and the partial file if it still has that name, then lets go of its lock."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            shutil.rmtree(_scratch(self.path), ignore_errors=True)
            with suppress(OSError):
                os.unlink(self.path)
            with suppress(OSError):
                os.close(fd)


def seal(sections: Sequence[Section], graphs: Sequence[Graph], end: int) -> tuple[bytes, bytes]:
    """The header and the index of a bundle whose last section ends at byte `end`. Pure and deterministic."""
    builder = Builder(1024)
    index = bytes(_index(builder, [_section(builder, s) for s in sections], [_graph(builder, g) for g in graphs]))
    offset = layout.align(end, layout.INDEX_ALIGNMENT)
    fields = (layout.MAGIC, layout.MAJOR, layout.MINOR, layout.FLAGS, len(index), offset + len(index), offset)
    digest = verify.digest(layout.HEADER.pack(*fields, b""), index)
    return layout.HEADER.pack(*fields, digest), index


def _section(builder: Builder, section: Section) -> int:
    kind, name = builder.CreateSharedString(section.kind), builder.CreateString(section.name)
    sha256 = builder.CreateByteVector(section.sha256)
    schema.SectionStart(builder)
    schema.SectionAddKind(builder, kind)
    schema.SectionAddName(builder, name)
    schema.SectionAddOffset(builder, section.offset)
    schema.SectionAddLength(builder, section.length)
    schema.SectionAddAlignment(builder, section.alignment)
    schema.SectionAddRequired(builder, section.required)
    schema.SectionAddSha256(builder, sha256)
    return schema.SectionEnd(builder)


def _graph(builder: Builder, graph: Graph) -> int:
    name, section = builder.CreateString(graph.name), builder.CreateString(graph.section)
    role, backend = builder.CreateSharedString(graph.role), builder.CreateSharedString(graph.backend)
    schema.GraphStart(builder)
    schema.GraphAddName(builder, name)
    schema.GraphAddRole(builder, role)
    schema.GraphAddBackend(builder, backend)
    schema.GraphAddChunk(builder, graph.chunk)
    schema.GraphAddFirstBlock(builder, graph.first_block)
    schema.GraphAddLastBlock(builder, graph.last_block)
    schema.GraphAddSection(builder, section)
    return schema.GraphEnd(builder)


def _index(builder: Builder, sections: list[int], graphs: list[int]) -> bytearray:
    vectors = []
    for entries in (sections, graphs):
        builder.StartVector(4, len(entries), 4)
        for entry in reversed(entries):
            builder.PrependUOffsetTRelative(entry)
        vectors.append(builder.EndVector())
    schema.IndexStart(builder)
    schema.IndexAddSections(builder, vectors[0])
    schema.IndexAddGraphs(builder, vectors[1])
    builder.Finish(schema.IndexEnd(builder))
    return builder.Output()


def _reserve(target: Path) -> tuple[int, Path]:
    """A new partial file beside the target, open and locked: its descriptor and its path."""
    while True:
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        try:
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a `_remove_stale` came between and is about to remove it
            os.close(fd)
            continue
        except OSError:  # no locks on this file system, so nobody can take the file for stale either
            return fd, partial
        if os.fstat(fd).st_nlink:
            return fd, partial
        os.close(fd)  # a `_remove_stale` came between and has removed it


def _scratch(partial: Path) -> Path:
    """The folder that belongs to a partial file, and is protected by its lock."""
    return partial.with_suffix(".scratch")


def _remove_stale(target: Path) -> None:
    """Removes the partial files of this target that nobody has locked: their writers are dead."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.partial")
    for name in filter(pattern.fullmatch, os.listdir(target.parent)):
        partial = target.with_name(name)
        with suppress(OSError):  # somebody else's, or gone
            fd = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(_scratch(partial), ignore_errors=True)
                os.unlink(partial)
            finally:
                os.close(fd)


def _rename_new(partial: Path, target: Path) -> None:
    """A rename that never replaces: the system refuses, so no other writer can come between a look and the rename."""
    libc, source, name = ctypes.CDLL(None, use_errno=True), os.fsencode(partial), os.fsencode(target)
    try:
        if sys.platform == "darwin":
            failed = libc.renamex_np(source, name, _RENAME_EXCL)
        else:
            failed = libc.renameat2(_AT_FDCWD, source, _AT_FDCWD, name, _RENAME_NOREPLACE)
        code = ctypes.get_errno() if failed else 0
    except AttributeError:
        code = errno.ENOSYS
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        # An old C library, or a file system without it (NFS): hold the name with an empty file, then rename over that.
        try:
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
        except FileExistsError:
            raise _exists(target) from None
        os.replace(partial, target)
    elif code == errno.EEXIST:
        raise _exists(target)
    elif code:
        raise OSError(code, os.strerror(code))


def _sync_folder(folder: Path) -> None:
    """Makes the new name outlive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems do not know it
            raise
    finally:
        os.close(fd)


def _exists(target: Path) -> UsageError:
    why = "A folder has that name." if os.path.isdir(target) else "A file of that name exists."
    return UsageError(f"The bundle {target} was not written.", why, "Choose another name, or pass overwrite=True.")


@contextmanager
def _storage(target: Path) -> Iterator[None]:
    """Makes a StorageError, with what can be done about it, of what the system refuses."""
    try:
        yield
    except BrokenPipeError:  # not of a file: whoever a caller reports to has left
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fix = f"Free some space in {target.parent}, or write to another disk."
        elif error.errno in (errno.ENOENT, errno.ENOTDIR):
            fix = f"Create the folder {target.parent} first."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            fix = f"Write to a folder that you may change, or make {target.parent} one."
        else:
            fix = "Check the disk, or write to another one."
        why = f"The system says: {error.strerror}."
        raise StorageError(f"The bundle {target} could not be written.", why, fix) from None
