"""Signed manifests: which models a device may run, and every rule by which it believes so.

A manifest is one JSON document of three kinds of signed parts, after The Update Framework (TUF 1.0.33, section 5):

    root       whose Ed25519 keys, and how many of them, may sign each part; a chain that changes one version at a time
    timestamp  which targets are current; expires soon, so that somebody who withholds news is found out
    targets    name -> length and digests of every model, all in one part, so that models of two releases never mix

`Trusted` is what a device believes: a value, made from a root that a person pinned. `follow` walks the chain of roots,
`accept` judges the rest; both return a new value or raise `ManifestError` with the `reason` in a word. Nothing here
knows files, links or clocks: `now` is passed in (seconds since 1970). Every count and length has a cap, and bytes that
are not the one canonical form of what they say are refused, so a signature covers what was read and nothing else.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from shoal.runtime.errors import MissingPackageError, TrustError

try:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
except ImportError as error:
    raise MissingPackageError(
        "Signatures cannot be checked.", f"{error}.", "Install what that needs: pip install 'shoal[agent]'."
    ) from None

FORMAT = 1
ROLES = ("root", "targets", "timestamp")
MOST_BYTES = 48 << 10  # of a manifest: it travels as the head of one message
MOST_ROOTS, MOST_KEYS, MOST_SIGNATURES, MOST_MODELS = 32, 16, 32, 128
MOST_LENGTH = 1 << 40  # of a model, bytes
MOST_VERSION = 1 << 31
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_LAST = 253_402_300_799  # the end of the year 9999


class ManifestError(TrustError):
    """A manifest is not believed; `reason`: form, size, signature, threshold, root, rollback, expired or mixed."""

    def __init__(self, reason: str, why: str, fix: str = "Get the current manifest from whoever signs the models."):
        super().__init__("The update is refused.", why, fix)
        self.reason = reason


@dataclass(frozen=True)
class Role:
    """`threshold` of these `keys` (public, hex) must have signed."""

    keys: frozenset[str]
    threshold: int


@dataclass(frozen=True)
class Root:
    version: int
    expires: int  # seconds since 1970
    roles: Mapping[str, Role]


@dataclass(frozen=True)
class Timestamp:
    version: int
    expires: int
    targets_version: int
    targets_sha256: str  # of the signed bytes of the targets


@dataclass(frozen=True)
class Target:
    """A model: its bundle's digest, and `length` and SHA-256 of the file, so that nothing unsigned is ever parsed."""

    name: str
    digest: str
    length: int
    sha256: str


@dataclass(frozen=True)
class Targets:
    version: int
    expires: int
    models: Mapping[str, Target]


Content = Root | Timestamp | Targets
Part = TypeVar("Part", Root, Timestamp, Targets)


