"""Run with TRITON_INTERPRET=1: holds the GPU kernels against float64 products, on CPU tensors."""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fac_synthesis.sae import core as module
from fac_synthesis.sae.core import SAE, SAEConfig, dense_losses, gpu_bag_sums, gpu_row_dots, sae_losses

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [(3, 5, 40, 33), (4, 20, 64, 130)]


def check_products(dtype, B, K, H, D):
    "Both kernels against dense products."
    torch.manual_seed(0)
    y = torch.randn(B, D).to(dtype)
    rows = torch.randn(H, D).to(dtype)
    values = torch.randn(B, K).to(dtype)
    indices = torch.rand(B, H).topk(K, 1).indices
    values[0, 1:4] = 0
    indices[0, 1:4] = 0  # padding repeats an index
    codes = torch.zeros(B, H, dtype=torch.float64).scatter_add_(1, indices, values.double())
    sums = gpu_bag_sums(rows, indices.flatten(), values.flatten(), torch.arange(0, B * K + 1, K))
    dots = gpu_row_dots(y, indices, rows)
    all_dots = y.double() @ rows.double().T
    for mine, reference in ((sums, codes @ rows.double()), (dots, all_dots.gather(1, indices))):
        error = (mine - reference).abs() / (1 + reference.abs())
        assert mine.dtype == dtype and error.max() < CLOSE[dtype], (dtype, D)


def check_step(tied):
    "A whole step, with empty bags (latents that no token chose) and long ones."
    sae = SAE(SAEConfig(6, 40, 3, tied, prefixes=(16,))).double()
    x = torch.randn(50, 6, dtype=torch.float64)
    with torch.no_grad():
        sae.b_enc[20] = 9.0
        sae.b_enc[30:] = -9.0
    dead = torch.arange(30, 40)
    sparse = sae_losses(sae, x, dead_M=dead, k_aux=1).total
    dense = dense_losses(sae, x, dead_M=dead, k_aux=1)
    mine = torch.autograd.grad(sparse, list(sae.parameters()))
    reference = torch.autograd.grad(dense, list(sae.parameters()))
    for a, b in zip(mine, reference, strict=True):
        assert (a - b).abs().max() < 1e-10


checks = 0
for dtype, shape in itertools.product(CLOSE, SHAPES):
    check_products(dtype, *shape)
    checks += 1
module.on_gpu = lambda tensor: True
for tied in (True, False):
    check_step(tied)
    checks += 1
print(checks, "checks")
