"""MetricLearningModule: the loss and figures that it computes, two processes against one, precision, checkpoints."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pddm_ext
from helpers import MODES, PARAMETERS, host_only, on_one_thread
from pddm_ext import reference
from pddm_ext.adapters.lightning import MetricLearningModule
from processes import in_two_processes

pytestmark = [host_only("Lightning's CPU accelerator"), pytest.mark.filterwarnings("ignore")]

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

Batch = tuple[Tensor, Tensor]


def trainer(**kwargs: Any) -> Trainer:
    switches = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 1, **dict.fromkeys(switches, False), **kwargs})


def whole(batches: list[Batch]) -> DataLoader:
    """A loader of ready batches."""
    return DataLoader(batches, batch_size=None)


def clusters(classes: int, per_class: int, seed: int) -> Batch:
    """Classes told apart by 4 of 32 coordinates, the others noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    signal = torch.randn(classes, 4, generator=generator)[labels]
    signal = signal + 0.1 * torch.randn(len(labels), 4, generator=generator)
    return torch.cat([signal, torch.randn(len(labels), 28, generator=generator)], dim=1), labels


def drawn(count: int, classes: int = 12, samples: int = 4) -> list[Batch]:
    images, labels = clusters(40, 20, seed=0)
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        chosen = torch.randperm(40, generator=generator)[:classes, None]
        rows = (20 * chosen + torch.randint(20, (classes, samples), generator=generator)).flatten()
        batches.append((images[rows], labels[rows]))
    return batches


