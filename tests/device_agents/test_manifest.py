"""Each attack that The Update Framework names, tried against a trusted set, and what a device must still accept."""

import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.device_agents import manifest
from shoal.device_agents.manifest import Manifest, ManifestError, Role, Root, Target, Targets, Timestamp, Trusted
from shoal.runtime.errors import TrustError

NOW = 1_900_000_000  # 2030
DAY = 86400


def key(seed: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)


def role(*seeds: int, threshold: int = 1) -> Role:
    return Role(frozenset(manifest.public_hex(key(seed)) for seed in seeds), threshold)


def target(name: str, content: int = 1) -> Target:
    return Target(name, f"{content:064x}", 1000 + content, f"{content + 7:064x}")


class Vendor:
    """Signs as a vendor does; a test changes a field and publishes, or signs with the wrong key."""

    def __init__(self):
        self.roles = {"root": role(1), "targets": role(2), "timestamp": role(3)}
        self.keys = {"root": [1], "targets": [2], "timestamp": [3]}
        self.versions = {"root": 1, "targets": 1, "timestamp": 1}
        self.expires = {"root": NOW + 400 * DAY, "targets": NOW + 90 * DAY, "timestamp": NOW + 7 * DAY}
        self.models = [target("camera")]
        self.roots = [self.root()]

    def signed(self, content, *seeds: int):
        return manifest.sign(content, [key(seed) for seed in seeds])

    def root(self, *extra: int):
        return self.signed(Root(self.versions["root"], self.expires["root"], self.roles), *self.keys["root"], *extra)

    def rotate(self, name: str, seeds: list[int], threshold: int = 1):
        """A new root, signed by the old keys and the new."""
        old = self.keys["root"]
        self.roles = self.roles | {name: role(*seeds, threshold=threshold)}
        self.keys = self.keys | {name: seeds}
        self.versions["root"] += 1
        self.roots.append(self.root(*old))

    def targets(self):
        content = Targets(self.versions["targets"], self.expires["targets"], {t.name: t for t in self.models})
        return self.signed(content, *self.keys["targets"])

    def timestamp(self, targets=None):
        named = targets or self.targets()
        content = Timestamp(self.versions["timestamp"], self.expires["timestamp"], named.content.version, named.sha256)
        return self.signed(content, *self.keys["timestamp"])

    def manifest(self, **parts) -> Manifest:
        targets = parts.get("targets") or self.targets()
        return Manifest(tuple(self.roots), parts.get("timestamp") or self.timestamp(targets), targets)

    def release(self, *models: Target):
        self.models = list(models)
        self.versions["targets"] += 1
        self.versions["timestamp"] += 1


@pytest.fixture
def vendor() -> Vendor:
    return Vendor()


@pytest.fixture
def trusted(vendor) -> Trusted:
    """A device that has seen release 1."""
    return believe(Trusted.pin(manifest.encode_root(vendor.roots[0])), vendor.manifest())


def believe(trusted: Trusted, offered: Manifest, now: float = NOW) -> Trusted:
    offered = Manifest.decode(offered.encode())
    return trusted.follow(offered).accept(offered, now)


def refused(reason: str, trusted: Trusted, offered: Manifest, now: float = NOW) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        believe(trusted, offered, now)
    assert caught.value.reason == reason, caught.value
    assert isinstance(caught.value, TrustError) and caught.value.why and caught.value.fix
    return caught.value


def test_a_device_believes_a_release_the_same_again_and_the_next(vendor, trusted):
    assert trusted.models == {"camera": target("camera")}
    assert believe(trusted, vendor.manifest()) == trusted
    vendor.release(target("camera", 2), target("voice", 3))
    assert set(believe(trusted, vendor.manifest()).models) == {"camera", "voice"}


def test_what_is_believed_outlives_the_process(trusted):
    assert Trusted.decode(trusted.encode()) == trusted
    first = replace(trusted, timestamp=None, targets=None)
    assert Trusted.decode(first.encode()) == first


