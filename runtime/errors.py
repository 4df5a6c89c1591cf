"""What a person reads when shoal cannot go on.

Every failure that leaves the library is a `ShoalError`: *what* happened, *why*, and what would *fix* it, each one
sentence. A family is a subclass; its `code` is the CLI's exit status and never changes meaning (see docs/errors.md).
This module imports nothing, so every other one may use it.
"""


class ShoalError(Exception):
    """Root of every failure. `what`, `why` and `fix` are sentences for a person; `code` is the exit status."""

    code = 1

    def __init__(self, what: str, why: str, fix: str):
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  fix: {self.fix}"


class UsageError(ShoalError):
    """An argument has a wrong type or value."""

    code = 2


class SourceError(ShoalError):
    """A checkpoint (GGUF file, Hugging Face folder) is missing, damaged or incomplete."""

    code = 3


class ConvertError(ShoalError):
    """A readable checkpoint cannot become a bundle: an unsupported model, recipe or tensor."""

    code = 4


class BundleError(ShoalError):
    """A bundle is not one, is damaged, too new, or changed while it was in use."""

    code = 5


class BudgetError(ShoalError):
    """The model does not fit the memory it was given. `plan` holds the table that shows it."""

    code = 6
    plan = None


class BackendError(ShoalError):
    """An execution provider is absent, refused a graph or failed while running it. `placement` is where the graph's
    nodes run, where that is what is wrong."""

    code = 7
    placement: object = None


class ContextError(ShoalError):
    """A prompt, or a prompt and its answer, do not fit the context."""

    code = 8


class StorageError(ShoalError):
    """The disk is full, read-only, or a cache folder cannot be used."""

    code = 9


class BusyError(ShoalError):
    """Every slot is taken and the queue is full; the same request may work later."""

    code = 10


class MissingPackageError(ShoalError):
    """An optional package that this feature needs is not installed."""

    code = 11


class LinkError(ShoalError):
    """A link to a peer broke, fell silent, or carries what is not our protocol."""

    code = 12


class TrustError(ShoalError):
    """A peer is not paired or no longer trusted, a pairing failed, or a signature does not hold."""

    code = 13


class RemoteError(ShoalError):
    """The peer refused a request or failed at it; `what`, `why` and `fix` are what it said."""

    code = 14
