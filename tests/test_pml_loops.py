"""pytorch-metric-learning: its memory, and loops, trainers and testers that learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, samplers, testers, trainers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor

import pddm_ext
from helpers import DEVICE, assert_same_bits, make_features, make_unit, on_one_thread
from pddm_ext.adapters.pml import PDDMMiner, PDDMSimilarity, QuadrupletLoss
from pml_truth import PAIRED, D, copied, labels_of, loss_of, lowest_with_itself, mined_by_loops, with_density
from truth import truth


class Spy(losses.TripletMarginLoss):
    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        self.given = indices_tuple
        return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)


Spy.__name__ = "TripletMarginLoss"  # CrossBatchMemory asks for names


def test_cross_batch_memory_keeps_every_anchor():
    """Its queue holds the batch too, whose rows score lowest with themselves."""
    unit, y = lowest_with_itself(), labels_of(0, 0, 1, 1, 2, 2)
    loss = Spy(distance=PDDMSimilarity(unit))
    memory = losses.CrossBatchMemory(loss, D, 12, miner=PDDMMiner(unit)).to(DEVICE)
    for step in range(4):
        memory(make_features(6, D, seed=step), y)
        a, p, n = loss.given
        assert a.tolist() == list(range(6))
        held = memory.label_memory
        assert torch.equal(held[p], y[a])
        assert (held[n] != y[a]).all()
        assert (memory.curr_batch_idx[a] != p).all()


@pytest.mark.parametrize("given", [False, True])
def test_quadruplets_in_a_memory_that_lets_them_in(given):
    class Memory(losses.CrossBatchMemory):
        @staticmethod
        def supported_losses() -> list[str]:
            return [*losses.CrossBatchMemory.supported_losses(), "QuadrupletLoss"]

    unit, y = make_unit(D), labels_of(*PAIRED)
    memory = Memory(QuadrupletLoss(unit), D, 24, miner=PDDMMiner(unit) if given else None).to(DEVICE)
    first, x = make_features(12, D, dtype=torch.float64), make_features(12, D, seed=1, dtype=torch.float64)
    memory(first, y)
    held, held_y = torch.cat([first, x]), torch.cat([y, y])
    s = truth(x, unit, held)
    if given:
        triplets = mined_by_loops(s, y, held_y, "anchor", lambda i, j: j == i + 12)
    else:
        triplets = [
            (a, p, n)
            for a in range(12)
            for p in range(24)
            for n in range(24)
            if held_y[p] == y[a] != held_y[n] and p != a + 12
        ]
    expected = loss_of(x, held, triplets, copied(unit)).mean()
    torch.testing.assert_close(memory(x, y), expected)
    with pytest.raises(Exception, match="CrossBatchMemory not supported for QuadrupletLoss"):
        losses.CrossBatchMemory(QuadrupletLoss(unit), D)


def test_autocast_takes_a_memory_of_another_dtype():
    """CrossBatchMemory's stays in float32 on a GPU. It is rounded as the batch is, as for any other product."""
    unit, y = make_unit(D), labels_of(*PAIRED)
    x, r = make_features(12, D).bfloat16(), make_features(12, D, seed=1)
    distance, miner = PDDMSimilarity(unit), PDDMMiner(unit, "pair")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert_same_bits(distance(x, r), distance(x, r.bfloat16()))
        assert_same_bits(distance.pairwise_distance(x, r), distance.pairwise_distance(x, r.bfloat16()))
        assert_same_bits(miner(x, y, r, y), miner(x, y, r.bfloat16(), y))
        value = QuadrupletLoss(unit)(x, y, ref_emb=r, ref_labels=y)
    ids = torch.arange(12, device=DEVICE)
    among = {"ref_feats": r.bfloat16(), "ref_labels": y, "ids": ids, "ref_ids": ids}
    expected = pddm_ext.QuadrupletLoss()(x, unit.mine(x, y, mode="anchor", **among), ref_feats=r)
    torch.testing.assert_close(value, expected, rtol=0.05, atol=0)


