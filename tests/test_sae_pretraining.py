"Training of the SAE, its checkpoints, its estimate and its processes, on a small made-up source."

import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from toy_source import TEXTS, ToySource, all_tokens

from fac_synthesis.models.backbone import Backbone, tiny_model, word_tokenizer
from fac_synthesis.run.artifacts import digest_of, load_artifact, save_artifact
from fac_synthesis.run.parameters import UserError
from fac_synthesis.sae import pretraining as module
from fac_synthesis.sae.core import SAE, sae_losses
from fac_synthesis.sae.evaluation import evaluate_sae
from fac_synthesis.sae.pretraining import (
    TrainConfig,
    TrainedSAE,
    Training,
    batch_shares,
    estimate,
    k_at,
    last_checkpoint,
    launch_options,
    learning_rate_at,
    load_checkpoint,
    main,
    memory_parts,
    my_shards,
    read_pretraining_texts,
    save_checkpoint,
    split_texts,
    train_anywhere,
    train_sae,
    write_job,
)

torch.set_num_threads(1)

SMALL = dict(
    n_latents=64,
    k=3,
    k_start=8,
    n_steps=24,
    tokens_per_step=64,
    batch_tokens=64,
    buffer_tokens=256,
    window_texts=16,
    dead_tokens=500,
    checkpoint_every=5,
    log_every=4,
    k_aux=8,
    aux_coef=1 / 32,
    keep_gb=1e-5,
)


def settings(**changes) -> TrainConfig:
    return TrainConfig(**SMALL | changes)


def training(**changes) -> Training:
    return Training(ToySource(), TEXTS, settings(**changes))


def train(work: Path, **changes) -> TrainedSAE:
    return train_sae(ToySource(), TEXTS, settings(**changes), work)


def same(a: SAE, b: SAE) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return a.config == b.config and all(torch.equal(x, y) for x, y in pairs)


def in_a_child(call: str, **environment: str) -> subprocess.Popen:
    "A process that calls a function of this file."
    tests = Path(__file__).parent
    code = f"import sys; sys.path.insert(0, {str(tests)!r}); import test_sae_pretraining as t; t.{call}"
    env = {**os.environ, "PYTHONPATH": str(tests.parent), **environment}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return subprocess.Popen([sys.executable, "-c", code], cwd=tests.parent, env=env, **pipes)


# ---- settings


def test_schedules():
    config = settings(n_steps=100, k_anneal=0.5, warm_up=0.1, decay=0.2, learning_rate=1.0)
    ks = [k_at(config, step) for step in range(100)]
    rates = [learning_rate_at(config, step) for step in range(100)]
    assert ks[0] == 8 and ks[50:] == [3] * 50 and ks == sorted(ks, reverse=True)
    assert rates[0] == pytest.approx(0.1) and rates[10:80] == [1.0] * 70 and rates[-1] == pytest.approx(0.05)
    assert k_at(settings(k_anneal=0.0), 1) == 3


@pytest.mark.parametrize(
    "change,sentence",
    [
        (dict(buffer_tokens=100), "buffer_tokens = 100"),
        (dict(k_start=65), "k_start = 65"),
        (dict(n_steps=0), "at least 1"),
        (dict(k=65, k_start=8), "k = 65"),
        (dict(shards=3), "dealt evenly to 3 shards"),
        (dict(shards=4), "for each of 4 shards"),
        (dict(activation="threshold"), "cannot be trained"),
        (dict(buffer_dtype="float8"), "float8"),
        (dict(prefixes=[64]), "prefixes"),
    ],
)
def test_impossible_settings_are_refused(change, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        train(tmp_path, **change)


def test_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="no text to train"):
        train_sae(ToySource(), [], settings(), tmp_path)


def test_texts_are_split_by_the_seed_alone():
    to_train, held = split_texts(TEXTS, 0.1, seed=0)
    assert sorted(to_train + held) == sorted(TEXTS) and len(held) == 6
    assert (to_train, held) == split_texts(TEXTS, 0.1, seed=0) != split_texts(TEXTS, 0.1, seed=1)
    assert len(split_texts(TEXTS[:3], 0.0, seed=0)[1]) == 1, "one text at least"
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert held == [TEXTS[i] for i in order[:6]] and to_train == [TEXTS[i] for i in order[6:]]


