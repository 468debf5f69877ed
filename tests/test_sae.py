"""The Top-K SAE: its gradients, its codes, its dead latents, its files."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fac_synthesis.run.parameters import UserError
from fac_synthesis.sae import core as module
from fac_synthesis.sae.core import (
    SAE,
    ChosenPreactivations,
    SAEConfig,
    batch_top_k,
    count_idle_,
    dense_losses,
    reconstruction_losses,
    row_top_k,
    sae_losses,
    to_threshold,
    top_k,
)

torch.set_num_threads(1)


def make(tied=True, d=12, h=48, k=4, seed=0, dtype=torch.float32, **kind) -> SAE:
    torch.manual_seed(seed)
    sae = SAE(SAEConfig(d, h, k, tied, layer=3, backbone="tiny", **kind)).to(dtype)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.3)
        sae.b_dec.normal_()
        if not tied:
            sae.W_dec.normal_()
            sae.normalise_()
    return sae


def planted(n: int, generator, d=32, atoms=200) -> torch.Tensor:
    """Sums of five of `atoms` fixed directions."""
    directions = F.normalize(torch.randn(atoms, d, generator=torch.Generator().manual_seed(5)), dim=1)
    chance = torch.rand(n, atoms, generator=generator)
    active = chance >= chance.topk(5, dim=1).values[:, -1:]
    return 4 * ((torch.rand(n, atoms, generator=generator) + 0.5) * active) @ directions


KINDS = {
    "topk": {},
    "batchtopk": dict(activation="batchtopk"),
    "threshold": dict(activation="threshold"),
    "matryoshka": dict(prefixes=(8, 20)),
    "matryoshka batchtopk": dict(activation="batchtopk", prefixes=(8, 20)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dead", [None, [], [1, 5, 6, 7, 40]])
def test_gradients_equal_dense_autograd(kind, tied, dead):
    sae = make(tied, dtype=torch.float64, **KINDS[kind])
    x = torch.randn(70, 12, dtype=torch.float64)
    if kind == "threshold":
        sae.threshold_H.uniform_(-1, 3)
    dead = None if dead is None else torch.tensor(dead, dtype=torch.long)
    gradients, totals = [], []
    for loss in (sae_losses(sae, x, dead_M=dead, k_aux=3).total, dense_losses(sae, x, dead_M=dead, k_aux=3)):
        sae.zero_grad()
        loss.backward()
        totals.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in sae.named_parameters()})
    assert abs(totals[0] - totals[1]) < 1e-12
    for name in gradients[0]:
        assert (gradients[0][name] - gradients[1][name]).abs().max() < 1e-10, name


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_dense_and_sparse_products_agree(monkeypatch, share):
    monkeypatch.setitem(module.DENSE_SHARE, "cpu", share)
    monkeypatch.setitem(module.BLOCK_TOKENS, "cpu", 7)
    sae = make(False, k=20, dtype=torch.float64, prefixes=(16,))
    x = torch.randn(30, 12, dtype=torch.float64)
    mine = torch.autograd.grad(sae_losses(sae, x).total, list(sae.parameters()))
    reference = torch.autograd.grad(dense_losses(sae, x), list(sae.parameters()))
    for a, b in zip(mine, reference, strict=True):
        assert (a - b).abs().max() < 1e-10


def test_a_bfloat16_product_only_chooses():
    sae = make(False, d=32, h=256, k=8)
    x = torch.randn(200, 32)
    _, exact = sae.encode(x)
    sae.product_dtype = torch.bfloat16
    values, indices = sae.encode(x)
    preacts = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    assert values.dtype == torch.float32
    assert torch.allclose(values, preacts.gather(1, indices).relu(), atol=1e-5)
    nothing = torch.zeros_like(preacts)
    same = nothing.scatter(1, indices, 1) * nothing.scatter(1, exact, 1)
    assert same.sum() > 0.97 * 8 * 200, "rounding swaps few latents"
    grads = [torch.autograd.grad(sae(x).x_BD.pow(2).sum(), sae.W_enc)[0]]
    sae.product_dtype = None
    grads.append(torch.autograd.grad(sae(x).x_BD.pow(2).sum(), sae.W_enc)[0])
    assert (grads[0] - grads[1]).norm() < 0.2 * grads[1].norm()


def test_gpu_kernels_under_the_interpreter():
    """Triton must be told before it is imported, hence another process."""
    if not importlib.util.find_spec("triton"):
        pytest.skip("triton is not installed, so there are no GPU kernels to check")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_kernels.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "8 checks" in done.stdout


def test_gradient_reaches_the_input():
    sae = make(dtype=torch.float64)
    x = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    choose = partial(row_top_k, k=3)

    def values_of(x):
        return ChosenPreactivations.apply(x, sae.W_enc, sae.b_enc, sae.b_dec, choose)[0]

    assert torch.autograd.gradcheck(values_of, (x,))


@pytest.mark.parametrize("tied", [True, False])
def test_encode_and_decode_reference(tied):
    sae = make(tied)
    x = torch.randn(33, 12)
    preacts = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    top = preacts.topk(4, dim=1)
    codes = torch.zeros_like(preacts).scatter(1, top.indices, top.values.relu())
    out = sae(x)
    mine = torch.zeros_like(preacts).scatter(1, out.indices_BK, out.values_BK)
    assert torch.allclose(mine, codes, atol=1e-5)
    assert torch.allclose(out.x_BD, codes @ (sae.W_enc if tied else sae.W_dec) + sae.b_dec, atol=1e-5)
    assert torch.allclose(sae.dense_latents(x), preacts.relu(), atol=1e-5)
    assert sae.encode(x, k=7)[0].shape == (33, 7)


def test_l0_is_at_most_k_and_below_it_when_few_are_positive():
    sae = make()
    with torch.no_grad():
        sae.b_enc.fill_(-3.0)
    values, _ = sae.encode(torch.randn(100, 12))
    active = (values > 0).sum(1)
    assert active.max() <= 4 and active.float().mean() < 4 and values.min() >= 0


@pytest.mark.parametrize(
    "shape,k", [((5, 64), 4), ((5, 64), 5), ((5, 60), 4), ((7, 160), 9), ((3, 2048), 3), ((0, 2048), 3)]
)
@pytest.mark.parametrize("levels", [1, 30])
def test_staged_top_k_is_exact(shape, k, levels):
    torch.manual_seed(0)
    preacts = torch.randn(shape)
    if levels > 1:  # rounding makes ties
        preacts = (preacts * levels).round()
    values, indices = top_k(preacts, k)
    assert torch.equal(values.sort(1).values, preacts.topk(k, dim=1).values.sort(1).values)
    assert torch.equal(preacts.gather(1, indices), values)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_batch_top_k_keeps_the_largest_positive_of_the_batch(monkeypatch, block):
    monkeypatch.setitem(module.BLOCK_TOKENS, "cpu", block)
    sae = make(dtype=torch.float64, activation="batchtopk")
    x = torch.randn(40, 12, dtype=torch.float64)
    x[3] *= 20  # a rich token
    x[5] = sae.b_dec  # a poor one
    preacts = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    kept = torch.zeros(preacts.numel(), dtype=torch.float64)
    top = preacts.flatten().topk(4 * 40)
    kept[top.indices] = top.values.relu()
    kept = kept.view_as(preacts)
    values, indices = sae.encode(x)
    codes = torch.zeros_like(preacts).scatter_add(1, indices, values)
    assert torch.allclose(codes, kept, atol=1e-12)
    assert values.shape[1] == (kept > 0).sum(1).max()


def test_batch_top_k_of_few_positives_and_of_none():
    values, indices = batch_top_k([torch.tensor([[-1.0, 2.0, -3.0]]), -torch.ones(1, 3)], total=4)
    assert values.tolist() == [[2], [0]] and indices.tolist() == [[1], [0]]
    values, indices = batch_top_k([torch.empty(0, 3)], total=0)
    assert values.shape == indices.shape == (0, 1)


def test_threshold_inference_equals_the_naive_formula_and_scales_with_the_units(tmp_path):
    torch.manual_seed(1)
    batch = make(False, activation="batchtopk")
    sae = to_threshold(batch, torch.rand(48) * 3 - 0.5)
    x = torch.randn(33, 12) * 2
    preacts = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    naive = torch.where(preacts > sae.threshold_H, preacts, 0).relu()
    values, indices = sae.encode(x)
    assert torch.allclose(torch.zeros_like(preacts).scatter_add(1, indices, values), naive, atol=1e-5)
    assert values.shape[1] == (naive > 0).sum(1).max()
    assert torch.allclose(sae(x).x_BD, naive @ sae.W_dec + sae.b_dec, atol=1e-4)
    alone = sae.encode(x[:1])[0]
    assert (alone > 0).sum() == (naive[0] > 0).sum(), "a token's code does not depend on its neighbours"
    sae.save(tmp_path)
    again = SAE.load(tmp_path)
    assert torch.equal(again.threshold_H, sae.threshold_H) and again.config == sae.config
    again.rescale_(4.0)
    assert torch.equal(again(4 * x).x_BD, 4 * sae(x).x_BD)


def test_threshold_above_everything_keeps_nothing():
    sae = to_threshold(make(), 1e9)
    x = torch.randn(5, 12)
    values, indices = sae.encode(x)
    assert values.shape == (5, 1) and not values.any() and torch.equal(sae(x).x_BD, sae.b_dec.expand(5, 12))


def test_prefixes_order_the_dictionary():
    torch.manual_seed(0)
    sae = SAE(SAEConfig(32, 256, 8, tied=False, prefixes=(32,)))
    generator = torch.Generator().manual_seed(0)
    plain = SAE(SAEConfig(32, 256, 8, tied=False))
    plain.load_state_dict(sae.state_dict())
    for model in (sae, plain):
        adam = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
        for _ in range(60):
            adam.zero_grad()
            sae_losses(model, planted(512, generator)).total.backward()
            model.project_gradient_()
            adam.step()
            model.normalise_()
    x = planted(512, generator)

    def fvu_of_the_first_32(model):
        out = model(x)
        first = model.decode(out.values_BK * (out.indices_BK < 32), out.indices_BK)
        return reconstruction_losses(x, first)[1].item()

    assert fvu_of_the_first_32(sae) < 0.9 * fvu_of_the_first_32(plain)


def test_a_folder_written_before_the_variants_still_loads(tmp_path):
    sae = make()
    sae.save(tmp_path)
    edit(tmp_path, activation=None, prefixes=None)
    assert SAE.load(tmp_path).config == sae.config
    make(prefixes=(8, 20)).save(tmp_path)
    assert SAE.load(tmp_path).config.prefixes == (8, 20)


def test_rescale_changes_units_exactly():
    sae = make(tied=False)
    x = torch.randn(20, 12)
    before = sae(x)
    sae.rescale_(4.0)  # a power of two: no rounding
    after = sae(4 * x)
    assert torch.equal(after.x_BD, 4 * before.x_BD) and torch.equal(after.values_BK, 4 * before.values_BK)


def test_decoder_constraint_of_the_untied_sae():
    sae = make(tied=False)
    x = torch.randn(50, 12)
    sae_losses(sae, x).total.backward()
    sae.project_gradient_()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-6
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.normalise_()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(48))
    tied = make()
    before = tied.W_enc.clone()
    tied.project_gradient_()
    tied.normalise_()
    assert torch.equal(tied.W_enc, before)


def test_losses_by_hand():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    guess = torch.tensor([[3.0, 3.0], [0.0, 0.0]])
    normalised_l2, fvu = reconstruction_losses(x, guess)
    assert normalised_l2 == pytest.approx((1 / 25 + 1) / 2) and fvu == pytest.approx(2 / 10)


@pytest.mark.parametrize("tied", [True, False])
def test_auxk_reaches_dead_encoder_rows_only_through_the_dead(tied):
    sae = make(tied)
    x = torch.randn(200, 12)
    with torch.no_grad():
        sae.b_enc[:6] = -1.5
    dead = torch.arange(6)
    losses = sae_losses(sae, x, dead_M=dead)
    (aux,) = torch.autograd.grad(losses.auxk, sae.W_enc)
    assert aux[:6].norm() > 0 and aux[6:].norm() == 0


def test_auxk_lowers_the_dead_share_in_200_steps():
    def dead_share(aux_coef):
        torch.manual_seed(0)
        sae = SAE(SAEConfig(32, 256, 8, tied=False))
        generator = torch.Generator().manual_seed(0)
        idle = torch.zeros(256, dtype=torch.long)
        with torch.no_grad():
            sae.b_enc[128:] = -5.0
        adam = torch.optim.Adam(sae.parameters(), lr=3e-3, fused=True)
        for _ in range(200):
            dead = (idle >= 2560).nonzero().flatten()
            losses = sae_losses(sae, planted(512, generator), dead_M=dead, k_aux=32, aux_coef=aux_coef)
            adam.zero_grad()
            losses.total.backward()
            sae.project_gradient_()
            adam.step()
            sae.normalise_()
            count_idle_(idle, losses.out)
        return (idle >= 2560).float().mean().item()

    with_auxk, without = dead_share(1 / 32), dead_share(0.0)
    assert with_auxk < 0.5 * without, (with_auxk, without)


def test_dead_latents_are_counted_in_tokens():
    sae = make()
    idle = torch.zeros(48, dtype=torch.long)
    out = sae(torch.randn(10, 12))
    count_idle_(idle, out)
    count_idle_(idle, out)
    fired = out.indices_BK[out.values_BK > 0].unique()
    assert (idle[fired] == 0).all() and idle.sum() == 20 * (48 - len(fired))


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, tied):
    sae = make(tied)
    sae.save(tmp_path / "sae")
    state = torch.random.get_rng_state()
    again = SAE.load(tmp_path / "sae")
    assert torch.equal(torch.random.get_rng_state(), state), "loading moves no random state"
    assert again.config == sae.config and again.decoder_HD.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), again.parameters(), strict=True))


def edit(folder, **changes):
    "Changes fields of a saved configuration; None removes one."
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def retensor(folder, change):
    "Changes saved tensors."
    tensors = load_file(folder / "sae.safetensors")
    change(tensors)
    save_file(tensors, folder / "sae.safetensors")


def truncate(folder):
    "Cuts the last bytes of the saved tensors."
    file = folder / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


BAD = {  # what the sentence says -> what was done to the folder
    "there is no SAE in": lambda f: (f / "config.json").unlink(),
    "is not valid JSON": lambda f: (f / "config.json").write_text("{"),
    "its field 'format' should read": lambda f: edit(f, format="other"),
    "does not describe an SAE": lambda f: (f / "config.json").write_text("[]"),
    "has no field 'k'": lambda f: edit(f, k=None),
    "has an unknown field 'colour'": lambda f: edit(f, colour=1),
    "field 'd_model' of": lambda f: edit(f, d_model="12"),
    "k must lie between 1 and n_latents": lambda f: edit(f, k=49),
    "is unknown; choose one of": lambda f: edit(f, activation="gelu"),
    "must be whole numbers that rise": lambda f: edit(f, prefixes=[20, 8]),
    "from at least 1 to below n_latents": lambda f: edit(f, prefixes=[8, 48]),
    "field 'prefixes' of": lambda f: edit(f, prefixes=8),
    "a width of at least 1": lambda f: edit(f, d_model=0),
    "has no sae.safetensors": lambda f: (f / "sae.safetensors").unlink(),
    "is damaged or truncated": truncate,
    "holds the tensors": lambda f: retensor(f, lambda t: t.pop("b_dec")),
    "its config.json asks for": lambda f: edit(f, tied=False),
    "has shape (48, 12)": lambda f: edit(f, d_model=13),
    "not finite": lambda f: retensor(f, lambda t: t["b_enc"].fill_(float("nan"))),
}


@pytest.mark.parametrize("sentence", BAD)
def test_a_bad_folder_says_what_is_wrong(tmp_path, sentence):
    make().save(tmp_path)
    BAD[sentence](tmp_path)
    with pytest.raises(UserError) as caught:
        SAE.load(tmp_path)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_k_larger_than_the_dictionary_is_refused():
    with pytest.raises(UserError, match="between 1 and n_latents"):
        SAEConfig(4, 8, 9)
