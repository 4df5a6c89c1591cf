"""A learned choice among several edges against others: the figures of docs/split.md, "Several edges".

    python tests/converters/split/measure_edges.py POLICY [PART ...]

POLICY is a file of converters.split.offload. Parts are loads, unseen, preferences and lookahead (the last takes many
minutes); by default the first three. Seeds are none that a training takes worlds from. Differences are paired, world by
world, with 95 % of Student's t.
"""

import sys
from dataclasses import replace

import numpy as np

from shoal.converters.split.worlds import Context, Worlds, contexts, play
from shoal.runtime.split.learned import Policy, View, drain, encode

SPEED, RATE, SEEDS, TASKS = [1.0, 2.0, 4.0, 0.5], [5e5, 2e5, 1e5, 2e6], 32, 400
WATTS, JOULES = [1.0] * 4, [0.2, 0.4, 0.8, 0.1]  # while sending, and a unit of work: quick edges take more for it
STUDENT = {8: 2.365, 16: 2.131, 32: 2.040, 64: 1.998}  # 95 %, by how many there are


def arrivals(every: float, seeds: int = SEEDS, weight: float = 1.0) -> Context:
    """The four edges of docs/split.md and its tasks, a world for each seed."""
    tasks = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        at = np.cumsum(rng.exponential(every, TASKS))
        tasks.append((at, rng.lognormal(0, 0.5, TASKS) * 1e5, rng.lognormal(0, 1.0, TASKS)))
    at, nbytes, work = (np.stack(part) for part in zip(*tasks, strict=True))
    edges = [np.tile(np.array(values), (seeds, 1)) for values in (SPEED, RATE, WATTS, JOULES)]
    one = np.ones(seeds)
    load = (every * one, 1e5 * np.exp(0.125) * one, np.exp(0.5) * one)
    return Context(*edges, np.ones((seeds, 4), bool), at, nbytes, work, *load, weight * one, one)


def greedy(view: View) -> np.ndarray:
    return encode(view)[1].argmin(1)


def selfish(view: View) -> np.ndarray:
    sending = view.nbytes[:, None] / view.rate
    slowed = np.minimum(drain(view.works, view.speed, sending), view.work[:, None, None]).sum(2)
    own = sending + (view.work[:, None] + slowed) / view.speed
    return np.where(view.present, own, np.inf).argmin(1)


def shortest_queue(view: View) -> np.ndarray:
    return np.where(view.present, (view.works > 0).sum(2) - 1e-6 * view.speed, np.inf).argmin(1)


def blind(view: View) -> np.ndarray:
    rng = np.random.default_rng(int(view.work.sum() * 1e9) % 2**32)
    return np.where(view.present, rng.random(view.present.shape), -1).argmax(1)


def learned(policy: Policy):
    return lambda view: policy.scores(*encode(view)).argmax(1)


def paid(choose, context: Context) -> np.ndarray:
    seconds, joules = play(choose, context)
    return context.weight * seconds + (1 - context.weight) * context.scale * joules / context.at.shape[1]


def interval(values: np.ndarray) -> str:
    return f"{values.mean():+.2f} ± {STUDENT.get(len(values), 2.2) * values.std(ddof=1) / len(values) ** 0.5:.2f}"


def loads(policy: Policy) -> None:
    others = {"selfish": selfish, "shortest queue": shortest_queue, "random": blind}
    others |= {f"edge {place}": (lambda view, place=place: np.full(len(view.work), place)) for place in range(4)}
    for every in (2.0, 0.5, 0.3, 0.2):
        context = arrivals(every)
        base, found = paid(greedy, context), paid(learned(policy), context)
        rest = ", ".join(f"{name} {paid(choose, context).mean():.3f}" for name, choose in others.items())
        print(f"every {every}: greedy {base.mean():.3f}, learned {found.mean():.3f}, {rest}")
        print(f"  learned - greedy, % of greedy: {interval(100 * (found - base) / base.mean())}")
        for factor in (0.5, 2.0):
            off = paid(learned(policy), replace(context, every=context.every * factor))
            print(f"  with {factor} of the true seconds between tasks: {interval(100 * (off - base) / base.mean())}")


