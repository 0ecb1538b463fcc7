"""Precision by PyTorch's own switches: the features' dtype, autocast and ``torch.set_float32_matmul_precision``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast(feats: Tensor) -> Tensor:
    """Features in autocast's dtype where it is on; float64 is left alone, as autocast does."""
    device = feats.device.type
    # Not asked of torch, whose older compilers cannot read the answer: where the operators have kernels.
    if feats.dtype != torch.float64 and device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return feats.to(torch.get_autocast_dtype(device))
    return feats


def score_dtype(feats: Tensor) -> torch.dtype:
    """Of scores, and of all arithmetic that is no matrix product: float64 for float64 features, float32 otherwise."""
    return torch.float64 if feats.dtype == torch.float64 else torch.float32


def allow_tf32() -> bool:
    """Whether CUDA products of float32 features may round their operands to TF32; the CPU's are IEEE float32 always.

    What ``torch.set_float32_matmul_precision`` or ``torch.backends.cuda.matmul.fp32_precision`` has set. The compiler
    can read only the first one's form of it.
    """
    matmul = torch.backends.cuda.matmul
    return bool(matmul.allow_tf32 if torch.compiler.is_compiling() else matmul.fp32_precision == "tf32")


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Products in the operands' own dtype, on devices too that know no autocast."""
    device = x.device.type
    # Older compilers cannot read torch's answer.
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else nullcontext()


def unmasked(feats: Tensor) -> tuple[Tensor, Tensor]:
    """Features, and a zero to add to their loss, both as they are; NaN, and so every gradient, if one is not finite.

    Mining picks nothing that is not finite, and a loss over nothing is 0 with zero gradients: without this neither a
    gradient scaler nor a check of the loss would see that a net has overflowed. Nothing waits for the device.
    """
    zero = torch.where(feats.detach().isfinite().all(), 0.0, torch.nan)
    return feats * (1 + zero), zero