@dataclass(frozen=True)
class Signed:
    """One part: what it says, the bytes that are signed, and the signatures by public key (all hex)."""

    content: Any
    payload: bytes
    signatures: Mapping[str, str]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.payload).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What is handed out: roots in ascending order (a device skips those it knows), then what is current."""

    roots: tuple[Signed, ...]
    timestamp: Signed
    targets: Signed

    def encode(self) -> bytes:
        return canonical(
            {
                "format": FORMAT,
                "roots": [_part(root) for root in self.roots],
                "timestamp": _part(self.timestamp),
                "targets": _part(self.targets),
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> "Manifest":
        """Reads hostile bytes; nothing in it is believed yet. Raises ManifestError (form, size)."""
        value = _fields(_json(data), "manifest", {"format", "roots", "timestamp", "targets"})
        if value["format"] != FORMAT:
            raise ManifestError("form", f"The manifest's format is {value['format']!r:.20}.", "Install a newer shoal.")
        roots = value["roots"]
        if not isinstance(roots, list) or len(roots) > MOST_ROOTS:
            raise ManifestError("size", f"roots is not a list of at most {MOST_ROOTS}.")
        return cls(
            tuple(_signed(root, "root") for root in roots),
            _signed(value["timestamp"], "timestamp"),
            _signed(value["targets"], "targets"),
        )


@dataclass(frozen=True)
class Trusted:
    """What a device believes. `pinned` is the SHA-256 of the root that a person handed over, for people who compare;
    `latest` the latest moment at which something was believed: time does not go back."""

    pinned: str
    root: Signed
    timestamp: Signed | None = None
    targets: Signed | None = None
    latest: int = 0

    @classmethod
    def pin(cls, data: bytes) -> "Trusted":
        """The first root, from a file that a person handed over. It must carry its own threshold of signatures."""
        root = _signed(_json(data), "root")
        _judge(root, root.content.roles["root"], "root", "its own keys")
        return cls(root.sha256, root)

    @property
    def models(self) -> Mapping[str, Target]:
        return self.targets.content.models if self.targets else {}

    def expires(self) -> int:
        """When the first of the parts does; after that the device no longer knows that it is up to date."""
        return min(part.content.expires for part in (self.root, self.timestamp, self.targets) if part)

    def follow(self, manifest: Manifest) -> "Trusted":
        """Walks to the newest root: each must be signed by the threshold of the one before and by its own.

        To be kept even when `accept` then refuses, so that a stolen key stays dismissed. Whose key was dismissed loses
        his say about versions too (TUF 5.3.11): what a thief pushed to version 2^31 may be followed by version 2.
        """
        trusted = self
        for root in manifest.roots:
            now, was = root.content, trusted.root.content
            if now.version == was.version and root.payload != trusted.root.payload:
                raise ManifestError("root", f"There are two different roots of version {now.version}.")
            if now.version <= was.version:
                continue
            if now.version != was.version + 1:
                raise ManifestError("root", f"Root {now.version} does not follow root {was.version}.")
            _judge(root, was.roles["root"], "root", f"the keys of root {was.version}")
            _judge(root, now.roles["root"], "root", "its own keys")
            dismissed = {role for role in ROLES if was.roles[role].keys - now.roles[role].keys}
            trusted = replace(
                trusted,
                root=root,
                timestamp=None if dismissed & {"timestamp", "targets"} else trusted.timestamp,
                targets=None if "targets" in dismissed else trusted.targets,
            )
        return trusted

    def accept(self, manifest: Manifest, now: float) -> "Trusted":
        """Judges timestamp and targets under the root that `follow` found. A clock that went back does not count."""
        roles, time = self.root.content.roles, min(max(int(now), self.latest), _LAST)
        stamp, targets = manifest.timestamp, manifest.targets
        _alive(self.root, "root", time)

        _judge(stamp, roles["timestamp"], "timestamp", "the root's keys for it")
        _not_older(stamp, self.timestamp, "timestamp")
        if self.timestamp and stamp.content.targets_version < self.timestamp.content.targets_version:
            raise ManifestError(
                "rollback",
                f"It offers targets {stamp.content.targets_version}, "
                f"after {self.timestamp.content.targets_version} was seen.",
            )
        _alive(stamp, "timestamp", time)

        if targets.content.version != stamp.content.targets_version or targets.sha256 != stamp.content.targets_sha256:
            raise ManifestError("mixed", "The targets are not those that the timestamp names.")
        _judge(targets, roles["targets"], "targets", "the root's keys for it")
        _not_older(targets, self.targets, "targets")
        _alive(targets, "targets", time)
        return replace(self, timestamp=stamp, targets=targets, latest=time)

    def encode(self) -> bytes:
        """For a device's own disk."""
        parts = {"root": self.root, "timestamp": self.timestamp, "targets": self.targets}
        kept = {name: _part(part) if part else None for name, part in parts.items()}
        return canonical({"format": FORMAT, "latest": self.latest, "pinned": self.pinned, **kept})

    @classmethod
    def decode(cls, data: bytes) -> "Trusted":
        """What `encode` wrote. Raises ManifestError (form) when the disk damaged it."""
        value = _fields(
            _json(data, 2 * MOST_BYTES), "trusted", {"format", "latest", "pinned", "root", "timestamp", "targets"}
        )
        root = _signed(value["root"], "root")
        stamp, targets = (
            _signed(value[role], role) if value[role] is not None else None for role in ("timestamp", "targets")
        )
        _judge(root, root.content.roles["root"], "root", "its own keys")
        latest = _integer(value["latest"], "latest", 0, _LAST)
        return cls(_hex(value["pinned"], "pinned", 32), root, stamp, targets, latest)


