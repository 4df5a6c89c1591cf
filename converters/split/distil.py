"""Training of an encoder and a decoder in the place of a network's first part, in stages that can be killed and go on.

Stage 1 distils features: HND the one at the cut (Matsubara and Levorato 2020), GHND also later ones of the frozen tail,
plus the message's bits where a prior measures them (Matsubara et al. 2022). Stage 2 trains decoder and tail for the
task with the encoder frozen, so that one deployed encoder serves many tails (BottleFit, Matsubara et al. 2022). `fit`
is the loop under both: its order and its noise follow from the seed, so a run that was killed ends as one that was not.
Losses are sums over a row's features, averaged over rows. It knows nothing about images, cuts or files of networks.
"""

import contextlib
import hashlib
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from shoal.runtime.errors import StorageError, UsageError
from shoal.runtime.events import Event, Progress, silent

from .entropic import FactorisedPrior
from .network import Network
from .slimmable import sandwich

Batch = Mapping[str, torch.Tensor]
Loss = Callable[[Batch, torch.Generator], torch.Tensor]
CUT = "cut"  # the name of the feature at the cut among teachers' features


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. `rate` is divided by 10 after the epochs in `drops`, or falls like a cosine to 0; `sgd` is
    SGD with momentum 0.9 instead of Adam."""

    epochs: int = 10
    batch: int = 64
    rate: float = 1e-3
    drops: tuple[int, ...] = ()
    cosine: bool = False
    sgd: bool = False
    decay: float = 0.0
    clip: float = 0.0  # of the gradient's norm
    seed: int = 0

    def __post_init__(self):
        if self.epochs < 0 or self.batch < 1 or not self.rate > 0:
            said = f"{self.epochs} epochs of batches of {self.batch} at a rate of {self.rate}"
            raise UsageError("A training cannot have this schedule.", f"It has {said}.", "Correct the recipe's split.")

    def at(self, step: float) -> float:
        """The rate at `step` epochs."""
        if self.cosine:
            return self.rate * 0.5 * (1 + float(np.cos(np.pi * min(step / max(self.epochs, 1), 1.0))))
        return self.rate * 0.1 ** sum(step >= drop for drop in self.drops)


class Rows:
    """Arrays with as many rows each, by name; mapped files too. Of `copies`, rows i + n, i + 2 n, ... are row i changed
    (mirrored, say), and an epoch takes one of them."""

    def __init__(self, arrays: Mapping[str, np.ndarray], copies: int = 1):
        lengths = {len(array) for array in arrays.values()}
        if len(lengths) != 1 or 0 in lengths or lengths.pop() % copies:
            said = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
            raise UsageError(
                "These rows cannot be trained on.", f"Their numbers are {said or 'none'}.", "Give as many."
            )
        self.arrays, self.copies = dict(arrays), copies
        self.whole = len(next(iter(arrays.values())))
        self.count = self.whole // copies

    def take(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """A batch; halves become fp32, bytes stay."""
        batch = {name: torch.from_numpy(np.ascontiguousarray(array[rows])) for name, array in self.arrays.items()}
        return {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}

    def batches(self, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """All rows in their order, changed copies left out."""
        for at in range(0, self.count, size):
            yield self.take(np.arange(at, min(at + size, self.count)))


class Student(nn.Module):
    """`encoder`, what the latent goes through (`channel`: Levels or a FactorisedPrior), `decoder` and `tail`. `taps`
    are module paths inside the tail whose outputs are features too."""

    def __init__(
        self, encoder: nn.Module, channel: nn.Module, decoder: nn.Module, tail: nn.Module, taps: Sequence[str] = ()
    ):
        super().__init__()
        self.encoder, self.channel, self.decoder, self.tail = encoder, channel, decoder, tail
        self.choices: int = getattr(encoder, "choices", 1)
        self.taps = tuple(taps)

    def encode(self, x: torch.Tensor, choice: int = 0) -> torch.Tensor:
        return self.encoder(x, choice) if self.choices > 1 else self.encoder(x)

    def send(self, latent: torch.Tensor, bits: int = 0, choice: int = 0, generator=None) -> torch.Tensor:
        """The latent as the other side gets it."""
        if isinstance(self.channel, FactorisedPrior):
            return self.channel(latent, generator)
        return self.channel(latent, bits, choice) if bits else latent

    def cost(self, sent: torch.Tensor) -> torch.Tensor:
        """Bits of each number of latents, under the prior."""
        assert isinstance(self.channel, FactorisedPrior)
        return self.channel.bits(sent)

    def features(self, latent: torch.Tensor) -> dict[str, torch.Tensor]:
        """CUT and the taps; of the tail no more is computed than they need."""
        cut = self.decoder(latent)
        return {CUT: cut, **inner(self.tail, self.taps, cut)}

    def decode(self, latent: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The features (CUT and the taps) and the outputs."""
        cut = self.decoder(latent)
        features, outputs = answered(self.tail, self.taps, cut)
        return {CUT: cut, **features}, outputs

    def forward(self, x, bits: int = 0, choice: int = 0):
        return self.decode(self.send(self.encode(x, choice), bits, choice))[1]

    def stage(self, number: int) -> list[nn.Parameter]:
        """Readies stage 1 (encoder, channel and decoder learn) or 2 (decoder and tail); returns what learns. The tail's
        norms keep their statistics."""
        learns = (self.encoder, self.channel, self.decoder) if number == 1 else (self.decoder, self.tail)
        for part in (self.encoder, self.channel, self.decoder, self.tail):
            part.train(part in learns and part is not self.tail)
            part.requires_grad_(part in learns)
        return [parameter for part in learns for parameter in part.parameters()]


