"""What an edge counts, and where a device finds it."""

import pytest

from shoal.device_agents.figures import Timings
from shoal.device_agents.links import Address
from shoal.device_agents.reach import outward, reachable
from shoal.device_agents.snapshot import BUCKETS


def test_latencies_are_counted_in_buckets_percentiles_and_spans():
    timings = Timings()
    assert timings.say(100.0)["p50"] is None and timings.say(100.0)["recent"] == []
    for number in range(1, 101):
        timings.add(number / 1000, 100.0)
    timings.add(60.0, 111.0)
    said = timings.say(121.0)
    assert said["count"] == 101 and said["sum"] == pytest.approx(65.05)
    assert len(said["buckets"]) == len(BUCKETS) and said["buckets"][0] == 1  # exactly a millisecond
    assert said["buckets"][-1] == 100 and said["buckets"] == sorted(said["buckets"])
    assert said["p50"] == pytest.approx(0.051) and said["p95"] == pytest.approx(0.096)
    assert said["recent"] == [pytest.approx(0.0505), None, 60.0, None, None]
    for second in range(1000):
        timings.add(0.001, 200.0 + 5 * second)
    assert len(timings.say(200.0 + 5 * 999)["recent"]) == 60


def test_an_edge_says_where_others_reach_it():
    here = Address.parse("127.0.0.1:4707")
    cable = Address.parse("serial:/dev/ttyUSB0?baud=921600")
    assert outward(here) == here
    assert str(outward(cable)) == "serial:/dev/YOUR-PORT?baud=921600", "a port of the other end's"
    anywhere = outward(Address.parse("0.0.0.0:4707"))
    assert anywhere.host not in ("", "0.0.0.0") and anywhere.port == 4707
    assert Address.parse(reachable([cable, here])) == here
    assert Address.parse(reachable([here, Address.parse("10.1.2.3:99")])).host == "10.1.2.3"
    assert reachable([]) == ""
