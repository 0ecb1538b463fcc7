"""Divergence is said in words wherever it begins: in the embedding, in the unit, in the loss, under a scaler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers import host_only
from pddm_ext.adapters.lightning import MetricLearningModule
from pddm_ext.precision import unmasked
from pddm_ext.workbench import cli
from pddm_ext.workbench.data.splits import Dataset
from pddm_ext.workbench.learner import Learner
from pddm_ext.workbench.loop import CHECKPOINT, Run
from pddm_ext.workbench.settings import METHODS, Settings
from runs import TINY, TINY_OPTIONS

pytestmark = [
    host_only("the CPU's accelerator"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]


def test_features_that_are_finite_pass_as_they_are() -> None:
    feats = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    same, zero = unmasked(feats)
    assert torch.equal(same, feats)
    assert zero == 0
    same.sum().backward()
    assert torch.equal(feats.grad, torch.ones_like(feats))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_feature_that_is_not_finite_makes_the_loss_and_all_gradients_nan(value: float) -> None:
    feats = torch.randn(4, 3)
    feats[2, 1] = value
    feats.requires_grad_()
    same, zero = unmasked(feats)
    assert zero.isnan()
    same[0].sum().backward()
    assert feats.grad[0].isnan().all()


# The workbench


def spoil(monkeypatch: pytest.MonkeyPatch, change: Any, at: int = 3) -> None:
    """Change the loss of a learner's so-many-th batch."""
    forward, calls = Learner.forward, []

    def spoilt(self: Learner, *batch: Tensor) -> dict[str, Tensor]:
        calls.append(1)
        terms = forward(self, *batch)
        return change(self, terms) if len(calls) == at else terms

    monkeypatch.setattr(Learner, "forward", spoilt)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("objective.unit.c.weight", torch.nan, "the PDDM unit's c.weight is not finite after 4 steps; lower --lr or "),
        ("objective.unit.s.bias", torch.inf, "the PDDM unit's s.bias is not finite after 4 steps"),
        ("objective.unit.c.weight", 3e38, "the PDDM unit's scores are not finite after 4 steps"),
        ("net.head.weight", torch.nan, "the embedding is not finite after 4 steps; lower --lr"),
        ("net.structure.linear.bias", torch.nan, "the parameter net.structure.linear.bias is not finite after 4 steps"),
    ],
)
def test_a_parameter_that_is_not_finite_is_named_at_the_next_measurement(
    tiny: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: float,
    message: str,
) -> None:
    measure = Run._measure

    def spoilt(self: Run, *others: Any) -> None:
        if self.taken == 4:
            self.learner.get_parameter(name).data.fill_(value)
        measure(self, *others)

    monkeypatch.setattr(Run, "_measure", spoilt)
    assert_stopped(tmp_path, capsys, message)


