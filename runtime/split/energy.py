"""What a board says of its own energy: RAPL's counters, or a power sensor; None where it says nothing.

Linux only, read from sysfs: powercap counts joules of processor packages (root only on most systems), hwmon and a
battery's driver give watts of this moment. Which part of the board they mean differs from board to board.
"""

from pathlib import Path

_ROOT = Path("/sys/class")


class Meter:
    """Sensors found when it was made, below `root`."""

    def __init__(self, root: Path = _ROOT):
        zones = sorted(root.glob("powercap/*-rapl:[0-9]*"))
        self._zones = [zone for zone in zones if zone.name.count(":") == 1 and _number(zone / "energy_uj") is not None]
        self._spans = {zone: _number(zone / "max_energy_range_uj") or 0 for zone in self._zones}
        self._last = {zone: _number(zone / "energy_uj") or 0 for zone in self._zones}
        self._total = 0
        sensors = [*sorted(root.glob("hwmon/hwmon*/power*_input")), *sorted(root.glob("power_supply/*/power_now"))]
        self._sensors = [sensor for sensor in sensors if _number(sensor) is not None]

    def joules(self) -> float | None:
        """Of all processor packages since the meter was made; None without such counters. Call it at least once a
        minute: a counter runs over."""
        for zone in self._zones:
            now = _number(zone / "energy_uj")
            if now is None:
                return None
            step = now - self._last[zone]
            self._total += step if step >= 0 else step + self._spans[zone]
            self._last[zone] = now
        return self._total / 1e6 if self._zones else None

    def watts(self) -> float | None:
        """Of the first sensor, now; None without one."""
        found = _number(self._sensors[0]) if self._sensors else None
        return None if found is None else found / 1e6


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
