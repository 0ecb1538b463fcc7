"""Steps that teach nothing are told in words: once, each by its reason, or as errors where those were asked for."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pddm_ext
from helpers import DEVICE, MODES, host_only, kill_relus, make_features, make_labels, make_unit
from pddm_ext import HealthError, HealthWarning, health, reference, set_health_checks

pytestmark = host_only("a GPU's batches are looked at later; see the end of this file for how")


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> Iterator[None]:
    set_health_checks("warn")
    yield
    set_health_checks("warn")


def told(call: Any) -> list[str]:
    """What a call says of the kind that this file is about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if warning.category is HealthWarning]


def plain(unit: pddm_ext.PDDM) -> reference.PDDM:
    other = reference.PDDM(unit.dim, unit.hidden, unit.combined)
    other.load_state_dict(unit.state_dict())
    return other


X, LABELS = make_features(16, 6), make_labels(16)


def broken(rows: slice, value: float) -> Tensor:
    x = X.clone()
    x[rows, 2] = value
    return x


def with_broken_unit(value: float, name: str) -> pddm_ext.PDDM:
    unit = make_unit(6)
    with torch.no_grad():
        unit.get_parameter(name).flatten()[0] = value
    return unit


#: By what is wrong: features, labels, unit, and the words that say so.
ILL: dict[str, tuple[Tensor, Tensor, pddm_ext.PDDM, str]] = {}


def ill(what: str, feats: Tensor, words: str, labels: Tensor = LABELS, unit: pddm_ext.PDDM | None = None) -> None:
    ILL[what] = feats, labels, unit or make_unit(6), words


ill("all NaN", X * torch.nan, "16 of 16 rows of feats are not finite, the first is row 0")
ill("all infinite", X * torch.inf, "16 of 16 rows of feats are not finite")
ill("one NaN", broken(slice(5, 6), torch.nan), "1 of 16 rows of feats are not finite, the first is row 5")
ill("one infinite", broken(slice(3, 4), -torch.inf), "1 of 16 rows of feats are not finite, the first is row 3")
cancelling = torch.cat([broken(slice(0, 1), torch.inf), broken(slice(0, 1), -torch.inf)])
ill("both infinities", cancelling, "2 of 32 rows of feats are not finite", torch.cat([LABELS, LABELS]))
ill("unit NaN", X, "parameters that are not finite (c.bias)", unit=with_broken_unit(torch.nan, "c.bias"))
ill("unit infinite", X, "parameters that are not finite (s.weight)", unit=with_broken_unit(torch.inf, "s.weight"))
ill("no positive", X, "16 labelled rows and no two of one class", torch.arange(16, device=DEVICE))
ill("one row", X[:1], "1 labelled rows and no two of one class", LABELS[:1])
ill("one class", X, "all 16 labelled rows of the batch are of one class", torch.full((16,), -7, device=DEVICE))
ill("equal", X[:1].expand(16, 6), "all 16 rows of feats point the same way")
lengths = 2.0 ** (torch.arange(16, device=DEVICE) % 5)[:, None]
ill("equal but for length", X[:1] * lengths, "all 16 rows of feats point the same way")
ill("zero", X * 0, "all 16 rows of feats point the same way")
ill("no norm", X * 1e30, "all 16 rows of feats point the same way (or are too small or large to have a norm)")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ILL)
@pytest.mark.parametrize("package", ["fused", "reference"])
def test_a_batch_that_teaches_nothing_is_told_once(package, what, mode):
    feats, labels, unit, words = ILL[what]
    if package == "reference":
        unit = plain(unit)
    said = told(lambda: [unit.mine(feats, labels, mode=mode) for _ in range(3)])
    assert len(said) == 1
    assert words in said[0]
    assert "pddm_ext.set_health_checks" in said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_is_looked_at(dtype):
    unit = make_unit(6)
    for what in ("all NaN", "one infinite", "equal", "equal but for length"):
        feats, labels, _, words = ILL[what]
        set_health_checks("warn")
        (said,) = told(lambda: unit.mine(feats.to(dtype), labels, mode="anchor"))  # noqa: B023
        assert words in said


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_teaches_something_is_not_mentioned(mode):
    unit = make_unit(6)
    assert told(lambda: unit.mine(X, LABELS, mode=mode)) == []
    assert told(lambda: unit.mine(X.half() * 1000, LABELS, mode=mode)) == []  # whose sum is out of float16's range
    near = X[:1] + 1e-3 * X  # close together is not one point
    assert told(lambda: unit.mine(near, LABELS, mode=mode)) == []
    assert told(lambda: unit.mine(X, torch.cat([LABELS[:4], torch.arange(100, 112)]), mode=mode)) == []


