"""Checkpoints of others.

Each layout is written as its makers write it, and compared with their formula. Then what is broken or
dangerous, and the way back.
"""

import json
import os
import warnings

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fac_synthesis.sae import checkpoints as module
from fac_synthesis.sae.checkpoints import (
    LAYOUTS,
    check_sae,
    hook_layer,
    load_published,
    open_checkpoint,
    read_sae,
    recognise,
    save_sae_lens,
    save_sparsify,
)
from fac_synthesis.sae.core import SAE, SAEConfig, to_threshold

D, H, K = 12, 40, 5


def weights(seed=0):
    """W (h, d), c (h), V (h, d) with rows of different norms, b (d)."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g) for shape in ((H, D), (H,), (H, D), (D,))]


W, C, V, B = weights()
X = torch.randn(300, D, generator=torch.Generator().manual_seed(9)) * 2
NORM = V.norm(dim=1)
CENTRED = (X - B) @ W.T + C  # pre-activations of layouts that subtract the decoder bias
RAW = X @ W.T + C  # and of those that do not
RAMP = torch.linspace(0, 4, H)  # a threshold per latent


def top(z, k=K):
    kept = z.topk(k, dim=1)
    return torch.zeros_like(z).scatter(1, kept.indices, kept.values.clamp_min(0))


def above(z, threshold):
    return z.relu() * (z > threshold)


# ---- the layouts: each writer returns (what to load, codes, reconstruction) by the published formula


def authors(folder, **config):
    "Published code: weight = state_dict with W_enc (d, h), config; Top-K, then ReLU, tied decoder."
    file = folder / "TopK7_l16_h40_epoch3.pth"
    weight = dict(mask=torch.ones(H), W_enc=W.T.contiguous(), b_enc=C, b_dec=B)
    torch.save(dict(weight=weight, config=dict(d_inp=D, d_hide=H, topK=K) | config), file)
    a = top(CENTRED)
    return file, a, a @ W + B


def authors_relu(folder):
    file, *_ = authors(folder)
    state = torch.load(file, weights_only=True)
    del state["config"]["topK"]
    torch.save(state, file)
    a = CENTRED.relu()
    return file, a, a @ W + B


LENS = dict(
    d_in=D,
    d_sae=H,
    dtype="float32",
    device="cpu",
    apply_b_dec_to_input=True,
    normalize_activations="none",
    reshape_activations="none",
    architecture="standard",
)
LENS_METADATA = dict(
    sae_lens_version="6.54.12",
    sae_lens_training_version="6.54.12",
    model_name="meta-llama/Llama-3.1-8B",
    hook_name="blocks.15.hook_resid_post",
)


def lens(folder, tensors=None, drop=(), metadata=True, **settings):
    tensors = dict(W_enc=W.T.contiguous(), b_enc=C, W_dec=V, b_dec=B) | (tensors or {})
    save_file(tensors, folder / "sae_weights.safetensors")
    about = dict(metadata=LENS_METADATA) if metadata else {}
    write_json(folder / "cfg.json", LENS | about | settings, drop)
    return folder


def write_json(file, fields, drop=()):
    file.write_text(json.dumps({name: value for name, value in fields.items() if name not in drop}))


def lens_standard(folder):
    a = CENTRED.relu()
    return lens(folder), a, a @ V + B


def lens_standard_raw_input(folder):
    a = RAW.relu()
    return lens(folder, apply_b_dec_to_input=False), a, a @ V + B


def lens_topk(folder):
    a = top(CENTRED)
    return lens(folder, architecture="topk", k=K, rescale_acts_by_decoder_norm=False), a, a @ V + B


def lens_topk_rescaled(folder):
    a = top(CENTRED * NORM)
    return lens(folder, architecture="topk", k=K, rescale_acts_by_decoder_norm=True), a, (a / NORM) @ V + B


def lens_topk_before_6(folder):
    a = top(RAW)
    old = dict(activation_fn_str="topk", activation_fn_kwargs={"k": K}, apply_b_dec_to_input=False)
    old |= dict(hook_name="blocks.16.hook_resid_pre", model_name="gpt2")
    return lens(folder, metadata=False, drop=("reshape_activations",), **old), a, a @ V + B


def lens_jumprelu(folder):
    a = above(CENTRED, RAMP)
    return lens(folder, {"threshold": RAMP}, architecture="jumprelu"), a, a @ V + B


def lens_batchtopk(folder):
    theta = {"topk_threshold": torch.tensor(6.0, dtype=torch.double)}
    a = above(CENTRED * NORM, 6.0)
    path = lens(folder, theta, architecture="batchtopk", k=5.0, rescale_acts_by_decoder_norm=True)
    return path, a, (a / NORM) @ V + B


SPARSIFY = dict(
    activation="topk",
    expansion_factor=32,
    normalize_decoder=True,
    num_latents=H,
    k=K,
    multi_topk=False,
    skip_connection=False,
    transcode=False,
    d_in=D,
)


def sparsify(folder, name="layers.15", drop=(), **settings):
    folder = folder / name
    folder.mkdir()
    save_file({"encoder.weight": W, "encoder.bias": C, "W_dec": V, "b_dec": B}, folder / "sae.safetensors")
    write_json(folder / "cfg.json", SPARSIFY | settings, drop)
    values, indices = F.relu(F.linear(X - B, W, C)).topk(K, dim=-1)
    a = torch.zeros(len(X), H).scatter(1, indices, values)
    return folder, a, torch.einsum("bk,bkd->bd", values, V[indices]) + B


TRAINER = dict(
    trainer_class="Trainer",
    activation_dim=D,
    dict_size=H,
    layer=15,
    lm_name="meta-llama/Llama-3.1-8B-Instruct",
    submodule_name="resid_post_layer_15",
)
COUNT = torch.tensor(K, dtype=torch.int)


def learned(folder, kind, state, **trainer):
    torch.save(state, folder / "ae.pt")
    buffer = dict(d_submodule=D, io="out", ctx_len=2048)
    write_json(folder / "config.json", dict(trainer=TRAINER | dict(dict_class=kind) | trainer, buffer=buffer))
    return folder


def linear(**extra):
    return {"encoder.weight": W, "encoder.bias": C, "decoder.weight": V.T.contiguous()} | extra


def learned_relu(folder):
    a = CENTRED.relu()
    return learned(folder, "AutoEncoder", linear(bias=B)), a, a @ V + B


def learned_relu_new(folder):
    a = RAW.relu()
    return learned(folder, "AutoEncoderNew", linear(**{"decoder.bias": B}), submodule_name=None), a, a @ V + B


def learned_topk(folder):
    a = top(CENTRED.relu())
    state = linear(b_dec=B, k=COUNT, threshold=torch.tensor(-1.0))
    return learned(folder, "AutoEncoderTopK", state, k=K), a, a @ V + B


def learned_batchtopk(folder, theta=3.0):
    a = CENTRED.relu()
    a = a * (a > theta)
    state = linear(b_dec=B, k=COUNT, threshold=torch.tensor(theta))
    return learned(folder, "BatchTopKSAE", state, k=K), a, a @ V + B


def learned_batchtopk_untrained_threshold(folder):
    return learned_batchtopk(folder, -1.0)


def learned_matryoshka(folder):
    a = above(CENTRED, 3.0)
    state = dict(W_enc=W.T.contiguous(), b_enc=C, W_dec=V, b_dec=B, k=COUNT, threshold=torch.tensor(3.0))
    state["group_sizes"] = torch.tensor([10, 30])
    return learned(folder, "MatryoshkaBatchTopKSAE", state, k=K), a, a @ V + B


def learned_jumprelu(folder):
    theta = torch.linspace(0.001, 4, H)
    a = F.relu(RAW * (RAW > theta))
    state = dict(W_enc=W.T.contiguous(), b_enc=C, W_dec=V, b_dec=B, threshold=theta)
    return learned(folder, "JumpReluAutoEncoder", state), a, a @ V + B


def goodfire(folder):
    file = folder / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    encoder = {"encoder_linear.weight": W, "encoder_linear.bias": C}
    decoder = {"decoder_linear.weight": V.T.contiguous(), "decoder_linear.bias": B}
    torch.save(encoder | decoder, file)
    a = F.relu(F.linear(X, W, C))
    return file, a, F.linear(a, V.T, B)


SCOPE = dict(
    d_model=D,
    d_sae=H,
    expansion_factor=4,
    hook_point_in="blocks.15.hook_resid_post",
    hook_point_out="blocks.15.hook_resid_post",
    act_fn="jumprelu",
    jump_relu_threshold=2.5,
    top_k=7,
    norm_activation="dataset-wise",
    dataset_average_activation_norm={"in": 9.5, "out": 9.5},
    use_decoder_bias=True,
    apply_decoder_bias_to_pre_encoder=False,
    sparsity_include_decoder_norm=True,
)


def scope_formula(W, C, V, B):
    "Llama Scope as its library runs it: into raw units, unit decoder rows, then the threshold."
    factor, norm = D**0.5 / 9.5, V.norm(dim=1)
    raw = (X @ W.T + C / factor) * norm
    a = raw * (raw > 2.5)
    return a, a @ (V / norm[:, None]) + B / factor


def scope(folder, **settings):
    (folder / "checkpoints").mkdir()
    save_file(linear(**{"decoder.bias": B}), folder / "checkpoints/final.safetensors")
    write_json(folder / "hyperparams.json", SCOPE | settings)
    return folder, *scope_formula(W, C, V, B)


def scope_bfloat16(folder):
    folder, *_ = scope(folder)
    file = folder / "checkpoints/final.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    return folder, *scope_formula(*(tensor.bfloat16().float() for tensor in (W, C, V, B)))


def made(config: SAEConfig) -> SAE:
    "Our SAE with the tensors above."
    tensors = dict(W_enc=W, b_enc=C, b_dec=B) | ({} if config.tied else dict(W_dec=V))
    with torch.device("meta"):
        sae = SAE(config)
    sae.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return sae


def ours(folder):
    made(SAEConfig(D, H, K, tied=False, layer=16)).save(folder)
    a = top(CENTRED)
    return folder, a, a @ V + B


LAYERS = {goodfire: 20, authors: 16}
EVERY = [
    authors,
    authors_relu,
    lens_standard,
    lens_standard_raw_input,
    lens_topk,
    lens_topk_rescaled,
    lens_topk_before_6,
    lens_jumprelu,
    lens_batchtopk,
    sparsify,
    learned_relu,
    learned_relu_new,
    learned_topk,
    learned_batchtopk,
    learned_batchtopk_untrained_threshold,
    learned_matryoshka,
    learned_jumprelu,
    goodfire,
    scope,
    scope_bfloat16,
    ours,
]
every = pytest.mark.parametrize("write", EVERY, ids=lambda w: w.__name__)


def codes(sae, x=X):
    values, indices = sae.encode(x)
    return torch.zeros(len(x), sae.config.n_latents).scatter_add(1, indices, values).detach()


def close(mine, theirs):
    return (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@every
def test_loads_and_reproduces_the_published_formula(write, tmp_path):
    path, a, x_hat = write(tmp_path)
    sae = load_published(path)
    assert close(codes(sae), a) and close(sae(X).x_BD, x_hat)
    assert (a > 0).any() and (a == 0).any(), "the formula chooses"
    assert sae.config.layer == LAYERS.get(write, 16)
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in sae.state_dict().values())


@every
def test_our_own_files_keep_it(write, tmp_path):
    (tmp_path / "a").mkdir()
    sae = load_published(write(tmp_path / "a")[0])
    sae.save(tmp_path / "b")
    again = load_published(tmp_path / "b")
    assert again.config == sae.config and torch.equal(codes(again), codes(sae))


def test_the_file_name_does_not_decide(tmp_path):
    file, a, _ = authors(tmp_path)
    sae = load_published(file.rename(tmp_path / "ae.safetensors"))
    assert close(codes(sae), a) and sae.config.layer == 0, "only the name knew the layer"
    assert load_published(tmp_path, layer=16).config.layer == 16


def test_what_a_checkpoint_says_beyond_its_tensors(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    matryoshka = load_published(learned_matryoshka(tmp_path / "a")[0]).config
    scoped = load_published(scope(tmp_path / "b")[0]).config
    assert matryoshka.prefixes == (10,) and matryoshka.k == K
    assert matryoshka.backbone == "meta-llama/Llama-3.1-8B-Instruct"
    assert scoped.k == 7 and scoped.activation == "threshold"
    assert load_published(authors(tmp_path / "c")[0]).config.tied


def test_a_norm_factor_is_in_raw_units(tmp_path):
    "Residuals and norm of the training data doubled: codes and reconstructions doubled, without a threshold."
    for name in "ab":
        (tmp_path / name).mkdir()
    doubled = {"in": 19.0, "out": 19.0}
    one = scope(tmp_path / "a", jump_relu_threshold=0.0)[0]
    two = scope(tmp_path / "b", jump_relu_threshold=0.0, dataset_average_activation_norm=doubled)[0]
    one, two = load_published(one), load_published(two)
    assert close(codes(two, 2 * X), 2 * codes(one)) and close(two(2 * X).x_BD, 2 * one(X).x_BD)


LAYOUT_OF = dict(
    authors="authors",
    lens="SAELens",
    sparsify="sparsify",
    learned="dictionary_learning",
    goodfire="Goodfire",
    scope="Llama Scope",
)


@every
def test_every_layout_is_recognised_by_content(write, tmp_path):
    path = write(tmp_path)[0]
    if write is ours:
        return
    layout = LAYOUT_OF[write.__name__.split("_")[0]]
    assert layout in LAYOUTS and recognise(open_checkpoint(module.find_checkpoint(path))) == layout


# ---- hook points


@pytest.mark.parametrize(
    "hook,layer",
    [
        ("layers.0", 1),
        ("model.layers.15", 16),
        ("blocks.15.hook_resid_post", 16),
        ("blocks.16.hook_resid_pre", 16),
        ("resid_post_layer_15", 16),
    ],
)
def test_layers_count_from_one(hook, layer):
    assert hook_layer(hook) == layer


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.0.hook_resid_pre",
        "blocks.15.hook_mlp_out",
        "layers.15.mlp",
        "blocks.15.attn.hook_z",
        "resid_mid_layer_3",
        "mlp_out_layer_3",
        "",
    ],
)
def test_another_site_is_not_a_layer(hook, refused):
    assert repr(hook) in refused(lambda: hook_layer(hook))


def test_another_site_only_when_asked_for(tmp_path, refused):
    path, a, _ = sparsify(tmp_path, "layers.23.mlp")
    message = refused(lambda: load_published(path))
    assert "layers.23.mlp" in message and "other_sites=True" in message
    sae = load_published(path, other_sites=True)
    assert sae.config.layer == 0 and close(codes(sae), a)


@pytest.mark.parametrize(
    "write", [authors, goodfire, lens_topk, sparsify, learned_topk, scope, ours], ids=lambda w: w.__name__
)
def test_a_wrong_layer_is_refused(write, tmp_path, refused):
    path = write(tmp_path)[0]
    right = LAYERS.get(write, 16)
    assert load_published(path, layer=right).config.layer == right
    message = refused(lambda: load_published(path, layer=right - 1))
    assert f"reads layer {right}" in message and f"not layer {right - 1}" in message


# ---- broken and dangerous


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["top", "weight", "config"])
def test_a_hostile_pickle_is_refused_and_nothing_runs(where, legacy, tmp_path, refused):
    file, mark = authors(tmp_path)[0], tmp_path / "it ran".replace(" ", "_")
    state = torch.load(file, weights_only=True)
    state = Hostile(mark) if where == "top" else {**state, where: {**state[where], "extra": Hostile(mark)}}
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    message = refused(lambda: load_published(file))
    assert "could run code" in message and str(file) in message and not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists(), "the pickle was hostile indeed"


def rewrite(folder, change):
    """Change the tensors of the one safetensors or torch file in `folder`."""
    (file,) = [f for f in folder.rglob("*") if f.suffix in (".safetensors", ".pth", ".pt")]
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    else:
        state = torch.load(file, weights_only=True)
        change(state.get("weight", state))
        torch.save(state, file)


def truncate(folder, keep=0.6):
    (file,) = [f for f in folder.rglob("*") if f.suffix in (".safetensors", ".pth", ".pt")]
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])


def resize(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def nan(name):
    return lambda tensors: tensors[name].view(-1)[0].fill_(float("nan"))


def without(name):
    return lambda tensors: tensors.pop(name)


TENSOR = {
    authors: "b_enc",
    lens_topk: "b_enc",
    lens_jumprelu: "threshold",
    sparsify: "W_dec",
    learned_batchtopk: "encoder.bias",
    learned_jumprelu: "W_dec",
    goodfire: "decoder_linear.bias",
    scope: "encoder.bias",
}


@pytest.mark.parametrize(
    "what,change",
    [("has no tensor", without), ("has shape", resize), ("not finite", nan)],
    ids=["missing", "misshapen", "nan"],
)
@pytest.mark.parametrize("write", TENSOR, ids=lambda w: w.__name__)
def test_a_broken_tensor_is_named(write, what, change, tmp_path, refused):
    path = write(tmp_path)[0]
    rewrite(tmp_path, change(TENSOR[write]))
    message = refused(lambda: load_published(path))
    if (write, change) != (sparsify, without):
        assert what in message and TENSOR[write] in message
    assert str(tmp_path) in message


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.6])
@pytest.mark.parametrize(
    "write", [authors, lens_topk, sparsify, learned_topk, goodfire, scope], ids=lambda w: w.__name__
)
def test_a_truncated_file_is_refused(write, keep, tmp_path, refused):
    path = write(tmp_path)[0]
    truncate(tmp_path, keep)
    assert "damaged" in refused(lambda: load_published(path))


def two_of_them(folder):
    for number in (3, 4):
        sparsify(folder, f"layers.{number}")


def without_json(folder):
    (learned(folder, "AutoEncoder", linear(bias=B)) / "config.json").unlink()


def another_site(folder):
    learned(folder, "AutoEncoder", linear(bias=B), submodule_name="mlp_out_layer_15")


def another_k(folder):
    learned(folder, "AutoEncoderTopK", linear(b_dec=B, k=torch.tensor(K)), k=K + 1)


def expected_average(folder):
    lens(folder, normalize_activations="expected_average_only_in")


BAD_SETTINGS = {
    "architecture 'gated'": lambda f: lens(f, architecture="gated"),
    "architecture 'temporal'": lambda f: lens(f, architecture="temporal"),
    "activation function 'tanh-relu'": lambda f: lens(f, activation_fn_str="tanh-relu"),
    "normalize_activations = 'layer_norm'": lambda f: lens(f, normalize_activations="layer_norm"),
    "normalize_activations = 'expected_average_only_in'": expected_average,
    "reshape_activations = 'hook_z'": lambda f: lens(f, reshape_activations="hook_z"),
    "field 'd_sae' is '40'": lambda f: lens(f, d_sae="40"),
    "field 'k' is None": lambda f: lens(f, architecture="topk"),
    "of the wrong kind": lambda f: lens(f, activation_fn="topk", activation_fn_kwargs=3),
    "k must lie between 1 and n_latents": lambda f: lens(f, architecture="topk", k=H + 1),
    "fields d_in, d_sae": lambda f: lens(f, drop=("d_sae",)),
    "blocks.15.hook_mlp_out": lambda f: lens(f, metadata=False, hook_name="blocks.15.hook_mlp_out"),
    "activation = 'groupmax'": lambda f: sparsify(f, activation="groupmax"),
    "transcode = True": lambda f: sparsify(f, transcode=True),
    "skip_connection = True": lambda f: sparsify(f, skip_connection=True),
    "signed = True": lambda f: sparsify(f, signed=True),
    "fields d_in, k": lambda f: sparsify(f, drop=("k",)),
    "is 0, but should be a whole number": lambda f: sparsify(f, num_latents=0, expansion_factor=0),
    "class 'GatedAutoEncoder'": lambda f: learned(f, "GatedAutoEncoder", linear(b_dec=B)),
    "its weights say k = 5": another_k,
    "mlp_out_layer_15": another_site,
    "fields trainer": without_json,
    "it is a transcoder": lambda f: scope(f, hook_point_out="blocks.15.hook_mlp_out"),
    "activation function 'swish'": lambda f: scope(f, act_fn="swish"),
    "norm_activation = 'token-wise'": lambda f: scope(f, norm_activation="token-wise"),
    "one positive norm": lambda f: scope(f, dataset_average_activation_norm={"in": 0.0}),
    "use_glu_encoder": lambda f: scope(f, use_glu_encoder=True),
    "field 'topK' is True": lambda f: authors(f, topK=True),
    "field 'd_hide' is -1": lambda f: authors(f, d_hide=-1),
    "is not valid JSON": lambda f: (lens(f) / "cfg.json").write_text("{"),
    "no SAE in a layout known here": lambda f: save_file({"lm_head.weight": W}, f / "model.safetensors"),
    "it holds nothing": lambda f: torch.save([1, 2], f / "list.pt"),
    "holds no weights": lambda f: (f / "notes.txt").write_text("nothing"),
    "holds 2 SAEs; name one of them": two_of_them,
}


@pytest.mark.parametrize("sentence", BAD_SETTINGS)
def test_what_has_no_exact_form_is_refused_in_one_sentence(sentence, tmp_path, refused):
    BAD_SETTINGS[sentence](tmp_path)
    message = refused(lambda: load_published(tmp_path))
    assert sentence in message and str(tmp_path) in message


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "word"])
def test_nothing_there(name, refused):
    assert name in refused(lambda: load_published(name))


# ---- hub names


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """cache(repo): the snapshot folder of a repository in an otherwise empty, offline hub cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def snapshot(repo):
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        return folder / "snapshots" / commit

    return snapshot