def test_a_text_of_two_tasks_is_read_once():
    texts = dict(corpora_a=["one", "two"], corpora_b=["two", "three"])

    class Run:
        def input(self, stage, name, cls=None):
            return ["a", "b"] if name == "tasks" else SimpleNamespace(texts=lambda role: texts[name])

    assert read_pretraining_texts(Run()) == ["one", "two", "three"]


# ---- training


@pytest.mark.parametrize("tied", [True, False])
def test_training_learns_and_is_deterministic(tmp_path, tied):
    longer = dict(tied=tied, n_steps=150, learning_rate=1e-2)
    first, again = train(tmp_path / "0", **longer), train(tmp_path / "1", **longer)
    assert same(first.sae, again.sae) and first.history.equals(again.history)
    history, config = first.history, first.sae.config
    assert history.fvu.iloc[-1] < 0.5 * history.fvu.iloc[0]
    assert (history.l0 <= history.k).all() and history.tokens.iloc[-1] == 150 * 64
    assert (config.n_tokens, config.layer, config.backbone) == (150 * 64, 2, "toy")
    if not tied:
        assert torch.allclose(first.sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)
    other = train(tmp_path, tied=tied, seed=1)
    assert not torch.equal(other.sae.W_enc, first.sae.W_enc)


def test_the_scale_is_folded_in(tmp_path):
    inside = training()
    for _ in range(24):
        inside.step()
    x = next(ToySource().residuals(TEXTS)).x_ND
    want = inside.sae(x * inside.scale).x_BD / inside.scale
    sae = train(tmp_path).sae
    assert torch.allclose(sae(x).x_BD, want, atol=1e-4) and sae.config.scale == inside.scale


def test_trained_sae_folder_is_an_sae_folder(tmp_path):
    result = train(tmp_path)
    result.save(tmp_path / "sae")
    again = TrainedSAE.load(tmp_path / "sae")
    assert same(again.sae, result.sae) and same(SAE.load(tmp_path / "sae"), result.sae)
    pd.testing.assert_frame_equal(again.history, result.history)


def test_a_content_key_knows_the_sae_of_a_loaded_result(tmp_path):
    folder = save_artifact(tmp_path / "artifact", train(tmp_path), {})
    one, two = load_artifact(folder, TrainedSAE), load_artifact(folder, TrainedSAE)
    assert digest_of(one.sae) == digest_of(two.sae) != digest_of(one)
    with torch.no_grad():
        one.sae.b_enc.fill_(0)
    assert digest_of(one.sae) == digest_of(two.sae), "by the result's digest, its tensors are not read again"


def test_batchtopk_ends_as_a_threshold(tmp_path):
    longer = dict(activation="batchtopk", n_steps=150, learning_rate=1e-2, prefixes=[16, 32])
    trained = train(tmp_path, **longer)
    sae = trained.sae
    with torch.no_grad():
        out = sae(all_tokens())
    l0 = (out.values_BK > 0).sum(1).float()
    assert sae.config.activation == "threshold" and sae.config.prefixes == (16, 32)
    assert (sae.threshold_H > 0).all()
    assert 2 < l0.mean() < 4 and l0.std() > 0.2, "about k on average, and not k for each token"
    assert evaluate_sae(sae, ToySource(), TEXTS)["fvu"] < 0.3
    trained.save(tmp_path / "sae")
    assert torch.equal(SAE.load(tmp_path / "sae").threshold_H, sae.threshold_H)


def test_progress_is_reported(tmp_path, monkeypatch):
    seen = []

    def record(iterable, label, **options):
        for item in iterable:
            seen.append(label)
            yield item

    monkeypatch.setattr(module, "progress", record)
    train(tmp_path)
    assert seen == ["training the SAE"] * 24


# ---- a run that survives a kill


