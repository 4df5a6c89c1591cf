"""Whom this machine trusts, and with what: a folder of pinned certificates, one file a peer.

A peer is trusted exactly as long as its file is there: pairing writes it, revoking removes it, and nothing else puts
it back. Files are written whole or not at all, changes take turns between processes, and what another process changed
is seen by the next call. Knows nothing about links, clocks on the wire, or how a peer came to be paired.
"""

import base64
import builtins
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from shoal.runtime.errors import StorageError, TrustError, UsageError

from .home import private_folder, sync_folder, write_atomically
from .identity import NAME_BYTES, alone_in, cleaned, fingerprint, is_name, pack, readable

RIGHTS = frozenset({"infer", "update", "federate"})
FIRST_RIGHTS = frozenset({"infer", "update"})  # federation learns from a device's own data: a person must allow it
ROLES = ("device", "edge")
_FILE_BYTES = 1 << 14
_FORMAT = 1


@dataclass(frozen=True)
class Peer:
    """A paired machine: `certificate` is its DER, `role` what it is to us, `rights` what it may do with us.

    `address` is where it was last reached, `paired_at` and `seen_at` are UTC in ISO 8601; all three may be unknown.
    """

    fingerprint: str
    id: str
    name: str
    role: str
    certificate: bytes = field(repr=False)
    rights: frozenset[str] = FIRST_RIGHTS
    address: str | None = None
    paired_at: str = ""
    seen_at: str = ""

    @classmethod
    def of(cls, certificate: bytes, name: str, role: str, **more) -> "Peer":
        """The peer with this certificate; fingerprint and id follow from it."""
        printed = fingerprint(certificate)
        return cls(printed, readable(printed), name, role, certificate, **more)

    def may(self, right: str) -> bool:
        return right in self.rights


class Peers:
    """The peers in one folder, as all processes have left them. Every method may raise StorageError and TrustError."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._read: dict[str, tuple[tuple[int, ...], Peer | TrustError]] = {}

    @classmethod
    def open(cls, folder: Path) -> "Peers":
        """`folder` is made where it is missing; it belongs to this user alone."""
        folder = private_folder(Path(folder))
        with alone_in(folder):  # so what is half written now was left by a process that died
            for path in folder.glob(".*.json-*"):
                path.unlink(missing_ok=True)
        return cls(folder)

    def list(self) -> builtins.list[Peer]:
        """All, by name. Raises TrustError that names a damaged file."""
        found = []
        for entry in self._look().values():
            if isinstance(entry, TrustError):
                raise entry
            found.append(entry)
        return sorted(found, key=lambda peer: (peer.name, peer.fingerprint))

    def certificates(self) -> builtins.list[bytes]:
        """The DER of every trusted certificate. A damaged file trusts nobody, and keeps no one else out."""
        return [entry.certificate for entry in self._look().values() if isinstance(entry, Peer)]

    def get(self, fingerprint: str) -> Peer | None:
        """The peer with this fingerprint, None if it is not, or no longer, trusted. Raises TrustError if damaged."""
        entry = self._look().get(fingerprint)
        if isinstance(entry, TrustError):
            raise entry
        return entry

    def find(self, text: str) -> Peer:
        """The one peer that a person means: its name, or the beginning of its id or fingerprint. Raises UsageError."""
        peers = self.list()
        start = re.sub(r"[\s-]", "", text).lower()
        found = [peer for peer in peers if peer.name == text] or [
            peer
            for peer in peers
            if start and (peer.id.replace("-", "").lower().startswith(start) or peer.fingerprint.startswith(start))
        ]
        if not found:
            raise UsageError(
                f"There is no peer {text!r}.", "No name, id or fingerprint begins so.", "See: shoal peers list"
            )
        if len(found) > 1:
            names = ", ".join(f"{peer.name} ({peer.id})" for peer in found)
            raise UsageError(f"{text!r} means several peers.", f"They are {names}.", "Give more of the id.")
        return found[0]

    def add(self, peer: Peer) -> Peer:
        """Trusts `peer` from now on; returns it as kept: with the time, and a name that no other peer has.

        One that was there already begins anew, with the name and rights of `peer`.
        """
        with alone_in(self._folder):
            taken = {entry.name for entry in self._others(peer)}
            name, number = cleaned(peer.name), 2
            while name in taken:
                name, number = f"{cleaned(peer.name, NAME_BYTES - 6)}-{number}", number + 1
            return self._write(replace(peer, name=name, paired_at=peer.paired_at or now()))

    def revoke(self, peer: Peer) -> None:
        """Trusts `peer` no more: no new link opens, and what holds one sees it by `get`. Twice does no harm."""
        with alone_in(self._folder):
            try:
                self._path(peer.fingerprint).unlink(missing_ok=True)
                sync_folder(self._folder)
            except OSError as error:
                raise StorageError(
                    f"{peer.name} could not be revoked.", f"{error}.", f"Mend the folder {self._folder}."
                ) from None

    def rename(self, peer: Peer, name: str) -> Peer:
        """Raises UsageError for a name that is taken or cannot be shown."""
        if not is_name(name):
            raise UsageError(
                f"{name!r} cannot be a name.", "It is empty, too long or cannot be shown.", "Choose another."
            )
        with alone_in(self._folder):
            if any(other.name == name for other in self._others(peer)):
                raise UsageError(f"The name {name!r} is taken.", "Another peer has it.", "Choose another.")
            return self._write(replace(self._kept(peer), name=name))

    def allow(self, peer: Peer, rights: Iterable[str]) -> Peer:
        """Gives `peer` these rights and takes the others away. Raises UsageError."""
        rights = frozenset(rights)
        if not rights <= RIGHTS:
            raise UsageError(
                f"There is no right {', '.join(sorted(rights - RIGHTS))}.",
                f"The rights are {', '.join(sorted(RIGHTS))}.",
                "Name some of these, or none.",
            )
        with alone_in(self._folder):
            return self._write(replace(self._kept(peer), rights=rights))

    def saw(self, peer: Peer, address: str | None = None) -> Peer:
        """Notes that `peer` was here now, at `address` if it has one. Raises TrustError if it was revoked meanwhile."""
        with alone_in(self._folder):
            kept = self._kept(peer)
            return self._write(replace(kept, seen_at=now(), address=address or kept.address))

    def _kept(self, peer: Peer) -> Peer:
        """`peer` as its file says now: what was revoked must not come back by being changed."""
        kept = self.get(peer.fingerprint)
        if kept is None:
            raise TrustError(f"{peer.name} is not trusted.", "It was revoked.", "Pair with it again.")
        return kept

    def _others(self, peer: Peer) -> builtins.list[Peer]:
        return [e for e in self._look().values() if isinstance(e, Peer) and e.fingerprint != peer.fingerprint]

    def _path(self, fingerprint: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", fingerprint):
            raise TrustError("A fingerprint is none.", "It is not 64 hex digits.", "Pair with the peer again.")
        return self._folder / f"{fingerprint}.json"

    def _write(self, peer: Peer) -> Peer:
        path = self._path(peer.fingerprint)
        data = _to_json(peer)
        _from_json(path, data)  # what could not be read back is not written
        write_atomically(path, data)
        return peer

    def _look(self) -> dict[str, Peer | TrustError]:
        """Every file by its fingerprint. One is read again only where it is not the file that was read before."""
        seen: dict[str, tuple[tuple[int, ...], Peer | TrustError]] = {}
        try:
            for path in self._folder.glob("*.json"):
                try:
                    status = path.stat()
                    stamp = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
                    known = self._read.get(path.stem)
                    seen[path.stem] = known if known and known[0] == stamp else (stamp, _load(path))
                except FileNotFoundError:
                    continue  # revoked this moment
        except OSError as error:
            raise StorageError(
                f"The peers in {self._folder} cannot be read.", f"{error}.", "Mend the folder."
            ) from None
        self._read = seen
        return {name: entry for name, (_, entry) in seen.items()}


def now() -> str:
    """This moment in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _to_json(peer: Peer) -> bytes:
    fields = {
        "format": _FORMAT, "name": peer.name, "role": peer.role, "rights": sorted(peer.rights),
        "address": peer.address, "paired_at": peer.paired_at, "seen_at": peer.seen_at,
        "certificate": base64.b64encode(peer.certificate).decode(),
    }  # fmt: skip
    return json.dumps(fields, indent=2).encode() + b"\n"


