"""What works under which of torch's transforms, modes and wrappers; the documentation's table is made of these results.

``python tests/test_transforms.py`` writes the table of docs/transforms.md anew.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import multiprocessing
import pickle
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim, export
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import pddm_ext
from helpers import host_only
from pddm_ext import reference

pytestmark = host_only("autograd's and the compiler's parts are the same on every device")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "transforms.md"
BEGIN, END = "<!-- made by tests/test_transforms.py: begin -->\n", "<!-- made by tests/test_transforms.py: end -->\n"

N, D = 8, 6
LABELS = torch.arange(N) // 2
#: Of what is asked, a function of the unit and the features (n, d).
Asked = Callable[[nn.Module, Tensor], Tensor]


def rows(n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit_of(kind: type[nn.Module], seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return kind(D, 5, 4).double()


def matched(unit: nn.Module, x: Tensor) -> Tensor:
    return unit(x, x.flip(0) + 1)


def matrix(unit: nn.Module, x: Tensor) -> Tensor:
    where = pddm_ext if isinstance(unit, pddm_ext.PDDM) else reference
    return where.score_matrix(x, unit)


def loss(unit: nn.Module, x: Tensor) -> Tensor:
    labels = torch.arange(x.shape[-2], device=x.device) // 2
    return pddm_ext.QuadrupletLoss()(x, unit.mine(x, labels, mode="anchor"))


ENTRIES: dict[str, Asked] = {"`unit(x, y)`": matched, "`score_matrix`": matrix, "loss of `mine`": loss}


def mixed(t: Tensor) -> Tensor:
    """A scalar in which no entry's part is another's."""
    return (t * torch.linspace(1, 2, t.numel(), dtype=t.dtype).reshape(t.shape)).sum()


# Each of these is done with the unit on its kernels and with the one in plain PyTorch, and has to give the same.


def backward(asked: Asked, unit: nn.Module) -> list[Tensor]:
    x = rows().requires_grad_()
    return list(torch.autograd.grad(mixed(asked(unit, x)), [x, *unit.parameters()]))


def forward_mode(asked: Asked, unit: nn.Module) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(asked(unit, forward_ad.make_dual(rows(), rows(seed=2)))).tangent


def frozen_forward_mode(asked: Asked, unit: nn.Module) -> Tensor:
    return forward_mode(asked, unit.requires_grad_(False))


def func_grad(asked: Asked, unit: nn.Module) -> Tensor:
    return grad(lambda x: mixed(asked(unit, x)))(rows())


def func_vjp(asked: Asked, unit: nn.Module) -> Tensor:
    value, pull = vjp(lambda x: asked(unit, x), rows())
    return pull(torch.ones_like(value))[0]


def func_jacrev(asked: Asked, unit: nn.Module) -> Tensor:
    return jacrev(lambda x: asked(unit, x))(rows())


def func_vmap(asked: Asked, unit: nn.Module) -> Tensor:
    return vmap(lambda x: asked(unit, x))(torch.stack([rows(seed=s) for s in range(3)]))


def grads_of_each(asked: Asked, unit: nn.Module) -> dict[str, Tensor]:
    def of(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        with swapped(unit, parameters) as other:
            return mixed(asked(other, x))

    xs = torch.stack([rows(seed=s) for s in range(3)])
    return vmap(grad(of), in_dims=(None, 0))(dict(unit.named_parameters()), xs)


@contextlib.contextmanager
def swapped(unit: nn.Module, parameters: dict[str, Tensor]) -> Any:
    """The unit with other parameters, as torch.func.functional_call has a module during its forward pass."""
    with torch.nn.utils.stateless._reparametrize_module(unit, parameters):
        yield unit


def ensemble(asked: Asked, unit: nn.Module) -> Tensor:
    parameters, _ = stack_module_state([unit_of(type(unit), seed) for seed in range(3)])
    x = rows()

    def of(one: dict[str, Tensor]) -> Tensor:
        with swapped(unit, one) as other:
            return asked(other, x)

    return vmap(of)(parameters)


class Asker(nn.Module):
    """What is asked, as a module of the unit."""

    def __init__(self, asked: Asked, unit: nn.Module) -> None:
        super().__init__()
        self.asked, self.unit = asked, unit

    def forward(self, x: Tensor) -> Tensor:
        return self.asked(self.unit, x)


def called_with_others(asked: Asked, unit: nn.Module) -> Tensor:
    others = {f"unit.{name}": p for name, p in unit_of(type(unit), 7).named_parameters()}
    return functional_call(Asker(asked, unit), others, (rows(),))


def func_jvp(asked: Asked, unit: nn.Module) -> Tensor:
    return jvp(lambda x: asked(unit, x), (rows(),), (rows(seed=2),))[1]


def func_jacfwd(asked: Asked, unit: nn.Module) -> Tensor:
    return jacfwd(lambda x: asked(unit, x))(rows())


def compiled_jvp(asked: Asked, unit: nn.Module) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(lambda: func_jvp(asked, unit), backend="aot_eager")()


def second(asked: Asked, unit: nn.Module) -> Tensor:
    x = rows().requires_grad_()
    (first,) = torch.autograd.grad(mixed(asked(unit, x)), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def func_second(asked: Asked, unit: nn.Module) -> Tensor:
    return grad(lambda x: grad(lambda x: mixed(asked(unit, x)))(x).square().sum())(rows())


def func_hessian(asked: Asked, unit: nn.Module) -> Tensor:
    return hessian(lambda x: mixed(asked(unit, x)))(rows())


def batched_gradients(asked: Asked, unit: nn.Module) -> Tensor:
    x = rows().requires_grad_()
    value = asked(unit, x).flatten()
    return torch.autograd.grad(value, x, torch.eye(len(value), dtype=value.dtype), is_grads_batched=True)[0]


def checkpointed(asked: Asked, unit: nn.Module) -> Tensor:
    x = rows().requires_grad_()
    mixed(checkpoint(lambda x: asked(unit, x), x, use_reentrant=False)).backward()
    return x.grad


def saved_elsewhere(asked: Asked, unit: nn.Module) -> Tensor:
    x = rows().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        value = mixed(asked(unit, x))
    value.backward()
    return x.grad


def under_anomaly_detection(asked: Asked, unit: nn.Module) -> list[Tensor]:
    with torch.autograd.detect_anomaly(check_nan=True):
        return backward(asked, unit)


def compiled(asked: Asked, unit: nn.Module) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(lambda x: asked(unit, x), fullgraph=True, backend="aot_eager")(rows())


def exported(asked: Asked, unit: nn.Module, strict: bool) -> Tensor:
    graph = export(Asker(asked, unit), (rows(),), dynamic_shapes=({0: Dim("n", min=4)},), strict=strict)
    return graph.module()(rows(14))


def onnx(asked: Asked, unit: nn.Module) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Asker(asked, unit), (rows(),), dynamic_shapes=({0: Dim("n", min=4)},), dynamo=True, verbose=False
        )
    return program(rows(14))[0]


def inferred(asked: Asked, unit: nn.Module) -> Tensor:
    with torch.inference_mode():
        return asked(unit, rows()).clone()


def without_gradient(asked: Asked, unit: nn.Module) -> Tensor:
    with torch.no_grad():
        return asked(unit, rows())


def deterministic(asked: Asked, unit: nn.Module) -> list[Tensor]:
    torch.use_deterministic_algorithms(True)
    try:
        return backward(asked, unit)
    finally:
        torch.use_deterministic_algorithms(False)


def copied(asked: Asked, unit: nn.Module) -> list[Tensor]:
    return backward(asked, copy.deepcopy(unit))


def pickled(asked: Asked, unit: nn.Module) -> list[Tensor]:
    return backward(asked, pickle.loads(pickle.dumps(unit)))


def saved(asked: Asked, unit: nn.Module) -> list[Tensor]:
    buffer = io.BytesIO()
    torch.save(unit.state_dict(), buffer)
    other = unit_of(type(unit), 9)
    other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    return backward(asked, other)


class Tagged(Tensor):
    """A subclass without behaviour of its own."""


def subclassed(asked: Asked, unit: nn.Module) -> Tensor:
    return asked(unit, rows().as_subclass(Tagged)).as_subclass(Tensor)


def in_threads(asked: Asked, unit: nn.Module) -> list[Tensor]:
    with ThreadPoolExecutor(4) as pool:
        return [t for result in pool.map(lambda _: backward(asked, unit), range(8)) for t in result]


def _in_a_child(asked: Asked, unit: nn.Module, connection: Any) -> None:
    torch.set_num_threads(1)
    connection.send([t.tolist() for t in backward(asked, unit)])


def forked(asked: Asked, unit: nn.Module) -> list[Tensor]:
    """In a child that fork makes, on one thread: torch's own thread pool does not survive a fork."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_in_a_child, args=(asked, unit, theirs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a process with threads
        child.start()
    try:
        assert ours.poll(60), "the child hangs"
        return [torch.tensor(t, dtype=torch.float64) for t in ours.recv()]
    finally:
        child.kill()