class Recorded(Callback):
    """What a step logs."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


# --- One process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["anchor", "pair"])
@on_one_thread
def test_training_makes_unseen_classes_retrievable(mode):
    module = MetricLearningModule(nn.Linear(32, 8), 8, mode=mode, lr=1e-2)
    unseen = DataLoader(TensorDataset(*clusters(20, 10, seed=9)), batch_size=64)
    run = trainer()
    (before,) = run.validate(module, unseen, verbose=False)
    run.fit(module, whole(drawn(80)), unseen)
    after = run.callback_metrics
    assert before["precision_at_1"] < 0.2
    assert after["precision_at_1"] > 0.7
    assert after["mean_average_precision_at_r"] > 0.5


@pytest.mark.parametrize("mode", MODES)
@on_one_thread
def test_a_step_is_the_loss_of_the_paper(mode):
    """Values, logged terms, and the step of Adam against plain PyTorch."""
    settings: dict[str, Any] = {"alpha": 0.4, "beta": 0.8, "weight": 0.3, "lr": 1e-2, "weight_decay": 0.1}
    module = MetricLearningModule(nn.Linear(32, 8), 8, mode=mode, unit_lr_factor=3.0, **settings).double()
    net, unit = nn.Linear(32, 8).double(), reference.PDDM(8).double()
    net.load_state_dict(module.net.state_dict())
    unit.load_state_dict(module.unit.state_dict())

    images, labels = drawn(1)[0]
    labels[0] = 99  # alone in its class
    loss_fn = pddm_ext.QuadrupletLoss(0.4, 0.8, 0.3)
    feats = net(images.double())
    quads = reference.mine_and_score(feats, labels, unit, mode=mode)
    loss = loss_fn(feats, quads)
    groups = [{"params": net.parameters()}, {"params": unit.parameters(), "lr": 3e-2}]
    optimizer = torch.optim.Adam(groups, lr=1e-2, weight_decay=0.1)
    loss.backward()
    optimizer.step()

    recorded = Recorded()
    trainer(precision="64-true", callbacks=[recorded]).fit(module, whole([(images, labels.to(torch.int32))]))
    assert recorded.steps[0] == pytest.approx(
        {
            "train_loss": loss.item(),
            "train_similarity": loss_fn.similarity(quads).item(),
            "train_embedding": 0.3 * loss_fn.embedding(feats, quads).item(),
            "train_valid": 47 / 48 if mode == "anchor" else 1.0,
        },
        rel=1e-6,  # Lightning logs float32
    )
    for got, expected in ((module.net, net), (module.unit, unit)):
        torch.testing.assert_close(dict(got.named_parameters()), dict(expected.named_parameters()), rtol=1e-7, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("labels", [torch.zeros(6), torch.arange(6)], ids=["one class", "singletons"])
def test_every_parameter_is_in_the_graph_of_a_batch_without_quadruplets(mode, labels):
    module = MetricLearningModule(nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8)), 8, mode=mode)
    loss = module.training_step((torch.randn(6, 32), labels.long()), 0)
    loss.backward()
    assert loss.item() == 0
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert {name for name in gradients if name.startswith("unit.")} == {f"unit.{name}" for name in PARAMETERS}
    assert len(gradients) == 12
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert (gradient == 0).all(), name


@pytest.mark.parametrize("mode", MODES)
def test_a_share_of_no_slots_is_zero(mode):
    recorded = Recorded()
    batch = torch.randn(6, 32), torch.arange(6)
    trainer(callbacks=[recorded]).fit(MetricLearningModule(nn.Linear(32, 8), 8, mode=mode), whole([batch]))
    assert recorded.steps == [dict.fromkeys(recorded.steps[0], 0.0)]


def test_losses_are_of_float32_under_mixed_precision():
    seen: list[Tensor] = []

    class Watched(MetricLearningModule):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(super().forward(images))
            return seen[-1]

    module = Watched(nn.Linear(32, 8), 8)
    nn.init.uniform_(module.unit.s.weight, -9, 9)  # scores far apart, whose rounding shows
    unit = reference.PDDM(8)
    unit.load_state_dict(module.unit.state_dict())
    batch, recorded = drawn(1)[0], Recorded()
    trainer(precision="bf16-mixed", callbacks=[recorded]).fit(module, whole([batch]))
    assert seen[0].dtype == torch.bfloat16
    feats = seen[0].detach().float()
    quads = reference.mine_and_score(feats, batch[1], unit, mode="anchor")
    expected = pddm_ext.QuadrupletLoss()(feats, quads).item()
    assert recorded.steps[0]["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


def test_each_module_has_a_unit_of_its_own():
    one, other = (MetricLearningModule(nn.Linear(32, 8), 8) for _ in range(2))
    shared = pddm_ext.default_unit(8)
    parameters = [{id(p) for p in unit.parameters()} for unit in (one.unit, other.unit, shared)]
    assert len(set.union(*parameters)) == 24
    images, labels = drawn(1)[0]
    one.training_step((images, labels), 0).backward()
    assert all(p.grad is not None for p in one.unit.parameters())
    assert all(p.grad is None for p in [*other.unit.parameters(), *shared.parameters()])


def test_the_optimizer_has_every_parameter_once_and_the_units_own_rate():
    class WithMore(MetricLearningModule):
        def __init__(self) -> None:
            super().__init__(nn.Linear(32, 8), 8, lr=0.01, unit_lr_factor=0.5, weight_decay=0.002)
            self.more = nn.Linear(8, 8)

    module = WithMore()
    rest, unit = module.configure_optimizers().param_groups
    assert {id(p) for p in unit["params"]} == {id(p) for p in module.unit.parameters()}
    assert {id(p) for p in rest["params"]} == {id(p) for m in (module.net, module.more) for p in m.parameters()}
    assert (rest["lr"], unit["lr"]) == (0.01, 0.005)
    assert rest["weight_decay"] == unit["weight_decay"] == 0.002
    assert MetricLearningModule(nn.Linear(32, 8), 8).configure_optimizers().param_groups[0]["weight_decay"] == 5e-4


# --- Validation -------------------------------------------------------------------------------------------------------


def retrieval(feats: Tensor, labels: Tensor) -> dict[str, float]:
    """Precision@1 and MAP@R from their definitions, row by row."""
    feats = F.normalize(feats, dim=-1)
    first, average = [], []
    for query in range(len(feats)):
        others = torch.arange(len(feats)) != query
        order = (feats[others] - feats[query]).square().sum(-1).argsort()
        hits = (labels[others] == labels[query])[order]
        r = int(hits.sum())
        if r:
            first.append(float(hits[0]))
            average.append(sum(float(hits[: k + 1].sum()) / (k + 1) for k in range(r) if hits[k]) / r)
    return {
        "precision_at_1": sum(first) / len(first),
        "mean_average_precision_at_r": sum(average) / len(average),
    }


def noisy(count: int, seed: int) -> TensorDataset:
    """Rows of 5 classes, far from sorted out, of very different norms; two are alone in classes of their own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    labels[:2] = torch.tensor([7, 8])
    images = torch.randn(9, 6, generator=generator)[labels] + 0.7 * torch.randn(count, 6, generator=generator)
    return TensorDataset(images * torch.randn(count, 1, generator=generator).exp(), labels)


