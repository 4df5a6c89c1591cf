"""How a device is: battery, temperature, memory, pressure, processor, from what Linux says under /sys and /proc.

Every figure is None where there is no sensor, or none that says something believable: a guess is worse than nothing.
Files of the kernel are read anew each time, at most 64 KiB of each, and nothing about them is trusted. It knows
nothing about links; `limits` decides, purely, what a reading speaks against.

Sources: Documentation/ABI/testing/sysfs-class-power and sysfs-class-thermal, Documentation/accounting/psi.rst,
Documentation/admin-guide/cgroup-v2.rst, proc(5).
"""

import os
from dataclasses import dataclass
from pathlib import Path

from .messages import Health

_MOST = 64 << 10
_MAINS = {"Mains", "USB", "USB_C", "USB_PD", "USB_DCP", "USB_CDP", "Wireless"}
_COLDEST, _HOTTEST = -40.0, 150.0  # outside, a sensor is broken or absent


@dataclass(frozen=True)
class Reading:
    """Percent, degrees Celsius, bytes; None is `unavailable`."""

    battery_percent: float | None = None
    on_power: bool | None = None
    temperature_c: float | None = None
    memory_available: int | None = None
    memory_pressure: float | None = None  # share of the last 10 s in which something waited for memory
    cpu_percent: float | None = None  # of all cores, since the reading before

    def message(self, link_rate: float | None = None) -> Health:
        """As it is said to an edge; `link_rate` in bytes/s."""
        nan = float("nan")

        def number(value: float | None) -> float:
            return nan if value is None else float(value)

        return Health(
            number(self.battery_percent),
            -1 if self.on_power is None else int(self.on_power),
            number(self.temperature_c),
            -1 if self.memory_available is None else self.memory_available,
            number(self.memory_pressure),
            number(self.cpu_percent),
            number(link_rate),
        )