def test_releases_may_be_skipped(vendor, trusted):
    for content in (2, 3, 4):
        vendor.release(target("camera", content))
    assert believe(trusted, vendor.manifest()).targets.content.version == 4


# Rollback


def test_rollback_to_an_older_manifest(vendor, trusted):
    old = vendor.manifest()
    vendor.release(target("camera", 2))
    newer = believe(trusted, vendor.manifest())
    refused("rollback", newer, old)


def test_rollback_of_the_timestamp_alone(vendor, trusted):
    vendor.versions["timestamp"] = 5
    newer = believe(trusted, vendor.manifest())
    vendor.versions["timestamp"] = 4
    refused("rollback", newer, vendor.manifest())


def test_rollback_of_targets_under_a_new_timestamp(vendor, trusted):
    """A stolen timestamp key does not bring an old model back."""
    old = vendor.targets()
    vendor.release(target("camera", 2))
    newer = believe(trusted, vendor.manifest())
    vendor.versions["timestamp"] += 1
    refused("rollback", newer, vendor.manifest(targets=old))


def test_rollback_of_targets_after_the_timestamp_key_was_dismissed(vendor, trusted):
    old = vendor.targets()
    vendor.release(target("camera", 2))
    newer = believe(trusted, vendor.manifest())
    vendor.rotate("timestamp", [33])
    refused("rollback", newer, vendor.manifest(targets=old))


@pytest.mark.parametrize("part", ["timestamp", "targets"])
def test_two_different_parts_of_one_version(vendor, trusted, part):
    vendor.expires[part] += 1
    if part == "targets":
        vendor.versions["timestamp"] += 1
    refused("rollback", trusted, vendor.manifest())


# Freeze


@pytest.mark.parametrize("part", ["root", "targets", "timestamp"])
def test_freeze_is_found_out_when_a_part_expires(vendor, trusted, part):
    vendor.expires = {name: NOW + 1000 * DAY for name in vendor.expires} | {part: NOW + DAY}
    vendor.roots, vendor.versions = [], {"root": 1, "targets": 2, "timestamp": 2}
    vendor.roots = [vendor.root()]
    trusted = Trusted.pin(manifest.encode_root(vendor.roots[0]))
    assert believe(trusted, vendor.manifest(), NOW + DAY - 1)
    error = refused("expired", trusted, vendor.manifest(), NOW + DAY)
    assert part in error.why


def test_the_device_knows_until_when_it_is_up_to_date(vendor, trusted):
    assert trusted.expires() == vendor.expires["timestamp"]


def test_an_expired_root_in_the_middle_of_the_chain_is_walked_over(vendor, trusted):
    vendor.expires["root"] = NOW - DAY
    vendor.rotate("timestamp", [33])
    vendor.expires["root"] = NOW + 400 * DAY
    vendor.rotate("timestamp", [34])
    assert believe(trusted, vendor.manifest()).root.content.version == 3


# A clock that goes backwards


def test_a_clock_set_back_does_not_revive_what_expired(vendor, trusted):
    vendor.release(target("camera", 2))
    vendor.expires["timestamp"] = NOW + 30 * DAY
    later = believe(trusted, vendor.manifest(), NOW + 20 * DAY)
    vendor.versions["timestamp"] += 1
    vendor.expires["timestamp"] = NOW + 10 * DAY
    refused("expired", later, vendor.manifest(), now=NOW)


def test_a_device_without_a_clock_goes_on_from_the_latest_moment_it_knows(vendor, trusted):
    vendor.release(target("camera", 2))
    believed = believe(trusted, vendor.manifest(), now=0)
    assert believed.models["camera"] == target("camera", 2) and believed.latest == NOW


def test_a_clock_far_ahead_leaves_nothing_behind(vendor, trusted):
    refused("expired", trusted, vendor.manifest(), now=4e12)
    assert believe(trusted, vendor.manifest(), NOW + 1).latest == NOW + 1


# Mix and match