def test_validation_figures_are_those_of_the_whole_epoch():
    data = noisy(45, seed=0)
    images, labels = data.tensors
    expected = retrieval(images, labels)
    assert 0.2 < expected["mean_average_precision_at_r"] < expected["precision_at_1"] < 0.9
    module = MetricLearningModule(nn.Identity(), 6)
    for batch_size in (7, 45):
        (got,) = trainer().validate(module, DataLoader(data, batch_size), verbose=False)
        assert got == pytest.approx(expected, rel=1e-6)


def test_validation_of_class_ids_that_float32_cannot_tell_apart():
    images, labels = noisy(45, seed=0).tensors
    data = TensorDataset(images, labels + 2**40)
    (got,) = trainer().validate(MetricLearningModule(nn.Identity(), 6), DataLoader(data, 45), verbose=False)
    assert got == pytest.approx(retrieval(images, labels), rel=1e-6)


def test_a_test_is_measured_as_validation_is_and_predictions_are_features():
    data = noisy(45, seed=0)
    module = MetricLearningModule(nn.Identity(), 6)
    (got,) = trainer().test(module, DataLoader(data, 7), verbose=False)
    assert got == pytest.approx(retrieval(*data.tensors), rel=1e-6)
    images = data.tensors[0]
    for loader in (DataLoader(data, 7), DataLoader(images, 7)):
        assert torch.equal(torch.cat(trainer().predict(module, loader)), images)


def test_features_that_are_not_finite_are_said():
    images, labels = noisy(45, seed=0).tensors
    images[3, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="the features are not finite; lower lr"):
        trainer().validate(MetricLearningModule(nn.Identity(), 6), DataLoader(TensorDataset(images, labels), 7))


def test_several_loaders_are_measured_each_by_itself():
    sets = [noisy(45, seed=0), noisy(30, seed=1)]
    module, run = MetricLearningModule(nn.Identity(), 6), trainer()
    run.fit(module, whole([sets[0].tensors]), DataLoader(sets[0], 8))  # with fewer loaders
    run.validate(module, [DataLoader(data, 8) for data in sets], verbose=False)
    expected = {
        f"{name}/dataloader_idx_{index}": value
        for index, data in enumerate(sets)
        for name, value in retrieval(*data.tensors).items()
    }
    assert {name: float(value) for name, value in run.callback_metrics.items()} == pytest.approx(expected, rel=1e-6)