def train_and_die(step: int, work: str):
    "Trains, and is killed in the middle of this step: Adam has moved, the counters have not."
    calls, count = [], Training.count
    module.estimate = lambda *_: "no estimate"

    def count_or_die(*args):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        count(*args)

    Training.count = count_or_die
    train(work)


def test_a_killed_run_continues_to_the_same_bytes(tmp_path):
    step = random.SystemRandom().randrange(1, 25)
    killed = tmp_path / "b"
    killed.mkdir()
    whole = train(tmp_path / "a")
    child = in_a_child(f"train_and_die({step}, {str(killed)!r})")
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    left = last_checkpoint(killed)
    assert (left.name if left else None) == (f"step-{(step - 1) // 5 * 5:08d}" if step > 5 else None), step
    resumed = train(killed)
    whole.save(tmp_path / "x")
    resumed.save(tmp_path / "y")
    assert (tmp_path / "x/sae.safetensors").read_bytes() == (tmp_path / "y/sae.safetensors").read_bytes()
    assert same(whole.sae, resumed.sae) and whole.history.equals(resumed.history)


def test_stopping_at_every_step_changes_nothing(tmp_path):
    changes, steps = dict(tied=False, checkpoint_every=1, n_steps=12), 12
    whole = training(**changes)
    for _ in range(steps):
        whole.step()
    for i in range(steps):
        part = training(**changes)
        if i:
            load_checkpoint(part, {}, last_checkpoint(tmp_path))
        part.step()
        save_checkpoint(part, {}, tmp_path)
    assert same(whole.sae, part.sae) and whole.history == part.history
    assert torch.equal(whole.idle_H, part.idle_H)


def test_a_kill_while_writing_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    one = training()
    one.step()
    save_checkpoint(one, {}, tmp_path)
    monkeypatch.setattr(torch, "save", lambda state, stream: (stream.write(b"half"), 1 / 0))
    one.step()
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(one, {}, tmp_path)
    left = last_checkpoint(tmp_path)
    assert left.name == "step-00000001" and torch.load(left / "training.pt")["done"] == 1
    monkeypatch.undo()
    save_checkpoint(one, {}, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000002"]


def test_foreign_and_damaged_checkpoints_are_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match="belongs to another training .k was 3, is 4"):
        train(tmp_path, k=4)
    with pytest.raises(UserError, match="texts was 60, is 59"):
        train_sae(ToySource(), TEXTS[1:], settings(), tmp_path)
    file = last_checkpoint(tmp_path) / "shard-0.pt"
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(UserError, match="is damaged"):
        train(tmp_path)


def test_batchtopk_threshold_survives_a_checkpoint(tmp_path):
    changes = dict(activation="batchtopk", n_steps=12)
    whole, part = training(**changes), training(**changes)
    for _ in range(9):
        whole.step()
        part.step()
    save_checkpoint(part, {}, tmp_path)
    again = training(**changes)
    load_checkpoint(again, {}, last_checkpoint(tmp_path))
    for _ in range(3):
        whole.step()
        again.step()
    assert torch.equal(whole.theta, again.theta) and whole.theta > 0


# ---- several processes


def test_shares_make_the_loss_of_the_whole_batch():
    torch.manual_seed(0)
    changes = dict(aux_coef=0.5, dead_tokens=0, batch_tokens=32, prefixes=(16,))
    one_step = training(shards=3, tokens_per_step=60, **changes)
    sae = one_step.sae
    x = torch.randn(60, 16) * torch.linspace(0.5, 2, 60)[:, None] + 1
    dead = dict(dead_M=torch.arange(64), k_aux=8, aux_coef=0.5)
    whole = sae_losses(sae, x, 3, **dead)
    (want,) = torch.autograd.grad(whole.total, [sae.W_enc])
    losses = [sae_losses(sae, part, 3, **dead) for part in x.split(20)]
    shares = batch_shares(x.split(20), [one.fvu for one in losses])
    fvu = sum(share * one.fvu for (share, _), one in zip(shares, losses))
    auxk = sum(share * one.auxk for (_, share), one in zip(shares, losses))
    assert torch.allclose(fvu, whole.fvu) and torch.allclose(auxk, whole.auxk)
    one_step.adam.step = lambda: None
    one_step.config = replace(one_step.config, k_start=3)
    one_step.update(list(x.split(20)))
    assert torch.allclose(sae.W_enc.grad, want, atol=1e-6 * want.abs().max().item())
    assert (one_step.idle_H == 0).sum() < 64


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def die_in_a_step(work: str, step: int):
    """A process on a job folder.

    The second one is killed in the middle of a step, when Adam has moved and the counters have not.
    """
    count = Training.count

    def count_or_die(self, losses):
        if self.done == step and self.buffers[0].x_SD is not None and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        count(self, losses)

    Training.count = count_or_die
    sys.exit(main([work]))