def test_a_hub_name_is_taken_from_the_cache(cache, refused):
    _, a, _ = authors(cache("owner/sae_llama_l16_h40"))
    sae = load_published("owner/sae_llama_l16_h40")
    assert close(codes(sae), a) and sae.config.layer == 16
    message = refused(lambda: load_published("owner/absent"))
    assert "neither a file or folder here nor to be had from the hub" in message


def test_one_of_several_on_the_hub(cache):
    root = cache("owner/many")
    for name in ("resid_post_layer_11/trainer_1", "resid_post_layer_15/trainer_1"):
        (root / name).mkdir(parents=True)
    learned_topk(root / "resid_post_layer_11/trainer_1")
    _, a, _ = learned_batchtopk(root / "resid_post_layer_15/trainer_1")
    assert close(codes(load_published("owner/many/resid_post_layer_15/trainer_1")), a)
    assert close(codes(load_published("owner/many/resid_post_layer_15")), a)


def test_only_the_wanted_files_are_fetched(tmp_path, monkeypatch, cache, refused):
    source, asked = tmp_path / "remote", []
    for name in ("a", "b"):
        (source / name).mkdir(parents=True)
        scope(source / name)
    (source / "README.md").write_text("hello")

    class Hub:
        def list_repo_files(self, repo):
            return module.relative_files(source)

    def download(repo, file):
        asked.append(file)
        return str(source / file)

    monkeypatch.setattr(module, "HfApi", Hub)
    monkeypatch.setattr(module, "hf_hub_download", download)
    load_published("owner/many/b")
    assert asked == ["b/hyperparams.json", "b/checkpoints/final.safetensors"]
    assert "holds 2 SAEs" in refused(lambda: load_published("owner/many"))


