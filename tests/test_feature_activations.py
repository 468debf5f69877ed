"Activations: g is the largest value at the user's tokens, delta is a filter, and spans hold the peak."

import numpy as np
import pytest
import torch
from scipy import sparse

from fac_synthesis.features.activations import (
    Entries,
    FeatureActivations,
    FeatureReader,
    collect_activations,
    half_maximum,
    in_units,
    open_reader,
    pool_max,
    read_activations,
    read_delta,
    read_texts,
    span,
    thresholds,
    top_texts,
)
from fac_synthesis.models.backbone import tokenize
from fac_synthesis.run.artifacts import digest_of, remember_digest
from fac_synthesis.sae.core import SAE, SAEConfig


def brute_force(sae, backbone, text, top_k):
    "Latents at each of the user's tokens from the model's own hidden states, dense: (T, latents)."
    t = tokenize(backbone.tokenizer, [text], backbone.max_length)[0]
    with torch.no_grad():
        states = backbone.model(torch.tensor([t.ids]), output_hidden_states=True).hidden_states
        x_TD = states[backbone.layer][0, t.first : t.last]
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
            at_peak = dense_TH[a.peak[row, latent] - 1, latent]
            assert at_peak == pytest.approx(g[latent], abs=1e-5), "the peak is where the maximum stands"


@pytest.mark.parametrize("top_k", [True, False])
def test_batches_do_not_matter(sae, backbone, texts, top_k):
    one, many = (collect_activations(sae, backbone, texts, top_k, n) for n in (1, 100_000))
    assert abs(one.g - many.g).max() < 1e-5 and (one.peak != many.peak).nnz == 0


def pooled(columns, n_latents):
    entries = pool_max(Entries(*map(np.array, columns)), n_latents)
    return [array.tolist() for array in entries]


def test_pooling_takes_the_first_of_equal_peaks_and_drops_zeros():
    columns = ([1, 0, 0, 0, 2, 2], [3, 3, 3, 3, 0, 1], [1.0, 2.0, 5.0, 5.0, 0.0, -1.0], [9, 0, 7, 4, 0, 0])
    assert pooled(columns, n_latents=4) == [[0, 1], [3, 3], [5.0, 1.0], [4, 9]]
    one = ([2**31], [70_000], [1.0], [0])
    many = "many texts times many latents do not overflow"
    assert pooled(one, n_latents=65_536 * 2)[0] == [2**31], many


def test_delta_is_a_filter_and_strict():
    a = FeatureActivations(
        sparse.csr_matrix(np.array([[1.0, 0, 2], [0, 0.5, 0]], dtype=np.float32)),
        sparse.csr_matrix(np.array([[1, 0, 4], [0, 2, 0]])),
    )
    assert [a.active(d).nnz for d in (0.0, 0.5, 1.0, 2.0)] == [3, 2, 1, 0]
    assert a.latents(0.5).tolist() == [True, False, True]
    assert a.g.nnz == 3, "and takes nothing from the stored values"


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
    assert (a.g != b.g).nnz == 0 == (a.peak != b.peak).nnz
    assert a.g.shape == b.g.shape and b.g.dtype == np.float32


def test_units_divide_the_values_and_leave_the_peaks(sae, backbone, texts, tmp_path):
    a = collect_activations(sae, backbone, texts)
    unit = half_maximum(a)
    assert np.allclose(unit, np.where(a.latents(), a.g.toarray().max(0) / 2, 1)) and (unit > 0).all()
    b = FeatureReader(sae, backbone, unit_H=unit)(texts)
    b.save(tmp_path)
    for c in (b, in_units(a, unit), FeatureActivations.load(tmp_path)):
        assert np.allclose(c.g.toarray(), a.g.toarray() / unit, atol=1e-6)
        assert c.g.max() == pytest.approx(2) and c.g.dtype == np.float32
        assert (c.peak != a.peak).nnz == 0, "the peak of a latent stays where it is, also on disk"
        assert (c.latents() == a.latents()).all()
    assert in_units(a, None) is a


