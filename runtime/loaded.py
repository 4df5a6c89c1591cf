"""What every loaded model has: a card, a plan, its measured rows, and an end."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from . import measure
from .backends.placement import Placement
from .bitstack.stack import Stack
from .budget import Plan
from .bundle import Bundle
from .card import Card
from .errors import BackendError, UsageError
from .experts.store import Store
from .prepack import Prepared
from .session import LIBRARIES


@dataclass
class Parts:
    """What `load` made: the open bundle, its card and plan, the mapped files, and the anonymous bytes that single
    steps of loading added (tokenizer, engine)."""

    bundle: Bundle
    card: Card
    plan: Plan
    replan: Callable[..., Plan]  # plans anew as for this load, but for what it is given
    mapped: dict[str, str] = field(default_factory=dict)  # row name -> path of the mapped file
    added: dict[str, int] = field(default_factory=dict)  # row name -> anonymous bytes
    placement: dict[str, int] = field(default_factory=dict)  # execution provider -> nodes
    placed: Placement | None = None  # every node, and of those that fell back why
    nodes: tuple = ()  # of the graph, where it is profiled
    products: list = field(default_factory=list)  # (place, offset, bytes) of the weights that our products read whole
    load_s: float = 0.0
    prepared: Prepared | None = None
    stack: Stack | None = None
    experts: Store | None = None
    kept: list = field(default_factory=list)  # what else is closed with the model
    base: int | None = None  # anonymous bytes when loading was done
    code: int | None = field(default_factory=lambda: measure.folder_rss(LIBRARIES))  # of the engine, before loading

    def ready(self) -> None:
        """Loading is done: what the process holds beyond this is activations."""
        self.base = measure.anonymous_bytes()

    def grew(self, row: str, before: int | None) -> None:
        """Notes as `row` what loading added to the anonymous bytes since `before`, but for what has a row already."""
        now = measure.anonymous_bytes()
        if now is not None and before is not None:
            self.added[row] = max(0, now - before - sum(self.added.values()))


class Loaded:
    """Base of the loaded models; closing twice is allowed, using it afterwards is an error."""

    def __init__(self, parts: Parts):
        self.parts, self.card, self.plan, self.bundle = parts, parts.card, parts.plan, parts.bundle
        self.closed = False
        self._resizing = threading.Lock()  # who changes the plan of a live model takes turns

    @property
    def backend_nodes(self) -> dict[str, int]:
        """How many nodes of the graph each execution provider took."""
        return dict(self.parts.placement)

    @property
    def placement(self) -> Placement | None:
        """Where each node of the graph runs, and of those that are not on the chosen backend why."""
        return self.parts.placed

    @property
    def stack(self) -> Stack | None:
        """The weights whose number may change while the model serves; None of a model that has none."""
        return self.parts.stack

    @property
    def experts(self) -> Store | None:
        """The slots of a mixture's experts; None of a model that has none."""
        return self.parts.experts

    @property
    def elastic(self) -> Stack | Store | None:
        """What of the weights may change in size while the model serves: `entries` of a stack, or slots for experts."""
        return self.parts.stack or self.parts.experts

    def set_entries(self, entries: int) -> Plan:
        """Makes the first `entries` of the stack resident, or room for so many experts: exact control, to measure with;
        any thread, while it runs.

        Raises UsageError where there is no such number of entries or neither stack nor experts, BudgetError where the
        budget in force has no room for it, and BundleError for an entry that is damaged; nothing has changed then.
        """
        with self._resizing:
            self._open()
            if self.elastic is None:
                raise UsageError(
                    "The model has no stack, and no experts.", "Its size is fixed.",
                    "Convert it with the bitstack recipe.",
                )  # fmt: skip
            plan = self.plan
            plan = self.parts.replan(
                memory=plan.memory, context=plan.context, chunk=plan.chunk, loaded=True, entries=entries
            )
            self.elastic.set_entries(entries)
            self.plan = plan
            return plan

    def measure(self) -> dict[str, int | None]:
        """Bytes that each row of the plan holds now, by the kernel's own accounting; None where it does not tell."""
        found: dict[str, int | None] = {}
        for row in self.plan.rows:
            if row.name in self.parts.mapped:
                found[row.name] = measure.mapped_rss(self.parts.mapped[row.name])
            else:
                found[row.name] = self.parts.added.get(row.name)
        if self.stack is not None:
            found["stack"] = held = self.stack.resident()
            weights = found["weights"]  # of the same file
            found["weights"] = None if weights is None or held is None else max(0, weights - held)
        if self.experts is not None:
            found["experts"] = self.experts.resident()
        now, code = measure.anonymous_bytes(), measure.folder_rss(LIBRARIES)
        if code is not None and self.parts.code is not None:
            found["engine code"] = max(0, code - self.parts.code)
        if now is not None and self.parts.base is not None:
            found["activations"] = max(0, now - self.parts.base - (found.get("experts") or 0))
        return found

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.bundle.close()
            for part in (self.parts.stack, self.parts.experts, self.parts.prepared, *self.parts.kept):
                if part is not None:
                    part.close()

    def _open(self) -> None:
        if self.closed:
            raise BackendError("The model is closed.", "close() was called.", "Load it again.")

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.close()