def test_weights_are_told_from_other_files():
    files = [
        "cfg.json",
        "sparsity.safetensors",
        "activations_store_state.safetensors",
        "trainer_state.pt",
        "optimizer.pt",
        "sae_weights.safetensors",
        "old/sae_weights.safetensors",
    ]
    assert module.weights_file(files, "x") == "sae_weights.safetensors"


# ---- does it fit?


def fitted(backbone, texts):
    """An SAE that knows the residuals by heart: one latent per token."""
    x = torch.cat([r.x_ND for r in backbone.residuals(texts)])
    sae = SAE(SAEConfig(backbone.d_model, len(x), 1, layer=backbone.layer))
    mean = x.mean(0)
    rows = x - mean
    with torch.no_grad():
        sae.b_dec.copy_(mean)
        sae.W_enc.copy_(rows / rows.norm(dim=1, keepdim=True))
    return sae


def test_a_sound_sae_passes_and_a_foreign_one_warns(backbone, texts, sae):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers = check_sae(fitted(backbone, texts), backbone, texts, n_tokens=20)
    assert numbers["fvu"] < 0.01 and numbers["n_tokens"] == 20
    with pytest.warns(UserWarning, match="variance unexplained on 20 tokens"):
        assert check_sae(sae, backbone, texts, n_tokens=20)["fvu"] > 0.5