def test_singletons_alone_give_nan_and_do_not_stop_training():
    """As two batches of a sanity check may be."""
    data = TensorDataset(torch.randn(6, 32), torch.arange(6))
    run = trainer(num_sanity_val_steps=1)
    run.fit(MetricLearningModule(nn.Linear(32, 8), 8), whole(drawn(1)), DataLoader(data, 3))
    assert run.global_step == 1
    assert run.callback_metrics["precision_at_1"].isnan()


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_load_without_a_pickle_and_training_goes_on(tmp_path):
    batches = drawn(6)
    images = batches[0][0]

    def module() -> MetricLearningModule:
        torch.manual_seed(3)
        return MetricLearningModule(nn.Linear(32, 8), 8, mode="pair", lr=2e-3, gather=True)

    straight = module()
    trainer().fit(straight, whole(batches))

    begun = module()
    saving = ModelCheckpoint(tmp_path, "begun", every_n_train_steps=3, save_top_k=-1)
    trainer(max_steps=3, enable_checkpointing=True, callbacks=[saving], logger=False).fit(begun, whole(batches[:3]))
    path = tmp_path / "begun.ckpt"

    loaded = MetricLearningModule.load_from_checkpoint(path, net=nn.Linear(32, 8), weights_only=True)
    assert (loaded.mode, loaded.lr, loaded.gather, loaded.unit.dim) == ("pair", 2e-3, True, 8)
    assert torch.equal(loaded(images), begun(images))
    for name in ("net", "unit"):
        torch.testing.assert_close(
            getattr(loaded, name).state_dict(), getattr(begun, name).state_dict(), rtol=0, atol=0
        )
    assert torch.equal(loaded.unit(loaded(images), images[:, :8]), begun.unit(begun(images), images[:, :8]))

    resumed = MetricLearningModule(nn.Linear(32, 8), 8, mode="pair", lr=2e-3)
    trainer(max_steps=6, max_epochs=2).fit(resumed, whole(batches[3:]), ckpt_path=path, weights_only=True)
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_a_subclass_keeps_its_own_arguments_out_of_checkpoints(tmp_path):
    class Birds(MetricLearningModule):
        def __init__(self, backbone: nn.Module, **options: Any) -> None:
            super().__init__(backbone, dim=8, **options)

    module = Birds(nn.Linear(32, 8), lr=3e-4)
    run = trainer()
    run.fit(module, whole(drawn(1)))
    run.save_checkpoint(tmp_path / "birds.ckpt")
    loaded = Birds.load_from_checkpoint(tmp_path / "birds.ckpt", backbone=nn.Linear(32, 8), weights_only=True)
    assert not loaded.hparams
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)


# --- Two processes ----------------------------------------------------------------------------------------------------