def test_targets_of_one_release_under_the_timestamp_of_another(vendor, trusted):
    old = vendor.targets()
    vendor.release(target("camera", 2))
    refused("mixed", trusted, vendor.manifest(targets=old, timestamp=vendor.timestamp()))


def test_other_targets_of_the_same_version(vendor, trusted):
    vendor.release(target("camera", 2))
    stamp = vendor.timestamp()
    vendor.models = [target("camera", 3)]
    refused("mixed", trusted, vendor.manifest(timestamp=stamp))


def test_a_model_put_into_signed_targets(vendor, trusted):
    offered = vendor.manifest()
    targets = offered.targets.content
    forged = replace(targets, models={**targets.models, "voice": target("voice", 9)})
    payload = manifest.sign(forged, []).payload
    refused("mixed", trusted, replace(offered, targets=replace(offered.targets, payload=payload)))


# Wrong keys


@pytest.mark.parametrize("part", ["targets", "timestamp"])
def test_a_key_that_nobody_named(vendor, trusted, part):
    vendor.release(target("camera", 2))
    vendor.keys[part] = [9]
    refused("signature", trusted, vendor.manifest())


@pytest.mark.parametrize(("part", "thief"), [("targets", 3), ("timestamp", 2), ("targets", 1)])
def test_the_key_of_another_role(vendor, trusted, part, thief):
    vendor.release(target("camera", 2))
    vendor.keys[part] = [thief]
    refused("signature", trusted, vendor.manifest())


def test_a_flipped_bit_in_a_signature(vendor, trusted):
    vendor.release(target("camera", 2))
    offered = vendor.manifest()
    ((who, signature),) = offered.timestamp.signatures.items()
    broken = f"{int(signature, 16) ^ 1:0128x}"
    refused("signature", trusted, replace(offered, timestamp=replace(offered.timestamp, signatures={who: broken})))


def test_a_part_signed_as_another_role(vendor, trusted):
    offered = vendor.manifest()
    with pytest.raises(ManifestError, match="signed as something else"):
        Manifest.decode(replace(offered, targets=offered.timestamp).encode())


def test_a_public_key_that_is_no_point_of_the_curve(vendor, trusted):
    bad = "02" + "00" * 31
    vendor.roles = vendor.roles | {"timestamp": Role(frozenset({bad}), 1)}
    vendor.versions["root"] += 1
    vendor.roots.append(vendor.root())
    offered = vendor.manifest()
    stamp = replace(offered.timestamp, signatures={bad: "00" * 64})
    refused("signature", trusted, replace(offered, timestamp=stamp))


def test_a_pinned_root_must_be_signed_by_itself(vendor):
    root = replace(vendor.roots[0], signatures=vendor.signed(vendor.roots[0].content, 9).signatures)
    with pytest.raises(ManifestError) as caught:
        Trusted.pin(manifest.encode_root(root))
    assert caught.value.reason == "signature"


# Threshold


def test_below_the_threshold(vendor, trusted):
    vendor.rotate("targets", [20, 21, 22], threshold=2)
    vendor.keys["targets"] = [20]
    refused("threshold", trusted, vendor.manifest())
    vendor.keys["targets"] = [20, 22]
    assert believe(trusted, vendor.manifest())


def test_strangers_do_not_count_towards_the_threshold(vendor, trusted):
    vendor.rotate("targets", [20, 21], threshold=2)
    vendor.keys["targets"] = [20, 9, 3]
    refused("threshold", trusted, vendor.manifest())


def test_one_key_signs_once_however_often_it_is_written(vendor, trusted):
    vendor.rotate("targets", [20, 21], threshold=2)
    vendor.keys["targets"] = [20]
    offered = vendor.manifest().encode()
    ((who, signature),) = vendor.targets().signatures.items()
    twice = offered.replace(f'"{who}":"{signature}"'.encode(), f'"{who}":"{signature}","{who}":"{signature}"'.encode())
    assert twice != offered
    with pytest.raises(ManifestError, match="canonical"):
        Manifest.decode(twice)


