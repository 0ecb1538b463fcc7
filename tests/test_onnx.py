"""The unit in ONNX: by the plain operators of ``reference``; the fused ones are refused by a message that says so."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import pddm_ext
from helpers import host_only, make_features

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra test has it")

pytestmark = [host_only("a graph is the same on every device"), pytest.mark.usefixtures("one_thread", "silently")]

D = 16


@pytest.fixture
def silently() -> Iterator[None]:
    """The exporters warn of what they will change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("normalize_input", [False, True])
def test_a_plain_unit_scores_in_onnx_as_the_fused_one_does(normalize_input: bool) -> None:
    unit = pddm_ext.PDDM(D, 12, 10, normalize_input=normalize_input).eval()
    plain = pddm_ext.reference.PDDM(D, 12, 10, normalize_input=normalize_input).eval()
    plain.load_state_dict(unit.state_dict())
    pairs, rows = (make_features(2, D, seed=0), make_features(2, D, seed=1)), {0: Dim("n", min=1)}
    program = torch.onnx.export(plain, pairs, dynamic_shapes=(rows, rows), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for n in (1, 3, 7):
        x, y = make_features(n, D, seed=2 * n), make_features(n, D, seed=2 * n + 1)
        y[0] = x[0]  # nothing is left of u
        (scores,) = session.run(None, {"x": x.numpy(), "y": y.numpy()})
        torch.testing.assert_close(torch.from_numpy(scores), unit(x, y).detach(), rtol=1e-5, atol=1e-6)


class Asks(nn.Module):
    def __init__(self, asked: Callable[[pddm_ext.PDDM, Tensor], Tensor]) -> None:
        super().__init__()
        self.asked, self.unit = asked, pddm_ext.PDDM(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.asked(self.unit, x)


LABELS = torch.arange(6) // 2
FUSED: dict[str, Callable[[pddm_ext.PDDM, Tensor], Tensor]] = {
    "unit": lambda unit, x: unit(x, x.flip(0)),
    "mine": lambda unit, x: unit.mine(x, LABELS).s_ij,
    "score_pairs": lambda unit, x: pddm_ext.score_pairs(x, LABELS, LABELS, unit),
    "score_matrix": lambda unit, x: pddm_ext.score_matrix(x, unit),
    "topk": lambda unit, x: pddm_ext.topk(x, x, 2, unit)[0],
}


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("entry", FUSED)
def test_every_fused_entry_is_refused_in_onnx_and_names_the_plain_one(entry: str, dynamo: bool) -> None:
    example, file = (make_features(6, D),), None if dynamo else io.BytesIO()
    with pytest.raises(Exception, match=r"export a pddm_ext.reference.PDDM with this unit's state_dict"):
        torch.onnx.export(Asks(FUSED[entry]).eval(), example, file, dynamo=dynamo, verbose=False)


def test_after_a_refusal_all_is_as_before() -> None:
    unit, x = pddm_ext.PDDM(D), make_features(6, D)
    before = unit(x, x.flip(0))
    with pytest.raises(Exception, match=r"pddm_ext.reference"):
        torch.onnx.export(Asks(FUSED["unit"]).eval(), (x,), dynamo=True, verbose=False)
    assert torch.equal(unit(x, x.flip(0)), before)
    graph = torch.export.export(unit, (x, x.clone()), dynamic_shapes=({0: Dim("n")}, {0: Dim("n")}))
    assert torch.equal(graph.module()(x, x.flip(0)), before)