class Sensors:
    """Reads what is there. `root` is where /sys and /proc are, for tests and containers."""

    def __init__(self, root: Path = Path("/")):
        self._root = Path(root)
        self._ticks: tuple[int, int] | None = None

    def read(self) -> Reading:
        """A reading of now; never raises. The first one knows no processor load."""
        battery, power = self._power()
        return Reading(battery, power, self._temperature(), self._memory(), self._pressure("memory"), self._processor())

    def _power(self) -> tuple[float | None, bool | None]:
        """Charge of all batteries of the machine itself (not of a mouse), and whether it is fed from outside."""
        charges, online, states = [], [], []
        for supply in self._entries("sys/class/power_supply"):
            kind = self._text(supply / "type")
            if kind in _MAINS:
                online.append(self._text(supply / "online") not in (None, "0"))
            elif kind == "Battery" and self._text(supply / "scope") != "Device":
                if self._text(supply / "present") == "0":
                    continue
                states.append(self._text(supply / "status"))
                charges.append(self._charge(supply))
        known = [charge for charge in charges if charge is not None]
        if any(online):
            power: bool | None = True
        elif "Discharging" in states:
            power = False
        elif any(state in ("Charging", "Full", "Not charging") for state in states):
            power = True
        else:
            power = False if online and charges else None
        return (sum(known) / len(known) if known else None), power

    def _charge(self, supply: Path) -> float | None:
        percent: float | None = self._number(supply / "capacity")
        for kind in ("energy", "charge"):
            if percent is not None:
                break
            now, full = self._number(supply / f"{kind}_now"), self._number(supply / f"{kind}_full")
            percent = 100 * now / full if now is not None and full else None
        return float(percent) if percent is not None and 0 <= percent <= 100 else None

    def _temperature(self) -> float | None:
        """The hottest believable sensor of the machine: it is the one that throttles."""
        zones = [zone / "temp" for zone in self._entries("sys/class/thermal") if zone.name.startswith("thermal_zone")]
        if not zones:
            chips = self._entries("sys/class/hwmon")
            zones = [path for chip in chips for path in self._entries(chip) if path.name.endswith("_input")]
            zones = [path for path in zones if path.name.startswith("temp")]
        degrees = [value / 1000 for value in map(self._number, zones) if value is not None]
        # Exactly 0 is what a sensor says that is switched off
        return max((value for value in degrees if _COLDEST < value < _HOTTEST and value), default=None)

    def _memory(self) -> int | None:
        """What can still be used: of the machine, or of the control group that this process is in, if that is less."""
        available = None
        for line in self._lines("proc/meminfo"):
            name, _, rest = line.partition(":")
            if name == "MemAvailable" and rest.split()[:1] and rest.split()[0].isdecimal():
                available = int(rest.split()[0]) << 10
        room = [available, *map(self._room, self._groups())]
        return min((value for value in room if value is not None), default=None)

    def _groups(self) -> list[Path]:
        """The folder of this process's control group (version 2) and those above it."""
        for line in self._lines("proc/self/cgroup"):
            if line.startswith("0::/") and ".." not in line.split("/"):
                path = Path(line.removeprefix("0::/"))
                return [self._root / "sys/fs/cgroup" / part for part in (path, *path.parents)][:32]
        return []

    def _room(self, group: Path) -> int | None:
        most, used = self._number(group / "memory.max"), self._number(group / "memory.current")
        if most is None or used is None:  # "max": no limit here
            return None
        for line in self._lines(group / "memory.stat"):
            name, _, count = line.partition(" ")
            if name == "inactive_file" and count.isdecimal():
                used -= min(used, int(count))  # given back when somebody asks
        return max(0, most - used)

    def _pressure(self, what: str) -> float | None:
        """The `some avg10` of pressure stall information, percent."""
        for line in self._lines(f"proc/pressure/{what}"):
            if line.startswith("some "):
                fields = dict(field.partition("=")[::2] for field in line.split()[1:])
                try:
                    share = float(fields.get("avg10", ""))
                except ValueError:
                    return None
                return share if 0 <= share <= 100 else None
        return None

    def _processor(self) -> float | None:
        for line in self._lines("proc/stat"):
            fields = line.split()
            if fields[:1] == ["cpu"] and len(fields) >= 5 and all(field.isdecimal() for field in fields[1:]):
                ticks = [int(field) for field in fields[1:9]]  # guest time, which follows, is in user time already
                now = (sum(ticks), ticks[3] + (ticks[4] if len(ticks) > 4 else 0))
                before, self._ticks = self._ticks, now
                if before is None or now[0] <= before[0]:
                    return None
                idle = (now[1] - before[1]) / (now[0] - before[0])
                return min(100.0, max(0.0, 100 * (1 - idle)))
        return None

    def _entries(self, folder: Path | str) -> list[Path]:
        path = self._root / folder
        try:
            return sorted(path / name for name in os.listdir(path))[:256]
        except OSError:
            return []

    def _text(self, path: Path | str) -> str | None:
        try:
            with open(self._root / path, "rb") as file:
                return file.read(_MOST).decode("ascii", "replace").strip()
        except OSError:  # also of a driver that has no answer just now
            return None

    def _lines(self, path: Path | str) -> list[str]:
        return (self._text(path) or "").splitlines()

    def _number(self, path: Path) -> int | None:
        text = self._text(path) or ""
        digits = text.removeprefix("-")
        return int(text) if digits.isascii() and digits.isdecimal() and len(digits) < 19 else None


@dataclass(frozen=True)
class Limits:
    """From where a device should be left in peace."""

    battery: float = 20.0  # percent, without power
    temperature: float = 85.0
    pressure: float = 40.0
    memory: int = 32 << 20


def strain(reading: Reading, limits: Limits | None = None) -> str:
    """What speaks against more work now, in words; "" where nothing is known to."""
    limits = limits or Limits()
    charge, heat = reading.battery_percent, reading.temperature_c
    if charge is not None and charge < limits.battery and reading.on_power is not True:
        return f"the battery is at {charge:.0f} %"
    if heat is not None and heat >= limits.temperature:
        return f"it is {heat:.0f} °C hot"
    if reading.memory_pressure is not None and reading.memory_pressure >= limits.pressure:
        return f"memory is short: {reading.memory_pressure:.0f} % of the time something waits for it"
    if reading.memory_available is not None and reading.memory_available < limits.memory:
        return f"{reading.memory_available >> 20} MiB of memory are left"
    return ""