def on_meta(asked: Asked, unit: nn.Module) -> Tensor:
    return torch.tensor(asked(unit.to("meta"), rows().to("meta")).shape)


def on_fakes(asked: Asked, unit: nn.Module) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.Size(asked(unit, torch.empty(N, D, dtype=torch.float64)).shape)  # type: ignore[return-value]


def autocast(asked: Asked, unit: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return asked(unit.float(), rows().float())


def parametrized(asked: Asked, unit: nn.Module) -> list[Tensor]:
    torch.manual_seed(3)
    parametrizations.weight_norm(unit.u)
    parametrizations.spectral_norm(unit.v.eval())
    return backward(asked, unit)


# What makes a layer compute something else than its weight says: accepted by nobody, refused by name.


def old_weight_norm(asked: Asked, unit: nn.Module) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(unit.u)
    return asked(unit, rows())


def old_spectral_norm(asked: Asked, unit: nn.Module) -> Tensor:
    nn.utils.spectral_norm(unit.c)
    return asked(unit, rows())


def pruned(asked: Asked, unit: nn.Module) -> Tensor:
    prune.random_unstructured(unit.v, "weight", 0.5)
    return asked(unit, rows())


class LowRank(nn.Module):
    """A linear layer and a low-rank part beside it, as LoRA has them; its weight is the layer's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.part = base, nn.Linear(base.in_features, base.out_features, dtype=torch.float64)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.part(x)


def adapted(asked: Asked, unit: nn.Module) -> Tensor:
    unit.u = LowRank(unit.u)
    return asked(unit, rows())


def hooked(asked: Asked, unit: nn.Module) -> Tensor:
    unit.s.register_forward_hook(lambda module, inputs, output: output * 2)
    return asked(unit, rows())


def hooked_backward(asked: Asked, unit: nn.Module) -> Tensor:
    unit.c.register_full_backward_hook(lambda module, inputs, outputs: inputs)
    return asked(unit, rows())


def patched(asked: Asked, unit: nn.Module) -> Tensor:
    unit.u.forward = lambda x: x  # type: ignore[method-assign]
    return asked(unit, rows())


def quantized(asked: Asked, unit: nn.Module) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = torch.ao.quantization.quantize_dynamic(unit.float(), {nn.Linear}, dtype=torch.qint8)
    return asked(other, rows().float())


ROWS: dict[str, dict[str, Callable[[Asked, nn.Module], Any]]] = {
    "Derivatives": {
        "`backward`, `torch.autograd.grad`": backward,
        "`torch.autograd.grad(…, is_grads_batched=True)`": batched_gradients,
        "`torch.func.grad`": func_grad,
        "`torch.func.vjp`": func_vjp,
        "`torch.func.jacrev`": func_jacrev,
        "`torch.func.jvp`": func_jvp,
        "`torch.func.jvp` in `torch.compile`": compiled_jvp,
        "`torch.func.jacfwd`": func_jacfwd,
        "`torch.autograd.forward_ad`": forward_mode,
        "`torch.autograd.forward_ad`, the unit frozen": frozen_forward_mode,
        "second derivatives, `create_graph=True`": second,
        "second derivatives, `torch.func.grad` twice": func_second,
        "`torch.func.hessian`": func_hessian,
    },
    "Batches of calls": {
        "`torch.func.vmap`": func_vmap,
        "`vmap(grad(…))`, a gradient for each sample": grads_of_each,
        "`stack_module_state` and `vmap`, an ensemble": ensemble,
        "`torch.func.functional_call`": called_with_others,
    },
    "Modes": {
        "`torch.no_grad()`": without_gradient,
        "`torch.inference_mode()`": inferred,
        "`torch.autocast`": autocast,
        "`torch.use_deterministic_algorithms(True)`": deterministic,
        "`torch.autograd.detect_anomaly`": under_anomaly_detection,
        "`torch.utils.checkpoint` (not reentrant)": checkpointed,
        "`torch.autograd.graph.save_on_cpu`": saved_elsewhere,
        "the meta device (shapes)": on_meta,
        "`FakeTensorMode` (shapes)": on_fakes,
        "a subclass of `Tensor`": subclassed,
    },
    "Graphs": {
        "`torch.compile(fullgraph=True)`": compiled,
        "`torch.export`, rows dynamic": functools.partial(exported, strict=False),
        "`torch.export(strict=True)`, rows dynamic": functools.partial(exported, strict=True),
        "`torch.onnx.export`, rows dynamic": onnx,
    },
    "Copies and processes": {
        "`copy.deepcopy`": copied,
        "`pickle`": pickled,
        "`torch.save` and `torch.load(weights_only=True)` of its `state_dict`": saved,
        "several threads at once": in_threads,
        "a forked child on one thread": forked,
    },
    "Layers of the unit": {
        "`torch.nn.utils.parametrizations`": parametrized,
        "`torch.nn.utils.weight_norm` by hooks": old_weight_norm,
        "`torch.nn.utils.spectral_norm` by hooks": old_spectral_norm,
        "`torch.nn.utils.prune`": pruned,
        "a layer in the place of `nn.Linear` (LoRA)": adapted,
        "forward hooks of a layer": hooked,
        "backward hooks of a layer": hooked_backward,
        "a layer whose `forward` is replaced": patched,
        "dynamic quantization": quantized,
    },
}
RIGHT, REFUSED = "right", "refused"
#: What an error has to name for a refusal to be one in words.
NAMES = ("pddm_ext.reference", "torch.nn.utils.parametriz", "unit's u.weight has", "unit's u.weight is missing")


def outcome(entry: str, what: Callable[[Asked, nn.Module], Any]) -> str:
    """What became of one row and column: right, where it is what plain PyTorch gives, or refused in words."""
    asked = ENTRIES[entry]
    try:
        got = what(asked, unit_of(pddm_ext.PDDM))
    except Exception as error:
        if not any(name in str(error) for name in NAMES):
            raise
        return REFUSED
    # The unit in plain PyTorch has no fake kernels of ours, and shapes are the same.
    wanted = what(asked, unit_of(reference.PDDM))
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if what is autocast else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(got, wanted, **tolerance)
    return RIGHT


@functools.cache
def results(section: str, row: str) -> tuple[str, ...]:
    return tuple(outcome(entry, ROWS[section][row]) for entry in ENTRIES)


def table() -> str:
    lines = []
    for section, made in ROWS.items():
        lines += [f"| {section} | {' | '.join(ENTRIES)} |", "|---|" + "---|" * len(ENTRIES)]
        lines += [f"| {row} | {' | '.join(results(section, row))} |" for row in made]
        lines.append("")
    return "\n".join(lines)


def on_page(text: str) -> dict[str, tuple[str, ...]]:
    """The results of a page's table, by row."""
    body = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body.splitlines() if line]
    return {row: tuple(found) for row, *found in cells if found and set(found) <= {RIGHT, REFUSED}}