def test_the_check_equals_plain_arithmetic(backbone, texts):
    x = torch.cat([r.x_ND for r in backbone.residuals(texts)])[:15]
    torch.manual_seed(2)
    sae = to_threshold(SAE(SAEConfig(32, 64, 4)), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        numbers = check_sae(sae, backbone, texts, n_tokens=15)
    error = (x - sae(x).x_BD).pow(2).sum()
    assert numbers["fvu"] == pytest.approx((error / (x - x.mean(0)).pow(2).sum()).item(), rel=1e-4)
    assert numbers["l0"] == pytest.approx((codes(sae, x) > 0).sum(1).float().mean().item())


def test_the_check_refuses_another_width_or_layer(backbone, texts, refused):
    assert "width 12" in refused(lambda: check_sae(SAE(SAEConfig(12, 20, 2)), backbone, texts))
    assert "layer=3" in refused(lambda: check_sae(SAE(SAEConfig(32, 20, 2, layer=3)), backbone, texts))
    assert "fewer than two tokens" in refused(lambda: check_sae(SAE(SAEConfig(32, 20, 2)), backbone, []))


# ---- writing


def make(kind="topk", tied=False, layer=16) -> SAE:
    activation = "batchtopk" if kind == "batchtopk" else "topk"
    sae = made(SAEConfig(D, H, K, tied, layer=layer, backbone="some/model", activation=activation))
    return to_threshold(sae, RAMP) if kind == "threshold" else sae


def same(one, two):
    a, b = one.state_dict(), two.state_dict()
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "kind,save", [("topk", save_sae_lens), ("threshold", save_sae_lens), ("topk", save_sparsify)]
)
def test_there_and_back(kind, save, tied, tmp_path):
    sae = make(kind, tied)
    again = load_published(save(sae, tmp_path))
    config = again.config
    assert same(sae, again)
    assert (config.layer, config.k, config.tied, config.activation) == (16, K, tied, kind)
    if save is save_sae_lens:
        assert again.config.backbone == "some/model"


