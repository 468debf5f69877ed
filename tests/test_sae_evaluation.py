"The evaluation of an SAE, against direct computations on a small made-up source."

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_source import TEXTS, ToySource, all_tokens

from fac_synthesis.run.parameters import UserError
from fac_synthesis.sae import evaluation as module
from fac_synthesis.sae.core import SAE, SAEConfig, sae_losses
from fac_synthesis.sae.evaluation import Sums, density_histogram, evaluate_sae

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sae():
    "An SAE that has learnt something of the source, so that its numbers are not those of chance."
    torch.manual_seed(0)
    sae, x = SAE(SAEConfig(16, 64, 3)), all_tokens()
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(40):
        adam.zero_grad()
        sae_losses(sae, x).total.backward()
        adam.step()
    return sae


def variance_unexplained(x, out) -> float:
    return ((x - out).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item()


def test_no_text_is_refused():
    with pytest.raises(UserError, match="no token to evaluate"):
        evaluate_sae(SAE(SAEConfig(16, 8, 2)), ToySource(), [])


def test_vectors_are_measured_as_by_a_direct_computation(sae):
    got = evaluate_sae(sae, ToySource(), TEXTS, batch_tokens=64)
    x = all_tokens()
    with torch.no_grad():
        out = sae(x)
    X, R = x.double(), out.x_BD.double()
    active = out.values_BK > 0
    fired = torch.bincount(out.indices_BK[active], minlength=64)
    want = dict(
        n_tokens=len(x),
        fvu=variance_unexplained(X, R),
        normalised_l2=((X - R).pow(2).sum(1) / X.pow(2).sum(1)).mean().item(),
        cosine=F.cosine_similarity(X, R).mean().item(),
        l0=active.sum(1).double().mean().item(),
        dead_share=(fired == 0).double().mean().item(),
    )
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-5), name
    assert got["fvu"] < 0.5, "the SAE has learnt something"
    assert sum(got["density_counts"]) == (fired > 0).sum()
    assert len(got["density_edges"]) == len(got["density_counts"]) + 1


def test_losses_are_measured_as_by_a_direct_computation(sae):
    got = evaluate_sae(sae, ToySource(), TEXTS, batch_tokens=64)
    mean = all_tokens().double().mean(0).float()
    edits = dict(
        original=None,
        sae=lambda x: sae(x).x_BD,
        zero=lambda x: 0 * x,
        mean=lambda x: mean.expand_as(x),
    )
    with torch.no_grad():
        found = ToySource().edited_losses(TEXTS, edits)
    ce = {name: loss for name, (loss, _) in found.items()}
    assert got["delta_ce"] == pytest.approx(ce["sae"] - ce["original"], rel=1e-4)
    for how in ("sae", "zero", "mean"):
        assert got[f"kl_{how}"] == pytest.approx(found[how][1], rel=1e-4) and got[f"kl_{how}"] > 0
    for how in ("zero", "mean"):
        share = (ce[how] - ce["sae"]) / (ce[how] - ce["original"])
        assert got[f"loss_recovered_{how}"] == pytest.approx(share, rel=1e-4)


def test_special_tokens_and_outliers_are_counted_apart():
    source, sae = ToySource(), SAE(SAEConfig(16, 64, 3))
    got = evaluate_sae(sae, source, TEXTS, batch_tokens=64, max_norm=3.0)
    x = all_tokens(special=True)
    with torch.no_grad():
        out = sae(x)
    assert got["n_tokens_all"] == got["n_tokens"] + len(TEXTS) == len(x)
    assert got["fvu_all"] == pytest.approx(variance_unexplained(x, out.x_BD), rel=1e-4)
    assert abs(got["fvu_all"] - got["fvu"]) > 0.01
    some = source.edited_losses(TEXTS[::4], dict(original=None), special=True)
    assert got["ce_original_all"] == pytest.approx(some["original"][0])
    few = evaluate_sae(sae, source, TEXTS, batch_tokens=64, max_norm=3.0, loss_texts=9)
    first = source.edited_losses(TEXTS[:9], dict(original=None))
    assert few["fvu"] == got["fvu"] and few["ce_original"] == pytest.approx(first["original"][0])


def test_outliers_of_the_user_are_left_out_of_the_users_numbers(sae):
    got = evaluate_sae(sae, ToySource(), TEXTS, batch_tokens=64, max_norm=1.0)
    assert 0.3 < got["n_tokens"] / len(all_tokens()) < 0.7, "about half lie below the median norm"


def test_fvu_survives_a_large_mean():
    torch.manual_seed(0)
    sae = SAE(SAEConfig(16, 64, 4)).double()
    x = torch.randn(500, 16, dtype=torch.float64)

    def fvu(x):
        sums = Sums(sae)
        with torch.no_grad():
            sae.b_dec.copy_(x.mean(0))
            for part in x.split(100):
                sums.add(part, sae(part))
        return sums.numbers()["fvu"]

    assert fvu(x) == pytest.approx(fvu(x + 1e6), rel=1e-6)


def test_density_histogram_by_hand():
    histogram = density_histogram(torch.tensor([0, 1, 10, 1000]), 1000, bins=6)
    assert histogram["density_counts"] == [0, 0, 0, 1, 1, 1]
    assert np.isclose(histogram["density_edges"], range(-6, 1)).all()


def test_progress_is_reported(sae, monkeypatch):
    seen = []

    def record(iterable, label, **options):
        for item in iterable:
            seen.append(label)
            yield item

    monkeypatch.setattr(module, "progress", record)
    evaluate_sae(sae, ToySource(), TEXTS)
    assert "evaluating the SAE" in seen
