"""PDDMQuadrupletLoss: its value and gradients, what the trainer does with its unit, and errors. Without a network."""

from __future__ import annotations

import copy
import functools
import logging
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import TrainerCallback

import pddm_ext
from helpers import MODES, PARAMETERS, host_only, on_one_thread
from pddm_ext import reference
from pddm_ext.adapters.sentence_transformers import PDDMQuadrupletLoss
from processes import in_two_processes

pytestmark = [host_only("the trainer's CPU"), pytest.mark.filterwarnings("ignore")]

logging.getLogger("sentence_transformers").setLevel(logging.ERROR)

CLASSES, OF_CLASS, NOISE = 24, 4, 30


def made(seed: int = 0, **kwargs: Any) -> SentenceTransformer:
    """Sentences to the mean of 16 trained numbers of each word: words of each class, and words of none."""
    words = [f"c{c}w{w}" for c in range(CLASSES) for w in range(OF_CLASS)] + [f"n{w}" for w in range(NOISE)]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(seed)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu", **kwargs)


def sentences(classes: range, per_class: int, seed: int) -> tuple[list[str], Tensor]:
    """Of three words of their class and six of none."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes).repeat_interleave(per_class)
    own = torch.randint(OF_CLASS, (len(labels), 3), generator=generator).tolist()
    other = torch.randint(NOISE, (len(labels), 6), generator=generator).tolist()
    texts = [
        " ".join([*(f"c{c}w{w}" for w in a), *(f"n{w}" for w in b)])
        for c, a, b in zip(labels.tolist(), own, other, strict=True)
    ]
    return texts, labels


def dataset() -> Dataset:
    texts, labels = sentences(range(16), 12, seed=0)
    return Dataset.from_dict({"sentence": texts, "label": labels.tolist()})


def trainer(model: SentenceTransformer, loss: Any, folder: Path, **kwargs: Any) -> SentenceTransformerTrainer:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 32,
        "batch_sampler": "group_by_label",
        "learning_rate": 5e-2,
        "learning_rate_mapping": {r"^unit\.": 3e-3},
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **kwargs,
    }
    args = SentenceTransformerTrainingArguments(output_dir=str(folder), **settings)
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=dataset(), loss=loss)


def precision_at_1(model: SentenceTransformer, texts: list[str], labels: Tensor) -> float:
    embeddings = F.normalize(model.encode(texts, convert_to_tensor=True), dim=-1)
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-2)
    return (labels[similarity.argmax(1)] == labels).float().mean().item()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


# --- The loss itself --------------------------------------------------------------------------------------------------


def test_it_mines_among_candidates():
    model = made()
    unit = pddm_ext.PDDM(16)
    embeddings, labels = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)), torch.arange(20) // 4
    value = PDDMQuadrupletLoss(model, unit, candidates=2).compute_loss_from_embeddings([embeddings], labels)
    quads = unit.mine(embeddings, labels, mode="pair", candidates=2)
    torch.testing.assert_close(value, pddm_ext.QuadrupletLoss()(embeddings, quads))
    assert not torch.equal(quads.k, unit.mine(embeddings, labels, mode="pair").k)
    with pytest.raises(ValueError, match="candidates is 0; at least 1 is accepted"):
        PDDMQuadrupletLoss(model, unit, candidates=0)


def test_a_unit_that_is_frozen_at_first_and_a_copy_are_shared_too():
    """Each parameter that is trained has the mean of its gradients taken, and once."""
    embeddings, labels = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)), torch.arange(20) // 4
    loss = PDDMQuadrupletLoss(made(), pddm_ext.PDDM(16).requires_grad_(False))
    expected = loss.compute_loss_from_embeddings([embeddings], labels)

    def averaged(loss: PDDMQuadrupletLoss) -> set[int]:
        torch.testing.assert_close(loss.compute_loss_from_embeddings([embeddings], labels), expected)
        return {len(parameter._backward_hooks or {}) for parameter in loss.unit.parameters()}

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert averaged(loss) == {0}
        loss.unit.requires_grad_()
        assert averaged(loss) == averaged(loss) == {1}
        assert averaged(copy.deepcopy(loss)) == {1}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("mode", MODES)
@on_one_thread
def test_value_and_gradients_are_those_of_the_definition(mode):
    model = made().double()
    unit = pddm_ext.PDDM(16, hidden=5).double()
    loss = PDDMQuadrupletLoss(model, unit, mode=mode, alpha=0.4, beta=0.8, weight=0.3)
    texts, labels = sentences(range(5), 3, seed=0)
    features = model.preprocess(texts)
    value = loss([features], labels)
    value.backward()
    got = {name: parameter.grad for name, parameter in loss.named_parameters()}
    assert set(got) == {"model.0.embedding.weight", *(f"unit.{name}" for name in PARAMETERS)}

    same = reference.PDDM(16, hidden=5).double()
    same.load_state_dict(unit.state_dict())
    words = model[0].embedding.weight.detach().clone().requires_grad_()
    feats = F.embedding_bag(features["input_ids"], words, features["offsets"])
    quads = reference.mine_and_score(feats, labels, same, mode=mode)
    expected = pddm_ext.QuadrupletLoss(0.4, 0.8, 0.3)(feats, quads)
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(got["model.0.embedding.weight"], words.grad, rtol=1e-9, atol=1e-12)
    for name, parameter in same.named_parameters():
        torch.testing.assert_close(got[f"unit.{name}"], parameter.grad, rtol=1e-9, atol=1e-12)
        assert parameter.grad.abs().max() > 0 or name == "s.bias"  # the loss is of differences of scores
    assert words.grad.abs().max() > 1e-3
    assert torch.equal(loss.compute_loss_from_embeddings([feats], labels), value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]], ids=["one class", "singletons"])
def test_a_batch_without_quadruplets_costs_nothing(mode, labels):
    model = made()
    loss = PDDMQuadrupletLoss(model, mode=mode)
    value = loss([model.preprocess(["c0w0 n1", "n1 n2", "c3w1"])], torch.tensor(labels))
    value.backward()
    assert value.item() == 0
    assert all((parameter.grad == 0).all() for parameter in loss.parameters())


def test_the_loss_is_of_float32_under_autocast():
    model = made()
    loss = PDDMQuadrupletLoss(model)
    texts, labels = sentences(range(5), 3, seed=0)
    feats = model.encode(texts, convert_to_tensor=True).bfloat16()
    unit = reference.PDDM(16)
    unit.load_state_dict(loss.unit.state_dict())
    quads = reference.mine_and_score(feats.float(), labels, unit, mode="pair")
    expected = pddm_ext.QuadrupletLoss()(feats.float(), quads)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss.compute_loss_from_embeddings([feats], labels)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


def test_a_unit_is_made_for_what_training_embeds():
    """Encoding may truncate; training does not."""
    model = made(truncate_dim=4)
    loss = PDDMQuadrupletLoss(model)
    assert loss.unit.dim == 16
    assert model.truncate_dim == 4
    texts, labels = sentences(range(5), 3, seed=0)
    assert loss([model.preprocess(texts)], labels) > 0
    assert PDDMQuadrupletLoss(made()).unit is not pddm_ext.default_unit(16)


# --- With the trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pair", "anchor"])
@on_one_thread
def test_training_separates_classes_old_and_new(mode, tmp_path):
    model = made()
    loss = PDDMQuadrupletLoss(model, mode=mode)
    seen, unseen = sentences(range(16), 8, seed=1), sentences(range(16, CLASSES), 8, seed=2)
    before, start = [precision_at_1(model, *texts) for texts in (seen, unseen)], state(loss)
    trainer(model, loss, tmp_path, max_steps=200).train()
    after = [precision_at_1(model, *texts) for texts in (seen, unseen)]
    assert max(before) < 0.55
    assert after[0] > 0.95
    assert after[1] > 0.75
    for name, value in state(loss).items():
        assert name == "unit.s.bias" or not torch.equal(value, start[name]), name


def test_the_optimizer_has_every_parameter_once_and_the_units_own_rate(tmp_path):
    model = made()
    loss = PDDMQuadrupletLoss(model)
    groups = trainer(model, loss, tmp_path, weight_decay=0.1).create_optimizer().param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == 9
    expected = {id(p): 3e-3 for p in loss.unit.parameters()} | {id(p): 5e-2 for p in model.parameters()}
    assert rates == expected


def test_a_run_resumes_with_the_units_weights_beside_the_checkpoint(tmp_path):
    """As the documentation says: the checkpoint has no weights of the unit, and this is how to keep them."""

    class SaveUnit(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                torch.save(loss.unit.state_dict(), f"{args.output_dir}/checkpoint-{state.global_step}/unit.pt")

    def begun() -> PDDMQuadrupletLoss:
        return PDDMQuadrupletLoss(made())

    straight = begun()
    trainer(straight.model, straight, tmp_path / "straight", max_steps=6).train()

    loss = begun()
    run = trainer(loss.model, loss, tmp_path / "run", max_steps=6, save_strategy="steps", save_steps=3)
    run.add_callback(SaveUnit())
    run.train()
    kept = tmp_path / "run" / "checkpoint-3"
    names = {path.name for path in kept.rglob("*")}
    assert {"model.safetensors", "optimizer.pt", "unit.pt"} <= names
    assert "huang2016local" in (kept / "README.md").read_text("utf-8")
    assert len(torch.load(kept / "optimizer.pt", weights_only=True)["state"]) == 9

    resumed = PDDMQuadrupletLoss(made(seed=8))
    weights = torch.load(kept / "unit.pt", weights_only=True)
    resumed.unit.load_state_dict(weights)
    trainer(resumed.model, resumed, tmp_path / "run", max_steps=6).train(resume_from_checkpoint=str(kept))
    assert_equal(state(resumed), state(straight))
    assert not torch.equal(weights["u.weight"], straight.unit.u.weight)

    forgotten = PDDMQuadrupletLoss(made(seed=8))
    trainer(forgotten.model, forgotten, tmp_path / "run", max_steps=6).train(resume_from_checkpoint=str(kept))
    assert not torch.allclose(forgotten.unit.u.weight, straight.unit.u.weight, atol=0.05)


def test_configuration_and_citation_are_for_the_model_card():
    loss = PDDMQuadrupletLoss(made(), pddm_ext.PDDM(16, hidden=5), mode="anchor", alpha=0.4, beta=0.8, weight=0.3)
    assert loss.get_config_dict() == {
        "unit": "16, hidden=5, combined=16, normalize_input=False",
        "mode": "anchor",
        "alpha": 0.4,
        "beta": 0.8,
        "weight": 0.3,
        "ignore_label": None,
        "candidates": None,
        "gather": False,
    }
    assert loss.citation.startswith("\n@inproceedings{huang2016local,")


# --- Two processes ----------------------------------------------------------------------------------------------------


def settings() -> dict[str, Any]:
    """Plain gradient descent: Adam would hide a factor of the gradient."""
    return {"max_steps": 4, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def as_one_of_two(rank: int, port: int, folder: Path, *, gather: bool) -> None:
    """What each process does; results go to a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    loss = PDDMQuadrupletLoss(made(seed=rank), gather=gather)
    loss.model.load_state_dict(made().state_dict())
    results: dict[str, Any] = {"start": state(loss), "batches": []}
    loss.register_forward_pre_hook(lambda _, inputs: results["batches"].append((dict(inputs[0][0]), inputs[1])))
    trainer(loss.model, loss, folder / "out", **settings()).train()
    torch.save({**results, "end": state(loss)}, folder / f"{rank}.pt")


