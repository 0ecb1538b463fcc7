"""pytorch-metric-learning: train with the quadruplet loss, and rank classes never seen by the score it has learned."""

import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

import pddm_ext
from pddm_ext.adapters.pml import PDDMSimilarity, QuadrupletLoss

torch.manual_seed(0)
labels = torch.arange(40).repeat_interleave(20)
signal = torch.randn(40, 8)[labels] + 0.3 * torch.randn(800, 8)  # eight coordinates tell the classes apart
data = torch.cat([signal, torch.randn(800, 24)], dim=1)  # and twenty-four do not
seen = labels < 20

net = torch.nn.Linear(32, 16)
unit = pddm_ext.PDDM(16)
# TripletMarginLoss(distance=PDDMSimilarity(unit)) with a PDDMMiner(unit, mode="pair") would do, too.
loss_func = QuadrupletLoss(unit)
optimizer = torch.optim.Adam([*net.parameters(), *loss_func.parameters()], lr=3e-3)
calculator = AccuracyCalculator(include=("precision_at_1",), k=1, knn_func=CustomKNN(PDDMSimilarity(unit)))


@torch.no_grad()
def accuracy() -> float:
    return calculator.get_accuracy(net(data[~seen]), labels[~seen])["precision_at_1"]


print(f"precision at 1 of unseen classes, before: {accuracy():.1%}")
for _ in range(200):
    batch = torch.randperm(400)[:128]
    loss = loss_func(net(data[seen][batch]), labels[seen][batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"and after: {accuracy():.1%}")
