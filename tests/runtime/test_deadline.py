"""Calls that are late are given up, and who made them is told."""

import threading

import pytest

from shoal.runtime.deadline import Late, Worker, within


def test_a_call_gives_what_it_gives():
    assert within(60, lambda: 7, "one") == 7
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 / 0, "one")


def test_calls_of_a_worker_share_a_thread_of_their_own():
    worker = Worker("one")
    threads = {worker.call(threading.get_ident, 60) for _ in range(5)}
    assert len(threads) == 1 and threads != {threading.get_ident()}
    worker.close()
    worker.close()


def test_what_hangs_is_left_behind_and_the_worker_is_lost():
    worker, go = Worker("the npu"), threading.Event()
    with pytest.raises(Late, match="the npu did not come back within 0.05 s"):
        worker.call(lambda: go.wait(60), 0.05)
    with pytest.raises(Late, match="earlier"):
        worker.call(lambda: 1, 60)
    assert worker.lost
    go.set()


def test_callers_take_turns():
    worker, found = Worker("one"), []
    threads = [threading.Thread(target=lambda i=i: found.append(worker.call(lambda: i, 60))) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(20))
    worker.close()
