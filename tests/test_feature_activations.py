"Activations: g is the maximum over the user's tokens, whatever the batches; delta is a filter; spans hold the peak."

import numpy as np
import pytest
import torch
from fac_synthesis.features.activations import (
    FeatureActivations,
    FeatureReader,
    collect_activations,
    half_maximum,
    pool_max,
    span,
    top_texts,
)
from fac_synthesis.models.backbone import tokenize
from fac_synthesis.sae.core import SAE, SAEConfig
from scipy import sparse


def brute_force(sae, backbone, text, top_k):
    "Latents at each of the user's tokens from the model's own hidden states, one text at a time, dense: (T, latents)."
    t = tokenize(backbone.tokenizer, [text], backbone.max_length)[0]
    with torch.no_grad():
        x_TD = backbone.model(torch.tensor([t.ids]), output_hidden_states=True).hidden_states[backbone.layer][
            0, t.first : t.last
        ]
        dense_TH = sae.dense_latents(x_TD).numpy()
    if not top_k:
        return dense_TH
    least_T1 = np.sort(dense_TH, 1)[:, [-sae.config.k]]
    return np.where(dense_TH >= least_T1, dense_TH, 0)


@pytest.mark.parametrize("top_k", [True, False])
def test_g_is_the_maximum_over_the_users_tokens(sae, backbone, texts, top_k):
    a = collect_activations(sae, backbone, texts, top_k)
    assert a.g.shape == (len(texts), sae.config.n_latents) and a.g.data.min() > 0
    for row, text in enumerate(texts):
        dense_TH = brute_force(sae, backbone, text, top_k)
        g = a.g[row].toarray().ravel()
        assert np.allclose(g, dense_TH.max(0), atol=1e-5)
        for latent in np.flatnonzero(g > 1e-4):
            assert dense_TH[a.peak[row, latent] - 1, latent] == pytest.approx(g[latent], abs=1e-5), (
                "the peak is where the maximum stands"
            )


@pytest.mark.parametrize("top_k", [True, False])
def test_batches_do_not_matter(sae, backbone, texts, top_k):
    one, many = (collect_activations(sae, backbone, texts, top_k, n) for n in (1, 100_000))
    assert abs(one.g - many.g).max() < 1e-5 and (one.peak != many.peak).nnz == 0


def test_pooling_takes_the_first_of_equal_peaks_and_drops_zeros():
    pooled = pool_max(
        *map(
            np.array,
            ([1, 0, 0, 0, 2, 2], [3, 3, 3, 3, 0, 1], [1.0, 2.0, 5.0, 5.0, 0.0, -1.0], [9, 0, 7, 4, 0, 0]),
        ),
        n_latents=4,
    )
    assert [a.tolist() for a in pooled] == [[0, 1], [3, 3], [5.0, 1.0], [4, 9]]
    assert pool_max(*map(np.array, ([2**31], [70_000], [1.0], [0])), n_latents=65_536 * 2)[0].tolist() == [
        2**31
    ], "many texts times many latents do not overflow"


def test_delta_is_a_filter_and_strict():
    a = FeatureActivations(
        sparse.csr_matrix(np.array([[1.0, 0, 2], [0, 0.5, 0]], dtype=np.float32)),
        sparse.csr_matrix(np.array([[1, 0, 4], [0, 2, 0]])),
    )
    assert [a.active(d).nnz for d in (0.0, 0.5, 1.0, 2.0)] == [3, 2, 1, 0]
    assert a.latents(0.5).tolist() == [True, False, True] and a.g.nnz == 3, (
        "and takes nothing from the stored values"
    )


def test_rows_keep_values_and_peaks_together(sae, backbone, texts):
    a = collect_activations(sae, backbone, texts)
    mask = np.arange(len(texts)) % 2 == 0
    picked = a.rows(mask)
    assert (picked.g != a.rows(np.flatnonzero(mask)).g).nnz == 0 and picked.g.shape[0] == 4
    latent = int(picked.g[1].argmax())
    assert picked.peak[1, latent] == a.peak[2, latent] > 0


def test_save_and_load(sae, backbone, texts, tmp_path):
    a = collect_activations(sae, backbone, texts).rows([3, 0, 5])
    a.save(tmp_path)
    b = FeatureActivations.load(tmp_path)
    assert (
        (a.g != b.g).nnz == 0 == (a.peak != b.peak).nnz and a.g.shape == b.g.shape and b.g.dtype == np.float32
    )


def test_units_divide_the_values_and_leave_the_peaks(sae, backbone, texts, tmp_path):
    a = collect_activations(sae, backbone, texts)
    unit = half_maximum(a)
    assert np.allclose(unit, np.where(a.latents(), a.g.toarray().max(0) / 2, 1)) and (unit > 0).all()
    b = FeatureReader(sae, backbone, unit_H=unit)(texts)
    b.save(tmp_path)
    for c in (b, a.in_units(unit), FeatureActivations.load(tmp_path)):
        assert (
            np.allclose(c.g.toarray(), a.g.toarray() / unit, atol=1e-6)
            and c.g.max() == pytest.approx(2)
            and c.g.dtype == np.float32
        )
        assert (c.peak != a.peak).nnz == 0, "the peak of a latent stays where it is, also on disk"
        assert (c.latents() == a.latents()).all()


def test_an_sae_of_another_model(backbone, texts, refused):
    said = refused(
        lambda: collect_activations(SAE(SAEConfig(d_model=48, n_latents=64, k=4)), backbone, texts)
    )
    assert "48" in said and "32" in said


def test_top_texts_and_spans_hold_the_peak(sae, backbone, texts):
    a = collect_activations(sae, backbone, texts)
    for latent in np.flatnonzero(a.latents())[:30]:
        top = top_texts(a, latent, 3)
        column = a.g[:, [latent]].toarray().ravel()
        assert [g for _, g, _ in top] == sorted(column[column > 0], reverse=True)[:3]
        for row, g, position in top:
            word = texts[row].split()[position]
            assert column[row] == g and f"[{word}]" in span(backbone, texts[row], position, 2, 1)
            assert span(backbone, texts[row], position, 99, 99, mark=False) == texts[row].strip()


def test_span_windows_are_cut_at_the_texts_ends(backbone):
    text = " tell me about the lock . "
    assert [span(backbone, text, p, 1, 1) for p in (0, 3, 5)] == ["[tell] me", "about [the] lock", "lock [.]"]
    assert span(backbone, text, 2, 0, 0) == "[about]"