@pytest.mark.parametrize("package", ["fused", "reference"])
def test_features_out_of_autocasts_range_are_told_as_such(package):
    unit = make_unit(6) if package == "fused" else plain(make_unit(6))
    for rows, words in ((slice(5, 6), "1 of 16 rows of feats"), (slice(None), "16 of 16 rows of feats")):
        feats = X.clone()
        feats[rows] *= 1e6
        set_health_checks("warn")
        with torch.autocast("cpu", torch.float16):
            (said,) = told(lambda: unit.mine(feats, LABELS, mode="anchor"))  # noqa: B023
        assert f"{words} are not finite" in said
        assert "torch.float16" in said


@pytest.mark.parametrize("package", ["fused", "reference"])
def test_features_that_only_autocast_makes_equal_have_collapsed(package):
    unit = make_unit(6) if package == "fused" else plain(make_unit(6))
    near = (1 + 1e-4 * X).abs()  # whose differences bfloat16 does not have
    assert told(lambda: unit.mine(near, LABELS, mode="anchor")) == []
    with torch.autocast("cpu", torch.bfloat16):
        (said,) = told(lambda: unit.mine(near, LABELS, mode="anchor"))
    assert "all 16 rows of feats point the same way" in said


def test_each_reason_is_told_for_itself():
    unit = make_unit(6)
    for what in ("all NaN", "no positive", "one class", "equal"):
        feats, labels, _, words = ILL[what]
        (said,) = told(lambda: unit.mine(feats, labels))  # noqa: B023
        assert words in said


@pytest.mark.parametrize("what", ILL)
def test_errors_where_they_are_asked_for_come_each_time(what):
    feats, labels, unit, words = ILL[what]
    set_health_checks("raise")
    for _ in range(2):
        with pytest.raises(HealthError) as error:
            pddm_ext.mine_and_score(feats, labels, unit, mode="anchor")
        assert words in str(error.value)


def test_silence_where_it_is_asked_for():
    set_health_checks("ignore")
    assert told(lambda: [unit.mine(feats, labels) for feats, labels, unit, _ in ILL.values()]) == []


def test_other_actions_are_refused():
    with pytest.raises(ValueError, match="action is 'print'; 'warn', 'raise', 'ignore' are accepted"):
        set_health_checks("print")


def test_what_is_mined_is_the_same_whether_it_is_looked_at_or_not():
    unit = make_unit(6)
    for feats, labels, _, _ in ILL.values():
        set_health_checks("ignore")
        silent = unit.mine(feats, labels, mode="anchor")
        set_health_checks("warn")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for a, b in zip(unit.mine(feats, labels, mode="anchor"), silent, strict=True):
                assert torch.equal(a, b)


def test_the_warning_points_at_the_callers_line():
    unit = make_unit(6)
    with pytest.warns(HealthWarning) as caught:
        pddm_ext.mine_and_score(X * torch.nan, LABELS, unit)
    assert caught[0].filename == __file__


