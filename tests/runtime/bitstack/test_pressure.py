"""Following the system's memory: the policy on traces, the readers on real files and on malformed ones, the thread."""

import dataclasses
import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shoal
from shoal.runtime.bitstack import pressure
from shoal.runtime.bitstack.pressure import MIB, Reading, State, System, decide, moved, refused
from shoal.runtime.errors import BudgetError, UsageError

START = State(memory=300 * MIB, least=100 * MIB, most=500 * MIB, reserve=50 * MIB)


def follow(state: State, trace, stalls=None) -> tuple[State, list[tuple[float, int]]]:
    """A model that can do whatever is decided, over available MiB a second."""
    moves = []
    for now, available in enumerate(trace):
        stalled = stalls[now] if stalls else 0.0
        target = decide(Reading(float(now), available and available * MIB, 20 * MIB, stalled), state)
        if target is not None:
            assert state.least <= target <= state.most and target != state.memory
            state = moved(state, target, float(now))
            moves.append((now, target))
    return state, moves


def test_it_shrinks_at_once_and_by_enough():
    reading = Reading(0.0, 200 * MIB, 20 * MIB, 0.0)
    target = decide(reading, START)
    assert target < 170 * MIB, "what is held and available, less the reserve"
    assert decide(reading, moved(START, target, 0.0)) is None
    assert decide(Reading(0.0, 10 * MIB), START) == START.least
    assert decide(Reading(0.0, 10 * MIB), dataclasses.replace(START, memory=START.least)) is None


def test_it_grows_slowly_and_only_after_calm():
    state, moves = follow(START, [1000] * 60)
    targets = [target for _, target in moves]
    assert state.memory == START.most and targets == sorted(targets) and 3 <= len(moves) <= 8
    assert all(later - before >= pressure.SETTLE for (before, _), (later, _) in zip(moves, moves[1:], strict=False))
    _, moves = follow(START, [200] + [1000] * 60)
    assert moves[0][0] == 0 and moves[1][0] >= pressure.PATIENCE
    assert not follow(START, [1000] * 60, stalls=[0.05] * 60)[1], "somebody waits for memory"


def test_stalls_shrink_whatever_is_available():
    state, moves = follow(START, [1000] * 30, stalls=[0.3] * 30)
    targets = [target for _, target in moves]
    assert targets == sorted(targets, reverse=True) and state.memory < 110 * MIB and len(moves) <= 15
    assert follow(START, [None] * 3, stalls=[0.3] * 3)[1] and not follow(START, [None] * 9, stalls=[None] * 9)[1]


@pytest.mark.parametrize("period", [2, 7, 20, 45, 120, 300])
def test_an_oscillation_does_not_make_it_thrash(period):
    seconds = 3600
    trace = [1000 if now // period % 2 else 150 for now in range(seconds)]
    state, moves = follow(START, trace)
    shrinks = [target for (_, before), (_, target) in zip(moves, moves[1:], strict=False) if target < before]
    # Patience doubles with each growth that was a mistake: 10, 20, .. 600 seconds
    assert len(shrinks) <= 2 + 7 + seconds / pressure.LONGEST and len(moves) <= 100
    # Noise within the band moves nothing
    noise = random.Random(period)
    _, moves = follow(START, [330 + noise.uniform(0, 9) for _ in range(seconds)])
    assert len(moves) <= 2


def test_a_slow_decline_is_followed_in_few_steps():
    state, moves = follow(START, [330 - now * 0.05 for now in range(3600)])
    assert len(moves) <= 2 + 40 and state.memory < 125 * MIB


def test_what_was_refused_waits():
    state = refused(START, 5.0)
    assert decide(Reading(6.0, 0), state) is None and decide(Reading(5.0 + pressure.PATIENCE, 0), state) is not None


# Readers --------------------------------------------------------------------------------------------------------------


def tree(root, files: dict[str, str]):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return System(root, clock=iter(range(100)).__next__)


MOUNT = "36 25 0:31 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
MEMINFO = "MemTotal:       8000000 kB\nMemFree:         100000 kB\nMemAvailable:   1000000 kB\n"


def test_the_tightest_limit_of_all_groups_counts(tmp_path):
    group = "sys/fs/cgroup/app/worker/"
    system = tree(tmp_path, {
        "proc/meminfo": MEMINFO, "proc/self/mountinfo": MOUNT, "proc/self/cgroup": "1:cpu:/x\n0::/app/worker\n",
        "proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=7\n",
        group + "memory.max": "max\n", group + "memory.high": f"{600 * MIB}\n",
        group + "memory.current": f"{500 * MIB}",
        group + "memory.stat": f"anon 5\nactive_file {30 * MIB}\ninactive_file {20 * MIB}\n",
        group + "memory.pressure": "some avg10=1.00 avg60=0.00 avg300=0.00 total=1000000\nfull avg10=0 total=5\n",
        "sys/fs/cgroup/app/memory.max": f"{900 * MIB}", "sys/fs/cgroup/app/memory.current": f"{890 * MIB}",
    })  # fmt: skip
    assert [path.name for path in system.groups()] == ["worker", "app", "cgroup"]
    assert system.read(3) == Reading(0, 10 * MIB, 3, None)
    (tmp_path / group / "memory.pressure").write_text("some avg10=1.00 avg60=0.00 avg300=0.00 total=1250000\n")
    (tmp_path / "sys/fs/cgroup/app/memory.max").write_text("max")
    assert system.read() == Reading(1, 150 * MIB, 0, 0.25)
    (tmp_path / "sys/fs/cgroup/app/memory.max").unlink()
    (tmp_path / group / "memory.high").write_text("max")
    assert system.read() == Reading(2, 1000000 << 10, 0, 0.0)


OWN = {"0::/\n": ["cgroup"], "0::/../other\n": ["cgroup"], "0::/a/b/c\n": ["c", "b", "a", "cgroup"], "": ["cgroup"]}


@pytest.mark.parametrize("where, names", OWN.items())
def test_groups_stay_below_what_is_mounted(tmp_path, where, names):
    system = tree(tmp_path, {"proc/self/mountinfo": MOUNT, "proc/self/cgroup": where})
    assert [path.name for path in system.groups()] == names
    inside = tree(tmp_path, {"proc/self/mountinfo": MOUNT.replace(" / /sys", " /a /sys")})
    assert len(list(inside.groups())) <= len(names)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(max_size=200) | st.sampled_from(["max", "-1", "9" * 40, "some total=", "some total=x", "1e9", "\0"])
)
def test_malformed_files_say_nothing_and_raise_nothing(tmp_path_factory, text):
    root = tmp_path_factory.mktemp("proc")
    names = ("memory.max", "memory.high", "memory.current", "memory.stat", "memory.pressure")
    files = {f"sys/fs/cgroup/{name}": text for name in names}
    files |= {"proc/meminfo": text, "proc/self/mountinfo": MOUNT + text, "proc/self/cgroup": text}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8", errors="replace")
    reading = System(root).read()
    assert reading.available is None or reading.available >= 0
    assert decide(reading, START) is None or reading.available is not None
    assert System(root / "absent").read().available is None


