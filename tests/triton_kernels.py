"""Run with TRITON_INTERPRET=1: holds the GPU kernels against float64 products, on CPU tensors."""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fac_synthesis.sae.core as core  # noqa: E402
from fac_synthesis.sae.core import SAE, SAEConfig  # noqa: E402

PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
SIZES = [(3, 5, 40, 33), (4, 20, 64, 130)]  # tokens, chosen latents, latents, width


def check_products(dtype: torch.dtype, close: float, B: int, K: int, H: int, D: int):
    "Both kernels at one size and precision."
    torch.manual_seed(0)
    y_BD = torch.randn(B, D).to(dtype)
    rows_HD = torch.randn(H, D).to(dtype)
    values_BK = torch.randn(B, K).to(dtype)
    indices_BK = torch.rand(B, H).topk(K, 1).indices
    values_BK[0, 1:4] = 0
    indices_BK[0, 1:4] = 0  # padding repeats an index
    codes_BH = torch.zeros(B, H, dtype=torch.float64).scatter_add_(1, indices_BK, values_BK.double())
    bags = torch.arange(0, B * K + 1, K)
    sums = core.gpu_bag_sums(rows_HD, indices_BK.flatten(), values_BK.flatten(), bags)
    dots = core.gpu_row_dots(y_BD, indices_BK, rows_HD)
    true_sums = codes_BH @ rows_HD.double()
    true_dots = (y_BD.double() @ rows_HD.double().T).gather(1, indices_BK)
    for ours, reference in ((sums, true_sums), (dots, true_dots)):
        gap = ((ours - reference).abs() / (1 + reference.abs())).max()
        assert ours.dtype == dtype and gap < close, (dtype, D)


def check_step(tied: bool):
    "A whole step, with empty bags (latents that no token chose) and long ones."
    sae = SAE(SAEConfig(d_model=6, n_latents=40, k=3, tied=tied, prefixes=(16,))).double()
    x_BD = torch.randn(50, 6, dtype=torch.float64)
    with torch.no_grad():
        sae.b_enc[20] = 9.0
        sae.b_enc[30:] = -9.0
    auxiliary = dict(dead_M=torch.arange(30, 40), k_aux=1)
    parameters = list(sae.parameters())
    ours = torch.autograd.grad(core.sae_losses(sae, x_BD, **auxiliary).total, parameters)
    reference = torch.autograd.grad(core.dense_losses(sae, x_BD, **auxiliary), parameters)
    for a, b in zip(ours, reference, strict=True):
        assert (a - b).abs().max() < 1e-10


checks = 0
for (dtype, close), (B, K, H, D) in itertools.product(PRECISIONS, SIZES):
    check_products(dtype, close, B, K, H, D)
    checks += 1
core.on_gpu = lambda tensor: True
for tied in (True, False):
    check_step(tied)
    checks += 1
print(checks, "checks")
