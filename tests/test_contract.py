"""The contract of section 2: units, the default one, names, shapes and devices."""

import copy
import inspect
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import pddm_ext
from helpers import (
    CAPABILITIES,
    DEVICE,
    MODES,
    PACKAGES,
    PARAMETERS,
    assert_same_bits,
    cpu_only,
    host_only,
    instruction_set,
    make_features,
    make_labels,
    make_unit,
)
from pddm_ext import _C, reference
from processes import in_a_new_process
from truth import assert_within, bound_of, truth

X, LABELS, I = make_features(8, 4), make_labels(8), torch.arange(8, device=DEVICE)  # noqa: E741


# --- Devices ----------------------------------------------------------------------------------------------------------


def test_results_are_on_the_features_device():
    unit, x = make_unit(4), X.clone().requires_grad_()
    results = [pddm_ext.score_pairs(x, I, I, unit), pddm_ext.score_matrix(x, unit), unit(x, x)]
    results += [*pddm_ext.topk(x, x, 2, unit), *(field for mode in MODES for field in unit.mine(x, LABELS, mode=mode))]
    sum(t.sum() for t in results if t.requires_grad).backward()
    assert {t.device for t in (*results, x.grad, unit.c.weight.grad)} == {X.device}


def on_meta() -> tuple[torch.Tensor, torch.Tensor, pddm_ext.PDDM]:
    return X.to("meta"), LABELS.to("meta"), make_unit(4).to("meta")


@pytest.mark.parametrize("mode", ["batch", "anchor"])
def test_mining_on_meta_has_shapes_and_dtypes(mode):
    feats, labels, unit = on_meta()
    got, real = unit.mine(feats, labels, mode=mode), make_unit(4).mine(X, LABELS, mode=mode)
    for a, b in zip(got, real, strict=True):
        assert a.device.type == "meta"
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_scores_on_meta_have_shapes_and_dtypes():
    feats, labels, unit = on_meta()
    assert pddm_ext.score_pairs(feats, labels, labels, unit).shape == (8,)
    assert pddm_ext.score_matrix(feats, unit).shape == (8, 8)
    assert pddm_ext.score_matrix(feats, unit, feats[:3]).shape == (8, 3)
    assert [t.shape for t in pddm_ext.topk(feats[:2], feats, 3, unit)] == [(2, 3)] * 2
    assert unit(feats, feats).shape == (8,)
    assert pddm_ext.score_matrix(feats.double(), unit).dtype == torch.float64


# --- Units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_a_unit_is_four_linear_layers_under_the_documented_keys(package):
    unit = package.PDDM(6, 5, 4)
    shapes = {name: tuple(value.shape) for name, value in unit.state_dict().items()}
    expected = [(5, 6), (5,), (5, 6), (5,), (4, 10), (4,), (1, 4), (1,)]
    assert shapes == dict(zip(PARAMETERS, expected, strict=True))
    assert all(isinstance(layer, torch.nn.Linear) for layer in (unit.u, unit.v, unit.c, unit.s))


def test_sizes_default_to_the_dimension_and_the_switch_to_off():
    unit = pddm_ext.PDDM(7)
    assert (unit.dim, unit.hidden, unit.combined, unit.normalize_input) == (7, 7, 7, False)
    with pytest.raises(TypeError):
        pddm_ext.PDDM(7, 7, 7, True)  # the switch has a name
    assert "normalize_input=True" in repr(pddm_ext.PDDM(7, normalize_input=True))


def test_the_switch_changes_the_scores():
    plain, normalised = make_unit(4), make_unit(4, normalize_input=True)
    assert (pddm_ext.score_matrix(X, plain) != pddm_ext.score_matrix(X, normalised)).any()


def test_units_travel():
    unit = make_unit(4, 3, 5, normalize_input=True)
    buffer = io.BytesIO()
    torch.save(unit.state_dict(), buffer)
    buffer.seek(0)
    loaded = pddm_ext.PDDM(4, 3, 5, normalize_input=True).to(DEVICE)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    plain = reference.PDDM(4, 3, 5, normalize_input=True)
    plain.load_state_dict(unit.state_dict())  # and between the package and its reference
    back = pddm_ext.PDDM(4, 3, 5, normalize_input=True).to(DEVICE)
    back.load_state_dict(plain.state_dict())
    for other in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit)), loaded, back):
        assert_same_bits(other.mine(X, LABELS, mode="anchor"), unit.mine(X, LABELS, mode="anchor"))


def test_a_copy_shares_no_parameter():
    unit = make_unit(4)
    other = copy.deepcopy(unit)
    with torch.no_grad():
        other.s.bias += 1
    assert_same_bits(pddm_ext.score_matrix(X, unit), pddm_ext.score_matrix(X, make_unit(4)))


