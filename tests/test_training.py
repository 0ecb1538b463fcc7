"""The loop: its updates, what it says of a collapse, and two processes that train one net."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pddm_ext.workbench import checkpoint, outcome
from pddm_ext.workbench.data.augment import DRAWINGS
from pddm_ext.workbench.data.splits import Dataset
from pddm_ext.workbench.loop import CHECKPOINT, Run
from pddm_ext.workbench.measuring import COLLAPSED, CollapseWarning
from pddm_ext.workbench.settings import Settings
from processes import environment_of_a_user
from runs import TINY, TINY_OPTIONS, differences, make_archive, trained

pytestmark = pytest.mark.usefixtures("one_thread")


# Updates


def test_accumulated_batches_are_updated_by_the_mean_of_their_gradients(tiny: Dataset) -> None:
    changed = {"method": "contrastive", "augment": False, "every": 1, "steps": 1, "accumulate": 2}
    run = Run(Settings(**{**TINY, **changed}), tiny)
    start = run.learner.state_dict()
    seen: list[tuple[Tensor, Tensor]] = []
    run.learner.register_forward_pre_hook(lambda module, given: seen.append(given))
    gradients = []
    run.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([p.grad.clone() for p in run.learner.parameters() if p.grad is not None])
    )
    start = {name: value.clone() for name, value in start.items()}
    run.train(progress=False)
    assert len(seen) == 2
    assert not torch.equal(seen[0][0], seen[1][0])
    expected = Run(run.settings, tiny).learner
    expected.load_state_dict(start)
    (sum(sum(expected(*given).values()) for given in seen) / 2).backward()
    for got, parameter in zip(gradients[0], expected.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-7)
    assert run.curves["loss"] == [None, pytest.approx(sum(sum(expected(*given).values()) for given in seen).item() / 2)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("constant", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ("cosine", 0, [(1 + math.cos(step * math.pi / 8)) / 2 for step in range(8)]),
        ("cosine", 2, [(1 + math.cos(step * math.pi / 8)) / 2 * (1 if step else 0.5) for step in range(8)]),
    ],
)
def test_learning_rates_follow_their_schedule(tiny: Dataset, schedule: str, warmup: int, factors: list[float]) -> None:
    changed = {**TINY, "steps": 8, "every": 4, "lr": 0.01, "method": "pddm-batch", "unit_lr_factor": 3.0}
    run = Run(Settings(**changed, schedule=schedule, warmup=warmup), tiny)
    rates: list[list[float]] = []
    run.optimizer.register_step_pre_hook(lambda *_: rates.append([g["lr"] for g in run.optimizer.param_groups]))
    run.train(progress=False)
    for part, rate in enumerate((0.01, 0.01, 0.03)):  # the head's, the backbone's and the unit's
        assert [each[part] for each in rates] == pytest.approx([rate * factor for factor in factors])


def test_augment_decides_what_the_net_sees(tiny: Dataset) -> None:
    plain = DRAWINGS.plain(tiny.train.pictures[torch.arange(32)])

    def known(augment: bool) -> list[bool]:
        run = Run(Settings(**TINY, augment=augment), tiny)
        seen: list[Tensor] = []
        run.learner.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        run.train(progress=False)
        return [bool((plain == picture).flatten(1).all(1).any()) for picture in torch.cat(seen)]

    assert all(known(False))
    assert not any(known(True))


def test_the_same_seed_gives_the_same_run(tiny: Dataset) -> None:
    one, same, other = (trained(tiny, seed=seed).learner.state_dict() for seed in (1, 1, 2))
    assert not differences(one, same)
    assert differences(one, other)


def test_a_collapse_is_said_once(tiny: Dataset) -> None:
    """Weights that decay far faster than they learn leave one point for all pictures."""
    run = Run(Settings(**{**TINY, "steps": 30, "every": 5}, method="pddm-batch", lr=0.05, weight_decay=1e4), tiny)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train(progress=False)
    said = [str(warning.message) for warning in caught if warning.category is CollapseWarning]
    low = [value < COLLAPSED for value in run.curves["spread"]]
    assert len(said) == sum(now and not before for before, now in zip([False, *low], low, strict=False)) == 1
    at = low.index(True)
    assert said[0].startswith(
        f"after {run.curves['step'][at]} steps the embedding has collapsed: its spread is "
        f"{run.curves['spread'][at]:.4f}, its effective rank {run.curves['effective_rank'][at]:.1f} of 8"
    )
    assert low[-1]
    assert outcome.figures(run)["collapsed"]


def test_too_few_test_pictures_are_told(tiny: Dataset) -> None:
    few = Dataset("folder", DRAWINGS, tiny.train, tiny.test.classes(torch.arange(2)))
    with pytest.raises(ValueError, match="folder has 8 test pictures; Recall@8 needs more"):
        Run(Settings(**TINY), few)


# Several processes


_ON_TWO = """
import os, sys
import torch
from pddm_ext.workbench import cli
from pddm_ext.workbench import checkpoint, loop

