"""Backbones: exact residuals of any architecture, and the user's tokens under any template.

Also opening and saving, and a training that survives a kill.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import fac_synthesis.models.backbone as B
from fac_synthesis.models.backbone import (
    Backbone,
    decoder_layers,
    open_backbone,
    pick_dtype,
    residual_stream,
    tiny_model,
    tokenize,
    train_language_model,
    word_tokenizer,
)
from fac_synthesis.run.artifacts import check_artifact, digest_of, load_artifact, save_artifact

REAL = (
    Path(os.environ["FAC_DATA_DIR"]).parent / "models" / "real-lm" if "FAC_DATA_DIR" in os.environ else None
)
ARCHITECTURES = ["llama", "mistral", "qwen2", "gpt2", "gpt_neox", "phi"]


def toy(kind: str, vocab: int = 60, layers: int = 4):
    names = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4)
    if kind == "gpt2":
        names = dict(n_embd=32, n_layer=layers, n_head=4)
    if kind in ("llama", "mistral", "qwen2"):
        names["num_key_value_heads"] = 2
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=vocab, **names)).eval()


def hidden_states(model, ids_BT, **more):
    with torch.no_grad():
        return model(ids_BT, output_hidden_states=True, **more).hidden_states


# ---- residuals


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_residuals_are_the_models_own_hidden_states(kind, words, texts):
    model = toy(kind)
    for layer in (1, 2, 3):
        seen = 0
        for r in Backbone(model, words, layer).residuals(texts, batch_tokens=40):
            for i in r.text_N.unique().tolist():
                t = tokenize(words, [texts[i]], 256)[0]
                own_TD = hidden_states(model, torch.tensor([t.ids]))[layer][0, t.first : t.last]
                rows = r.text_N == i
                gap = (r.x_ND[rows] - own_TD).abs().max()
                assert r.position_N[rows].tolist() == list(range(len(own_TD)))
                assert r.token_N[rows].tolist() == t.ids[t.first : t.last]
                assert gap < 1e-6, "a text in a padded batch reads as it does alone"
                seen += 1
        assert seen == len(texts)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_above_the_hook_layer_do_not_run(kind):
    model, ran = toy(kind), []
    for i, block in enumerate(B.decoder_layers(model), 1):
        block.register_forward_hook(lambda m, a, o, i=i: ran.append(i))
    model.get_output_embeddings().register_forward_hook(lambda m, a, o: ran.append("head"))
    with torch.no_grad():
        residual_stream(model, 3, input_ids=torch.tensor([[1, 2]]))
    assert ran == [1, 2, 3]
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    assert ran == [1, 2, 3, 1, 2, 3, 4, "head"], "and the hook is gone afterwards"


def test_layer_1_is_the_first_block():
    model, ids = toy("llama"), torch.tensor([[3, 4, 5]])
    seen = []
    model.model.layers[0].register_forward_hook(lambda m, a, o: seen.append(B.hidden_of(o)))
    with torch.no_grad():
        x = residual_stream(model, 1, input_ids=ids)
    embedded, first = hidden_states(model, ids)[:2]
    assert torch.equal(x, seen[0]) and torch.equal(x, first) and not torch.equal(x, embedded)


class OldStyle(torch.nn.Module):
    "A decoder block that returns a tuple, as blocks did for years."

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **more):
        return (self.block(*args, **more), None)


def test_blocks_that_return_tuples(words, texts):
    plain, tuples = Backbone(toy("llama"), words, 2), Backbone(toy("llama"), words, 2)
    tuples.model.model.layers[1] = OldStyle(tuples.model.model.layers[1])
    for a, b in zip(plain.residuals(texts), tuples.residuals(texts), strict=True):
        assert torch.equal(a.x_ND, b.x_ND)
    inner = tuples.model.model.layers[2].forward

    def takes_tuples(x, *args, **more):
        return inner(B.hidden_of(x), *args, **more)

    def halved(x_ND):
        return x_ND * 0.5

    tuples.model.model.layers[2].forward = takes_tuples
    assert tuples.token_losses(texts, halved) == plain.token_losses(texts, halved)
    assert plain.token_losses(texts, halved) != plain.token_losses(texts)


def test_bfloat16_model_gives_float32(words, texts, tmp_path):
    b = Backbone(toy("llama").to(torch.bfloat16), words, 2)
    exact = Backbone(toy("llama"), words, 2)
    for r, e in zip(b.residuals(texts), exact.residuals(texts), strict=True):
        assert r.x_ND.dtype == torch.float32 and (r.x_ND - e.x_ND).norm() < 0.05 * e.x_ND.norm()
    assert abs(b.token_losses(texts, torch.zeros_like) - exact.token_losses(texts, torch.zeros_like)) < 0.1
    b.save(tmp_path)
    assert Backbone.load(tmp_path).model.dtype == torch.bfloat16


def test_token_losses_are_the_models_cross_entropy(backbone, texts):
    total = count = 0
    for text in texts:
        t = tokenize(backbone.tokenizer, [text], 256)[0]
        with torch.no_grad():
            logits = backbone.model(torch.tensor([t.ids])).logits[0].log_softmax(-1)
        for p in range(t.first, t.last):
            total -= logits[p - 1, t.ids[p]].item()
            count += 1
    assert backbone.token_losses(texts, batch_tokens=30) == pytest.approx(total / count, abs=1e-5)


def test_edited_losses_are_the_models_cross_entropy_and_divergence_over_all_tokens(backbone, texts):
    sums, count = np.zeros(3), 0

    def edit(x_ND):
        return 0.3 * x_ND

    def hook(module, args, output):
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    for text in texts:
        ids = torch.tensor([tokenize(backbone.tokenizer, [text], 256)[0].ids])
        log_p = backbone.model(ids).logits[0].detach().log_softmax(-1)
        handle = decoder_layers(backbone.model)[backbone.layer - 1].register_forward_hook(hook)
        log_q = backbone.model(ids).logits[0].detach().log_softmax(-1)
        handle.remove()
        for p in range(len(ids[0]) - 1):
            divergence = (log_p[p].exp() * (log_p[p] - log_q[p])).sum()
            target = ids[0, p + 1]
            sums += [-log_p[p, target].item(), -log_q[p, target].item(), divergence.item()]
            count += 1
    got = backbone.edited_losses(texts, dict(original=None, edited=edit), batch_tokens=30, special=True)
    (original, nothing), (edited, divergence) = got["original"], got["edited"]
    assert [original, edited, divergence] == pytest.approx((sums / count).tolist(), abs=1e-4)
    assert nothing == 0 < divergence


def test_special_residuals_hold_the_template_too(backbone, texts):
    (every,) = backbone.residuals(texts, special=True)
    (user,) = backbone.residuals(texts)
    assert len(every.x_ND) == sum(len(t.ids) for t in tokenize(backbone.tokenizer, texts, 256))
    assert torch.equal(every.x_ND[every.user_N], user.x_ND) and user.user_N.all()
    assert torch.equal(every.position_N[every.user_N], user.position_N)


def test_batches_hold_every_text_once_and_stay_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 90, 300).tolist()
    batches = B.length_batches(lengths, 100)
    assert sorted(sum(batches, [])) == list(range(300))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 100 for b in batches)


# ---- templates

PROSE = [
    "The quick brown fox can't jump over naïve cafés.",
    "Tea — 茶 — costs 3.50€ (or more), doesn't it? 🎉",
    "first the spray , then the stencil , then the wall",
    "open the lock with a key",
]
EACH = "{% for m in messages %}"
TEMPLATES = {
    "system text before, suffix after": (
        "{{ bos_token }}<|turn|>system\nYou are kind.<|end|>"
        + EACH
        + "<|turn|>{{ m.role }}\n{{ m.content | trim }}<|end|>{% endfor %}"
    ),
    "instruction marks": "{{ bos_token }}" + EACH + "[INST] {{ m.content }} [/INST]{% endfor %}",
    "text glued to the marks": "{{ bos_token }}" + EACH + "<|turn|>{{ m.content }}<|end|>{% endfor %}",
    "nothing after": "{{ bos_token }}" + EACH + "{{ m.role }}: {{ m.content }}{% endfor %}",
    "several templates": {
        "default": "{{ bos_token }}" + EACH + "<|turn|>{{ m.content }}<|end|>{% endfor %}",
        "tool_use": "x",
    },
    "none": None,
}


def byte_tokenizer(template=None, trim: bool = False) -> PreTrainedTokenizerFast:
    "A byte-level BPE tokenizer that adds <s> by itself, as Llama's does."
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "<|turn|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(PROSE * 3, trainer)
    adds_bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim), adds_bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        additional_special_tokens=["<|turn|>", "<|end|>"],
        chat_template=template,
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_users_tokens_are_found_under_any_template(name):
    tokenizer = byte_tokenizer(TEMPLATES[name])
    for text in [*PROSE, f"  {PROSE[0]}\n"]:
        t = tokenize(tokenizer, [text], 256)[0]
        assert t.ids.count(tokenizer.bos_token_id) == 1 and t.ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(t.ids[t.first : t.last]).strip() == text.strip()
        for cut in (t.ids[t.first + 1 :], t.ids[: t.last - 1]):
            assert text.strip() not in tokenizer.decode(cut), "no token of it is left out"


@pytest.mark.parametrize("trim", [True, False])
def test_characters_match_words_with_a_byte_level_tokenizer(trim):
    b = Backbone(toy("llama", 400), byte_tokenizer(TEMPLATES["instruction marks"], trim), 2)
    for text in PROSE:
        places = b.characters(text)
        (r,) = b.residuals([text])
        assert len(places) == len(r.token_N)
        covered = {i for a, z in places for i in range(a, z)}
        assert covered >= {i for i, c in enumerate(text) if not c.isspace()} and max(covered) < len(text)
        assert all(a <= c and z <= d for (a, z), (c, d) in zip(places, places[1:])), "in reading order"
        for token, (a, z) in zip(r.token_N.tolist(), places):
            written = b.tokenizer.decode([token])
            if "\ufffd" not in written:
                assert written.strip() == text[a:z].strip(), "a token's characters are the ones it stands for"


def test_a_template_that_hides_the_text_is_refused(words, refused):
    tokenizer = word_tokenizer(["a b"])
    for template in ("{{ '<bos>' }}", "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}"):
        tokenizer.chat_template = template
        assert "exactly once" in refused(lambda: tokenize(tokenizer, ["a"], 9))


def test_truncation_keeps_the_beginning_of_the_text(words, refused):
    text = "first the spray , then the stencil"
    whole, cut = (tokenize(words, [text], n)[0] for n in (99, 6))
    assert cut.ids == whole.ids[:6] and len(cut.ids) == 6
    assert cut.characters == whole.characters[:4] and (cut.first, cut.last) == (2, 6)
    assert (whole.last, len(whole.ids)) == (9, 10)
    assert "max_length" in refused(lambda: tokenize(words, [text], 2)), (
        "no token of the text is left: its features would silently be none"
    )


def test_empty_text_is_refused(backbone, refused):
    assert "number 2" in refused(lambda: list(backbone.residuals(["fine", " \n"])))


@pytest.mark.parametrize(
    "change, padding",
    [
        (dict(), "<pad>"),
        (dict(pad_token="<end>"), "<bos>"),
        (dict(pad_token=None, bos_token=None), "<unk>"),
        (dict(pad_token="<end>", bos_token=None, unk_token=None, eos_token="<user>"), "<user>"),
    ],
)
def test_padding_never_ends_a_text(change, padding):
    tokenizer = word_tokenizer(["a b"])
    for name, token in change.items():
        setattr(tokenizer, name, token)
    assert tokenizer.convert_ids_to_tokens(B.padding_id(tokenizer)) == padding


def test_a_tokenizer_without_padding_is_refused(refused):
    tokenizer = word_tokenizer(["a b"])
    tokenizer.pad_token = tokenizer.eos_token = "<end>"
    tokenizer.bos_token = tokenizer.unk_token = None
    assert "pad_token" in refused(lambda: B.padding_id(tokenizer))


# ---- opening and keeping


@pytest.fixture(scope="module")
def saved(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("model")
    made = Backbone(toy("qwen2", len(words)), words, 3, max_length=77)
    made.history = [2.0, 1.0]
    made.save(folder)
    return folder


def test_trained_and_referenced_backbones_come_back_the_same(saved, texts, tmp_path):
    trained = Backbone.load(saved)
    assert (trained.layer, trained.max_length, trained.source, trained.history) == (3, 77, "", [2.0, 1.0])
    referenced = open_backbone(str(saved), 2, 50)
    referenced.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["backbone.json"], "a reference holds no weights"
    again = Backbone.load(tmp_path)
    assert (again.layer, again.max_length, again.source) == (2, 50, str(saved))
    for a, b in zip(referenced.residuals(texts), again.residuals(texts), strict=True):
        assert torch.equal(a.x_ND, b.x_ND)
    assert open_backbone(str(saved)).layer == 2, "0 is half depth"


@pytest.mark.parametrize(
    "known, kind",
    [
        ({}, torch.float32),
        ({"avx512_f": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_dtype_follows_the_processor(known, kind, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert pick_dtype("auto", "cpu") == kind and pick_dtype("float16", "cpu") == torch.float16
    with pytest.raises(B.UserError, match="dtype 'int3' is unknown; use auto, float32"):
        pick_dtype("int3", "cpu")


@pytest.mark.parametrize(
    "settings,said",
    [
        (dict(layer=5), "1 to 4"),
        (dict(layer=-1), "1 to 4"),
        (dict(dtype="int3"), "float32"),
        (dict(dtype="relu"), "float32"),
        (dict(dtype="nn"), "float32"),
        (dict(device="gpu"), "cuda"),
    ],
)
def test_wrong_settings(saved, refused, settings, said):
    assert said in refused(lambda: open_backbone(str(saved), **settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(saved, refused, tmp_path):
    assert "cpu" in refused(lambda: open_backbone(str(saved), device="cuda"))
    Backbone.load(saved).save(tmp_path)
    about = json.loads((tmp_path / "backbone.json").read_text())
    (tmp_path / "backbone.json").write_text(json.dumps({**about, "device": "cuda"}))
    opened = Backbone.load(tmp_path)
    assert opened.device.type == "cpu", "a backbone that was trained on a GPU opens without one"


def test_wrong_places(refused, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "owner/model" in refused(lambda: open_backbone("no/such/folder"))
    assert str(tmp_path / "x") in refused(lambda: open_backbone(str(tmp_path / "x")))
    assert "some-owner/some-model" in refused(lambda: open_backbone("some-owner/some-model"))
    assert "config.json" in refused(lambda: open_backbone(str(tmp_path))), "a folder without a model"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_truncated_files(saved, refused, tmp_path, name):
    for file in saved.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:300] if file.name == name else content)
    assert str(tmp_path) in refused(lambda: open_backbone(str(tmp_path)))


def test_the_only_layer_is_half_depth_too(words):
    assert Backbone(toy("llama", layers=1), words).layer == 1


def test_another_layer_of_the_same_model(saved, texts):
    trained = Backbone.load(saved)
    other = B.at_layer(trained, 1, 50)
    assert (other.layer, other.max_length, other.history) == (1, 50, trained.history)
    assert other.model is trained.model and trained.layer == 3
    assert not torch.equal(next(other.residuals(texts)).x_ND, next(trained.residuals(texts)).x_ND)


def test_a_loaded_backbone_and_its_model_are_known_without_reading_the_weights(saved, tmp_path, monkeypatch):
    folder = save_artifact(tmp_path / "backbone", Backbone.load(saved), {})
    first, second = (load_artifact(folder, Backbone) for _ in range(2))

    def weights(self):
        raise AssertionError("the weights need not be read")

    monkeypatch.setattr(torch.nn.Module, "state_dict", weights)
    assert digest_of(first) == digest_of(second) and digest_of(first.model) == digest_of(second.model)
    assert digest_of(first) != digest_of(first.model)


def test_another_content_of_a_folder_is_another_reference(saved, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(saved, place)
    digests = []
    for i in range(2):
        files = B.source_stamp(str(place))
        folder = save_artifact(tmp_path / f"reference{i}", B.refer_to(str(place), files, layer=2), {})
        digests.append(check_artifact(folder))
        assert load_artifact(folder, Backbone).files == files
        weights = (place / "model.safetensors").read_bytes()
        (place / "model.safetensors").write_bytes(weights)
        os.utime(place / "model.safetensors", (1, 1))
    assert digests[0] != digests[1]


def test_a_model_without_decoder_blocks_is_refused(words, refused):
    model = toy("llama")
    model.config.num_hidden_layers = 9
    assert "decoder" in refused(lambda: Backbone(model, words))


# ---- training


def train(work=None):
    "A short training; its weights and losses are a function of nothing but this code."
    rng = np.random.default_rng(0)
    chats = []
    for _ in range(40):
        asked = " ".join(rng.choice(list("abcdefgh"), rng.integers(2, 9)))
        chats.append([dict(role="user", content=asked), dict(role="assistant", content="a b c")])
    tokenizer = word_tokenizer([m["content"] for c in chats for m in c])
    torch.manual_seed(0)
    model = tiny_model("llama", len(tokenizer), 16, 2)
    settings = dict(steps=24, batch=4, learning_rate=1e-2, seed=0)
    losses = train_language_model(model, tokenizer, chats, **settings, work=work, save_every=5)
    return losses, torch.cat([p.flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def unbroken():
    return train()


def stop_at(step: int, act):
    "train() whose step number `step` runs `act` instead of training."
    inner, done = B._language_model_step, []

    def broken(*args):
        if len(done) == step:
            act()
        done.append(inner(*args))
        return done[-1]

    return broken


@pytest.mark.parametrize("step", [3, 5, 17])
def test_training_resumes_to_the_same_bytes_after_an_error(unbroken, monkeypatch, tmp_path, step):
    def fail():
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(B, "_language_model_step", stop_at(step, fail))
        train(tmp_path)
    losses, weights = train(tmp_path)
    assert losses == unbroken[0] and torch.equal(weights, unbroken[1])


def wait_to_be_killed(folder: str):
    def wait():
        print("waiting", flush=True)
        signal.pause()

    B._language_model_step = stop_at(13, wait)
    torch.set_num_threads(1)
    train(Path(folder))


def test_training_resumes_to_the_same_bytes_after_a_kill(unbroken, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", f"import test_backbone; test_backbone.wait_to_be_killed({str(tmp_path)!r})"],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert child.stdout.readline().strip() == "waiting"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert (tmp_path / "checkpoint.pt").exists()
    (tmp_path / "checkpoint.part").write_bytes(b"half a checkpoint")
    losses, weights = train(tmp_path)
    assert losses == unbroken[0] and torch.equal(weights, unbroken[1])


def test_training_learns_and_ignores_padding(unbroken):
    assert np.mean(unbroken[0][-5:]) < 0.8 * unbroken[0][0]
    model = tiny_model("llama", 20, 16, 2)
    still = torch.optim.SGD(model.parameters(), 0.0)
    short, long = [1, 5, 6, 7], [1, 5, 6, 7, 8, 9]
    alone = B._language_model_step(model, [still], [short], 0.0)
    padded = B._language_model_step(model, [still], [short, long], 0.0)
    long_alone = model(input_ids=torch.tensor([long]), labels=torch.tensor([long])).loss.item()
    assert padded == pytest.approx((3 * alone + 5 * long_alone) / 8, abs=1e-5), "the mean is over real tokens"


def test_batches_hold_every_conversation_once_per_epoch_and_depend_on_the_seed_only():
    ids = [[1] * n for n in range(2, 40)]

    def draw(seed):
        return [b for b, _ in zip(B.conversation_batches(ids, 5, seed), range(8))]

    assert sorted(len(r) for b in draw(0) for r in b) == list(range(2, 40)) and draw(0) == draw(0) != draw(1)


def conversations():
    "Two conversations that the base model learns from and one that it does not."
    texts = [("a", "b"), ("b", "a"), ("c", "d")]
    turns = [json.dumps([["user", asked], ["assistant", said]]) for asked, said in texts]
    return pd.DataFrame(dict(late=[False, False, True], turns=turns))


TINY = B.TinySettings("llama", hidden_size=16, n_layers=2, batch=2, learning_rate=1e-2, device="cpu", seed=0)


def test_the_base_model_knows_all_words_and_learns_from_early_conversations_only(monkeypatch):
    seen = []
    inner = B._language_model_step

    def watched(model, optimizers, rows, rate):
        seen.append(rows)
        return inner(model, optimizers, rows, rate)

    monkeypatch.setattr(B, "_language_model_step", watched)
    base = B.train_tiny(conversations(), TINY, steps=3)
    vocabulary = base.tokenizer.get_vocab()
    assert {"a", "b", "c", "d"} <= set(vocabulary) and len(base.history) == 3
    ids = {i for rows in seen for row in rows for i in row}
    assert vocabulary["a"] in ids and vocabulary["c"] not in ids
    seen.clear()
    weights = [p.clone() for p in base.model.parameters()]
    tuned = B.train_tiny(conversations(), TINY, steps=4, base=base)
    assert vocabulary["c"] in {i for rows in seen for row in rows for i in row}
    assert all(map(torch.equal, weights, base.model.parameters())), "the base model stays as it is"
    assert not all(map(torch.equal, weights, tuned.model.parameters())) and len(tuned.history) == 4


def test_a_tiny_model_is_a_function_of_its_settings_and_the_global_seed():
    digests = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        digests.append(digest_of(B.train_tiny(conversations(), TINY, steps=2).model))
    assert digests[0] == digests[1] != digests[2]


def test_all_cores_are_given_back():
    before = torch.get_num_threads()
    with B.all_cores():
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    assert torch.get_num_threads() == before


def test_unknown_architecture_and_nothing_to_learn_from(words, refused):
    assert "qwen2" in refused(lambda: tiny_model("bert", 20, 16, 2))
    model, settings = tiny_model("llama", 20, 16, 2), dict(steps=2, batch=2, learning_rate=1e-3, seed=0)
    assert "conversation" in refused(lambda: train_language_model(model, words, [], **settings))


# ---- a real model


@pytest.fixture(scope="module")
def real():
    if not REAL or not REAL.exists():
        pytest.skip("FAC_DATA_DIR is not set, or no real-lm lies beside it")
    return open_backbone(str(REAL), 3)


def test_real_model(real):
    for batch in real.residuals(PROSE, batch_tokens=64):
        for i in batch.text_N.unique().tolist():
            t = tokenize(real.tokenizer, [PROSE[i]], 256)[0]
            own_TD = hidden_states(real.model, torch.tensor([t.ids]))[3][0, t.first : t.last]
            assert (batch.x_ND[batch.text_N == i] - own_TD).abs().max() < 2e-5 * own_TD.abs().max(), (
                "float32 sums in another order"
            )
            assert t.ids.count(real.tokenizer.bos_token_id) == 1
    for text in PROSE:
        places = real.characters(text)
        assert {i for a, z in places for i in range(a, z)} >= {
            i for i, c in enumerate(text) if not c.isspace()
        }
        for token, (a, z) in zip(tokenize(real.tokenizer, [text], 256)[0].ids[2:], places):
            written = real.tokenizer.decode([token])
            if "\ufffd" not in written:
                assert written.strip() == text[a:z].strip()


def test_real_model_exactly_as_alone(real):
    (r,) = real.residuals(PROSE[:1])
    t = tokenize(real.tokenizer, PROSE[:1], 256)[0]
    assert (
        r.x_ND - hidden_states(real.model, torch.tensor([t.ids]))[3][0, t.first : t.last]
    ).abs().max() < 1e-6