def test_this_machine_can_be_read():
    system = System()
    reading = system.read()
    if pressure.measure.anonymous_bytes() is not None:
        assert reading.available > 0
    assert system.read().stalled in (None, 0.0) or 0 <= system.read().stalled <= 1


# The thread -----------------------------------------------------------------------------------------------------------


class Scripted(System):
    """Readings of a script; the last one stays."""

    def __init__(self, *available: int):
        self.available, self.count = list(available), 0

    def read(self, held: int = 0) -> Reading:
        self.count += 1
        found = self.available.pop(0) if len(self.available) > 1 else self.available[0]
        return Reading(1000.0 * self.count, found - held, held, 0.0)


def test_a_model_follows(tiny_stack):
    with shoal.load(tiny_stack, context=64) as model:
        whole, changes, done = model.plan.total, [], threading.Event()
        system = Scripted(whole - 40_000, whole * 9)

        def told(change):
            changes.append(change)
            if len(changes) == 2:
                done.set()

        with model.follow_memory(reserve=1, interval=0.01, on_change=told, system=system) as watcher:
            assert done.wait(20)
            assert watcher.error is None
        fewer, again = changes
        assert fewer.plan.entries < again.plan.entries == len(model.stack.index.order) == model.stack.entries
        assert fewer.memory == fewer.plan.memory <= whole - 40_000 and again.memory == whole


def test_bounds_are_those_of_the_model_and_of_who_asks(tiny_stack):
    with shoal.load(tiny_stack, context=64) as model:
        state = pressure.Watcher(model).state
        assert state.least < state.memory == state.most == model.plan.total
        assert state.most - state.least >= model.stack.sizes[-1] - model.stack.sizes[model.stack.index.floor]
        assert model.set_memory(state.least).entries == model.stack.index.floor and model.plan.total == state.least
        for wrong in ({"interval": 0}, {"least": "10GB"}, {"most": 1000}, {"reserve": "much"}):
            with pytest.raises(UsageError):
                pressure.Watcher(model, **wrong)


def test_errors_are_told_or_kept_and_a_closed_model_ends_it(tiny_stack):
    model = shoal.load(tiny_stack, context=64)
    changes = []
    watcher = pressure.Watcher(model, least=1 << 20, reserve=1, on_change=changes.append, system=Scripted(2 << 20))
    change = watcher.step()
    assert isinstance(change.error, BudgetError) and changes == [change] and watcher.error is None
    watcher.on_change, watcher.system = None, Scripted(2 << 20, 2 << 20)
    watcher.state = dataclasses.replace(watcher.state, until=0.0)
    watcher.step()
    assert isinstance(watcher.error, BudgetError) and model.stack.entries == model.plan.entries

    def broken(change):
        raise RuntimeError("theirs")

    watcher.on_change, watcher.state = broken, dataclasses.replace(watcher.state, until=0.0)
    watcher.step()
    assert str(watcher.error) == "theirs"
    running = model.follow_memory(interval=0.01)
    model.close()
    running._thread.join(20)
    assert not running._thread.is_alive() and watcher.step() is None


def test_a_model_without_a_stack_follows_by_its_context(int8_bundle):
    with shoal.load(int8_bundle) as model:
        watcher = pressure.Watcher(model, reserve=1, system=Scripted(model.plan.total - 50_000))
        longest = model.plan.context
        assert watcher.step().plan.context < longest
