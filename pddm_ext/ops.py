"""The operators ``torch.ops.pddm``: loading, shapes for the compiler, and gradients.

The kernels' schemas are in ``csrc/bindings/operators.cpp``. Every operator takes a unit as its eight parameters and its
switches, in the order of :func:`unit_arguments`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._installing import explain
from .parameters import Parameters
from .precision import allow_tf32, score_dtype

try:
    from . import _C
except ImportError as error:
    raise ImportError(explain(error)) from error

NO_CUDA = (
    "pddm_ext was built without CUDA and its tensors must be on the CPU: move them there, or build it again with "
    "'PDDM_CUDA=on pip install --no-build-isolation .' where torch has CUDA and nvcc is on the PATH"
)

NO_ONNX = (
    "ONNX has none of pddm_ext's operators: export a pddm_ext.reference.PDDM with this unit's state_dict, which gives "
    "the same scores by plain operators; 'pddm-ext export' does that for a trained unit"
)

_EMULATED = _C.build_info()["cuda"] == "emulated"

UnitArguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, bool]


def unit_arguments(unit: Parameters, tensors: list[Tensor] | None = None) -> UnitArguments:
    """Of a unit, and its tensors where they have been asked for."""
    w_u, b_u, w_v, b_v, w_c, b_c, w_s, b_s = unit.tensors() if tensors is None else tensors
    rounded = on_device(w_u) and allow_tf32()  # the CPU's products never are, and torch takes long to ask
    return w_u, b_u, w_v, b_v, w_c, b_c, w_s, b_s, unit.normalize_input, rounded


def on_device(x: Tensor) -> bool:
    """Whether a device's kernels serve it, or the emulation of them."""
    return x.is_cuda or _EMULATED


def _refuse_onnx() -> None:
    if torch.onnx.is_in_onnx_export():
        raise NotImplementedError(NO_ONNX)


def shapes(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers what an operator's results look like, which ``torch.export`` asks for, also on behalf of ONNX."""

    def register(fake: Callable[..., Any]) -> Any:
        @functools.wraps(fake)
        def traced(*arguments: Any) -> Any:
            _refuse_onnx()
            return fake(*arguments)

        return torch.library.register_fake(f"pddm::{name}", traced)

    return register


@shapes("mine")
def shapes_of_mining(feats: Tensor, labels: Tensor, *unit_and_mode: Any) -> tuple[Tensor, ...]:
    mode = unit_and_mode[10]
    if mode == 0:
        slots: Any = 1
    elif mode == 1:
        slots = feats.shape[0]
    else:
        slots = torch.library.get_ctx().new_dynamic_size()
    indices = [feats.new_empty(slots, dtype=torch.int64) for _ in range(4)]
    scores = [feats.new_empty(slots, dtype=score_dtype(feats)) for _ in range(3)]
    return (*scores, *indices, feats.new_empty(slots, dtype=torch.bool))


@shapes("score_pairs")
def _(feats: Tensor, i: Tensor, j: Tensor, *unit: Any) -> Tensor:
    return feats.new_empty(i.shape[0], dtype=score_dtype(feats))


@shapes("score_matrix")
def _(feats: Tensor, split: int, *unit: Any) -> Tensor:
    n = feats.shape[0]
    shape = (n, n) if split < 0 else (split, n - split)
    return feats.new_empty(shape, dtype=score_dtype(feats))


@shapes("topk")
def _(queries: Tensor, gallery: Tensor, k: int, *unit: Any) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=score_dtype(queries)), queries.new_empty(shape, dtype=torch.int64)


@shapes("largest")
def _(values: Tensor, own: Tensor, classes: Tensor, count: int) -> Tensor:
    return values.new_empty((values.shape[0], count), dtype=torch.int64)