def test_an_unknown_layer_stays_unknown(tmp_path):
    for save in (save_sae_lens, save_sparsify):
        assert load_published(save(make(layer=0), tmp_path / save.__name__)).config.layer == 0


def test_what_a_layout_cannot_hold_is_refused(tmp_path, refused):
    assert "to_threshold" in refused(lambda: save_sae_lens(make("batchtopk"), tmp_path))
    assert "Top-K only" in refused(lambda: save_sparsify(make("threshold"), tmp_path))
    assert not list(tmp_path.iterdir())


# ---- through the libraries themselves, where they are installed


@pytest.mark.parametrize("kind", ["topk", "threshold"])
def test_sae_lens_reads_ours_and_we_read_its(kind, tmp_path):
    lens_library = pytest.importorskip("sae_lens", reason="the round trip through SAELens needs sae-lens")
    sae = make(kind)
    theirs = lens_library.SAE.load_from_disk(save_sae_lens(sae, tmp_path / "ours"))
    with torch.no_grad():
        assert close(codes(sae), theirs.encode(X)) and close(sae(X).x_BD, theirs(X))
    assert theirs.cfg.metadata.hook_name == "blocks.15.hook_resid_post"
    theirs.save_model(tmp_path / "theirs")
    assert same(sae, load_published(tmp_path / "theirs"))


