"""Models of the device itself: what they answer, and what a probe finds."""

import sys
from pathlib import Path

import numpy as np
import pytest

from shoal.converters.split.tail import pack
from shoal.device_agents.local import Local
from shoal.runtime.errors import UsageError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from make_split import split  # noqa: E402
from paired import broken, small_network  # noqa: E402


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return small_network(tmp_path_factory.mktemp("network"))


def test_a_probe_finds_what_does_not_compute(network, tmp_path):
    _, device, head, images, logits = network
    good, bad = Local(device), Local(broken(tmp_path / "broken.shoal"))
    good.probe()
    with pytest.raises(Exception, match="not finite"):
        bad.probe()
    for local in (good, bad):
        local.close()


def test_head_and_tail_of_one_bundle_make_an_answer(network, tmp_path):
    made, (*_, images, logits) = split(), network
    pack({"head": made.head, "tail": made.tail}, tmp_path / "both.shoal", "cats")
    local = Local(tmp_path / "both.shoal")
    np.testing.assert_allclose(local.answer({"image": images})["logits"], logits, atol=1e-4)
    assert local.seconds and local.model.name == "cats"
    local.close()
    with pytest.raises(UsageError):
        local.answer({"image": images})
