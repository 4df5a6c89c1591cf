"""Prometheus' text: read back by a parser of its grammar."""

import math
import re

from shoal.device_agents.metrics import render

_SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:\w+="(?:[^"\\\n]|\\[\\"n])*",?)*)\})? (NaN|[+-]Inf|[-+.\de]+)')


def parse(text: str) -> dict[str, float]:
    """Series -> value; fails where the text is not exposition format 0.0.4, or a series comes twice."""
    found, typed = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, family, kind = line.split()
            assert family not in typed
            typed[family] = kind
        elif not line.startswith("# HELP "):
            match = _SAMPLE.fullmatch(line)
            assert match, line
            name, labels, value = match.groups()
            assert any(name in (family, *(family + end for end in ("_bucket", "_sum", "_count"))) for family in typed)
            series = f"{name}{{{labels}}}" if labels else name
            assert series not in found, series
            found[series] = float(value)
    return found


def test_a_snapshot_is_told_in_full(stand_in):
    found = parse(render(stand_in.snapshot()))
    front = 'device="camera-front",id="K1QX-7MZA-PT4N-2WVE"'
    assert found['shoal_edge_devices{connected="true"}'] == 3
    assert found['shoal_edge_requests_total{result="busy"}'] == 12
    assert found[f"shoal_device_received_bytes_total{{{front}}}"] == 61_888_002
    assert found[f"shoal_device_rtt_seconds{{{front}}}"] == 0.0014
    assert found['shoal_model_requests_total{model="mobilenet-tail",digest="5b5b5b5b5b5b5b5b"}'] == 19_844
    assert found['shoal_rounds{state="training"}'] == 1 and found["shoal_pairing_open"] == 0
    buckets = [value for series, value in found.items() if series.startswith("shoal_edge_latency_seconds_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == found["shoal_edge_latency_seconds_count"] == 60
    assert not any("greenhouse" in series and "rtt" in series for series in found)  # unknown is left out, not zero


def test_hostile_names_and_numbers_stay_inside_their_series(stand_in):
    device = stand_in.value["devices"][0]
    device["name"] = 'a"} 1\nshoal_pairing_open 7\n# \\'
    device["health"]["battery_percent"] = math.inf
    stand_in.value["devices"][1]["name"] = device["name"]  # told apart by their ids
    found = parse(render(stand_in.snapshot()))
    assert found["shoal_pairing_open"] == 0 and math.inf in found.values()


def test_a_pairing_code_is_no_metric(stand_in):
    stand_in.open_window()
    text = render(stand_in.snapshot())
    assert parse(text)["shoal_pairing_open"] == 1 and "4071" not in text