def test_a_threshold_that_no_keys_can_reach(vendor):
    vendor.roles = vendor.roles | {"targets": Role(role(2).keys, 2)}
    with pytest.raises(ManifestError, match="threshold"):
        Trusted.pin(manifest.encode_root(vendor.root()))


def test_a_threshold_of_none(vendor):
    vendor.roles = vendor.roles | {"targets": Role(role(2).keys, 0)}
    with pytest.raises(ManifestError, match="threshold"):
        Trusted.pin(manifest.encode_root(vendor.root()))


# Rotation of keys


@pytest.mark.parametrize("name", ["root", "targets", "timestamp"])
def test_a_rotated_key_signs_and_the_old_one_no_longer_does(vendor, trusted, name):
    was = vendor.keys[name]
    vendor.rotate(name, [40])
    vendor.release(target("camera", 2))
    newer = believe(trusted, vendor.manifest())
    assert newer.root.content.version == 2
    if name != "root":
        vendor.release(target("camera", 3))
        vendor.keys[name] = was
        refused("signature", newer, vendor.manifest())


def test_a_new_root_that_the_old_keys_did_not_sign(vendor, trusted):
    vendor.roles, vendor.keys = vendor.roles | {"root": role(50)}, vendor.keys | {"root": [50]}
    vendor.versions["root"] = 2
    vendor.roots.append(vendor.root())
    refused("signature", trusted, vendor.manifest())


def test_a_new_root_that_its_own_keys_did_not_sign(vendor, trusted):
    vendor.roles = vendor.roles | {"root": role(50)}
    vendor.versions["root"] = 2
    vendor.roots.append(vendor.root())
    refused("signature", trusted, vendor.manifest())


def test_a_root_that_skips_a_version(vendor, trusted):
    vendor.versions["root"] = 2
    vendor.rotate("targets", [40])
    refused("root", trusted, vendor.manifest())


def test_two_roots_of_one_version(vendor, trusted):
    vendor.expires["root"] += 1
    vendor.roots = [vendor.root()]
    refused("root", trusted, vendor.manifest())


def test_an_old_root_is_not_gone_back_to(vendor, trusted):
    vendor.rotate("targets", [40])
    newer = believe(trusted, vendor.manifest())
    assert newer.follow(replace(vendor.manifest(), roots=tuple(vendor.roots[:1]))) == newer


def test_a_new_root_holds_even_when_the_rest_is_refused(vendor, trusted):
    vendor.rotate("timestamp", [33])
    vendor.keys["timestamp"] = [3]  # the thief still has the old key
    offered = vendor.manifest()
    after = trusted.follow(offered)
    assert after.root.content.version == 2
    refused("signature", after, offered)


@pytest.mark.parametrize("name", ["targets", "timestamp"])
def test_a_thief_who_ran_ahead_is_forgotten_with_his_key(vendor, trusted, name):
    """Fast-forward: version 2^31 is signed with a stolen key; the vendor dismisses the key and goes on from 2."""
    honest = dict(vendor.versions)
    vendor.versions[name] = manifest.MOST_VERSION
    ahead = believe(trusted, replace(vendor.manifest()) if name == "timestamp" else _stamped(vendor))
    vendor.versions = honest
    vendor.rotate(name, [60])
    vendor.release(target("camera", 2))
    if name == "targets":
        vendor.versions["timestamp"] += 1
    assert believe(ahead, vendor.manifest()).models["camera"] == target("camera", 2)


def _stamped(vendor) -> Manifest:
    vendor.versions["timestamp"] += 1
    return vendor.manifest()


# Endless data, and bytes that are not what they seem


def test_a_manifest_over_the_cap_is_not_even_parsed():
    with pytest.raises(ManifestError) as caught:
        Manifest.decode(b"[" * (manifest.MOST_BYTES + 1))
    assert caught.value.reason == "size"


def test_endless_roots(vendor):
    offered = replace(vendor.manifest(), roots=tuple(vendor.roots * (manifest.MOST_ROOTS + 1)))
    with pytest.raises(ManifestError) as caught:
        Manifest.decode(offered.encode())
    assert caught.value.reason == "size"


