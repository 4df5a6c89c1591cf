"""What every loaded model has: a card, a plan, its measured rows, and an end."""

from dataclasses import dataclass, field

from . import measure
from .budget import Plan
from .bundle import Bundle
from .card import Card
from .errors import BackendError
from .prepack import Prepared
from .session import LIBRARIES


@dataclass
class Parts:
    """What `load` made: the open bundle, its card and plan, the mapped files, and the anonymous bytes that single
    steps of loading added (tokenizer, engine)."""

    bundle: Bundle
    card: Card
    plan: Plan
    mapped: dict[str, str] = field(default_factory=dict)  # row name -> path of the mapped file
    added: dict[str, int] = field(default_factory=dict)  # row name -> anonymous bytes
    placement: dict[str, int] = field(default_factory=dict)  # execution provider -> nodes
    nodes: tuple = ()  # of the graph, where it is profiled
    products: list = field(default_factory=list)  # (place, offset, bytes) of the weights that our products read whole
    load_s: float = 0.0
    prepared: Prepared | None = None
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

    @property
    def backend_nodes(self) -> dict[str, int]:
        """How many nodes of the graph each execution provider took."""
        return dict(self.parts.placement)

    def measure(self) -> dict[str, int | None]:
        """Bytes that each row of the plan holds now, by the kernel's own accounting; None where it does not tell."""
        found: dict[str, int | None] = {}
        for row in self.plan.rows:
            if row.name in self.parts.mapped:
                found[row.name] = measure.mapped_rss(self.parts.mapped[row.name])
            else:
                found[row.name] = self.parts.added.get(row.name)
        now, code = measure.anonymous_bytes(), measure.folder_rss(LIBRARIES)
        if code is not None and self.parts.code is not None:
            found["engine code"] = max(0, code - self.parts.code)
        if now is not None and self.parts.base is not None:
            found["activations"] = max(0, now - self.parts.base)
        return found

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.bundle.close()
            for part in (self.parts.prepared, *self.parts.kept):
                if part is not None:
                    part.close()

    def _open(self) -> None:
        if self.closed:
            raise BackendError("The model is closed.", "close() was called.", "Load it again.")

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.close()
