"""Cache policies: against references in plain Python, and against what no cache can do."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from shoal.runtime.errors import BackendError, UsageError
from shoal.runtime.experts.policies import POLICIES, simulate
from shoal.runtime.experts.predictors import guesses
from shoal.runtime.kernels import build

HERE = Path(__file__).resolve().parent
NEVER = 1 << 60


def reference(trace, slots: int, policy: str) -> tuple[int, int]:
    """(hits, misses) of lru, lfu or belady without guesses; a token's experts of a layer are all there at once."""
    cached: set[tuple[int, int]] = set()
    used: dict[tuple[int, int], int] = {}
    uses: dict[tuple[int, int], int] = {}
    clock = hits = misses = 0
    future = [
        [(layer, int(expert)) for expert in trace.ids[token, layer] if expert >= 0]
        for token in range(trace.tokens) for layer in range(trace.layers)
    ]  # fmt: skip

    def next_use(one, after: int) -> int:
        return next((step for step in range(after + 1, len(future)) if one in future[step]), NEVER)

    for step, needed in enumerate(future):
        if step % trace.layers == 0 and step // trace.layers in trace.starts:
            uses.clear()
        for one in reversed(needed):
            clock += 1
            used[one] = clock
            uses[one] = uses.get(one, 0) + 1
        worth = {
            "lru": lambda one: used[one],
            "lfu": lambda one: (uses.get(one, 0), used[one]),
            "belady": lambda one, step=step: (-next_use(one, step), used[one]),
        }[policy]
        here = {one for one in needed if one in cached}
        for one in needed:
            if one in cached and one in here:
                hits += 1
                continue
            misses += 1
            if len(cached) >= slots:
                able = [other for other in cached if other not in here]
                if not able:
                    continue
                cached.remove(min(able, key=worth))
            cached.add(one)
            here.add(one)
    return hits, misses


def run(trace, slots: int, policy: str = "lru", **options):
    scores = trace.scores if trace.scores is None else trace.scores.astype(np.float32)
    return simulate(trace.ids, trace.experts, slots, policy, scores=scores, starts=trace.starts, **options)


@pytest.mark.parametrize("policy", ["lru", "lfu", "belady"])
@pytest.mark.parametrize("shape", [(60, 1, 8, 2), (40, 3, 6, 2), (40, 4, 5, 3)])
def test_the_simulator_equals_plain_python(routing, policy, shape):
    for seed in range(3):
        trace = routing(*shape, memory=0.7, seed=seed)
        for slots in range(1, shape[1] * shape[2] + 1, 2):
            counts = run(trace, slots, policy)
            assert (counts.hits.sum(), counts.misses.sum()) == reference(trace, slots, policy), (seed, slots)


def test_by_hand(of_ids):
    # One layer, one expert a token, two slots: 0 1 2 0 1
    trace = of_ids([[[0]], [[1]], [[2]], [[0]], [[1]]], experts=3)
    # lru: 0 and 1 come; 2 takes 0's slot, 0 takes 1's, 1 takes 2's
    found = run(trace, 2, "lru").total()
    assert (found["hits"], found["misses"], found["compulsory"]) == (0, 5, 3)
    # belady: 2 takes the slot of 1, which is needed after 0; 0 is there; 1 comes again
    found = run(trace, 2, "belady").total()
    assert (found["hits"], found["misses"], found["compulsory"]) == (1, 4, 3)