def test_a_loss_that_is_not_finite_is_told_with_its_step(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where nothing of it reaches a parameter."""
    spoil(monkeypatch, lambda learner, terms: {**terms, "score": terms["score"].detach() * torch.nan})
    assert_stopped(tmp_path, capsys, "the loss is not finite at step 3; lower --lr")


def assert_stopped(folder: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    """By step 4, with one line, and with the checkpoint of step 2 kept."""
    assert cli.main(["train", *TINY_OPTIONS, "--structure", "0.3", "--out", str(folder)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines[:-1]] == ["training: step 0/6", "training: step 2/6"]
    assert lines[-1].startswith(f"pddm-ext: error: {message}")
    assert torch.load(folder / CHECKPOINT)["taken"] == 2
    assert not (folder / "metrics.json").exists()


@pytest.mark.parametrize("method", METHODS)
def test_features_that_overflow_are_seen_in_the_loss_of_every_method(tiny: Dataset, method: str) -> None:
    run = Run(Settings(**TINY, method=method), tiny)
    run.learner.net.head.weight.data.fill_(torch.inf)
    terms = run.learner(torch.rand(12, 1, 32, 32), torch.arange(12) // 3, torch.arange(12))
    assert all(term.isnan() for term in terms.values())
    sum(terms.values()).backward()
    assert run.learner.net.head.bias.grad.isnan().all()


def scaled(monkeypatch: pytest.MonkeyPatch, scale: float) -> list[torch.amp.GradScaler]:
    """Fabric's half precision with its scaler, which it has on GPUs alone."""
    scalers: list[torch.amp.GradScaler] = []

    def fabric(self: Run, accelerator: str, processes: int, loggers: Any) -> Fabric:
        scalers.append(torch.amp.GradScaler("cpu", init_scale=scale))
        plugin = FabricMixedPrecision("16-mixed", "cpu", scalers[-1])
        return Fabric(accelerator="cpu", devices=1, loggers=loggers, plugins=[plugin])

    monkeypatch.setattr(Run, "_fabric", fabric)
    return scalers


def overflow(at: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward pass of these steps, counted from 1, the features are infinite."""
    both, calls = torch.nn.Linear.forward, []

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        out = both(self, x)
        if self.training and self.out_features == TINY["dim"] and x.shape[1] == 1024:
            calls.append(1)
            if len(calls) in at:
                return out * torch.inf
        return out

    monkeypatch.setattr(nn.Linear, "forward", forward)


@pytest.mark.parametrize("method", ["pddm-anchor", "multi-similarity"])
@pytest.mark.parametrize("at", [{1}, {2, 3}])
def test_a_step_that_a_scaler_passes_over_is_no_divergence(
    tiny: Dataset, monkeypatch: pytest.MonkeyPatch, method: str, at: set[int]
) -> None:
    scalers = scaled(monkeypatch, 1024.0)
    overflow(at, monkeypatch)
    run = Run(Settings(**TINY, method=method), tiny)
    run.train(progress=False)
    assert scalers[0].get_scale() == 1024 / 2 ** len(at)  # it has seen them
    assert run.optimizer.state[run.learner.net.head.weight]["step"] == 6 - len(at)
    assert run.curves["step"] == [0, 2, 4, 6]
    assert all(torch.tensor(curve[1:]).isfinite().all() for curve in run.curves.values())


def test_gradients_too_large_for_the_first_scales_are_no_divergence(
    tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    scalers = scaled(monkeypatch, 2.0**126)
    Run(Settings(**TINY), tiny).train(progress=False)
    assert scalers[0].get_scale() < 2.0**126


def test_steps_that_are_all_passed_over_are_divergence(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled(monkeypatch, 1024.0)
    overflow({3, 4}, monkeypatch)
    with pytest.raises(FloatingPointError, match="the loss is not finite at step 3"):
        Run(Settings(**TINY), tiny).train(progress=False)


def test_a_scale_that_has_come_to_nothing_is_divergence(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are finite, gradients never: nothing is trained any more."""
    scaled(monkeypatch, 2.0**-23)
    nan_gradient = lambda learner, terms: {"score": terms["score"] + 0 * learner.net.head.bias.abs().sqrt().sum()}  # noqa: E731
    for at in (1, 2):
        spoil(monkeypatch, nan_gradient, at)
    run = Run(Settings(**TINY), tiny)
    run.learner.net.head.bias.data.zero_()
    with pytest.raises(FloatingPointError, match="no update is made any more after 2 steps"):
        run.train(progress=False)


# Lightning


def fit(module: MetricLearningModule, batches: int = 4, **options: Any) -> Trainer:
    random = torch.Generator().manual_seed(0)
    data = [(torch.randn(12, 8, generator=random), torch.arange(12) // 3) for _ in range(batches)]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, **{**quiet, **options})
    trainer.fit(module, DataLoader(data, batch_size=None))
    return trainer


def test_a_diverging_rate_stops_lightning() -> None:
    with pytest.raises(FloatingPointError, match="a loss is not finite; lower lr"):
        fit(MetricLearningModule(nn.Linear(8, 4), 4, lr=1e30))


def test_it_stops_before_the_epoch_ends() -> None:
    module = MetricLearningModule(nn.Linear(8, 4), 4, lr=1e30)
    with pytest.raises(FloatingPointError):
        fit(module, batches=60, log_every_n_steps=5)
    assert module.trainer.global_step == 5


def test_a_unit_that_is_not_finite_stops_lightning() -> None:
    module = MetricLearningModule(nn.Linear(8, 4), 4)
    with torch.no_grad():
        module.unit.c.weight[0, 0] = torch.nan
    message = r"the parameter unit\.c\.weight is not finite; lower lr or unit_lr_factor"
    with pytest.raises(FloatingPointError, match=message):
        fit(module)
    data = DataLoader([(torch.randn(12, 8), torch.arange(12) // 3)], batch_size=None)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    with pytest.raises(FloatingPointError, match=message):
        trainer.validate(module, data)


class Overflowing(nn.Linear):
    """Infinite at some of its calls, counted from 1."""

    def __init__(self, at: set[int]) -> None:
        super().__init__(8, 4)
        self.at, self.calls = at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (torch.inf if self.calls in self.at else 1)


def half(scale: float) -> tuple[torch.amp.GradScaler, dict[str, Any]]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return scaler, {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "log_every_n_steps": 1}


def test_a_step_that_lightnings_scaler_passes_over_is_no_divergence() -> None:
    scaler, options = half(1024.0)
    module = MetricLearningModule(Overflowing({2}), 4)
    fit(module, **options)
    assert scaler.get_scale() == 512
    optimizer = module.trainer.optimizers[0]
    assert optimizer.state[module.net.weight]["step"] == 3


def test_a_scale_that_has_come_to_nothing_stops_lightning() -> None:
    _, options = half(2.0**-23)
    with pytest.raises(FloatingPointError, match="no update is made any more"):
        fit(MetricLearningModule(Overflowing({1, 2, 3, 4}), 4), **options)