@pytest.mark.parametrize(("section", "row"), [(section, row) for section, made in ROWS.items() for row in made])
def test_the_page_says_what_happens(section: str, row: str) -> None:
    assert on_page(PAGE.read_text("utf-8"))[row] == results(section, row)


def test_the_page_has_these_rows_and_no_others() -> None:
    assert list(on_page(PAGE.read_text("utf-8"))) == [row for made in ROWS.values() for row in made]


def test_topk_has_no_gradient_under_transforms() -> None:
    unit, x, gallery = unit_of(pddm_ext.PDDM), rows(), rows(seed=3)
    assert not pddm_ext.topk(x.requires_grad_(), gallery, 2, unit)[0].requires_grad
    scores, columns = vmap(lambda q: pddm_ext.topk(q, gallery, 2, unit))(torch.stack([rows(), rows(seed=4)]))
    for k, queries in enumerate((rows(), rows(seed=4))):
        expected = pddm_ext.topk(queries, gallery, 2, unit)
        assert torch.equal(scores[k], expected[0])
        assert torch.equal(columns[k], expected[1])


@pytest.mark.parametrize("mode", ["batch", "anchor", "pair"])
def test_vmap_mines_each_batch(mode: str) -> None:
    unit, xs = unit_of(pddm_ext.PDDM), torch.stack([rows(seed=s) for s in range(3)])
    mined = vmap(lambda x: tuple(unit.mine(x, LABELS, mode=mode)))(xs)
    for k, x in enumerate(xs):
        for field, expected in zip(mined, unit.mine(x, LABELS, mode=mode), strict=True):
            assert torch.equal(field[k], expected)


