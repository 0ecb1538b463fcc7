"""Rows whose class is not known are in no quadruplet, neither as positives nor as negatives, wherever labels enter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pddm_ext
from helpers import DEVICE, MODES, assert_same_bits, host_only, make_features, make_labels, make_unit
from pddm_ext import Quadruplets, reference


def without(feats: Tensor, labels: Tensor, unit: pddm_ext.PDDM, mode: str, ignored: int) -> Quadruplets:
    """What the other rows alone give, in the numbers and slots of the whole batch."""
    known = (labels.long() != ignored).nonzero().flatten()
    quads = unit.mine(feats[known], labels[known], mode=mode)
    number = torch.cat([known, known.new_tensor([-1])])  # the last is for slots that are not valid
    i, j, k, l = (number[rows] for rows in quads[:4])  # noqa: E741
    made = quads._replace(i=i, j=j, k=k, l=l)
    if mode != "anchor":
        return made
    slots = [torch.full((len(labels),), -1, device=feats.device).scatter(0, known, rows) for rows in made[:4]]
    scores = [feats.new_zeros(len(labels)).scatter(0, known, s) for s in made[4:7]]
    valid = torch.zeros(len(labels), dtype=torch.bool, device=feats.device).scatter(0, known, made.valid)
    return Quadruplets(*slots, *scores, valid)


@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
def test_mining_leaves_them_out(mode, data):
    n = data.draw(st.integers(0, 24))
    values = data.draw(st.sampled_from([(-1, 0, 1, 2), (-(2**63), 5, 2**63 - 1), (0, 255)]))
    labels = torch.tensor([data.draw(st.sampled_from(values)) for _ in range(n)], dtype=torch.int64).to(DEVICE)
    ignored, unit, feats = values[0], make_unit(5), make_features(n, 5)
    got = unit.mine(feats, labels, mode=mode, ignore_label=ignored)
    expected = without(feats, labels, unit, mode, ignored)
    assert_same_bits(got, expected)
    plain = reference.mine_and_score(feats, labels, unit, mode=mode, ignore_label=ignored)
    for a, b in zip((*got[:4], got.valid), (*plain[:4], plain.valid), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_without_it_every_number_is_a_class(mode):
    unit, feats, labels = make_unit(5), make_features(12, 5), make_labels(12) * 0 - 1
    labels[6:] = 3
    assert unit.mine(feats, labels, mode=mode).valid.any()
    assert not unit.mine(feats, labels, mode=mode, ignore_label=-1).valid.any()


@pytest.mark.parametrize("mode", MODES)
def test_they_get_no_gradient_and_the_others_get_theirs(mode):
    unit, feats, labels = make_unit(5), make_features(20, 5), make_labels(20)
    left_out = torch.arange(20, device=DEVICE) % 3 == 0
    labels[left_out] = -1
    spoilt = feats.clone()
    spoilt[0] = torch.nan  # whatever stands there
    spoilt[3] = torch.inf
    spoilt.requires_grad_()
    quads = pddm_ext.mine_and_score(spoilt, labels, unit, mode=mode, ignore_label=-1)
    pddm_ext.QuadrupletLoss()(spoilt, quads).backward()
    known = feats[~left_out].clone().requires_grad_()
    pddm_ext.QuadrupletLoss()(known, unit.mine(known, labels[~left_out], mode=mode)).backward()
    assert (spoilt.grad[left_out] == 0).all()
    torch.testing.assert_close(spoilt.grad[~left_out], known.grad)


@pytest.mark.parametrize(
    ("dtype", "values", "ignored"),
    [
        (torch.uint8, (255, 1, 2), 255),
        (torch.int8, (-1, 1, 2), -1),
        (torch.int16, (-1, 1, 2), -1),
        (torch.uint16, (65535, 1, 2), 65535),
        (torch.uint64, (2**64 - 1, 1, 2), 2**64 - 1),
    ],
)
def test_any_integer_dtype(dtype, values, ignored):
    unit, feats = make_unit(5), make_features(12, 5)
    labels = torch.tensor([values[r % 3] for r in range(12)], dtype=dtype).to(DEVICE)
    quads = unit.mine(feats, labels, mode="anchor", ignore_label=ignored)
    assert quads.valid.tolist() == [r % 3 != 0 for r in range(12)]


@pytest.mark.parametrize("ignored", [np.int8(-1), np.uint64(2**64 - 1)])
def test_an_integer_of_numpy(ignored):
    dtype = torch.int64 if ignored < 0 else torch.uint64
    labels = torch.tensor([int(ignored), 1, 2] * 4, dtype=dtype).to(DEVICE)
    quads = make_unit(5).mine(make_features(12, 5), labels, mode="anchor", ignore_label=ignored)
    assert quads.valid.tolist() == [r % 3 != 0 for r in range(12)]


def test_a_bank_of_int64_knows_the_largest_numbers():
    """Which its labels had as uint64."""
    labels = torch.tensor([0, 0, 1, 1, 2**64 - 1, 2**64 - 1], dtype=torch.uint64).to(DEVICE)
    feats, ids, bank = make_features(6, 5), torch.arange(6, device=DEVICE), pddm_ext.MemoryBank(6, 5).to(DEVICE)
    bank.add(feats, labels, ids)
    for unit in (make_unit(5), reference.PDDM(5).to(DEVICE)):
        given = {"ignore_label": 2**64 - 1, "mode": "anchor", "ids": ids, **bank.references()}
        quads = unit.mine(feats, labels, **given)
        assert quads.valid.tolist() == [True] * 4 + [False] * 2
        assert torch.cat(quads[1:4]).max() <= 3


def test_a_refusal_makes_no_default_unit(monkeypatch):
    monkeypatch.setattr("pddm_ext.unit._default_units", {})
    before = torch.get_rng_state()
    for mine in (pddm_ext.mine_and_score, reference.mine_and_score):
        with pytest.raises(TypeError, match="ignore_label is a float"):
            mine(make_features(12, 5), make_labels(12), ignore_label=1.5)
    assert not pddm_ext.unit._default_units
    assert torch.equal(torch.get_rng_state(), before)


def test_a_number_that_the_dtype_has_not_leaves_nobody_out():
    unit, feats, labels = make_unit(5), make_features(12, 5), make_labels(12)
    unsigned = torch.tensor([*[2**64 - 1] * 4, *labels[4:].clamp(min=0).tolist()], dtype=torch.uint64).to(DEVICE)
    assert unit.mine(feats, unsigned, mode="anchor", ignore_label=-1).valid[:4].all()  # whose bits are those of −1
    assert unit.mine(feats, labels.to(torch.int8), mode="anchor", ignore_label=300).valid.all()


@pytest.mark.parametrize("ignored", [1.0, "1", True, torch.tensor(1)])
def test_it_is_an_integer(ignored):
    unit, feats, labels = make_unit(5), make_features(12, 5), make_labels(12)
    words = f"ignore_label is a {type(ignored).__name__}; an int is accepted"
    for mine in (unit.mine, lambda *a, **k: reference.mine_and_score(*a, unit, **k)):
        with pytest.raises(TypeError, match=words):
            mine(feats, labels, ignore_label=ignored)
    with pytest.raises(TypeError, match=words):
        pddm_ext.DensityRegularizer(ignore_label=ignored)


def test_the_density_regularizer_leaves_them_out():
    feats, labels = make_features(20, 5), make_labels(20)
    labels[::3] = -1
    known = labels != -1
    got = pddm_ext.DensityRegularizer(ignore_label=-1)(feats, labels)
    assert_same_bits([got], [pddm_ext.DensityRegularizer()(feats[known], labels[known])])
    assert not torch.equal(got, pddm_ext.DensityRegularizer()(feats, labels))


# --- Adapters ---------------------------------------------------------------------------------------------------------


@host_only("the library's own code")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_reference", [False, True])
def test_pytorch_metric_learning(mode, with_reference):
    pml = pytest.importorskip("pddm_ext.adapters.pml")
    unit, feats, labels = make_unit(5), make_features(24, 5), make_labels(24)
    labels[::4] = -1
    known = (labels != -1).nonzero().flatten()
    others = {}
    if with_reference:
        ref, ref_labels = make_features(30, 5, seed=3), make_labels(30, seed=3)
        ref_labels[::5] = -1
        ref_known = (ref_labels != -1).nonzero().flatten()
        others = {"ref_emb": ref, "ref_labels": ref_labels}
        known_others = {"ref_emb": ref[ref_known], "ref_labels": ref_labels[ref_known]}
    got = pml.PDDMMiner(unit, mode, ignore_label=-1)(feats, labels, **others)
    alone = pml.PDDMMiner(unit, mode)(feats[known], labels[known], **(known_others if with_reference else {}))
    of = ref_known if with_reference else known
    assert [t.tolist() for t in got] == [known[alone[0]].tolist(), of[alone[1]].tolist(), of[alone[2]].tolist()]
    loss = pml.QuadrupletLoss(unit, mode, ignore_label=-1)(feats, labels, **others)
    alone = pml.QuadrupletLoss(unit, mode)(feats[known], labels[known], **(known_others if with_reference else {}))
    torch.testing.assert_close(loss, alone)
    regularizer = pml.DensityRegularizer(ignore_label=-1)
    assert regularizer.density.ignore_label == -1
    with pytest.raises(TypeError, match="ignore_label is a str; an int is accepted"):
        pml.PDDMMiner(unit, mode, ignore_label="-1")


@host_only("the library's own code")
def test_lightning():
    lightning = pytest.importorskip("pddm_ext.adapters.lightning")
    torch.manual_seed(0)
    module = lightning.MetricLearningModule(torch.nn.Linear(6, 4), 4, ignore_label=-1)
    module.log = module.log_dict = lambda *args, **kwargs: None
    images, labels = torch.randn(16, 6), torch.arange(16) // 4
    labels[::3] = -1
    known = labels != -1
    loss = module.training_step((images, labels), 0)
    torch.testing.assert_close(loss, module.training_step((images[known], labels[known]), 0))
    with pytest.raises(TypeError, match="ignore_label is a float; an int is accepted"):
        lightning.MetricLearningModule(torch.nn.Linear(6, 4), 4, ignore_label=-1.0)


@host_only("the library's own code")
def test_lightning_measures_the_others_alone():
    pytest.importorskip("pddm_ext.adapters.lightning")
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader, TensorDataset

    from pddm_ext.adapters.lightning import MetricLearningModule

    torch.manual_seed(0)
    images, labels = torch.randn(40, 6), torch.arange(40) // 4
    labels[::3] = -1
    known = labels != -1
    net = torch.nn.Linear(6, 4)

    def measured(rows: Tensor, ids: Tensor, **options: int) -> dict[str, float]:
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, barebones=False
        )
        data = DataLoader(TensorDataset(rows, ids), batch_size=16)
        return trainer.validate(MetricLearningModule(net, 4, **options), data, verbose=False)[0]

    assert measured(images, labels, ignore_label=-1) == measured(images[known], labels[known])
    assert measured(images, labels, ignore_label=-1) != measured(images, labels)


@host_only("the library's own code")
def test_scikit_learn():
    sklearn = pytest.importorskip("pddm_ext.adapters.sklearn")
    torch.manual_seed(0)
    rows, labels = torch.randn(40, 6).double().numpy(), (torch.arange(40) // 10).numpy()
    labels[::3] = -1
    known = labels != -1
    options = {"steps": 5, "hidden": 4, "random_state": 0}
    got = sklearn.PDDMNeighborsClassifier(ignore_label=-1, **options).fit(rows, labels)
    alone = sklearn.PDDMNeighborsClassifier(**options).fit(rows[known], labels[known])
    assert got.classes_.tolist() == [0, 1, 2, 3]
    assert (got.predict_proba(rows) == alone.predict_proba(rows)).all()
    with pytest.raises(ValueError, match="y has no label but -1, which ignore_label leaves out"):
        sklearn.PDDMNeighborsClassifier(ignore_label=-1).fit(rows, labels * 0 - 1)


@host_only("the library's own code")
def test_sentence_transformers():
    pytest.importorskip("pddm_ext.adapters.sentence_transformers")
    from test_sentence_transformers import made

    from pddm_ext.adapters.sentence_transformers import PDDMQuadrupletLoss

    model = made()
    dim = model.get_embedding_dimension()
    torch.manual_seed(0)
    embeddings, labels = torch.randn(16, dim), torch.arange(16) // 4
    labels[::3] = -1
    known = labels != -1
    loss = PDDMQuadrupletLoss(model, ignore_label=-1)
    alone = PDDMQuadrupletLoss(model, loss.unit)
    got = loss.compute_loss_from_embeddings([embeddings], labels)
    torch.testing.assert_close(got, alone.compute_loss_from_embeddings([embeddings[known]], labels[known]))
    assert loss.get_config_dict()["ignore_label"] == -1