@on_one_thread
@pytest.mark.parametrize("gather", [False, True])
def test_two_processes_train_one_unit(tmp_path, gather):
    """By the mean of their gradients, from the unit of rank 0; of one with both batches, if they gather."""
    target = functools.partial(as_one_of_two, gather=gather)
    first, second = in_two_processes(target, tmp_path, preload="pddm_ext.adapters.sentence_transformers")
    assert not torch.equal(first["start"]["unit.u.weight"], second["start"]["unit.u.weight"])
    assert_equal(second["end"], first["end"])

    one = PDDMQuadrupletLoss(made())
    one.load_state_dict(first["start"])
    optimizer = trainer(one.model, one, tmp_path, **settings()).create_optimizer()
    assert len(first["batches"]) == len(second["batches"]) == 4
    for halves in zip(first["batches"], second["batches"], strict=True):
        assert not torch.equal(halves[0][0]["input_ids"], halves[1][0]["input_ids"])
        optimizer.zero_grad()
        if gather:
            rows = [one.model(features)["sentence_embedding"] for features, _ in halves]
            one.compute_loss_from_embeddings([torch.cat(rows)], torch.cat([labels for _, labels in halves])).backward()
        else:
            (sum(one([features], labels) for features, labels in halves) / 2).backward()
        optimizer.step()
    got = {name.replace("module.", ""): value for name, value in first["end"].items()}
    torch.testing.assert_close(got, state(one), rtol=1e-4, atol=1e-6)
    for name in got.keys() - {"unit.s.bias"}:
        assert (got[name] - first["start"][name]).abs().max() > 1e-5, name