train, forward = loop.Run.train, loop.Learner.forward
seen = []

def kept(self, **changed):
    train(self, **changed)
    name = f"{sys.argv[1]}-{os.environ.get('LOCAL_RANK', '0')}.pt"
    torch.save({"learner": self.learner.state_dict(), "seen": seen, "leads": self.leads}, name)

def noted(self, pictures, *others):
    seen.append(pictures)
    return forward(self, pictures, *others)

save = checkpoint.save

def kept_too(path, state):
    save(path, state)
    save(path.with_name(f"after-{state['taken']}.pt"), state)

loop.Run.train, loop.Learner.forward, checkpoint.save = kept, noted, kept_too
torch.set_num_threads(1)
sys.exit(cli.main(sys.argv[2:]))
"""


def on_two(tmp_path: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "script.py").write_text(_ON_TWO)
    data = ["--data", "omniglot", "--root", str(tmp_path / "small.zip"), "--out", str(tmp_path / name)]
    given = ["train", *TINY_OPTIONS, *data, "--devices", "2", "--method", "recommended", "--unit-steps", "4", *options]
    command = [sys.executable, "script.py", name, *given]
    return subprocess.run(
        command, cwd=tmp_path, env=environment_of_a_user(), capture_output=True, text=True, check=False, timeout=300
    )


def test_two_processes_train_one_net_and_continue(tmp_path: Path) -> None:
    make_archive(tmp_path / "small.zip")
    for name, resume in (("whole", []), ("parts", ["--resume"])):
        done = on_two(tmp_path, name, "--steps", "4", *resume)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout.count("R-prec.") == 1
        if not resume:
            (tmp_path / "parts").mkdir()
            shutil.copy(tmp_path / "whole" / "after-2.pt", tmp_path / "parts" / CHECKPOINT)
    one, two = (torch.load(tmp_path / f"whole-{rank}.pt") for rank in (0, 1))
    assert (one["leads"], two["leads"]) == (True, False)
    assert len(one["seen"]) == len(two["seen"]) == 4
    assert not torch.equal(one["seen"][0], two["seen"][0])  # each has batches of its own
    # Batch normalisation's running means are each process's own after its last batch; the first one's are kept. And it
    # alone trains the unit in the end.
    found = differences(one["learner"], two["learner"])
    assert not [name for name in found if "running" not in name and not name.startswith("/fitted.")]
    assert "/fitted.unit.u.weight" in found
    metrics = outcome.read(tmp_path / "whole")
    assert metrics is not None
    assert metrics["curves"]["step"] == [0, 2, 4]
    for rank in (0, 1):
        whole, parts = (torch.load(tmp_path / f"{name}-{rank}.pt") for name in ("whole", "parts"))
        assert not differences(whole["seen"][2:], parts["seen"]), rank
    states = [checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("whole", "parts")]
    for state in states:
        del state["seconds"], state["curves"]["seconds"]
    assert not differences(*states)


def by_torchrun(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    given = ["train", *TINY_OPTIONS, "--steps", "2", "--method", "pddm-pair", "--out", str(folder), *options]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pddm_ext"]
    return subprocess.run(
        [*command, *given],
        cwd=folder.parent,
        env=environment_of_a_user(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_torchrun_starts_the_processes(tmp_path: Path) -> None:
    done = by_torchrun(tmp_path / "run", "--gather", "--bank", "30")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("R-prec.") == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["devices"] == 2
    refused = by_torchrun(tmp_path / "other", "--devices", "3")
    assert refused.returncode != 0
    assert "--devices is 3; torchrun has started 2, and as many are accepted" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_divergence_ends_every_process(tmp_path: Path) -> None:
    make_archive(tmp_path / "small.zip")
    done = on_two(tmp_path, "diverged", "--lr", "1e30")
    assert done.returncode == 2
    assert "embedding is not finite after 2 steps" in done.stderr
    assert not (tmp_path / "diverged" / "metrics.json").exists()