@shapes("asked_pairs")
def _(lists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pairs = torch.library.get_ctx().new_dynamic_size()
    return lists.new_empty(pairs), lists.new_empty(pairs), lists.new_empty(lists.shape)


@shapes("best_asked")
def _(scores: Tensor, places: Tensor, lists: Tensor, lowest: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = lists.shape[0]
    return lists.new_empty(rows), scores.new_empty(rows), lists.new_empty(rows, dtype=torch.bool)


@shapes("mine_listed")
def _(feats: Tensor, lists: Tensor, split: int, *unit: Any) -> tuple[Tensor, ...]:
    shapes: tuple[Tensor, ...] = shapes_of_mining(feats, lists, *unit, 1)
    return shapes


@shapes("candidate_rows")
def _(feats: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = feats.shape[0]
    rows = torch.empty_like(feats, memory_format=torch.contiguous_format)
    return rows, feats.new_empty(n, dtype=score_dtype(feats)), feats.new_empty((4, n), dtype=torch.int32)


@shapes("candidates")
def _(products: Tensor, first: int, weights: Tensor, classes: Tensor, count: int) -> Tensor:
    return products.new_empty((products.shape[0], 2 * count), dtype=torch.int64)


@shapes("nearest")
def _(rows: Tensor, classes: Tensor, count: int) -> Tensor:
    return rows.new_empty((rows.shape[0], count), dtype=torch.int64)


@shapes("dot_products")
def _(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], y.shape[0]))


@shapes("quadruplet_loss")
def _(feats: Tensor, s_ij: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return s_ij.new_empty(()), s_ij.new_empty(s_ij.shape, dtype=torch.uint8)


@shapes("quadruplet_loss_backward")
def _(upstream: Tensor, opened: Tensor, feats: Tensor, *scores: Any) -> tuple[Tensor, ...]:
    like = torch.empty_like(feats, memory_format=torch.contiguous_format)
    return (like, *(score.new_empty(score.shape) for score in scores[:3]))


def _gradients_like(feats: Tensor, unit: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (feats, *unit[:8]))


@shapes("score_pairs_backward")
def _(weight: Tensor, feats: Tensor, i: Tensor, j: Tensor, *unit: Any) -> tuple[Tensor, ...]:
    return _gradients_like(feats, unit)


@shapes("mine_backward")
def _(*given: Any) -> tuple[Tensor, ...]:
    return _gradients_like(given[3], given[8:])


@shapes("score_matrix_backward")
def _(weight: Tensor, feats: Tensor, split: int, *unit: Any) -> tuple[Tensor, ...]:
    return _gradients_like(feats, unit)


def keep_mined(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    feats, _, *unit_and_mode = inputs
    unit, ctx.others = unit_and_mode[:10], len(unit_and_mode) - 8
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(feats, *unit[:8], *output[3:7])
    ctx.switches = unit[8:]


def mine_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    feats, *unit, i, j, k, l = ctx.saved_tensors  # noqa: E741
    if all(g is None for g in upstream[:3]):
        nothing: tuple[None, ...] = (None,) * (10 + ctx.others)
        return nothing
    # Slots that are not valid have negative indices, which the kernel skips.
    d_feats, *d_unit = call("mine_backward", *upstream[:3], feats, i, j, k, l, *unit, *ctx.switches)
    others: list[None] = [None] * ctx.others
    return d_feats, None, *d_unit, *others


def _keep_pairs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    feats, i, j, *unit = inputs
    ctx.save_for_backward(feats, i, j, *unit[:8])
    ctx.switches = unit[8:]


def _score_pairs_backward(ctx: Any, weight: Tensor) -> tuple[Any, ...]:
    d_feats, *d_unit = call("score_pairs_backward", weight, *ctx.saved_tensors, *ctx.switches)
    return d_feats, None, None, *d_unit, None, None


def _keep_matrix(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    feats, ctx.split, *unit = inputs
    ctx.save_for_backward(feats, *unit[:8])
    ctx.switches = unit[8:]


def _score_matrix_backward(ctx: Any, weight: Tensor) -> tuple[Any, ...]:
    feats, *unit = ctx.saved_tensors
    d_feats, *d_unit = call("score_matrix_backward", weight, feats, ctx.split, *unit, *ctx.switches)
    return d_feats, None, *d_unit, None, None


def _no_second_derivative(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
    raise NotImplementedError(
        "pddm_ext has first derivatives only; pddm_ext.reference can be differentiated any number of times"
    )


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_gradient(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
    raise NotImplementedError("pddm_ext.topk has no gradient; pddm_ext.score_matrix has one")


_GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "mine": (mine_backward, keep_mined),
    "score_pairs": (_score_pairs_backward, _keep_pairs),
    "score_matrix": (_score_matrix_backward, _keep_matrix),
    "quadruplet_loss_backward": (_no_second_derivative, _keep_nothing),
    "mine_backward": (_no_second_derivative, _keep_nothing),
    "score_pairs_backward": (_no_second_derivative, _keep_nothing),
    "score_matrix_backward": (_no_second_derivative, _keep_nothing),
    "topk": (_no_gradient, _keep_nothing),
}


def _no_forward_mode(ctx: Any, *tangents: Any) -> Any:
    raise NotImplementedError(
        "pddm_ext has no forward-mode derivatives (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad); "
        "pddm_ext.reference has them, and the same values"
    )


def _transformable(name: str, backward: Callable[..., Any], keep: Callable[..., Any]) -> Any:
    """The operator once more, in the form that ``torch.func`` asks for; gradients registered with it are not."""

    def forward(*arguments: Any) -> Any:
        return getattr(torch.ops.pddm, name)(*arguments)

    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        def of(element: int) -> Any:
            return call(
                name, *(a if at is None else a.select(at, element) for a, at in zip(arguments, in_dims, strict=True))
            )

        if info.batch_size == 0:
            raise ValueError("vmap over a dimension of length 0; at least 1 is accepted")
        results = [of(element) for element in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        if len({field.shape for result in results for field in result[:1]}) > 1:
            raise ValueError("mode 'pair' has a slot for each pair scored, and vmap needs as many in every batch")
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    members = {"forward": forward, "setup_context": keep, "backward": backward, "jvp": _no_forward_mode, "vmap": vmap}
    return type(f"Transformable_{name}", (torch.autograd.Function,), {k: staticmethod(v) for k, v in members.items()})


def _below_autograd(name: str) -> Callable[..., Any]:
    """The operator without its registered gradient, which takes long to find out that there is none to keep: a small
    batch would notice."""
    operator = getattr(torch.ops.pddm, name).default

    def run(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return run


def _eager(name: str, run: Callable[..., Any], backward: Callable[..., Any], keep: Callable[..., Any]) -> Any:
    """The same with a gradient."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = run(*arguments)
        keep(ctx, arguments, output)
        return output

    members = {"forward": forward, "backward": backward}
    return type(f"Eager_{name}", (torch.autograd.Function,), {k: staticmethod(v) for k, v in members.items()})


_TRANSFORMABLE: dict[str, Any] = {}
_EAGER: dict[str, tuple[Callable[..., Any], Any]] = {}


def differentiable(name: str, backward: Callable[..., Any], keep: Callable[..., Any]) -> None:
    """Give an operator its gradient, in all of the forms that :func:`call` takes."""
    if backward is not _no_gradient:
        torch.library.register_autograd(f"pddm::{name}", backward, setup_context=keep)
        run = _below_autograd(name)
        _EAGER[name] = run, _eager(name, run, backward, keep)
    _TRANSFORMABLE[name] = _transformable(name, backward, keep)


for _name, _gradient in _GRADIENTS.items():
    differentiable(_name, *_gradient)


def tracing() -> bool:
    """Whether ``torch.jit.trace`` looks on, or an exporter by it."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def call(name: str, *arguments: Any) -> Any:
    """``torch.ops.pddm.<name>``, also under the transforms of ``torch.func`` and within forward-mode levels."""
    traced = tracing()
    if traced:
        _refuse_onnx()  # of its exporter before torch.export
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _TRANSFORMABLE[name].apply(*arguments)
    if name in _EAGER and not (traced or torch.compiler.is_compiling()):
        run, with_gradient = _EAGER[name]
        return with_gradient.apply(*arguments) if torch.is_grad_enabled() else run(*arguments)
    return getattr(torch.ops.pddm, name)(*arguments)


def _refuse_cuda(*_: Any) -> Any:
    raise RuntimeError(NO_CUDA)


#: Types of the devices whose tensors the operators take.
DEVICES = ("cpu",) if _EMULATED or _C.build_info()["cuda"] is None else ("cpu", "cuda")

if "cuda" not in DEVICES:
    for _name in (
        *("mine", "score_pairs", "score_matrix", "topk", "quadruplet_loss"),
        *("mine_backward", "score_pairs_backward", "score_matrix_backward", "quadruplet_loss_backward"),
        "mine_listed",
    ):
        torch.library.impl(f"pddm::{_name}", "cuda", _refuse_cuda)