def test_calling_a_unit_scores_matched_rows():
    unit = make_unit(4)
    x, y = make_features(24, 4).reshape(2, 3, 4, 4), make_features(24, 4, seed=1).reshape(2, 3, 4, 4)
    got = unit(x, y)
    assert got.shape == (2, 3, 4)
    rows = x.reshape(24, 4), unit, y.reshape(24, 4)
    assert_within(got, *(f(*rows).diagonal().reshape(2, 3, 4) for f in (truth, bound_of)))
    assert_same_bits(unit(x.transpose(0, 2), y.transpose(0, 2)), got.transpose(0, 2))
    assert_same_bits(unit(x[0, 0, 0], y[0, 0, 0]), got[0, 0, 0])


def test_a_parametrization_is_asked_once_in_a_call():
    class Counted(nn.Module):
        asked = 0

        def forward(self, x):
            self.asked += 1
            return x

    unit, counted = make_unit(4), Counted()
    parametrize.register_parametrization(unit.v, "weight", counted)
    for call in (
        lambda: unit(X, X),
        lambda: unit.mine(X, LABELS),
        lambda: unit.mine(X, LABELS, candidates=2),
        lambda: unit.mine(X, LABELS, ref_feats=X, ref_labels=LABELS),
        lambda: pddm_ext.mine_and_score(X, LABELS, unit, mode="anchor"),
        lambda: pddm_ext.score_pairs(X, I, I, unit),
        lambda: pddm_ext.score_matrix(X, unit, X),
        lambda: pddm_ext.topk(X, X, 2, unit),
    ):
        counted.asked = 0
        call()
        assert counted.asked == 1


# --- The default unit -------------------------------------------------------------------------------------------------


def test_mining_without_a_unit_uses_the_default_one():
    x, labels = make_features(12, 23), make_labels(12)
    unit = pddm_ext.default_unit(23, DEVICE)
    assert_same_bits(pddm_ext.mine_and_score(x, labels), unit.mine(x, labels))
    assert pddm_ext.default_unit(23, x.device) is unit
    assert pddm_ext.default_unit(23, str(DEVICE)) is unit
    assert (pddm_ext.default_unit(23) is unit) == (DEVICE.type == "cpu")  # the default's default
    assert pddm_ext.default_unit(23, "cpu") is pddm_ext.default_unit(23)
    assert pddm_ext.default_unit(24, DEVICE) is not unit
    if not torch.accelerator.is_available():
        with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|accelerator"):
            pddm_ext.default_unit(23, 0)  # is a device of that number, as in torch
    assert isinstance(unit, pddm_ext.PDDM)
    assert (unit.dim, unit.hidden, unit.combined, unit.normalize_input) == (23, 23, 23, False)


@host_only("of the host's tensors")
def test_the_default_unit_is_made_whatever_the_default_device():
    x, labels = make_features(12, 26), make_labels(12)
    with torch.device("meta"):
        quads = pddm_ext.mine_and_score(x, labels)
    assert_same_bits(list(quads), list(pddm_ext.default_unit(26).mine(x, labels)))


