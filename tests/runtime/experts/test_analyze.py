"""The figures of an analysis, worked by hand where they are small, and what they have to say about made-up routing."""

import json

import numpy as np
import pytest

from shoal.runtime.errors import UsageError
from shoal.runtime.experts.analyze import Hardware, analyze, sch, second_backend, sizes, srp
from shoal.runtime.experts.policies import depths, simulate
from shoal.runtime.experts.predictors import guesses, possible, recall, train_predictor
from shoal.runtime.experts.split import Costs


def test_srp_by_hand(of_ids):
    # Windows of 2 over 0 0 1 0: {0: 2}, {0: 1, 1: 1}, {1: 1, 0: 1}; all uses A = 6
    trace = of_ids([[[0]], [[0]], [[1]], [[0]]], experts=3)
    found = srp(trace, 2)
    # p = 0: TP 6, P = 2 * 9 = 18, F1 = 12/24. p = 1: TP 6, P = 2 * 5 = 10, F1 = 12/16. p = 2: TP 2, P 2, F1 = 4/8
    assert found["value"] == 0.75 and found["slots"] == pytest.approx(10 / 6)
    assert found["low"] is None  # of one sequence


def test_srp_does_not_look_across_sequences_and_pools_layers(of_ids):
    # Two sequences 0 0 | 1 1 in layer 0, 0 1 | 2 2 in layer 1. Windows of 2: {0: 2}, {1: 2}, {0: 1, 1: 1}, {2: 2}
    trace = of_ids([[[0], [0]], [[0], [1]], [[1], [2]], [[1], [2]]], experts=3, starts=(0, 2))
    # A = 8. p = 1: TP 8, P = 2 * 5, F1 = 16/18. p = 2: TP 6, P = 6, F1 = 12/14
    found = srp(trace, 2)
    assert found["value"] == pytest.approx(16 / 18) and found["slots"] == pytest.approx(10 / 8)
    # The first sequence alone: A = 4; p = 1: TP 4, P 6, F1 = 8/10; p = 2: TP 2, P 2, F1 = 4/6. The second alone: 1
    assert found["low"] == pytest.approx(0.8) and found["high"] == 1
    assert srp(trace, 3)["value"] is None  # no sequence is so long


def test_a_window_of_everything_counts_everything(of_ids):
    # Always the same two: any p from 1 chooses just them
    trace = of_ids([[[0, 1]]] * 8, experts=4)
    found = srp(trace, 4)
    assert found["value"] == 1 and found["slots"] == 1


def test_sch_by_hand(of_ids):
    # 0 1 2 0 with a window of 2, where a first use is 3 deeper than the experts seen before it:
    #   0  first, none seen: 3 + 1.                     stack 0
    #   1  first, one seen: 3 + 2.                      stack 1 0; ahead are 2 0
    #   2  first, two seen: 3 + 3. 1 is carried down, and since 0 is needed and 1 is not, beneath 0: stack 2 0 1
    #   0  found second (recency alone would have it third)
    trace = of_ids([[[0]], [[1]], [[2]], [[0]]], experts=3)
    assert depths(trace.ids[:, 0], 3, 2).ravel().tolist() == [4, 5, 6, 2]
    assert depths(trace.ids[:, 0], 3, 1).ravel().tolist() == [4, 5, 6, 3]  # 0 is not within one token of 1
    found = sch(trace, 2)
    assert found["value"] == [1 / 4, 3 / 4, 1.0]  # the first uses count from 1, 2 and 3 slots on
    assert found["counted"] == [0, 1 / 4, 1 / 4]


def test_sch_looks_all_of_a_token_up_before_any_moves(of_ids):
    # (0 1), (1 0): the stack is 1 0 after the first token, where 1 is at 1 and 0 at 2
    found = depths(of_ids([[[0, 1]], [[1, 0]]], experts=4).ids[:, 0], 4, 4)
    assert found.tolist() == [[5, 6], [1, 2]]
    # Nobody is at no depth, and moves nothing
    found = depths(of_ids([[[0, -1]], [[-1, 0]]], experts=4).ids[:, 0], 4, 4)
    assert found.tolist() == [[5, 0], [0, 1]]