def test_two_processes_killed_and_launched_again_equal_one_unbroken(tmp_path, monkeypatch):
    torch.manual_seed(0)
    words = word_tokenizer(TEXTS)
    backbone = Backbone(tiny_model("llama", len(words), 16, 2), words, layer=1)
    step, work = random.SystemRandom().randrange(6, 14), tmp_path / "two"
    changes = dict(aux_coef=1 / 8, dead_tokens=300, window_texts=8, max_norm=3.0)
    config = settings(shards=2, n_steps=13, **changes)
    one = train_anywhere(backbone, TEXTS, config, tmp_path / "one")

    write_job(backbone, TEXTS, config, work)
    call, port = f"die_in_a_step({str(work)!r}, {step})", free_port()
    together = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    children = [in_a_child(call, RANK=str(rank), **together) for rank in (0, 1)]
    for child in children:
        child.communicate(timeout=120)
    first, second = [child.returncode for child in children]
    assert first != 0 and second == -signal.SIGKILL
    left = last_checkpoint(work)
    assert left.name == f"step-{(step - 1) // 5 * 5:08d}"
    assert sorted(file.name for file in left.iterdir()) == ["shard-0.pt", "shard-1.pt", "training.pt"]

    monkeypatch.setenv("FAC_LAUNCH", f"--multi_gpu --num_processes 2 --main_process_port {free_port()}")
    two = train_anywhere(backbone, TEXTS, config, work)
    pairs = zip(one.sae.parameters(), two.sae.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) <= 1e-6, step
    assert one.sae.config == two.sae.config
    pd.testing.assert_frame_equal(one.history, two.history, rtol=1e-6)
    monkeypatch.setattr(subprocess, "Popen", None)
    again = train_anywhere(backbone, TEXTS, config, work)
    assert same(again.sae, two.sae), "a finished job is not started again"


def test_launch_options(monkeypatch):
    assert launch_options(4) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert launch_options(6) == ["--multi_gpu", "--num_processes", "3"] and launch_options(1) == []
    monkeypatch.setenv("FAC_LAUNCH", "--num_machines 2 --main_process_ip '10.0.0.1'")
    assert launch_options(1) == ["--num_machines", "2", "--main_process_ip", "10.0.0.1"]


def test_bad_jobs_are_refused_in_one_sentence(tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path)]) == 1 and "is no job folder" in capsys.readouterr().err
    monkeypatch.setattr(module, "rank_and_size", lambda: (0, 2))
    with pytest.raises(UserError, match="2 processes cannot share 3 shards evenly"):
        my_shards(3)


@pytest.mark.parametrize("refused,sentence", [(True, "needs more"), (False, "ended with code 1")])
def test_a_launched_training_that_fails_says_so(refused, sentence, tmp_path, monkeypatch):
    (tmp_path / "job.json").touch()
    monkeypatch.setenv("FAC_LAUNCH", "--num_processes 2")

    class Process:
        stdout, returncode = (), 1

        def __init__(self, *_, **__):
            if refused:
                (tmp_path / "refused.txt").write_text("this training needs more")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(subprocess, "Popen", Process)
    backbone = SimpleNamespace(device=torch.device("cpu"), model=torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match=sentence):
        train_anywhere(backbone, TEXTS, settings(), tmp_path)


# ---- what it will cost