def test_endless_keys(vendor):
    vendor.roles = vendor.roles | {"targets": role(*range(1, manifest.MOST_KEYS + 2))}
    with pytest.raises(ManifestError) as caught:
        Trusted.pin(manifest.encode_root(vendor.root()))
    assert caught.value.reason == "size"


def test_endless_signatures(vendor):
    offered = vendor.manifest()
    many = {f"{number:064x}": "00" * 64 for number in range(manifest.MOST_SIGNATURES + 1)}
    with pytest.raises(ManifestError) as caught:
        Manifest.decode(replace(offered, timestamp=replace(offered.timestamp, signatures=many)).encode())
    assert caught.value.reason == "size"


def test_endless_models(vendor):
    vendor.models = [target(f"model{number}") for number in range(manifest.MOST_MODELS + 1)]
    with pytest.raises(ManifestError) as caught:
        Manifest.decode(vendor.manifest().encode())
    assert caught.value.reason == "size"


def test_the_longest_manifest_that_is_allowed_fits_a_message(vendor, trusted):
    vendor.release(*(target(f"{number:064d}") for number in range(manifest.MOST_MODELS)))
    assert len(vendor.manifest().encode()) < manifest.MOST_BYTES
    assert len(believe(trusted, vendor.manifest()).models) == manifest.MOST_MODELS


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"version":1', '"version":1.0', 1),
        lambda text: text.replace('"version":1', '"version":01', 1),
        lambda text: text.replace('"version":1', '"version":0', 1),
        lambda text: text.replace('"version":1', '"version":-1', 1),
        lambda text: text.replace('"version":1', '"version":true', 1),
        lambda text: text.replace('"version":1', '"version":NaN', 1),
        lambda text: text.replace('"version":1', '"version":' + "9" * 5000, 1),
        lambda text: text.replace('"version":1', '"version":9007199254740993', 1),
        lambda text: text.replace('"length":1001', '"length":"1001"', 1),
        lambda text: text.replace('"length":1001', f'"length":{(1 << 40) + 1}', 1),
        lambda text: text.replace('"camera"', '"../camera"', 1),
        lambda text: text.replace('"camera"', '"\\ud800"', 1),
        lambda text: text.replace("Z", "+00:00", 1),
        lambda text: text.replace("2030-", "2030-13-", 1),
        lambda text: text.replace("{", "{ ", 1),
        lambda text: text + "\n",
        lambda text: "\ufeff" + text,
        lambda text: text[:-1],
        lambda text: text.replace('"format":1', '"format":2', 1),
        lambda text: text.replace('"format":1', '"extra":0,"format":1', 1),
        lambda text: "[" * 20000,
        lambda text: "null",
        lambda text: "",
    ],
)
def test_forms_that_are_not_the_form(vendor, edit):
    text = edit(vendor.manifest().encode().decode())
    with pytest.raises(ManifestError) as caught:
        Manifest.decode(text.encode("utf-8", "surrogatepass"))
    assert caught.value.reason == "form"


def test_every_byte_changed_is_refused_or_says_the_same(vendor, trusted):
    vendor.release(target("camera", 2))
    data = vendor.manifest().encode()
    honest = believe(trusted, vendor.manifest())
    for index in range(len(data)):
        for byte in {0, 0x30, 0xFF, data[index] ^ 1} - {data[index]}:
            changed = data[:index] + bytes([byte]) + data[index + 1 :]
            try:
                offered = Manifest.decode(changed)
                found = trusted.follow(offered).accept(offered, NOW)
            except ManifestError:
                continue
            assert found == honest  # a signature of a root that is known already


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["format", "roots", "timestamp", "targets", "signed", "signatures", "role", "version"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_a_manifest_or_a_refusal(value):
    for read in (Manifest.decode, Trusted.decode, Trusted.pin):
        with pytest.raises(ManifestError):
            read(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