def sign(content: Content, keys: Iterable[Ed25519PrivateKey]) -> Signed:
    """`content` with a signature by each key."""
    payload = canonical(_value(content))
    made = {public_hex(key): key.sign(_message(payload)).hex() for key in keys}
    return Signed(content, payload, made)


def encode_root(root: Signed) -> bytes:
    """The file that a person carries to a device: `Trusted.pin` reads it."""
    return canonical(_part(root))


def public_hex(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def canonical(value: object) -> bytes:
    """The one way to write `value`: ASCII JSON, sorted keys, no spaces, no fractions."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _message(payload: bytes) -> bytes:
    return b"shoal manifest 1\n" + payload  # the payload names its role, so a signature counts for one role only


def _judge(part: Signed, role: Role, name: str, whose: str) -> None:
    """Enough different keys of `role` have signed exactly these bytes."""
    good = sum(_holds(key, part.signatures[key], part.payload) for key in role.keys & part.signatures.keys())
    if good < role.threshold:
        version = f"{name} {part.content.version}"
        if not good:
            raise ManifestError("signature", f"No signature of {version} holds by {whose}.")
        raise ManifestError("threshold", f"{version} has {good} of {role.threshold} signatures by {whose}.")


def _holds(key: str, signature: str, payload: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), _message(payload))
    except (InvalidSignature, ValueError):  # ValueError: not a point of the curve
        return False
    return True


def _not_older(new: Signed, old: Signed | None, name: str) -> None:
    if old is None or new.content.version > old.content.version:
        return
    if new.content.version < old.content.version:
        raise ManifestError("rollback", f"{name} {new.content.version} came after {old.content.version} was seen.")
    if new.payload != old.payload:
        raise ManifestError("rollback", f"There are two different {name}s of version {old.content.version}.")


def _alive(part: Signed, name: str, time: int) -> None:
    if part.content.expires <= time:
        when = _date(part.content.expires)
        why = f"{name} {part.content.version} expired at {when}; it is {_date(time)}."
        raise ManifestError("expired", why, "Check this machine's clock; else the signer must renew the manifest.")


def _part(signed: Signed) -> dict[str, object]:
    return {"signed": json.loads(signed.payload), "signatures": dict(signed.signatures)}


def _value(content: Content) -> dict[str, object]:
    common = {"version": content.version, "expires": _date(content.expires)}
    if isinstance(content, Root):
        roles = {name: {"keys": sorted(role.keys), "threshold": role.threshold} for name, role in content.roles.items()}
        return common | {"role": "root", "roles": roles}
    if isinstance(content, Timestamp):
        named = {"version": content.targets_version, "sha256": content.targets_sha256}
        return common | {"role": "timestamp", "targets": named}
    models = {
        target.name: {"digest": target.digest, "length": target.length, "sha256": target.sha256}
        for target in content.models.values()
    }
    return common | {"role": "targets", "models": models}


# Reading: every function below takes what JSON gave and raises ManifestError("form" or "size") naming the field.


def _json(data: bytes, most: int = MOST_BYTES) -> object:
    if len(data) > most:
        raise ManifestError("size", f"It has {len(data)} bytes; at most {most} are read.")
    try:
        value = json.loads(bytes(data).decode("ascii"), parse_float=_no_number, parse_constant=_no_number)
        same = canonical(value) == data
    except (ValueError, RecursionError):
        raise ManifestError("form", "It is not JSON of whole numbers and ASCII.") from None
    if not same:
        raise ManifestError("form", "It is not in the canonical form.")
    return value


def _no_number(text: str) -> object:
    raise ValueError(text)


def _signed(value: object, role: str) -> Signed:
    part = _fields(value, role, {"signed", "signatures"})
    signatures = part["signatures"]
    if not isinstance(signatures, dict) or len(signatures) > MOST_SIGNATURES:
        raise ManifestError("size", f"{role} does not have at most {MOST_SIGNATURES} signatures.")
    for key, signature in signatures.items():
        _hex(key, f"{role}.signatures", 32), _hex(signature, f"{role}.signatures", 64)
    said = part["signed"]
    if not isinstance(said, dict) or said.get("role") != role:
        raise ManifestError("form", f"{role} is signed as something else.")
    return Signed(_READERS[role](said), canonical(said), signatures)


def _root(value: dict) -> Root:
    _fields(value, "root", {"role", "version", "expires", "roles"})
    roles = _fields(value["roles"], "root.roles", set(ROLES))
    return Root(*_common(value, "root"), {name: _role(roles[name], f"root.roles.{name}") for name in ROLES})


def _role(value: object, name: str) -> Role:
    role = _fields(value, name, {"keys", "threshold"})
    keys = role["keys"]
    if not isinstance(keys, list) or not 1 <= len(keys) <= MOST_KEYS:
        raise ManifestError("size", f"{name}.keys is not a list of 1 to {MOST_KEYS}.")
    unique = frozenset(_hex(key, f"{name}.keys", 32) for key in keys)
    if len(unique) != len(keys):
        raise ManifestError("form", f"{name}.keys names a key twice.")
    return Role(unique, _integer(role["threshold"], f"{name}.threshold", 1, len(unique)))


def _timestamp(value: dict) -> Timestamp:
    _fields(value, "timestamp", {"role", "version", "expires", "targets"})
    named = _fields(value["targets"], "timestamp.targets", {"version", "sha256"})
    version = _integer(named["version"], "timestamp.targets.version", 1, MOST_VERSION)
    return Timestamp(*_common(value, "timestamp"), version, _hex(named["sha256"], "timestamp.targets.sha256", 32))


def _targets(value: dict) -> Targets:
    _fields(value, "targets", {"role", "version", "expires", "models"})
    models = value["models"]
    if not isinstance(models, dict) or len(models) > MOST_MODELS:
        raise ManifestError("size", f"targets does not name at most {MOST_MODELS} models.")
    return Targets(*_common(value, "targets"), {name: _target(name, entry) for name, entry in models.items()})


def _target(name: str, value: object) -> Target:
    where = f"model {name!r:.70}"
    if not _NAME.fullmatch(name):
        raise ManifestError("form", f"{where} is not a lower-case name of at most 64 characters.")
    entry = _fields(value, where, {"digest", "length", "sha256"})
    length = _integer(entry["length"], f"{where}.length", 1, MOST_LENGTH)
    return Target(name, _hex(entry["digest"], f"{where}.digest", 32), length, _hex(entry["sha256"], where, 32))


_READERS: Mapping[str, Callable[[dict], Content]] = {"root": _root, "timestamp": _timestamp, "targets": _targets}


def _common(value: dict, name: str) -> tuple[int, int]:
    version = _integer(value["version"], f"{name}.version", 1, MOST_VERSION)
    return version, _seconds(value["expires"], f"{name}.expires")


def _fields(value: object, name: str, fields: set[str]) -> dict[str, Any]:
    """Exactly these: a field that this version does not know may be a rule that it would break."""
    if not isinstance(value, dict) or set(value) != fields:
        raise ManifestError("form", f"{name} does not have exactly the fields {', '.join(sorted(fields))}.")
    return value


def _integer(value: object, name: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ManifestError("form", f"{name} is not a whole number from {least} to {most}.")
    return value


def _hex(value: object, name: str, length: int) -> str:
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{2 * length}}}", value):
        raise ManifestError("form", f"{name} is not {length} bytes in lower-case hex.")
    return value


def _seconds(value: object, name: str) -> int:
    if isinstance(value, str) and len(value) == 20:
        try:
            seconds = int(datetime.strptime(value, _TIME).replace(tzinfo=UTC).timestamp())
        except ValueError:
            seconds = -1
        if seconds >= 0 and _date(seconds) == value:
            return seconds
    raise ManifestError("form", f"{name} is not a time such as 2030-01-31T12:00:00Z.")


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime(_TIME)