def unseen(policy: Policy) -> None:
    def drawn(seed: int, **terms) -> Context:
        return contexts(np.random.default_rng(1_000_000 + seed), 64, 300, **terms)

    rng = np.random.default_rng(5)
    usual = drawn(1, preferences=False)
    wide = drawn(2, preferences=False)
    wide = replace(wide, speed=wide.speed**2, at=wide.at * 1.0)
    total = [np.where(one.present, one.speed, 0).sum(1) for one in (drawn(2, preferences=False), wide)]
    wide = replace(wide, at=wide.at * (total[0] / total[1])[:, None], every=wide.every * total[0] / total[1],
                   rate=wide.rate * (total[1] / total[0])[:, None])  # fmt: skip
    shape = usual.work.shape
    cases = {
        "as in training": usual,
        "any preference": drawn(3),
        "8 to 12 edges": drawn(4, preferences=False, edges=(8, 12)),
        "speeds 1 : 256": wide,
        "work exponential": replace(usual, work=rng.exponential(1, shape)),
        "work all alike": replace(usual, work=np.ones(shape)),
        "work Pareto 1.5": replace(usual, work=(rng.pareto(1.5, shape) + 1) / 3),
        "tasks in pairs": replace(usual, at=np.repeat(usual.at[:, ::2], 2, 1)),
    }
    for name, context in cases.items():
        base, found = paid(greedy, context), paid(learned(policy), context)
        print(f"{name}: {interval(100 * (found / base - 1))} % of greedy; better in {(found < base).mean():.2f}")
        load = context.typical_work / context.every / np.where(context.present, context.speed, 0).sum(1)
        for least, most in ((0, 0.5), (0.5, 0.9), (0.9, 9)):
            rows = (load >= least) & (load < most)
            if name in ("as in training", "any preference") and rows.sum() > 2:
                print(f"  load {least} to {most}, {rows.sum()} worlds: {interval(100 * (found / base - 1)[rows])}")


def volume(points: np.ndarray, reference: tuple[float, float]) -> float:
    """The area that points [n, 2], the less the better, dominate below `reference`."""
    area, height = 0.0, reference[1]
    for first, second in sorted(map(tuple, points)):
        if first < reference[0] and second < height:
            area += (reference[0] - first) * (height - second)
            height = second
    return area


def preferences(policy: Policy) -> None:
    """Seconds and joules of a task, 11 weights: what is dominated of the area below (10 s, 1.5 J)."""
    reference, weights = (10.0, 1.5), np.linspace(0, 1, 11)
    for every in (0.5, 0.3, 0.2):
        volumes = {}
        for name, choose in {"greedy": greedy, "learned": learned(policy), "selfish": selfish,
                             "shortest queue": shortest_queue, "random": blind}.items():  # fmt: skip
            points = []
            for weight in weights if name in ("greedy", "learned") else (1.0,):
                seconds, joules = play(choose, arrivals(every, weight=weight))
                points.append(np.stack([seconds, joules / TASKS], 1))
            front = np.stack(points, 1)
            volumes[name] = np.array([volume(seed, reference) for seed in front])
            print(f"  {name}: {'; '.join(f'{a:.2f} s {b:.3f} J' for a, b in front.mean(0))}")
        base = volumes["greedy"]
        print(f"every {every}: " + ", ".join(f"{name} {found.mean():.3f}" for name, found in volumes.items()))
        print(f"  learned - greedy, % of greedy: {interval(100 * (volumes['learned'] - base) / base.mean())}")


def lookahead(_: Policy, futures: int = 16, steps: int = 16, seeds: int = 8) -> None:
    """Each edge is tried with as many futures as the load lets expect, which the greedy goes on in."""
    for every in (0.5, 0.3, 0.2):
        context, rng = arrivals(every, seeds), np.random.default_rng(1)
        worlds, edges = Worlds(context), 4
        for task in range(TASKS):
            nbytes, work = context.nbytes[:, task], context.work[:, task]
            worlds.until(context.at[:, task])
            rows = np.repeat(np.arange(seeds), edges * futures)
            tried = worlds.rows(rows)
            start = tried.waited.copy()
            tried.place(np.tile(np.repeat(np.arange(edges), futures), seeds), nbytes[rows], work[rows])
            shape = (seeds, 1, futures, steps)

            def same(values: np.ndarray) -> np.ndarray:  # the same futures for each edge
                return np.repeat(values, edges, 1).reshape(-1, steps)  # noqa: B023

            gaps = same(np.cumsum(rng.exponential(every, shape), 3))
            sizes, loads_ = same(rng.lognormal(0, 0.5, shape) * 1e5), same(rng.lognormal(0, 1.0, shape))
            for step in range(steps):
                tried.until(context.at[rows, task] + gaps[:, step])
                tried.place(greedy(tried.view(sizes[:, step], loads_[:, step])), sizes[:, step], loads_[:, step])
            tried.until(np.full(len(rows), np.inf))
            costs = (tried.waited - start).reshape(seeds, edges, futures).mean(2)
            worlds.place(costs.argmin(1), nbytes, work)
        worlds.until(np.full(seeds, np.inf))
        found, base = worlds.waited / TASKS, paid(greedy, context)
        print(f"every {every}: greedy {base.mean():.3f}, lookahead {found.mean():.3f}")
        print(f"  lookahead - greedy, % of greedy: {interval(100 * (found - base) / base.mean())}", flush=True)


if __name__ == "__main__":
    policy = Policy.load(sys.argv[1])
    for part in sys.argv[2:] or ["loads", "unseen", "preferences"]:
        globals()[part](policy)