def test_guesses_by_hand(of_ids):
    # Two layers of three experts, one a token, three slots; layer 1 uses 0, 1, 0
    trace = of_ids([[[0], [0]], [[0], [1]], [[0], [0]]], experts=3)
    guessed = np.full((3, 2, 1), -1, np.int32)
    guessed[:, 1, 0] = [2, 1, 0]
    # Token 0: (0,0) misses, a slot each; the guess (1,2) is wrong and takes one, (1,0) misses and takes the last.
    # Token 1: (0,0) hits; the guess (1,1) takes the slot of (1,2), never used, and is right.
    # Token 2: (0,0) hits; the guess (1,0) is there: no read, and it hits
    found = run(trace, 3, "lru", predicted=guessed).total()
    assert found == {
        "hits": 4, "misses": 2, "compulsory": 2, "prefetched": 2, "useful": 1, "late": 0, "wasted": 1,
        "cold": 3, "foretold": 1,
    }  # fmt: skip
    # With no time to read, the right guess is late and its expert is missed
    found = run(trace, 3, "lru", predicted=guessed, reads=0.0).total()
    assert (found["prefetched"], found["late"], found["wasted"], found["misses"]) == (0, 1, 0, 3)
    # Every second layer has time for one: the first of the two that are asked for in layer 1, at steps 1 and 3
    found = run(trace, 3, "lru", predicted=guessed, reads=0.5).total()
    assert found["prefetched"] == 2


def test_a_guess_does_not_evict_a_guess(of_ids):
    # Two slots, one of which the layer before holds: of two guesses one finds room, and keeps it
    trace = of_ids([[[0], [1]]] * 4, experts=4)
    guessed = np.full((4, 2, 2), -1, np.int32)
    guessed[:, 1] = [1, 2]
    found = run(trace, 2, "lru", predicted=guessed).total()
    # The first guess is right: all of layer 1 are hits, and (1,2) never finds a slot
    assert found["prefetched"] == found["useful"] == 1 and found["wasted"] == 0


@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_a_larger_cache_is_never_worse(routing, policy):
    for seed in range(3):
        trace = routing(150, 3, 8, 2, seed=seed)
        hits = [run(trace, slots, policy).hits.sum() for slots in range(1, 26)]
        assert hits == sorted(hits)
        # With room for all, only first uses are missed
        last = run(trace, 24, policy)
        assert (last.misses == last.compulsory).all()


@pytest.mark.parametrize("slots", [6, 9, 12, 18])
def test_nobody_reads_less_than_belady(routing, slots):
    for memory in (0.0, 0.9):
        trace = routing(150, 3, 8, 2, memory=memory)
        least = run(trace, slots, "belady").reads.sum()
        for policy in POLICIES:
            assert run(trace, slots, policy).reads.sum() >= least
            for predictor in ("repeat", "popular", "oracle"):
                found = run(trace, slots, policy, predicted=guesses(trace, predictor), reads=1.5)
                assert found.reads.sum() >= least, (policy, predictor)


def test_lru_at_a_token_s_experts_is_belady(routing):
    # All slots are the present token's, whatever the policy: what it needs next decides nothing
    for memory in (0.0, 0.8, 0.95):
        trace = routing(300, 1, 32, 4, memory=memory)
        least = run(trace, 4, "belady").total()
        for policy in POLICIES:
            assert run(trace, 4, policy).total() == least, policy


def test_every_policy_counts_every_use_once(routing):
    trace = routing(100, 3, 8, 2)
    guessed = guesses(trace, "repeat")
    for policy in POLICIES:
        for slots in (2, 7, 24):
            found = run(trace, slots, policy, predicted=guessed, reads=2.0)
            assert found.uses.sum() == (trace.ids >= 0).sum() and len(found.uses) == len(trace.starts)
            assert (found.compulsory <= found.misses).all() and found.foretold.sum() <= found.cold.sum()
            # At the end a guess was used, was not, or waits for nothing: all are told
            assert found.prefetched.sum() == found.useful.sum() + found.wasted.sum()


def test_the_oracle_leaves_nothing_but_first_tokens_to_wait_for(routing):
    trace = routing(100, 3, 8, 2)
    found = run(trace, 12, "lru", predicted=guesses(trace, "oracle"))
    assert found.misses.sum() == 0 and found.wasted.sum() == 0
    assert found.foretold.sum() == found.cold.sum() > 0