def test_vmap_of_pairs_wants_as_many_in_every_batch() -> None:
    labels, unit = torch.stack([LABELS, torch.arange(N) // 4]), unit_of(pddm_ext.PDDM)
    with pytest.raises(ValueError, match="a slot for each pair scored, and vmap needs as many in every batch"):
        vmap(lambda x, y: tuple(unit.mine(x, y, mode="pair")))(torch.stack([rows(), rows()]), labels)


def test_vmap_wants_at_least_one_element() -> None:
    unit, none = unit_of(pddm_ext.PDDM), torch.zeros(0, N, D, dtype=torch.float64)
    for entry in ENTRIES.values():
        with pytest.raises(ValueError, match="vmap over a dimension of length 0; at least 1 is accepted"):
            vmap(lambda x: entry(unit, x))(none)  # noqa: B023


def test_a_default_unit_has_to_be_there_before_a_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pddm_ext.unit._default_units", {})

    def mined(x: Tensor) -> Tensor:
        return pddm_ext.mine_and_score(x, LABELS).s_ij.sum()

    refused = pytest.raises(RuntimeError, match=r"call pddm_ext.default_unit\(6\) before")
    with refused:
        grad(mined)(rows())
    with refused:
        vmap(mined)(rows()[None])
    with FakeTensorMode(allow_non_fake_inputs=True), refused:
        mined(torch.empty(N, D))
    pddm_ext.default_unit(D)
    assert grad(mined)(rows()).any()


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    made = text[: text.index(BEGIN) + len(BEGIN)] + table() + text[text.index(END) :]
    PAGE.write_text(made, "utf-8")
    sys.exit(0)
