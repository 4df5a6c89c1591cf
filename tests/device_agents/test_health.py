"""Sensors read from made-up /sys and /proc trees, from none, from nonsense, and from this machine."""

import math
import os

import pytest

from shoal.device_agents.health import Limits, Reading, Sensors, strain

MEMINFO = "MemTotal: 8000000 kB\nMemFree: 100 kB\nMemAvailable:    2048 kB\n"
PRESSURE = "some avg10=12.50 avg60=3.00 avg300=1.00 total=99\nfull avg10=1.00 avg60=0.00 avg300=0.00 total=1\n"


@pytest.fixture
def tree(tmp_path):
    def write(**files):
        for path, text in files.items():
            target = tmp_path / path.replace("__", "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        return Sensors(tmp_path)

    return write


def supply(name: str, **files) -> dict[str, str]:
    return {f"sys__class__power_supply__{name}__{field}": f"{value}\n" for field, value in files.items()}


def test_where_there_is_no_sensor_every_figure_is_unavailable(tree):
    reading = tree().read()
    assert reading == Reading()
    said = reading.message()
    assert math.isnan(said.battery_percent) and math.isnan(said.temperature_c) and math.isnan(said.link_rate)
    assert said.on_power == -1 and said.memory_available == -1


def test_a_phone(tree):
    sensors = tree(
        **supply("battery", type="Battery", capacity=81, status="Discharging"),
        **supply("usb", type="USB", online=0),
        sys__class__thermal__thermal_zone0__temp="41500\n",
        sys__class__thermal__thermal_zone1__temp="63000\n",
        sys__class__thermal__cooling_device0__temp="99000\n",
        proc__meminfo=MEMINFO,
        proc__pressure__memory=PRESSURE,
        proc__stat="cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1 1 1 1\n",
    )
    assert sensors.read() == Reading(81.0, False, 63.0, 2048 << 10, 12.5, None)
    tree(proc__stat="cpu  130 0 110 860 0 0 0 0 0 0\n")
    reading = sensors.read()
    assert reading.cpu_percent == pytest.approx(40.0)
    assert reading.message(11520.0).link_rate == 11520.0
    assert reading.message().on_power == 0


@pytest.mark.parametrize(
    ("supplies", "battery", "power"),
    [
        (supply("AC", type="Mains", online=1), None, True),
        (supply("AC", type="Mains", online=0), None, None),
        (supply("B", type="Battery", capacity=50, status="Charging"), 50.0, True),
        (supply("B", type="Battery", capacity=50, status="Unknown"), 50.0, None),
        (supply("B", type="Battery", capacity=50) | supply("AC", type="Mains", online=0), 50.0, False),
        (supply("B", type="Battery", energy_now=30, energy_full=120, status="Full"), 25.0, True),
        (supply("B", type="Battery", charge_now=30, charge_full=0), None, None),
        (supply("B", type="Battery", capacity=250), None, None),
        (supply("B", type="Battery", capacity="many"), None, None),
        (supply("B", type="Battery", capacity=50, present=0), None, None),
        (supply("A", type="Battery", capacity=40) | supply("B", type="Battery", capacity=60), 50.0, None),
        (supply("mouse", type="Battery", scope="Device", capacity=7, status="Discharging"), None, None),
    ],
)
def test_power_supplies(tree, supplies, battery, power):
    reading = tree(**supplies).read()
    assert (reading.battery_percent, reading.on_power) == (battery, power)


@pytest.mark.parametrize(
    ("zones", "found"),
    [
        (["-127000"], None),
        (["0"], None),
        (["255000", "50000"], 50.0),
        (["", "x", "48000"], 48.0),
        (["9" * 400], None),
        (["-5000"], -5.0),
    ],
)
def test_a_sensor_that_says_what_cannot_be_is_not_believed(tree, zones, found):
    files = {f"sys__class__thermal__thermal_zone{number}__temp": text for number, text in enumerate(zones)}
    assert tree(**files).read().temperature_c == found


def test_a_board_that_has_only_hwmon(tree):
    sensors = tree(sys__class__hwmon__hwmon0__temp1_input="52000", sys__class__hwmon__hwmon0__fan1_input="90000")
    assert sensors.read().temperature_c == 52.0


def test_memory_is_that_of_the_tightest_control_group(tree):
    group = "sys__fs__cgroup__system.slice__"
    sensors = tree(
        proc__meminfo=MEMINFO,
        proc__self__cgroup="0::/system.slice/shoal.service\n",
        **{
            f"{group}shoal.service__memory.max": "max\n",
            f"{group}shoal.service__memory.current": "1000\n",
            f"{group}memory.max": "1000000\n",
            f"{group}memory.current": "900000\n",
            f"{group}memory.stat": "anon 1\ninactive_file 50000\n",
        },
    )
    assert sensors.read().memory_available == 150000


def test_a_control_group_that_leads_elsewhere_is_not_followed(tree):
    sensors = tree(proc__meminfo=MEMINFO, proc__self__cgroup="0::/../../secret\n")
    assert sensors.read().memory_available == 2048 << 10


@pytest.mark.parametrize("text", ["", "some\n", "some avg10=\n", "some avg10=nan\n", "some avg10=900\n", "\0" * 99])
def test_pressure_that_cannot_be_read(tree, text):
    assert tree(proc__pressure__memory=text).read().memory_pressure is None


def test_files_that_are_nonsense_leave_everything_unavailable(tree, tmp_path):
    noise = os.urandom(2000).decode("latin-1")
    sensors = tree(proc__meminfo=noise, proc__stat="cpu a b c d\n" + noise, proc__self__cgroup=noise)
    (tmp_path / "sys/class/power_supply/B").mkdir(parents=True)
    (tmp_path / "sys/class/thermal/thermal_zone0/temp").mkdir(parents=True)
    for _ in range(2):
        assert sensors.read() == Reading()


def test_a_counter_that_went_back_says_nothing(tree):
    sensors = tree(proc__stat="cpu 100 0 100 800\n")
    sensors.read()
    tree(proc__stat="cpu 1 0 1 8\n")
    assert sensors.read().cpu_percent is None


def test_this_machine():
    sensors = Sensors()
    sensors.read()
    reading = sensors.read()
    assert reading.memory_available and reading.memory_available > 1 << 20
    assert reading.cpu_percent is None or 0 <= reading.cpu_percent <= 100


def test_strain_is_said_only_where_it_is_known():
    assert strain(Reading()) == ""
    assert "battery" in strain(Reading(battery_percent=10, on_power=False))
    assert "battery" in strain(Reading(battery_percent=10))
    assert strain(Reading(battery_percent=10, on_power=True)) == ""
    assert "hot" in strain(Reading(temperature_c=90))
    assert "waits" in strain(Reading(memory_pressure=50))
    assert "MiB" in strain(Reading(memory_available=1 << 20))
    assert strain(Reading(temperature_c=90), Limits(temperature=100)) == ""