def of_sae_lens(lens_library, kind):
    "An SAE of SAELens with the tensors above."
    common = dict(d_in=D, d_sae=H, apply_b_dec_to_input=kind != "jumprelu")
    if kind == "standard":
        theirs = lens_library.StandardSAE(lens_library.StandardSAEConfig(**common))
    elif kind == "jumprelu":
        theirs = lens_library.JumpReLUSAE(lens_library.JumpReLUSAEConfig(**common))
    elif kind == "batchtopk":
        config = lens_library.BatchTopKTrainingSAEConfig(k=K, rescale_acts_by_decoder_norm=True, **common)
        theirs = lens_library.BatchTopKTrainingSAE(config)
    else:
        rescaled = dict(rescale_acts_by_decoder_norm=True) if kind == "topk_rescaled" else {}
        theirs = lens_library.TopKSAE(lens_library.TopKSAEConfig(k=K, **rescaled, **common))
    for name, value in dict(W_enc=W.T, b_enc=C, W_dec=V, b_dec=B, threshold=RAMP).items():
        if hasattr(theirs, name):
            getattr(theirs, name).copy_(value)
    return theirs


@pytest.mark.parametrize("kind", ["standard", "topk", "topk_rescaled", "jumprelu", "batchtopk"])
@torch.no_grad()
def test_codes_equal_those_of_sae_lens(kind, tmp_path):
    lens_library = pytest.importorskip("sae_lens", reason="the comparison with SAELens needs sae-lens")
    theirs = of_sae_lens(lens_library, kind)
    if kind == "batchtopk":
        theirs.topk_threshold.fill_(6.0)
        theirs.save_model(tmp_path / "training")
        theirs.save_inference_model(tmp_path)
        inference = load_published(tmp_path)
        raw = theirs.process_sae_in(X) @ theirs.W_enc + theirs.b_enc
        a = raw * NORM * (raw * NORM > 6.0)
        assert close(codes(inference), a)
        x_hat, sae = theirs.decode(a), load_published(tmp_path / "training")
    else:
        theirs.save_model(tmp_path)
        a, x_hat, sae = theirs.encode(X), theirs(X), load_published(tmp_path)
    assert close(codes(sae), a) and close(sae(X).x_BD.detach(), x_hat)


