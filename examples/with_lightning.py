"""PyTorch Lightning: a net trained on some classes, measured by searching among classes that it has never seen."""

import torch
from lightning.pytorch import Trainer, seed_everything
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pddm_ext.adapters.lightning import MetricLearningModule


class Embedding(MetricLearningModule):
    """Gives the net, and a schedule to the optimizer; all else is there."""

    def __init__(self, dim=16):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(144, dim)), dim, mode="pair", lr=1e-2)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


seed_everything(0, verbose=False)
# 80 classes, 20 pictures of 12 x 12 each: one row of a picture tells its class, the rest is noise.
labels = torch.arange(80).repeat_interleave(20)
images = torch.randn(len(labels), 1, 12, 12)
images[:, 0, 5] = torch.randn(80, 12)[labels] + 0.3 * torch.randn(len(labels), 12)
train, unseen = (TensorDataset(images[rows], labels[rows]) for rows in (labels < 60, labels >= 60))
sampler = MPerClassSampler(train.tensors[1], m=4, batch_size=64, length_before_new_iter=len(train))

module = Embedding()
trainer = Trainer(max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
(before,) = trainer.validate(module, DataLoader(unseen, 100), verbose=False)
trainer.fit(module, DataLoader(train, 64, sampler=sampler), DataLoader(unseen, 100))
for name, value in before.items():
    print(f"{name}: {value:.2f} before training, {trainer.callback_metrics[name]:.2f} after")