class Descent(MetricLearningModule):
    """By plain gradient descent: Adam would hide a factor of the gradient."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Halves(Descent):
    """The mean loss of both parts of a batch, as two processes have it that do not gather."""

    def training_step(self, batch: tuple[Batch, Batch], batch_idx: int) -> Tensor:
        return sum(super(Halves, self).training_step(part, batch_idx) for part in batch) / 2


def made(gather: bool, mode: Any, kind: type[Descent] = Descent) -> Descent:
    torch.manual_seed(5)
    return kind(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)), 5, mode=mode, gather=gather)


def parts() -> list[tuple[Batch, Batch]]:
    """Batches as two processes share them: unevenly; a class each; none with a positive; one process with one row."""
    generator = torch.Generator().manual_seed(2)
    labels = [
        ([0, 1, 0], [1, 2, 2, 0, 2]),
        ([0, 0, 0, 0], [1, 1, 1]),
        ([0, 1, 2], [3, 4, 5]),
        ([1, 1, 1, 0, 0, 2, 2], [0]),
    ]
    return [
        tuple((torch.randn(len(y), 6, dtype=torch.float64, generator=generator), torch.tensor(y)) for y in both)
        for both in labels
    ]


RUNS = [(True, "anchor"), (True, "batch"), (True, "pair"), (False, "anchor"), (False, "pair")]
UNEVEN = (9, 4)


def as_one_of_two(rank: int, port: int, folder: Path) -> None:
    """What each process does; results go to a file."""
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)

    def two(**kwargs: Any) -> Trainer:
        strategy = DDPStrategy(timeout=timedelta(seconds=60))
        return trainer(devices=2, strategy=strategy, precision="64-true", **kwargs)

    results: dict[str, Any] = {"fits": []}
    for gather, mode in RUNS:
        module, recorded = made(gather, mode), Recorded()
        if rank == 1:
            nn.init.zeros_(module.unit.u.weight)  # DDP begins with those of rank 0
        two(use_distributed_sampler=False, callbacks=[recorded]).fit(module, whole([both[rank] for both in parts()]))
        results["fits"].append((module.state_dict(), recorded.steps))
    module, data = made(False, "anchor"), noisy(45, seed=0)
    results["shared"] = two().validate(module, [DataLoader(data, 4), DataLoader(noisy(40, seed=1), 7)], verbose=False)
    own = noisy(sum(UNEVEN), seed=3)[slice(0, UNEVEN[0]) if rank == 0 else slice(UNEVEN[0], None)]
    loader = DataLoader(TensorDataset(*own), batch_size=3)
    results["uneven"] = two(use_distributed_sampler=False).validate(module, loader, verbose=False)
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return in_two_processes(as_one_of_two, folder, preload="pddm_ext.adapters.lightning")


@pytest.mark.parametrize(("gather", "mode"), RUNS)
@on_one_thread
def test_two_processes_take_the_steps_of_one(two_processes, gather, mode):
    """Of one with the whole batch if they gather, and by the mean of their gradients if not."""
    (first, logged), (second, _) = (results["fits"][RUNS.index((gather, mode))] for results in two_processes)
    assert all(torch.equal(first[name], second[name]) for name in first)

    if gather:
        one, batches = made(True, mode), []
        for both in parts():
            batches.append(tuple(torch.cat(rows) for rows in zip(*both, strict=True)))
    else:
        one, batches = made(False, mode, Halves), parts()
    start = {name: value.clone().double() for name, value in one.state_dict().items()}
    recorded = Recorded()
    trainer(precision="64-true", callbacks=[recorded]).fit(one, whole(batches))
    torch.testing.assert_close(first, dict(one.state_dict()), rtol=1e-9, atol=1e-12)
    for name in first.keys() - {"unit.s.bias"}:  # the loss is of differences of scores
        assert (first[name] - start[name]).abs().max() > 1e-5, name
    if gather:
        assert logged == [pytest.approx(step, rel=1e-6) for step in recorded.steps]
        assert [step["train_valid"] > 0 for step in logged] == [True, True, False, True]


@on_one_thread
def test_two_processes_measure_what_one_does(two_processes):
    """Also where Lightning's sampler repeats a row of 45 to share them, and where processes have 9 and 4 rows."""
    one, run = made(False, "anchor"), trainer(precision="64-true")
    shared = run.validate(one, [DataLoader(noisy(45, seed=0)), DataLoader(noisy(40, seed=1))], verbose=False)
    uneven = run.validate(one, DataLoader(noisy(sum(UNEVEN), seed=3)), verbose=False)
    for results in two_processes:
        assert results["shared"] == [pytest.approx(figures, rel=1e-6) for figures in shared]
        assert results["uneven"] == [pytest.approx(figures, rel=1e-6) for figures in uneven]


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"net": torch.relu}, TypeError, "net is a builtin_function_or_method; a torch.nn.Module is accepted"),
        ({"dim": 0}, ValueError, "dim is 0; at least 1 is accepted"),
        ({"mode": "hard"}, ValueError, "mode is 'hard'; 'batch', 'anchor', 'pair' are accepted"),
        ({"lr": 0.0}, ValueError, "lr is 0.0; a positive finite number is accepted"),
        ({"unit_lr_factor": float("inf")}, ValueError, "unit_lr_factor is inf; a positive finite number is accepted"),
        ({"alpha": -0.5}, ValueError, "alpha is -0.5; a finite number from 0 is accepted"),
        ({"beta": float("nan")}, ValueError, "beta is nan; a finite number from 0 is accepted"),
        ({"weight": -1}, ValueError, "weight is -1; a finite number from 0 is accepted"),
        ({"weight_decay": -1e-3}, ValueError, "weight_decay is -0.001; a finite number from 0 is accepted"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_are_not_accepted(arguments, error, message):
    with pytest.raises(error) as raised:
        MetricLearningModule(**{"net": nn.Identity(), "dim": 8, **arguments})
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (torch.zeros(6, 4, 8), torch.zeros(6).long(), ValueError, "feats has shape (6, 4, 8); (rows, dim) is accepted"),
        (torch.zeros(6, 8).int(), torch.zeros(6).long(), TypeError, "feats has dtype torch.int32; float32, float64,"),
        (torch.zeros(6, 4), torch.zeros(6).long(), ValueError, "unit scores features of dimension 8; these have 4"),
        (torch.zeros(6, 8), torch.zeros(5).long(), ValueError, "labels has length 5; feats has 6"),
        (torch.zeros(6, 8), torch.zeros(6), TypeError, "labels has dtype torch.float32; an integer dtype is accepted"),
    ],
)
def test_batches_that_are_not_accepted(images, labels, error, message):
    module = MetricLearningModule(nn.Identity(), 8)
    for step in (module.training_step, module.validation_step):
        with pytest.raises(error) as raised:
            step((images, labels), 0)
        assert str(raised.value).startswith(message)