def test_a_diverging_loop_is_told():
    """The loss falls to 0 and stays there, and the words come when it does."""
    torch.manual_seed(0)
    net, unit = nn.Linear(6, 6), pddm_ext.PDDM(6)
    optimizer = torch.optim.SGD([*net.parameters(), *unit.parameters()], lr=1e25)
    loss_fn, losses = pddm_ext.QuadrupletLoss(), []

    def train() -> None:
        for _ in range(5):
            feats = net(X)
            loss = loss_fn(feats, unit.mine(feats, LABELS, mode="anchor"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    (said,) = told(train)
    assert losses[-1] == 0
    assert "the scores are NaN" in said


def test_a_dead_unit_is_told():
    unit = make_unit(6)
    kill_relus(unit, "c")
    (said,) = told(lambda: unit.mine(X, LABELS, mode="anchor"))
    assert "its relus are dead" in said


def test_a_unit_that_starts_at_zero_is_not_mentioned():
    unit = make_unit(6)
    nn.init.zeros_(unit.s.weight)
    assert told(lambda: unit.mine(X, LABELS, mode="anchor")) == []
    quads = unit.mine(X, LABELS, mode="anchor")
    pddm_ext.QuadrupletLoss().similarity(quads).backward()
    assert unit.s.weight.grad.any()


@pytest.mark.parametrize("bad", ["embeddings", "ref_emb"])
def test_an_adapter_that_mines_in_a_reference_tells_as_well(bad):
    pml = pytest.importorskip("pddm_ext.adapters.pml")
    rows = {"embeddings": X, "ref_emb": make_features(16, 6, seed=2)}
    rows[bad] = broken(slice(2, 4), torch.nan)
    miner = pml.PDDMMiner(make_unit(6))
    said = told(lambda: [miner(rows["embeddings"], LABELS, rows["ref_emb"], LABELS.clone()) for _ in range(2)])
    assert len(said) == 1
    assert f"2 of 16 rows of {bad} are not finite, the first is row 2" in said[0]


@pytest.mark.parametrize("package", ["fused", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_references_that_are_not_finite_are_told_though_quadruplets_are_valid(package, dtype):
    unit = make_unit(6) if package == "fused" else plain(make_unit(6))
    references = broken(slice(2, 4), torch.inf).to(dtype)
    found = []
    given = {"ref_feats": references, "ref_labels": LABELS, "mode": "anchor"}
    said = told(lambda: found.extend(unit.mine(X, LABELS, **given) for _ in range(2)))
    assert len(said) == 1
    assert "2 of 16 rows of ref_feats are not finite, the first is row 2" in said[0]
    assert found[0].valid.any()
    large = torch.full((16, 6), 6e4, dtype=torch.float16)  # whose sum in its own dtype would not be
    assert not [word for word in told(lambda: unit.mine(X, LABELS, **given | {"ref_feats": large})) if "finite" in word]


# --- The default unit -------------------------------------------------------------------------------------------------


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr("pddm_ext.unit._default_units", {})
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer | None, count: int, accumulate: int = 1) -> None:
    loss_fn = pddm_ext.QuadrupletLoss()
    for _ in range(count):
        if optimizer is not None:
            optimizer.zero_grad()
        for _ in range(accumulate):
            feats = net(X)
            loss_fn(feats, pddm_ext.mine_and_score(feats, LABELS, mode="anchor")).backward()
        if optimizer is not None:
            optimizer.step()


def test_a_default_unit_that_no_optimizer_has_is_told_once(net):
    optimizer = torch.optim.Adam(net.parameters())
    said = told(lambda: steps(net, optimizer, 30))
    assert len(said) == 1
    assert "default_unit(4) has gathered the gradients of 8 backward passes and no optimizer has used them" in said[0]
    assert "pddm_ext.default_unit(4).parameters()" in said[0]


def test_its_warning_points_at_the_line_of_the_backward_pass(net):
    with pytest.warns(HealthWarning) as caught:
        steps(net, torch.optim.SGD(net.parameters(), lr=1e-3), 8)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_default_unit_that_is_trained_is_not_mentioned(net, kind, accumulate):
    optimizer = kind([*net.parameters(), *pddm_ext.default_unit(4).parameters()], lr=1e-3)
    assert told(lambda: steps(net, optimizer, 20, accumulate)) == []


@host_only("of the host's optimizers")
def test_one_that_a_fused_optimizer_trains_is_not_mentioned(net):
    """Which leaves a parameter's version as it was."""
    trained = [*net.parameters(), *pddm_ext.default_unit(4).parameters()]
    optimizer = torch.optim.Adam(trained, lr=1e-3, fused=True)
    optimizer.zero_grad = functools.partial(optimizer.zero_grad, set_to_none=False)
    assert told(lambda: steps(net, optimizer, 30)) == []


def test_a_default_unit_that_is_frozen_or_only_evaluated_is_not_mentioned(net):
    def evaluate() -> None:
        for _ in range(20):
            with torch.no_grad():
                pddm_ext.mine_and_score(net(X), LABELS)

    assert told(evaluate) == []
    pddm_ext.default_unit(4).requires_grad_(False)
    assert told(lambda: steps(net, torch.optim.SGD(net.parameters(), lr=1e-3), 20)) == []


def test_an_unused_default_unit_is_an_error_where_errors_are_asked_for(net):
    set_health_checks("raise")
    with pytest.raises(HealthError, match="no optimizer has used them"):
        steps(net, torch.optim.SGD(net.parameters(), lr=1e-3), 30)


# --- A GPU's way, without one -----------------------------------------------------------------------------------------


class Arrival:
    """Stands for torch.cuda.Event: what was written arrives when the test says so."""

    happened = False

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return Arrival.happened


def test_later_words_come_when_the_signs_have_arrived_and_not_before(monkeypatch):
    later, unit = health._Later(), make_unit(6)
    monkeypatch.setattr(torch.cuda, "Event", Arrival)
    pinned = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **kwargs: pinned(*shape, **kwargs))
    for feats, expected in ((X, False), (X * torch.nan, True), (X[:1].expand(16, 6), True)):
        Arrival.happened = False
        set_health_checks("ignore")
        later.write(health._signs(unit.mine(feats, LABELS, mode="anchor"), feats))
        assert not later.read()
        Arrival.happened = True
        assert later.read() == expected


def test_one_batch_in_sixteen_is_looked_at_later():
    later = health._Later()
    assert [later.due() for _ in range(33)] == [call % 16 == 0 for call in range(33)]


def test_signs_on_a_device_and_on_the_host_agree():
    set_health_checks("ignore")
    for feats, labels, unit, _ in ILL.values():
        for mode in ("batch", "anchor"):
            quads = unit.mine(feats, labels, mode=mode)
            assert health._ill(quads, feats) or not health._signs(quads, feats).any()
    quads = make_unit(6).mine(X, LABELS, mode="anchor")
    assert not health._ill(quads, X)
    assert not health._signs(quads, X).any()
    assert not health._signs(quads, X, X).any()
    assert health._ill(quads, X, broken(slice(2, 4), torch.nan))
    assert health._signs(quads, X, broken(slice(2, 4), torch.nan)).tolist() == [True, False, False]