def _load(path: Path) -> Peer | TrustError:
    try:
        with open(path, "rb") as file:
            return _from_json(path, file.read(_FILE_BYTES + 1))
    except TrustError as error:
        return error


def _from_json(path: Path, data: bytes) -> Peer:
    """Raises TrustError that names the file and what is wrong in it."""

    def refuse(why: str) -> TrustError:
        return TrustError(
            f"The peer's file {path} is damaged.", f"{why}.", "Remove the file, and pair with the peer again."
        )

    if len(data) > _FILE_BYTES:
        raise refuse("It is too long")
    try:
        fields = json.loads(data)
        certificate = base64.b64decode(fields["certificate"], validate=True)
        rights = fields["rights"]
        texts = [fields[name] for name in ("name", "role", "paired_at", "seen_at")]
        address = fields["address"]
        edition = fields["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise refuse(f"It is not the JSON of a peer ({type(error).__name__})") from None
    if edition != _FORMAT:
        raise refuse(f"It is of format {edition!r}, and this program reads {_FORMAT}")
    if not all(isinstance(text, str) and text.isprintable() for text in [*texts, address or ""]):
        raise refuse("A field is no text that can be shown")
    name, role, paired_at, seen_at = texts
    if not is_name(name) or role not in ROLES:
        raise refuse("Its name or role is none")
    if not isinstance(rights, list) or not all(isinstance(right, str) for right in rights) or not RIGHTS >= set(rights):
        raise refuse("Its rights are none")
    try:
        pack(certificate)
    except TrustError as error:
        raise refuse(error.why.rstrip(".")) from None
    if fingerprint(certificate) != path.stem:
        raise refuse("The certificate in it is another peer's")
    return Peer.of(certificate, name, role, rights=frozenset(rights), address=address, paired_at=paired_at,
                   seen_at=seen_at)  # fmt: skip