def test_a_window_of_all_that_follows_is_no_worse_than_recency(routing):
    trace = routing(300, 2, 16, 2, memory=0.9)
    for window in (1, 4, 16, 64):
        found = sch(trace, window)
        assert found["value"] == sorted(found["value"]) and found["counted"] == sorted(found["counted"])
        assert all(one >= two for one, two in zip(found["value"], found["counted"], strict=True))
        assert found["value"][-1] == 1 and found["low"][1] <= found["value"][1] <= found["high"][1]
    # With all slots only first uses are missed, as the simulator has it, whose slots outlive a sequence
    one = routing(300, 1, 16, 2, sequences=1)
    full = simulate(one.ids, 16, 16)
    assert sch(one, 16)["counted"][-1] == pytest.approx(full.hits.sum() / full.uses.sum())


def test_the_more_alike_neighbours_are_the_less_a_policy_matters(routing):
    found = []
    for memory in (0.0, 0.8, 0.95):
        trace = routing(2048, 1, 32, 4, memory=memory, sequences=4)
        gap = []
        for times in (1, 2):
            rates = {}
            for policy in ("lru", "belady"):
                counts = simulate(trace.ids, 32, times * 4, policy, starts=trace.starts)
                rates[policy] = counts.hits.sum() / counts.uses.sum()
            gap.append(rates["belady"] - rates["lru"])
        one = srp(trace, 16)
        found.append((one["value"], one["slots"], gap[1]))
        assert gap[0] == 0 and one["low"] <= one["value"] <= one["high"]
    values, slots, gaps = zip(*found, strict=True)
    # What a trace of 32 experts, four of them a token, is known to have
    assert values == pytest.approx((0.32, 0.49, 0.68), abs=0.04)
    assert slots == pytest.approx((2.6, 1.9, 1.2), abs=0.35)
    assert gaps == pytest.approx((0.23, 0.09, 0.04), abs=0.03)


def test_predictors_know_what_they_can(routing):
    trace = routing(200, 3, 8, 2, hidden=16)
    right = {name: recall(trace, guesses(trace, name)) for name in possible(trace)}
    assert right["oracle"] == 1 and right["popular"] < right["repeat"] < 1
    # Routers of one state: what a layer is given says what the next one takes, and only the first layer is not guessed
    assert right["learned"] > 0.6 * 2 / 3 + 0.2 and right["learned"] > right["repeat"] * 0.9
    found = guesses(trace, "learned")
    assert (found[:, 0] == -1).all() and (found[:, 1:] >= 0).all()
    assert (guesses(trace, "repeat")[trace.starts] == -1).all()
    wider = {name: recall(trace, guesses(trace, name, 4)) for name in ("popular", "learned")}
    assert wider["popular"] > right["popular"] and wider["learned"] > right["learned"]


def test_a_predictor_finds_the_routers_that_made_the_trace(routing):
    trace = routing(400, 3, 8, 2, hidden=16)
    matrices = train_predictor(trace)
    assert matrices.shape == (2, 8, 16) and matrices.dtype == np.float32
    alike = recall(trace, guesses(trace, "gate", matrices=matrices))
    assert alike == pytest.approx(2 / 3, abs=0.02)  # all but the first layer
    # A wrong matrix guesses no better than two of eight
    wrong = recall(trace, guesses(trace, "gate", matrices=np.roll(matrices, 1, 1)))
    assert wrong < 0.35


def test_predictors_that_cannot_be_tried_are_refused(routing):
    trace = routing(20)
    assert possible(trace) == ["repeat", "popular", "oracle"]
    for name in ("learned", "gate", "best"):
        with pytest.raises(UsageError):
            guesses(trace, name)
    with pytest.raises(UsageError):
        train_predictor(trace)
    with pytest.raises(UsageError):
        guesses(routing(20, hidden=4), "gate", matrices=np.zeros((2, 8, 5), np.float32))


def test_sizes_are_shares_and_multiples(routing):
    # 3 layers of 8 experts, two a token: 24, 6 a token
    assert sizes(routing(20)) == [
        ("12.5 %", 3), ("25 %, k", 6), ("50 %, 2k", 12), ("75 %", 18), ("100 %, 4k", 24)
    ]  # fmt: skip


def test_speed_by_hand():
    # 10 records of 1 MB and 10 MB/s: a second a token; 20 layers of 5 ms each read half a record
    hardware = Hardware(bandwidth=10e6, record=1_000_000, seconds=1.0)
    assert hardware.reads(20) == pytest.approx(0.5)
    assert hardware.speed(reads=5, misses=5) == pytest.approx((1.0, 1 / 1.5))  # waits for half a second
    assert hardware.speed(reads=20, misses=5) == pytest.approx((0.5, 0.5))  # the guesses take two seconds
    assert hardware.speed(reads=0, misses=0) == (1.0, 1.0)
    assert Hardware(bandwidth=10e6, record=1_000_000).speed(10, 10) == (1.0, None)
    assert Hardware(record=5).speed(1, 1) == (None, None) and Hardware(record=5).reads(3) == -1