@pytest.mark.parametrize(("own", "others"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_autocast_of_the_other_half_precision(own, others):
    unit, x, labels = make_unit(8), make_features(12, 8, dtype=own), make_labels(12)
    rounded = x.to(others)
    with torch.autocast(DEVICE.type, dtype=others):
        assert_same_bits(unit(x, x.flip(0)), unit(rounded, rounded.flip(0)))
        assert_same_bits(pddm_ext.score_matrix(x, unit, x[:5]), pddm_ext.score_matrix(rounded, unit, rounded[:5]))
        quads = unit.mine(x, labels, mode="anchor", ref_feats=x, ref_labels=labels)
        for loss in (pddm_ext.QuadrupletLoss(), reference.QuadrupletLoss()):
            assert loss(x, quads, ref_feats=x).isfinite()


def test_what_torch_jit_trace_would_keep_is_refused():
    unit, x, labels = make_unit(8).requires_grad_(False), make_features(12, 8), make_labels(12)
    for traced, given in (
        (lambda x, y: pddm_ext.score_matrix(x, unit, y), (x, x[:5])),
        (lambda x, y: unit.mine(x, y, candidates=4).k, (x, labels)),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would keep"):
            torch.jit.trace(traced, given)


def test_the_default_unit_trains():
    x, labels = make_features(12, 25), make_labels(12)
    optimizer = torch.optim.SGD(pddm_ext.default_unit(25, DEVICE).parameters(), lr=0.1)
    before = pddm_ext.mine_and_score(x, labels).s_ij
    before.sum().backward()
    optimizer.step()
    assert pddm_ext.mine_and_score(x, labels).s_ij.item() != before.item()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_default_unit_that_evaluation_made_can_still_be_trained(context):
    dim = {torch.no_grad: 26, torch.inference_mode: 27}[context]
    x, labels = make_features(12, dim), make_labels(12)
    with context():
        pddm_ext.mine_and_score(x, labels)  # the first use
    pddm_ext.mine_and_score(x, labels).s_ij.sum().backward()
    assert pddm_ext.default_unit(dim, DEVICE).s.weight.grad is not None


def test_threads_that_meet_at_a_new_default_unit_share_one():
    made, barrier = [], threading.Barrier(8)

    def first_use():
        barrier.wait()
        made.append(pddm_ext.default_unit(601))  # large enough that making one takes a while

    workers = [threading.Thread(target=first_use) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({id(unit) for unit in made}) == 1


# --- The package ------------------------------------------------------------------------------------------------------


def test_the_reference_has_the_same_names_and_parameters():
    for name in ("mine_and_score", "score_pairs", "score_matrix", "topk", "PDDM", "QuadrupletLoss", "default_unit"):
        assert name in pddm_ext.__all__
        ours, plain = (inspect.signature(getattr(package, name)).parameters for package in (pddm_ext, reference))
        assert list(ours) == list(plain)
        assert [p.default for p in ours.values()] == [p.default for p in plain.values()]
        assert getattr(pddm_ext, name).__doc__


def test_quadruplets_are_a_named_tuple_in_the_documented_order():
    quads = make_unit(4).mine(X, LABELS)
    assert quads._fields == ("i", "j", "k", "l", "s_ij", "s_ik", "s_jl", "valid")
    i64, f32 = torch.int64, torch.float32
    assert [f.dtype for f in quads] == [i64, i64, i64, i64, f32, f32, f32, torch.bool]


def test_mode_is_passed_by_name_only():
    with pytest.raises(TypeError):
        pddm_ext.mine_and_score(X, LABELS, make_unit(4), "anchor")
    with pytest.raises(TypeError):
        make_unit(4).mine(X, LABELS, "anchor")


INSTRUCTION_SETS = cpu_only("they have instruction sets")


@INSTRUCTION_SETS
def test_the_environment_forces_an_instruction_set():
    code = "import pddm_ext; from pddm_ext import _C; print(_C.cpu_capability())"
    assert in_a_new_process(code, PDDM_CPU_CAPABILITY="portable").stdout.strip() == "portable"
    assert in_a_new_process(code, PDDM_CPU_CAPABILITY="").stdout.strip() == CAPABILITIES[-1]


@INSTRUCTION_SETS
def test_an_unknown_instruction_set_is_an_error_on_first_use():
    code = """
import torch, pddm_ext
unit = pddm_ext.PDDM(4)
for _ in range(2):
    try:
        pddm_ext.score_matrix(torch.randn(3, 4), unit)
    except (RuntimeError, ValueError) as error:
        print(error)
"""
    done = in_a_new_process(code, PDDM_CPU_CAPABILITY="mmx")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PDDM_CPU_CAPABILITY is 'mmx'; this build on this machine has portable") == 2


@INSTRUCTION_SETS
def test_a_refused_instruction_set_leaves_the_old_one():
    with instruction_set("portable"):
        with pytest.raises(ValueError, match=r"PDDM_CPU_CAPABILITY is 'neon'; this build on this machine has portable"):
            _C.set_cpu_capability("neon")
        assert _C.cpu_capability() == "portable"


@INSTRUCTION_SETS
@pytest.mark.skipif("amx" not in CAPABILITIES, reason="without tiles")
def test_tiles_are_asked_for_when_they_are_chosen_and_done_without_where_refused():
    ask = """
import ctypes
libc = ctypes.CDLL(None)

def granted():
    features = ctypes.c_uint64()
    assert libc.syscall(158, 0x1022, ctypes.byref(features)) == 0  # arch_prctl, ARCH_GET_XCOMP_PERM
    return features.value >> 18 & 1

from pddm_ext import _C
assert _C.cpu_capabilities()["amx"] and not granted()
"""
    forced = in_a_new_process(ask + "print(_C.cpu_capability(), granted())", PDDM_CPU_CAPABILITY="avx2")
    assert forced.stdout.split() == ["avx2", "0"], forced.stderr
    chosen = in_a_new_process(ask + "print(_C.cpu_capability(), granted())")
    assert chosen.stdout.split() == ["amx", "1"], chosen.stderr

    # A signal stack without room for them.
    small = """
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

memory = ctypes.create_string_buffer(8192)
assert libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 8192)), None) == 0
print(_C.cpu_capability())
try:
    _C.set_cpu_capability("amx")
except ValueError as error:
    print(error)
"""
    refused = in_a_new_process(ask + small).stdout.splitlines()
    assert refused == [
        "avx512_bf16",
        "PDDM_CPU_CAPABILITY is 'amx', and the kernel does not grant its tiles to this process",
    ]


@INSTRUCTION_SETS
def test_the_best_instruction_set_is_the_default():
    assert next(iter(_C.cpu_capabilities())) == "portable"
    assert _C.cpu_capability() == CAPABILITIES[-1]