def clusters(classes: int, per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes told apart by four coordinates of sixteen; the others are noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat_interleave(per_class)
    signal = torch.randn(classes, 4, generator=g)[y] + 0.1 * torch.randn(len(y), 4, generator=g)
    return torch.cat([signal, 0.7 * torch.randn(len(y), 12, generator=g)], 1).to(DEVICE), y.to(DEVICE)


def precision(net: torch.nn.Module, x: Tensor, y: Tensor, distance: distances.BaseDistance) -> float:
    calculator = AccuracyCalculator(include=("precision_at_1",), k=1, device=DEVICE, knn_func=CustomKNN(distance))
    with torch.no_grad():
        return calculator.get_accuracy(net(x), y)["precision_at_1"]


def loop_triplet(unit: pddm_ext.PDDM) -> tuple[Any, Any]:
    reducer = reducers.ThresholdReducer(low=0)
    loss = losses.TripletMarginLoss(margin=0.5, distance=PDDMSimilarity(unit), reducer=reducer)
    return loss, PDDMMiner(unit, "pair")


def loop_contrastive(unit: pddm_ext.PDDM) -> tuple[Any, Any]:
    loss = losses.ContrastiveLoss(pos_margin=0.5, neg_margin=-0.5, distance=PDDMSimilarity(unit))
    return loss, miners.MultiSimilarityMiner(epsilon=0.5, distance=PDDMSimilarity(unit))


def loop_multi_similarity(unit: pddm_ext.PDDM) -> tuple[Any, Any]:
    return losses.MultiSimilarityLoss(beta=10, base=0, distance=PDDMSimilarity(unit)), None


def loop_quadruplet(unit: pddm_ext.PDDM) -> tuple[Any, Any]:
    return with_density(lambda **kwargs: QuadrupletLoss(unit, **kwargs), weight=0.01), None


def loop_memory(unit: pddm_ext.PDDM) -> tuple[Any, Any]:
    loss = losses.TripletMarginLoss(margin=0.5, distance=PDDMSimilarity(unit))
    return losses.CrossBatchMemory(loss, 8, 128, miner=PDDMMiner(unit, "pair")).to(DEVICE), None


@on_one_thread
@pytest.mark.parametrize("make", [loop_triplet, loop_contrastive, loop_multi_similarity, loop_quadruplet, loop_memory])
def test_a_training_loop_learns(make):
    """Loss, miner, distance and reducer; precision at 1 by score, of other samples of the classes."""
    torch.manual_seed(0)
    samples, classes = clusters(10, 32)
    x, y, test_x, test_y = samples[::2], classes[::2], samples[1::2], classes[1::2]
    net = torch.nn.Linear(16, 8).to(DEVICE)
    unit = pddm_ext.PDDM(8).to(DEVICE)
    loss_func, miner = make(unit)
    optimizer = torch.optim.Adam([*net.parameters(), *loss_func.parameters()], lr=1e-2)
    before = precision(net, test_x, test_y, PDDMSimilarity(unit))
    for _ in range(100):
        batch = torch.randperm(len(x))[:64].to(DEVICE)
        embeddings, labels = net(x[batch]), y[batch]
        optimizer.zero_grad()
        loss = (
            loss_func(embeddings, labels) if miner is None else loss_func(embeddings, labels, miner(embeddings, labels))
        )
        loss.backward()
        optimizer.step()
    after = precision(net, test_x, test_y, PDDMSimilarity(unit))
    assert before < 0.3
    assert after > 0.8


@on_one_thread
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_trainer_and_tester():
    """MetricLossOnly and GlobalEmbeddingSpaceTester as their notebooks use them."""
    torch.manual_seed(0)
    x, y = clusters(10, 32)
    train = torch.utils.data.TensorDataset(x[::2].cpu(), y[::2].cpu())
    validation = torch.utils.data.TensorDataset(x[1::2].cpu(), y[1::2].cpu())
    trunk, embedder = torch.nn.Linear(16, 16).to(DEVICE), torch.nn.Linear(16, 8).to(DEVICE)
    unit = pddm_ext.PDDM(8).to(DEVICE)
    loss = losses.TripletMarginLoss(margin=0.5, distance=PDDMSimilarity(unit))
    modules = {"trunk": trunk, "embedder": embedder, "metric_loss": loss}
    tester = testers.GlobalEmbeddingSpaceTester(
        data_device=DEVICE,
        dataloader_num_workers=0,
        accuracy_calculator=AccuracyCalculator(
            include=("precision_at_1",), k=1, device=DEVICE, knn_func=CustomKNN(PDDMSimilarity(unit))
        ),
    )

    def tested(epoch: int) -> float:
        splits = {"train": train, "val": validation}
        return tester.test(splits, epoch, trunk, embedder, [("val", ["train"])])["val"]["precision_at_1_level0"]

    before = tested(0)
    trainer = trainers.MetricLossOnly(
        {"trunk": trunk, "embedder": embedder},
        {f"{name}_optimizer": torch.optim.Adam(module.parameters(), lr=1e-2) for name, module in modules.items()},
        64,
        {"metric_loss": loss},
        train,
        mining_funcs={"tuple_miner": PDDMMiner(unit, "pair")},
        data_device=DEVICE,
        sampler=samplers.MPerClassSampler(y[::2].cpu(), m=8, length_before_new_iter=640),
        dataloader_num_workers=0,
    )
    trainer.train(num_epochs=8)
    assert before < 0.3
    assert tested(8) > 0.8
