"""Every kernel once or twice at sizes that fill no tile: what compute-sanitizer runs over."""

import torch

import pddm_ext

torch.manual_seed(0)
for dtype, dim, hidden, combined in [
    (torch.float32, 9, 17, 5),
    (torch.float64, 5, 3, 9),
    (torch.bfloat16, 33, 70, 65),
    (torch.float16, 16, 32, 64),
]:
    for normalize_input in (False, True):
        unit = pddm_ext.PDDM(dim, hidden, combined, normalize_input=normalize_input).cuda()
        feats = torch.randn(70, dim, device="cuda").to(dtype).requires_grad_()
        labels = torch.arange(70, device="cuda") // 3
        for mode in ("batch", "anchor", "pair"):
            quads = unit.mine(feats, labels, mode=mode)
            pddm_ext.QuadrupletLoss()(feats, quads).backward()
            for candidates in (1, 40):
                unit.mine(feats, labels, mode=mode, candidates=candidates)
        pddm_ext.score_matrix(feats, unit, feats[:9]).sum().backward()
        pddm_ext.score_matrix(feats[:20], unit).sum().backward()
        pddm_ext.topk(feats[:5], feats, 12, unit)
        unit.to(torch.float16).mine(feats, labels, mode="anchor").s_ij.sum().backward()  # converted in and out
with torch.no_grad():
    # Every shape of Hopper's tiles: 64, 128, 192 and 256 outputs.
    for width in (50, 120, 190, 250):
        unit = pddm_ext.PDDM(40, width, width).cuda()
        feats, labels = torch.randn(150, 40, device="cuda").bfloat16(), torch.arange(150, device="cuda") // 3
        for mode in ("batch", "anchor", "pair"):
            unit.mine(feats, labels, mode=mode)
        pddm_ext.score_matrix(feats, unit, feats[:70])
    torch.set_float32_matmul_precision("high")
    pddm_ext.score_matrix(torch.randn(40, 9, device="cuda"), pddm_ext.PDDM(9).cuda())
    # Candidates that are nearly all equal, and many of them.
    alike, labels = torch.ones(700, 9, device="cuda"), torch.arange(700, device="cuda") // 3
    for candidates in (9, 140):
        pddm_ext.PDDM(9).cuda().mine(alike, labels, mode="anchor", candidates=candidates)
# Products of a backward pass by warpgroups, in both of their shapes.
unit, feats = pddm_ext.PDDM(40, 128, 130).cuda(), torch.randn(200, 40, device="cuda").bfloat16().requires_grad_()
pddm_ext.score_matrix(feats, unit).float().sum().backward()
torch.cuda.synchronize()
