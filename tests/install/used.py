"""What an installed package must do: mine a small batch as the reference does, and refuse in words what would be read
out of bounds. Prints where the package was found.
"""

import torch

import pddm_ext

torch.manual_seed(0)
feats, labels = torch.randn(12, 8), torch.arange(4).repeat_interleave(3)
unit = pddm_ext.PDDM(8)
for mode in ("batch", "anchor", "pair"):
    ours = pddm_ext.mine_and_score(feats, labels, unit, mode=mode)
    truth = pddm_ext.reference.mine_and_score(feats, labels, unit, mode=mode)
    for name in ("i", "j", "k", "l", "valid"):
        assert torch.equal(getattr(ours, name), getattr(truth, name)), (mode, name)
    for name in ("s_ij", "s_ik", "s_jl"):
        torch.testing.assert_close(getattr(ours, name), getattr(truth, name))
    pddm_ext.QuadrupletLoss()(feats, ours).backward()
assert unit.u.weight.grad is not None
assert unit.u.weight.grad.norm() > 0
refused = ""
try:
    torch.ops.pddm.topk(feats, feats, 99, *pddm_ext.ops.unit_arguments(unit))
except RuntimeError as error:
    refused = str(error)
assert "pddm: k is 99 and the gallery has 12 rows" in refused, refused
print(pddm_ext.__file__)