def test_sparsify_reads_ours_and_we_read_its(tmp_path):
    pytest.importorskip("sparsify", reason="the round trip through sparsify needs eai-sparsify")
    from sparsify import SparseCoder

    sae = make()
    theirs = SparseCoder.load_from_disk(save_sparsify(sae, tmp_path / "ours"))
    with torch.no_grad():
        chosen = theirs.encode(X)
        assert close(codes(sae), torch.zeros(len(X), H).scatter(1, chosen.top_indices, chosen.top_acts))
        assert close(sae(X).x_BD, theirs.decode(chosen.top_acts, chosen.top_indices))
    theirs.save_to_disk(tmp_path / "theirs/layers.15")
    assert same(sae, load_published(tmp_path / "theirs"))


def test_llama_scope_reconstructs_as_in_sae_lens(tmp_path, monkeypatch):
    """For unit decoder rows.

    SAELens keeps the norm factor in the weights, so its latents are larger by that factor.
    """
    pytest.importorskip("sae_lens", reason="the comparison with SAELens needs sae-lens")
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def download(repo_id, filename, subfolder="", force_download=False):
        return str(tmp_path / subfolder.removeprefix("x").strip("/") / filename.removeprefix("x/"))

    scope(tmp_path)
    unit_rows = {"decoder.weight": (V / NORM[:, None]).T.contiguous()}
    rewrite(tmp_path, lambda tensors: tensors.update(unit_rows))
    monkeypatch.setattr(loaders, "hf_hub_download", download)
    overrides = dict(dtype="float32")
    settings, state, _ = loaders.llama_scope_sae_huggingface_loader("fnlp/any", "x", cfg_overrides=overrides)
    centred = settings["apply_b_dec_to_input"]
    theirs = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=H, apply_b_dec_to_input=centred))
    factor = D**0.5 / 9.5
    theirs.load_state_dict(state)
    theirs.fold_activation_norm_scaling_factor(factor)
    sae = load_published(tmp_path)
    with torch.no_grad():
        assert close(codes(sae) * factor, theirs.encode(X)) and close(sae(X).x_BD, theirs(X))


# ---- what later notebooks read


def test_the_reader_asks_for_an_sae_of_this_notebook():
    class Run:
        def input(self, stage, name, cls):
            return stage, name, cls

    assert read_sae(Run()) == ("12_sae_checkpoints", "sae", SAE)
