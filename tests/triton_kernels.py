"""Run with TRITON_INTERPRET=1: holds the GPU kernels against float64 products, on CPU tensors."""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fac_synthesis.sae.core import SAE, SAEConfig, dense_losses, gpu_bag_sums, gpu_row_dots, sae_losses  # noqa: E402

from fac_synthesis import sae as module  # noqa: E402

checks = 0
for (dtype, close), (B, K, H, D) in itertools.product(
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
    [(3, 5, 40, 33), (4, 20, 64, 130)],
):
    torch.manual_seed(0)
    y, rows, values, indices = (
        torch.randn(B, D).to(dtype),
        torch.randn(H, D).to(dtype),
        torch.randn(B, K).to(dtype),
        torch.rand(B, H).topk(K, 1).indices,
    )
    values[0, 1:4] = 0
    indices[0, 1:4] = 0  # padding repeats an index
    codes = torch.zeros(B, H, dtype=torch.float64).scatter_add_(1, indices, values.double())
    for mine, reference in (
        (
            gpu_bag_sums(rows, indices.flatten(), values.flatten(), torch.arange(0, B * K + 1, K)),
            codes @ rows.double(),
        ),
        (gpu_row_dots(y, indices, rows), (y.double() @ rows.double().T).gather(1, indices)),
    ):
        assert mine.dtype == dtype and ((mine - reference).abs() / (1 + reference.abs())).max() < close, (
            dtype,
            D,
        )
    checks += 1

module.on_gpu = lambda tensor: True
for tied in (True, False):  # a whole step, with empty bags (latents that no token chose) and long ones
    sae, x = SAE(SAEConfig(6, 40, 3, tied, prefixes=(16,))).double(), torch.randn(50, 6, dtype=torch.float64)
    with torch.no_grad():
        sae.b_enc[20] = 9.0
        sae.b_enc[30:] = -9.0
    dead = torch.arange(30, 40)
    mine, reference = (
        torch.autograd.grad(loss(sae, x, dead_M=dead, k_aux=1), list(sae.parameters()))
        for loss in (lambda *a, **k: sae_losses(*a, **k).total, dense_losses)
    )
    for a, b in zip(mine, reference, strict=True):
        assert (a - b).abs().max() < 1e-10
    checks += 1
print(checks, "checks")
