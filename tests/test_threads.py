"""Python threads: others run during a call, and several at once get the same bits."""

import sys
import threading
import time

import pytest
import torch

import pddm_ext
from helpers import EMULATED, assert_same_bits, cpu_only, make_features, make_labels, make_unit, threads


@cpu_only("on the GPU a call returns before its work is done")
@pytest.mark.parametrize("call", ["mine", "backward"])
def test_other_python_threads_run_during_a_call(call):
    """Nobody is asked for the GIL before a thousand seconds are over, so the other thread counts only where a call
    gives it away. The small operations around a kernel do that too, once each: hence more than a few."""
    unit, labels = make_unit(64), make_labels(600)
    x = make_features(600, 64).requires_grad_()
    calling, stop = threading.Event(), threading.Event()
    counted = 0

    def count():
        nonlocal counted
        calling.wait()
        while not stop.is_set():
            counted += 1
            time.sleep(0)  # gives the GIL back to a call that has returned

    interval = sys.getswitchinterval()
    other = threading.Thread(target=count, daemon=True)
    other.start()
    try:
        with threads(1):
            scores = unit.mine(x, labels, mode="pair").s_ik if call == "mine" else pddm_ext.score_matrix(x, unit)
            sys.setswitchinterval(1000)
            calling.set()
            before = counted
            if call == "mine":
                unit.mine(x, labels, mode="anchor")
            else:
                scores.sum().backward()
            progress = counted - before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        other.join()
    assert progress > 50


def test_several_threads_at_once_get_the_same_bits():
    n, workers, times = (40, 3, 1) if EMULATED else (150, 6, 3)
    unit, x, labels = make_unit(24, 17, 9), make_features(n, 24), make_labels(n)

    def everything():
        mine = x.clone().requires_grad_()
        q = unit.mine(mine, labels, mode="anchor")
        grads = torch.autograd.grad(pddm_ext.QuadrupletLoss().similarity(q), [mine, *unit.parameters()])
        ranked = pddm_ext.topk(x[:20], x, 5, unit)
        return [*q, *grads, *ranked, pddm_ext.score_matrix(x, unit)]

    expected = everything()
    results, errors = [], []

    def work():
        try:
            for _ in range(times):
                results.append(everything())
        except Exception as error:  # pragma: no cover - the failure itself
            errors.append(error)

    started = [threading.Thread(target=work) for _ in range(workers)]
    for worker in started:
        worker.start()
    for worker in started:
        worker.join()
    assert not errors
    assert len(results) == workers * times
    for result in results:
        assert_same_bits(result, expected)