# --- Errors -----------------------------------------------------------------------------------------------------------


class Unknown(SentenceTransformer):
    def get_embedding_dimension(self) -> None:
        return None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": nn.Linear(3, 4)}, TypeError, "model is a Linear; a SentenceTransformer is accepted"),
        ({"unit": nn.Linear(16, 1)}, TypeError, "unit is a Linear; a PDDM is accepted"),
        ({"unit": pddm_ext.PDDM(8)}, ValueError, "unit scores features of dimension 8; these have 16"),
        ({"gather": 1}, TypeError, "gather is a int; a bool is accepted"),
        ({"gather": True, "candidates": 4}, ValueError, "candidates is 4 beside gather; with it None is accepted"),
        ({"mode": "hard"}, ValueError, "mode is 'hard'; 'batch', 'anchor', 'pair' are accepted"),
    ],
)
def test_arguments_that_are_not_accepted(arguments, error, message):
    with pytest.raises(error) as raised:
        PDDMQuadrupletLoss(**{"model": made(), **arguments})
    assert str(raised.value) == message


def test_a_model_of_unknown_dimension():
    with pytest.raises(ValueError, match="model has modules that do not tell its embedding dimension"):
        PDDMQuadrupletLoss(Unknown(modules=list(made())))


@pytest.mark.parametrize(
    ("columns", "labels", "error", "message"),
    [
        (2, torch.zeros(3).long(), ValueError, "sentence_features has 2 columns of sentences; one is accepted"),
        (1, torch.zeros(3), TypeError, "labels has dtype torch.float32; an integer dtype is accepted"),
        (1, None, TypeError, "labels is a NoneType; a tensor of an integer dtype is accepted"),
        (1, torch.zeros(2).long(), ValueError, "labels has length 2; feats has 3"),
        (1, torch.zeros(3, 1).long(), ValueError, "labels has shape (3, 1); one dimension is accepted"),
    ],
)
def test_batches_that_are_not_accepted(columns, labels, error, message):
    model = made()
    with pytest.raises(error) as raised:
        PDDMQuadrupletLoss(model)([model.preprocess(["c0w0 n1", "n1 n2", "c3w1"])] * columns, labels)
    assert str(raised.value) == message