def test_a_second_backend_by_hand(of_ids):
    # One layer of four experts, two a token. Uses: 0 three times, 1 twice, 2 once, and once nobody. The CPU takes 4 an
    # expert, the accelerator 2, the link 3
    trace = of_ids([[[0, 1]], [[1, 0]], [[0, 2]], [[3, -1]]], experts=4)
    found = {one["slots"]: one for one in second_backend(trace, Costs(cpu=4, accelerator=2, link=3))}
    assert list(found) == [2, 3, 4] and all(one["cpu_seconds"] == (8 + 8 + 8 + 4) / 4 for one in found.values())
    # 0 and 1 resident: 4, 4; then 0 until 2 and 2, there at 3, until 5, or until 4 on the CPU; 3 until 5 or 4
    assert found[2]["hit_rate"] == 5 / 7
    assert found[2]["accelerator_seconds"] == (4 + 4 + 5 + 5) / 4 and found[2]["split_seconds"] == (4 + 4 + 4 + 4) / 4
    # All resident: nobody is brought over, and a token of one expert takes 2
    assert found[4]["hit_rate"] == 1
    assert found[4]["accelerator_seconds"] == found[4]["split_seconds"] == (4 + 4 + 4 + 2) / 4


def test_a_split_is_no_slower_than_either_alone(routing):
    trace = routing(100, 3, 8, 2)
    for costs in (Costs(1, 1, 1), Costs(9, 1, 4), Costs(1, 9, 4), Costs(1, 0.25, 100)):
        found = second_backend(trace, costs)
        assert [one["slots"] for one in found] == [slots for _, slots in sizes(trace)]
        assert [one["hit_rate"] for one in found] == sorted(one["hit_rate"] for one in found)
        for one in found:
            assert one["split_seconds"] <= min(one["cpu_seconds"], one["accelerator_seconds"]) + 1e-9
    # It is worth something where one would have to wait for the other
    assert found[0]["split_seconds"] < 0.95 * min(found[0]["cpu_seconds"], found[0]["accelerator_seconds"])


def test_an_analysis_says_whether_offloading_suits(routing):
    trace = routing(200, 3, 8, 2, memory=0.95, hidden=16, record=1 << 20, seconds=0.01)
    events = []
    found = analyze(trace, Hardware(bandwidth=5e9), progress=events.append)
    json.dumps(found)
    assert events[-1].done == events[-1].total == len(found["runs"]) == 5 * (7 + 6 * 4)
    assert {run["predictor"] for run in found["runs"]} == {"none", "repeat", "popular", "learned", "oracle"}
    assert found["left_out"] == ["gate"]
    assert found["reads_per_layer"] == pytest.approx(5e9 * 0.01 / 3 / (1 << 20))
    for run in found["runs"]:
        assert run["reads_bytes"] == run["reads"] * (1 << 20) and 0 <= run["hit_rate"] <= 1
        assert run["tokens_per_s"] <= run["most_tokens_per_s"] + 1e-9 <= 100 + 1e-6
        assert run["low"] - 1e-9 <= run["hit_rate"] <= run["high"] + 1e-9
        if run["slots"] == 24:
            assert run["hit_rate_without_first_uses"] == 1
    assert found["verdict"]["suits"] == "yes" and "suits this model" in found["verdict"]["sentences"][-1]
    slow = analyze(trace, Hardware(bandwidth=1e6), policies=("lru", "belady"), predictors=("repeat",))
    assert slow["verdict"]["suits"] == "no" and "GB/s" in slow["verdict"]["sentences"][-1]
    unknown = analyze(trace, policies=("lru",), predictors=())
    assert unknown["verdict"]["suits"] is None and len(unknown["runs"]) == 5
    assert all(run["most_tokens_per_s"] is None for run in unknown["runs"])


def test_the_bandwidth_that_is_asked_for_suffices(routing):
    trace = routing(200, 3, 8, 2, memory=0.8, record=1 << 20, seconds=0.01)

    def at(bandwidth: float) -> dict:
        return analyze(trace, Hardware(bandwidth=bandwidth), policies=("lru",), predictors=())["verdict"]

    needed = float(at(50e6)["sentences"][-1].split("need ")[1].split(" GB/s")[0]) * 1e9
    assert at(needed * 1.01)["suits"] == "yes" and at(needed * 0.9)["suits"] != "yes"
