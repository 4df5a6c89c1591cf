"""What every loaded model has: a card, a plan, its measured rows, and an end."""

from dataclasses import dataclass, field

from . import measure
from .budget import Plan
from .bundle import Bundle
from .card import Card
from .errors import BackendError


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
    load_s: float = 0.0


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
        return found

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.bundle.close()

    def _open(self) -> None:
        if self.closed:
            raise BackendError("The model is closed.", "close() was called.", "Load it again.")

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.close()