def test_parameters_make_a_mixture_one_of_its_parts(routing):
    trace = routing(200, 3, 8, 2, sequences=1, memory=0.5)
    lfu = run(trace, 9, "lfu").total()
    assert run(trace, 9, "hobbit", parameters=(0, 1, 0, 0)).total() == lfu
    assert run(trace, 9, "apex").total() != lfu
    # All of the weight on the layer distance, as published and as it should be
    late, soon = (run(trace, 9, "hobbit", parameters=(0, 0, 0, 1, flag)).hits.sum() for flag in (1, 0))
    assert soon != late
    # Without a layer that stays: least recently used
    lru = run(trace, 16, "lru").total()
    assert run(trace, 16, "shallow", parameters=(0,)).total() == lru != run(trace, 16, "shallow").total()


def test_layer_distance_by_hand(of_ids):
    # Three layers of one expert a token, three slots; the second token needs another one in layer 0
    trace = of_ids([[[0], [0], [0]], [[1], [0], [0]]], experts=2)
    distance = (0, 0, 0, 1)
    # From layer 0 the next layers are 1 (0 away), 2 (1 away) and 0 (2 away): (0,0) leaves, the others are hits
    assert run(trace, 3, "hobbit", parameters=(*distance, 0)).hits.sum() == 2
    # As published the present layer is the nearest: (2,0) leaves, and is missed
    assert run(trace, 3, "hobbit", parameters=(*distance, 1)).hits.sum() == 1
    # The last token used (1,0) and (2,0), but in layer 0 the last token is this one
    assert run(trace, 3, "apex").hits.sum() == 2


def test_shallow_keeps_the_first_layer(routing):
    trace = routing(300, 4, 8, 2, memory=0.0, sequences=1)
    kept = run(trace, 16, "shallow", parameters=(1,))
    # Eight reads bring the first layer, for good: the others share eight slots, and until then those that are free
    others = simulate(trace.ids[:, 1:], 8, 8, "lru").misses.sum()
    assert others <= kept.misses.sum() <= 8 + others


def test_scores_beyond_the_choice_are_what_mrs_lives_on(routing):
    trace = routing(600, 2, 16, 2, memory=0.9)
    with_scores = run(trace, 12, "mrs").hits.sum()
    without = simulate(trace.ids, 16, 12, "mrs", starts=trace.starts).hits.sum()
    assert with_scores > without


def test_impossible_arguments_are_refused(routing):
    trace = routing(20, 2, 8, 2)
    with pytest.raises(UsageError):
        run(trace, 4, "best")
    with pytest.raises(UsageError):
        run(trace, 0)
    with pytest.raises(UsageError):
        run(trace, 4, predicted=np.zeros((3, 2, 2), np.int32))
    with pytest.raises(UsageError):
        simulate(trace.ids, 9, 4, scores=trace.scores)
    with pytest.raises(UsageError):
        run(trace, 4, parameters=(float("nan"),))
    with pytest.raises(BackendError):
        simulate(trace.ids, 4, 4)  # ids beyond
    with pytest.raises(BackendError):
        simulate(trace.ids, 8, 4, starts=(0, 20))
    with pytest.raises(BackendError):
        simulate(trace.ids, 8, 4, starts=(0, 5, 5))


def test_random_calls_leave_the_bookkeeping_whole(tmp_path):
    try:
        compiler = build.Compiler(extra=["-Werror", "-O1", "-g1", "-fsanitize=address,undefined"])
        sources = [build.HERE / "expert_cache.cpp", HERE / "check_expert_cache.cpp"]
        program = compiler.link(compiler.compile(sources, tmp_path), tmp_path / "check")
    except build.BuildError as error:
        pytest.skip(str(error)[:200])
    done = subprocess.run([program, "1", "400"], capture_output=True, text=True)
    assert done.returncode == 0 and "all as it should be" in done.stdout, done.stderr
