"""What waits for what: the steps of several chunks of a prompt as tasks of schedule.State.

Within a chunk a step waits for who wrote what it takes, and for whoever still reads what it writes. Across chunks only
attention waits, for that of the same block in the chunk before, whose keys it reads; and where chunks share a lane of
buffers, whatever it holds. Pure; it knows nothing about graphs, devices or arrays.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..schedule import Task
from .layout import Attend, Call, Shadow, Static, Step, gives, takes

CPU = "cpu"


class Place(NamedTuple):
    """Which step of which chunk a task is, both by their numbers."""

    chunk: int
    step: int


def build(
    static: Static, lengths: Sequence[int], wanted: Sequence[bool], lanes: int, device: str,
    seconds: Callable[[int, int], float],
) -> tuple[list[Task], list[Place]]:  # fmt: skip
    """The tasks of chunks of these `lengths`, chunk by chunk, and which is which.

    Chunk j has lane j % `lanes` of the buffers. Steps that neither a later chunk nor who wants a chunk's stream
    (`wanted`) needs are left out: the end of the last block. `device` is the processor that runs device calls, and
    `seconds(length, step)` what a step is expected to take.
    """
    tasks: list[Task] = []
    places: list[Place] = []
    wrote: list[dict[str, int]] = [{} for _ in range(lanes)]
    reading: list[dict[str, list[int]]] = [{} for _ in range(lanes)]
    attended: dict[int, int] = {}
    live = {want: needed(static, want) for want in set(wanted)}
    for chunk, length in enumerate(lengths):
        writers, readers = wrote[chunk % lanes], reading[chunk % lanes]
        for number in live[wanted[chunk]]:
            step, here = static.steps[number], len(tasks)
            needs = {writers[name] for name in takes(step) if name in writers}
            for name in gives(step):
                needs.update(readers.get(name, ()))
                if name in writers:
                    needs.add(writers[name])
            if isinstance(step, Attend):
                if step.block in attended:
                    needs.add(attended[step.block])
                attended[step.block] = here
            for name in takes(step):
                readers.setdefault(name, []).append(here)
            for name in gives(step):
                writers[name], readers[name] = here, []
            processor = device if isinstance(step, Call) and step.device else CPU
            title = f"{step.block}/{label(step)} of chunk {chunk}"
            tasks.append(Task(title, chunk, step.block, number, {processor: seconds(length, number)}, tuple(needs)))
            places.append(Place(chunk, number))
    return tasks, places


def needed(static: Static, wanted: bool) -> list[int]:
    """The numbers of the steps that attention, and the stream where it is `wanted`, depend on, ascending."""
    alive = {static.stream} if wanted else set()
    found = []
    for number, step in reversed(list(enumerate(static.steps))):
        if isinstance(step, Attend) or alive.intersection(gives(step)):
            found.append(number)
            alive.difference_update(gives(step))
            alive.update(takes(step))
    return found[::-1]


def label(step: Step) -> str:
    """A step's name within its block, as a trace shows it."""
    return f"shadow of {step.takes}" if isinstance(step, Shadow) else step.name