def answered(tail: nn.Module, taps: Sequence[str], cut: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A tail's features and outputs. A `Network` knows its values by name, of other modules the paths are hooked."""
    if isinstance(tail, Network):
        found = tail.features([*taps, tail.graph.outputs[0]], cut)
        return {name: found[name] for name in taps}, found[tail.graph.outputs[0]]
    with tapped(tail, taps) as features:
        outputs = tail(cut)
    return features, outputs


def inner(tail: nn.Module, taps: Sequence[str], cut: torch.Tensor) -> dict[str, torch.Tensor]:
    """The features alone: of the tail no more is computed than they need."""
    if not taps:
        return {}
    if isinstance(tail, Network):
        return tail.features(list(taps), cut)
    with tapped(tail, taps, enough=len(set(taps))) as features, contextlib.suppress(_Enough):
        tail(cut)
    return features


class _Enough(Exception):
    """All features are there."""


@contextlib.contextmanager
def tapped(module: nn.Module, names: Sequence[str], enough: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """What the submodules `names` give while the block runs. Raises UsageError for a name that there is none of."""
    features: dict[str, torch.Tensor] = {}
    known = dict(module.named_modules())
    if missing := [name for name in names if name not in known]:
        why = f"It has {', '.join(name for name in list(known)[1:9])}, ..."
        raise UsageError(f"The tail has no module {missing[0]!r}.", why, "Name features by module path.")

    def keep(output: torch.Tensor, name: str) -> None:
        features[name] = output
        if len(features) == enough:
            raise _Enough

    handles = [known[name].register_forward_hook(lambda _, __, output, name=name: keep(output, name)) for name in names]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def teach(head: nn.Module, tail: nn.Module, taps: Sequence[str], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The teacher's features, by CUT and taps, and its outputs under "outputs"."""
    cut = head(x)
    features, outputs = answered(tail, taps, cut)
    return {CUT: cut, **features, "outputs": outputs}


def distance(features: Batch, wanted: Batch, names: Sequence[str]) -> torch.Tensor:
    """The sum of squared differences of the named features, a row."""
    total = torch.zeros(())
    for name in names:
        total = total + F.mse_loss(features[name].float(), wanted[name].float(), reduction="sum")
    return total / len(wanted[names[0]])


def stage1(
    student: Student, *, names: Sequence[str] = (CUT,), bits: Sequence[int] = (0,), beta: float = 0.0, copies: int = 3,
    weights: Mapping[str, float] | None = None, bf16: bool = False,
) -> Loss:  # fmt: skip
    """HND where `names` is CUT alone, GHND with taps of the tail beside it. Batches have "input" and the teacher's
    features by name. Each step draws the number of bits, and runs the choices of a sandwich. `beta` weighs a bit of the
    message against a unit of squared error."""

    def loss(batch: Batch, generator: torch.Generator) -> torch.Tensor:
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        total = torch.zeros(())
        for choice in sandwich(student.choices, copies, rng):
            drawn = int(rng.choice(list(bits)))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                latent = student.encode(batch["input"], choice).float()
                sent = student.send(latent, drawn, choice, generator)
                cost = student.cost(sent) if beta else None
                features = student.features(sent) if len(names) > 1 else {CUT: student.decoder(sent)}
            wanted = {name: batch[name] for name in names}
            for name in names:
                scale = (weights or {}).get(name, 1.0)
                total = total + scale * distance(features, wanted, (name,))
            if cost is not None:
                total = total + beta * cost.sum() / len(cost)
        return total

    return loss


def stage2(
    student: Student, *, modes: Sequence[tuple[int, int]] = ((0, 0),), alpha: float = 0.5, bf16: bool = False
) -> Loss:
    """Cross-entropy (`alpha` 1), or with the teacher's answers beside it: alpha CE + (1 - alpha) KL at temperature 1. A
    batch has "latent" (or one for each choice: "latent1", ...), "outputs" of the teacher and "label" where alpha > 0.
    Outputs that are no logits [n, classes] are distilled as features are, whatever `alpha` is. Each step draws one of
    `modes`, (choice, bits)."""

    def loss(batch: Batch, generator: torch.Generator) -> torch.Tensor:
        choice, bits = modes[int(torch.randint(len(modes), (), generator=generator))]
        with torch.no_grad():
            named = f"latent{choice}"
            latent = student.send(batch[named if named in batch else "latent"], bits, choice)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = student.tail(student.decoder(latent)).float()
        if logits.ndim != 2:
            return distance({"outputs": logits}, batch, ("outputs",))
        total = torch.zeros(())
        if alpha:
            total = total + alpha * F.cross_entropy(logits, batch["label"].long())
        if alpha < 1:
            wanted = F.log_softmax(batch["outputs"], 1)
            kl = F.kl_div(F.log_softmax(logits, 1), wanted, reduction="batchmean", log_target=True)
            total = total + (1 - alpha) * kl
        return total

    return loss


def fit(
    module: nn.Module, learns: Sequence[nn.Parameter], loss: Loss, rows: Rows, schedule: Schedule, *,
    checkpoint: str | os.PathLike | None = None, every: float = 60.0, stage: str = "train", progress: Progress = silent,
) -> list[float]:  # fmt: skip
    """Trains, and returns each epoch's mean loss. `checkpoint` is a file from which it goes on if it was interrupted,
    at most `every` seconds of work earlier, to the same result; it stays, and a finished one is only read. Raises
    StorageError, and UsageError for a checkpoint of another training."""
    optimiser: torch.optim.Optimizer
    if schedule.sgd:
        optimiser = torch.optim.SGD(list(learns), lr=schedule.rate, weight_decay=schedule.decay, momentum=0.9)
    else:
        optimiser = torch.optim.Adam(list(learns), lr=schedule.rate, weight_decay=schedule.decay)
    steps = -(-rows.count // schedule.batch)
    generator = torch.Generator()
    epoch, step, sums, losses = 0, 0, 0.0, list[float]()
    said = f"{schedule} {rows.count} {[tuple(parameter.shape) for parameter in learns]}"
    if checkpoint is not None and os.path.exists(checkpoint):
        state = _load(checkpoint, said)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"])
        epoch, step, sums, losses = state["epoch"], state["step"], state["sums"], state["losses"]
    saved = time.monotonic()

    def save() -> None:
        if checkpoint is not None:
            state = {"said": said, "module": module.state_dict(), "optimiser": optimiser.state_dict(),
                     "generator": generator.get_state(), "epoch": epoch, "step": step, "sums": sums,
                     "losses": losses}  # fmt: skip
            store(checkpoint, state)

    while epoch < schedule.epochs:
        order = np.random.default_rng((schedule.seed, epoch)).permutation(rows.count)
        if rows.copies > 1:
            drawn = np.random.default_rng((schedule.seed, epoch, 1)).integers(0, rows.copies, rows.count)
            order += rows.count * drawn
        if step == 0:
            generator.manual_seed((schedule.seed << 20) + epoch)
        while step < steps:
            for group in optimiser.param_groups:
                group["lr"] = schedule.at(epoch + step / steps)
            chosen = order[step * schedule.batch : (step + 1) * schedule.batch]
            value = loss(rows.take(chosen), generator)
            optimiser.zero_grad()
            value.backward()
            if schedule.clip:
                nn.utils.clip_grad_norm_(list(learns), schedule.clip)
            optimiser.step()
            sums += float(value.detach()) * len(chosen)
            step += 1
            detail = f"loss {sums / min(step * schedule.batch, rows.count):.4g}"
            progress(Event(stage, epoch * steps + step, schedule.epochs * steps, detail, "steps"))
            if step < steps and time.monotonic() - saved > every:
                save()
                saved = time.monotonic()
        losses.append(sums / rows.count)
        epoch, step, sums = epoch + 1, 0, 0.0
        save()
        saved = time.monotonic()
    return losses


def store(path: str | os.PathLike, state: Mapping) -> None:
    """Writes `state` of tensors and plain values as a file that is whole or not there. Raises StorageError."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError where the disk is full
        raise StorageError(f"{path} cannot be written.", str(error), "Free space, or choose another folder.") from None


def _load(path: str | os.PathLike, said: str) -> dict:
    try:
        state = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise StorageError(f"The checkpoint {path} cannot be read.", str(error)[:200], "Delete it.") from None
    if not isinstance(state, dict) or state.get("said") != said:
        why = "It is of another schedule, other data or another network."
        raise UsageError(f"The checkpoint {path} is not of this training.", why, "Delete it, or name another.")
    return state


def digest(module: nn.Module) -> str:
    """SHA-256, in hex, of every weight and statistic of a module: two that are the same give the same."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()