def test_estimating_changes_nothing(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    expected = estimate(ToySource(), TEXTS, settings(), tmp_path)
    assert torch.equal(torch.get_rng_state(), before) and not list(tmp_path.iterdir())
    assert expected.stepping_s > 0 and expected.reading_s > 0 and "of memory" in str(expected)


def test_estimated_reading_knows_what_is_remembered(tmp_path):
    def read(**changes):
        config = settings(n_steps=100, max_norm=0, **changes)
        return estimate(ToySource(), TEXTS, config, tmp_path).read_tokens

    epoch, everything = len(all_tokens()), 100 * 64 + 0.75 * 256
    assert read(keep_gb=1.0) == pytest.approx(epoch, rel=0.1)
    assert read(keep_gb=0.0) == everything
    assert read(store=True) == pytest.approx(epoch, rel=0.1)
    half = epoch * 16 * 4 / 2 / 1e9
    assert read(keep_gb=half) == pytest.approx((everything + epoch) / 2, rel=0.1)


@pytest.mark.parametrize("n_latents,steps", [(256, 60), (2048, 30), (8192, 15)])
def test_estimated_time_is_the_measured_one(tmp_path, monkeypatch, n_latents, steps):
    # the time of this process, whatever else the machine does
    monkeypatch.setattr(module, "clock", lambda device: time.process_time())
    reading = dict(tokens_per_step=256, batch_tokens=256, buffer_tokens=1024, window_texts=30, keep_gb=0.0)
    config = settings(n_latents=n_latents, n_steps=steps, aux_coef=0.0, **reading)
    seen = []
    for _ in range(8):
        expected = estimate(ToySource(), TEXTS, config, tmp_path)
        one = Training(ToySource(), TEXTS, config)
        began = time.process_time()
        for _ in range(steps):
            one.step()
        measured = time.process_time() - began
        seen.append((expected.reading_s + expected.stepping_s) / measured)
        if 0.75 < seen[-1] < 1.25:
            return
    raise AssertionError(f"estimated / measured: {seen}")


@pytest.mark.parametrize("what,free", [("cpu memory", "free_bytes"), ("disk", "disk_usage")])
def test_what_cannot_fit_is_refused_before_it_starts(tmp_path, monkeypatch, what, free):
    if free == "free_bytes":
        monkeypatch.setattr(module, free, lambda device: 1e6)
    else:
        monkeypatch.setattr(module.shutil, free, lambda path: SimpleNamespace(free=10))
    monkeypatch.setattr(module, "save_checkpoint", None)
    with pytest.raises(UserError, match=f"needs .* of {what}.* are free: "):
        train(tmp_path, n_latents=4096)


SIZES = [
    dict(n_latents=4096, tied=False),
    dict(n_latents=16384),
    dict(n_latents=1024, tokens_per_step=4096, buffer_tokens=65536),
]


def sized(size) -> TrainConfig:
    common = dict(tokens_per_step=1024, batch_tokens=512, buffer_tokens=8192, k_start=3)
    return settings(**common | dict(aux_coef=0.0, keep_gb=0.01) | size)


class WideSource(ToySource):
    d_model = 512

    def residuals(self, texts, **_):
        for _ in range(4):
            yield SimpleNamespace(x_ND=torch.randn(512, 512))


def process_status(key: str) -> int:
    "A size in bytes from what the system tells of this process."
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def measure_memory():
    "Prints the growth of the peak that each size causes, in bytes."
    for i, size in enumerate([dict(n_latents=256), *SIZES]):  # the first loads what torch loads late
        Path("/proc/self/clear_refs").write_text("5")
        before = process_status("VmRSS")
        one = Training(WideSource(), TEXTS, sized(size))
        for _ in range(2):
            one.step()
        if i:
            print(process_status("VmHWM") - before)
        del one


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell a process's peak memory"
)
def test_estimated_memory_is_the_measured_one():
    malloc = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0")
    child = in_a_child("measure_memory()", **malloc)
    printed = child.communicate()[0]
    assert child.returncode == 0
    for size, found in zip(SIZES, map(int, printed.split()), strict=True):
        expected = sum(memory_parts(sized(size), 512).values())
        assert 0.75 < expected / found < 1.25, (size, expected, found)