def test_an_sae_of_another_model(backbone, texts, refused):
    narrow = SAE(SAEConfig(d_model=48, n_latents=64, k=4))
    said = refused(lambda: collect_activations(narrow, backbone, texts))
    assert "48" in said and "32" in said


def test_top_texts_and_spans_hold_the_peak(sae, backbone, texts):
    a = collect_activations(sae, backbone, texts)
    for latent in np.flatnonzero(a.latents())[:30]:
        top = top_texts(a, latent, 3)
        column = a.g[:, [latent]].toarray().ravel()
        assert [peak.g for peak in top] == sorted(column[column > 0], reverse=True)[:3]
        for row, g, position in top:
            word = texts[row].split()[position]
            assert column[row] == g and f"[{word}]" in span(backbone, texts[row], position, 2, 1)
            assert span(backbone, texts[row], position, 99, 99, mark=False) == texts[row].strip()


def test_span_windows_are_cut_at_the_texts_ends(backbone):
    text = " tell me about the lock . "
    assert [span(backbone, text, p, 1, 1) for p in (0, 3, 5)] == ["[tell] me", "about [the] lock", "lock [.]"]
    assert span(backbone, text, 2, 0, 0) == "[about]"


# ---- thresholds


def test_thresholds_are_multiples_of_delta():
    tried = [0.625, 0.75, 0.875, 1.0, 1.125]
    assert thresholds(1.6, tried) == [1.0, 1.2, 1.4, 1.6, 1.8], "without the noise of a product"
    assert thresholds(1.6, [1.0, 1.0625, 1.125, 1.1875]) == [1.6, 1.7, 1.8, 1.9]
    assert thresholds(0.8, [1.0, 2.0]) == [0.8, 1.6], "they follow a change of delta"


def test_at_delta_0_the_multiples_are_thresholds():
    assert thresholds(0.0, [0.0, 1.0, 2.0]) == [0.0, 1.0, 2.0]


# ---- what a key holds, and what later notebooks read


def test_a_reader_and_activations_can_be_arguments_of_a_cached_function(sae, backbone, texts):
    remember_digest(backbone, "as loaded from an artifact")
    reader = FeatureReader(sae, backbone)
    same = FeatureReader(sae, backbone, True, None, 8192)
    assert digest_of(reader) == digest_of(same)
    others = [
        FeatureReader(sae, backbone, top_k=False),
        FeatureReader(sae, backbone, unit_H=np.ones(sae.config.n_latents, dtype=np.float32)),
        FeatureReader(SAE(sae.config), backbone),
    ]
    assert digest_of(reader) not in {digest_of(other) for other in others}
    a = read_texts(reader, texts)
    assert digest_of(a) == digest_of(reader(texts)) != digest_of(a.rows([0, 1]))


class Left:
    "A run whose earlier stages left these values."

    def __init__(self, values):
        self.values = values

    def input(self, stage, name, cls=None):
        return self.values[name]

    setting = input


@pytest.mark.parametrize("relative", [True, False])
def test_the_readers_of_this_notebook(sae, backbone, relative):
    settings = {"delta": 1.6, "use_top_k": False, "batch_tokens": 64, "relative": relative}
    unit_H = np.full(sae.config.n_latents, 2.0, dtype=np.float32)
    artifacts = {"unit": {"unit_H": unit_H}, "backbone": backbone, "sae": sae, "seed_toxicity": "activations"}
    run = Left(settings | artifacts)
    assert read_delta(run) == 1.6 and read_activations(run, "seed", "toxicity") == "activations"
    reader = open_reader(run)
    assert (reader.sae, reader.backbone, reader.top_k, reader.batch_tokens) == (sae, backbone, False, 64)
    assert (reader.unit_H is unit_H) == relative
