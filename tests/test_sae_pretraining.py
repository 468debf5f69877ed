"""Harvest, training and evaluation of the SAE, on a small made-up source of tokens."""

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
import torch.nn.functional as F
from fac_synthesis.run.parameters import UserError
from fac_synthesis.sae.core import SAE, SAEConfig, sae_losses
from fac_synthesis.sae.pretraining import (
    Harvest,
    Position,
    ShuffleBuffer,
    Sums,
    TrainConfig,
    TrainedSAE,
    Training,
    batch_shares,
    density_histogram,
    estimate,
    evaluate_sae,
    k_at,
    last_checkpoint,
    launch_options,
    learning_rate_at,
    load_checkpoint,
    main,
    memory_parts,
    save_checkpoint,
    train_anywhere,
    train_sae,
    update,
    within_norm,
    write_job,
)

from fac_synthesis import sae_pretraining as module

torch.set_num_threads(1)
TEXTS = [" ".join(str((7 * w + 3 * t) % 50) for t in range(4 + w % 5)) for w in range(60)]


class ToySource:
    """Word directions plus half of the previous word's; reads out the current word. With `special` each text has a first token of enormous norm."""

    d_model, layer, source = 16, 2, "toy"
    directions_VD = F.normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(1)), dim=1)

    def residuals(self, texts, batch_tokens=64, special=False):
        rows = sorted(range(len(texts)), key=lambda i: len(texts[i].split()))
        for begin in range(0, len(rows), batch_tokens // 8):
            parts = [self.one(i, texts[i], special) for i in rows[begin : begin + batch_tokens // 8]]
            yield SimpleNamespace(**{name: torch.cat([p[name] for p in parts]) for name in parts[0]})

    def one(self, i, text, special=False):
        ids = torch.tensor([0] * special + [int(w) for w in text.split()])
        rows, user = self.directions_VD[ids], torch.arange(len(ids)) >= special
        x = torch.where(
            user[:, None], 5 * rows + 2.5 * F.pad(rows * user[:, None], (0, 0, 1, 0))[:-1] + 1, 90.0
        )
        return dict(
            x_ND=x,
            text_N=torch.full_like(ids, i),
            position_N=torch.arange(len(ids)) - int(special),
            token_N=ids,
            user_N=user,
        )

    def edited_losses(self, texts, edits, special=False):
        parts = [self.one(i, t, special) for i, t in enumerate(texts)]
        x, ids = (torch.cat([p[name] for p in parts]) for name in ("x_ND", "token_N"))
        log_p = [
            (3 * ((edit(x) if edit else x) - 1) @ self.directions_VD.T).log_softmax(1)
            for edit in edits.values()
        ]
        return {
            name: (
                F.nll_loss(q, ids).item(),
                F.kl_div(q, log_p[0], reduction="batchmean", log_target=True).item(),
            )
            for name, q in zip(edits, log_p)
        }


def settings(**changes) -> TrainConfig:
    return TrainConfig(
        **{
            **dict(
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
            ),
            **changes,
        }
    )


def same(a: SAE, b: SAE) -> bool:
    return a.config == b.config and all(
        torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)
    )


def stream(epochs=1, begin=Position(), **changes):
    return Harvest(
        ToySource(), TEXTS, **{**dict(seed=0, batch_tokens=64, window_texts=16), **changes}
    ).stream(begin, epochs)


def rows(x: torch.Tensor) -> list:
    return sorted(map(tuple, x.tolist()))


def test_stream_covers_every_text_once_per_epoch_and_reshuffles():
    all_tokens = torch.cat([r.x_ND for r in ToySource().residuals(TEXTS)])
    epochs = {e: torch.cat([x for x, p in stream(2) if p.epoch == e]) for e in (0, 1)}
    assert rows(epochs[0]) == rows(all_tokens) == rows(epochs[1])
    assert not torch.equal(epochs[0], epochs[1])


def test_stream_continues_from_any_position():
    whole = list(stream(2))
    for i in range(len(whole)):
        rest = list(stream(2, begin=whole[i][1]))
        assert len(rest) == len(whole) - i - 1 and all(
            torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(whole[i + 1 :], rest)
        )


@pytest.mark.parametrize("keep_gb", [3e-6, 1.0])
def test_remembered_windows_give_the_same_bytes(keep_gb):
    calls, source = [], ToySource()
    original = source.residuals
    source.residuals = lambda texts, batch_tokens: (calls.append(1), original(texts, batch_tokens))[1]
    harvest = Harvest(source, TEXTS, seed=0, batch_tokens=64, window_texts=16, keep_gb=keep_gb)
    kept, anew = list(harvest.stream(epochs=3)), list(stream(3))
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(kept, anew, strict=True))
    assert len(calls) == 4 if keep_gb == 1.0 else 4 < len(calls) <= 12
    assert keep_gb == 1.0 or sum(x.nbytes for xs in harvest.kept.values() for x in xs) <= 3000


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_deal_every_text_once(shards):
    dealt = torch.cat([x for s in range(shards) for x, _ in stream(shard=s, shards=shards)])
    assert rows(dealt) == rows(torch.cat([x for x, _ in stream()]))
    with pytest.raises(UserError, match="give 4 windows of 16, too few for 5 shards"):
        stream(shards=5)


def test_stored_windows_are_read_back_and_survive_a_kill(tmp_path):
    calls, source, store = [], ToySource(), tmp_path / "store"
    original = source.residuals
    source.residuals = lambda texts, batch_tokens: (calls.append(1), original(texts, batch_tokens))[1]
    make = lambda: Harvest(source, TEXTS, seed=0, batch_tokens=64, window_texts=16, store=store).stream(
        epochs=2
    )
    broken = make()
    for _ in range(6):
        next(broken)
    (store / "window-000099.part").write_bytes(b"half")
    got, want = list(make()), list(stream(2))
    assert len(calls) == 4 and len(list(store.glob("*.safetensors"))) == 4
    assert all(
        torch.equal(a[0], b[0].bfloat16().float()) and a[1] == b[1] for a, b in zip(got, want, strict=True)
    )


def test_outliers_are_masked_by_option_only():
    x = torch.tensor([[1.0, 0], [0, 1.1], [0.9, 0], [0, 30.0]])
    assert within_norm(x, 10).tolist() == [True, True, True, False] and within_norm(x, 0).all()


@pytest.mark.parametrize("n", [7, 64, 100])
def test_buffer_draws_each_token_once(n):
    buffer = ShuffleBuffer(lambda begin: stream(1, begin), size=256, batch_tokens=64, seed=0)
    drawn, fills = [], []
    while len(x := buffer.draw(n)):
        drawn.append(x)
        fills.append(buffer.x_SD.data_ptr())
        assert sorted(torch.cat([buffer.waiting, buffer.free]).tolist()) == list(range(256))
    streamed = torch.cat([x for x, _ in stream(1)])
    assert rows(torch.cat(drawn)) == rows(streamed) and not torch.equal(torch.cat(drawn), streamed)
    assert len(set(fills)) == 1, "the buffer is refilled in place"


def test_buffer_order_depends_on_the_seed_only():
    draw = lambda seed: ShuffleBuffer(lambda begin: stream(None, begin), 256, 64, seed).draw(100)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_buffer_state_restores_the_sequence():
    make = lambda: ShuffleBuffer(lambda begin: stream(None, begin), 256, 64, 0)
    first = make()
    for _ in range(5):
        first.draw(60)
    second = make()
    second.restore({k: v.clone() if torch.is_tensor(v) else v for k, v in first.state().items()})
    for _ in range(20):
        assert torch.equal(first.draw(60), second.draw(60))


def test_a_bfloat16_buffer_rounds_and_nothing_else():
    draw = lambda dtype: ShuffleBuffer(lambda begin: stream(None, begin), 256, 64, 0, dtype).draw(100)
    assert torch.equal(draw("bfloat16"), draw("float32").bfloat16().float()) and not torch.equal(
        draw("bfloat16"), draw("float32")
    )


def test_a_batch_larger_than_announced_is_refused():
    big = lambda begin: iter([(torch.zeros(300, 4), Position())])
    with pytest.raises(UserError, match="raise batch_tokens"):
        ShuffleBuffer(big, 256, 64, 0).draw(8)


def test_schedules():
    config = settings(n_steps=100, k_anneal=0.5, warm_up=0.1, decay=0.2, learning_rate=1.0)
    ks, rates = [k_at(config, s) for s in range(100)], [learning_rate_at(config, s) for s in range(100)]
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
        train_sae(ToySource(), TEXTS, settings(**change), tmp_path)


def test_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="no text to train"):
        train_sae(ToySource(), [], settings(), tmp_path)
    with pytest.raises(UserError, match="no token to evaluate"):
        evaluate_sae(SAE(SAEConfig(16, 8, 2)), ToySource(), [])


@pytest.mark.parametrize("tied", [True, False])
def test_training_learns_and_is_deterministic(tmp_path, tied):
    runs = [
        train_sae(ToySource(), TEXTS, settings(tied=tied, n_steps=150, learning_rate=1e-2), tmp_path / str(i))
        for i in (0, 1)
        if not (tmp_path / str(i)).mkdir()
    ]
    assert same(runs[0].sae, runs[1].sae) and runs[0].history.equals(runs[1].history)
    history = runs[0].history
    assert (
        history.fvu.iloc[-1] < 0.5 * history.fvu.iloc[0]
        and (history.l0 <= history.k).all()
        and history.tokens.iloc[-1] == 150 * 64
    )
    assert (
        runs[0].sae.config.n_tokens == 150 * 64
        and runs[0].sae.config.layer == 2
        and runs[0].sae.config.backbone == "toy"
    )
    if not tied:
        assert torch.allclose(runs[0].sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)
    other = train_sae(ToySource(), TEXTS, settings(tied=tied, seed=1), tmp_path)
    assert not torch.equal(other.sae.W_enc, runs[0].sae.W_enc)


def test_the_scale_is_folded_in(tmp_path):
    training = Training(ToySource(), TEXTS, settings())
    for _ in range(24):
        training.step()
    x = next(ToySource().residuals(TEXTS)).x_ND
    inside = training.sae(x * training.scale).x_BD / training.scale
    sae = train_sae(ToySource(), TEXTS, settings(), tmp_path).sae
    assert torch.allclose(sae(x).x_BD, inside, atol=1e-4) and sae.config.scale == training.scale


def train_and_die(step: int, work: str):
    """Train, and be killed in the middle of this step: Adam has moved, the counters have not."""
    calls, count, module.estimate = [], module.count, lambda *_: "no estimate"

    def count_or_die(*args):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        count(*args)

    module.count = count_or_die
    train_sae(ToySource(), TEXTS, settings(), work)


def test_a_killed_run_continues_to_the_same_bytes(tmp_path):
    step = random.SystemRandom().randrange(1, 25)
    unbroken, killed = tmp_path / "a", tmp_path / "b"
    unbroken.mkdir()
    killed.mkdir()
    whole = train_sae(ToySource(), TEXTS, settings(), unbroken)
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_sae_pretraining as t; t.train_and_die({step}, {str(killed)!r})"
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert child.returncode == -signal.SIGKILL
    left = last_checkpoint(killed)
    assert (left.name if left else None) == (f"step-{(step - 1) // 5 * 5:08d}" if step > 5 else None), step
    resumed = train_sae(ToySource(), TEXTS, settings(), killed)
    whole.save(tmp_path / "x")
    resumed.save(tmp_path / "y")
    assert (tmp_path / "x/sae.safetensors").read_bytes() == (tmp_path / "y/sae.safetensors").read_bytes()
    assert same(whole.sae, resumed.sae) and whole.history.equals(resumed.history)


def test_stopping_at_every_step_changes_nothing(tmp_path):
    config, steps = settings(tied=False, checkpoint_every=1, n_steps=12), 12
    whole, about = Training(ToySource(), TEXTS, config), {}
    for _ in range(steps):
        whole.step()
    for i in range(steps):
        part = Training(ToySource(), TEXTS, config)
        if i:
            load_checkpoint(part, about, last_checkpoint(tmp_path))
        part.step()
        save_checkpoint(part, about, tmp_path)
    assert (
        same(whole.sae, part.sae) and whole.history == part.history and torch.equal(whole.idle_H, part.idle_H)
    )


def test_a_kill_while_writing_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    training = Training(ToySource(), TEXTS, settings())
    training.step()
    save_checkpoint(training, {}, tmp_path)
    monkeypatch.setattr(torch, "save", lambda state, stream: (stream.write(b"half"), 1 / 0))
    training.step()
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(training, {}, tmp_path)
    assert (
        last_checkpoint(tmp_path).name == "step-00000001"
        and torch.load(last_checkpoint(tmp_path) / "training.pt")["done"] == 1
    )
    monkeypatch.undo()
    save_checkpoint(training, {}, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000002"]


def test_foreign_and_damaged_checkpoints_are_refused(tmp_path):
    train_sae(ToySource(), TEXTS, settings(), tmp_path)
    with pytest.raises(UserError, match="belongs to another training .k was 3, is 4"):
        train_sae(ToySource(), TEXTS, settings(k=4), tmp_path)
    with pytest.raises(UserError, match="texts was 60, is 59"):
        train_sae(ToySource(), TEXTS[1:], settings(), tmp_path)
    file = last_checkpoint(tmp_path) / "shard-0.pt"
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(UserError, match="is damaged"):
        train_sae(ToySource(), TEXTS, settings(), tmp_path)


def test_trained_sae_folder_is_an_sae_folder(tmp_path):
    result = train_sae(ToySource(), TEXTS, settings(), tmp_path)
    result.save(tmp_path / "sae")
    again = TrainedSAE.load(tmp_path / "sae")
    assert same(again.sae, result.sae) and same(SAE.load(tmp_path / "sae"), result.sae)
    pd.testing.assert_frame_equal(again.history, result.history)


def test_evaluation_equals_a_direct_computation(tmp_path):
    source, sae = ToySource(), train_sae(ToySource(), TEXTS, settings(), tmp_path).sae
    got = evaluate_sae(sae, source, TEXTS, batch_tokens=64)
    x = torch.cat([r.x_ND for r in source.residuals(TEXTS)])
    with torch.no_grad():
        out = sae(x)
    X, R = x.double(), out.x_BD.double()
    error2 = (X - R).pow(2).sum(1)
    fired = torch.bincount(out.indices_BK[out.values_BK > 0], minlength=64)
    want = dict(
        n_tokens=len(x),
        fvu=(error2.sum() / (X - X.mean(0)).pow(2).sum()).item(),
        normalised_l2=(error2 / X.pow(2).sum(1)).mean().item(),
        cosine=F.cosine_similarity(X, R).mean().item(),
        l0=(out.values_BK > 0).sum(1).double().mean().item(),
        dead_share=(fired == 0).double().mean().item(),
    )
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-5), name
    edits = dict(
        original=None,
        sae=lambda x: sae(x).x_BD,
        zero=lambda x: 0 * x,
        mean=lambda x: X.mean(0).float().expand_as(x),
    )
    ce = {name: value for name, (value, _) in source.edited_losses(TEXTS, edits).items()}
    assert got["delta_ce"] == pytest.approx(ce["sae"] - ce["original"], rel=1e-4)
    for how in ("sae", "zero", "mean"):
        assert (
            got[f"kl_{how}"] == pytest.approx(source.edited_losses(TEXTS, edits)[how][1], rel=1e-4)
            and got[f"kl_{how}"] > 0
        )
    for how in ("zero", "mean"):
        assert got[f"loss_recovered_{how}"] == pytest.approx(
            (ce[how] - ce["sae"]) / (ce[how] - ce["original"]), rel=1e-4
        )
    assert (
        sum(got["density_counts"]) == (fired > 0).sum()
        and len(got["density_edges"]) == len(got["density_counts"]) + 1
    )


def test_special_tokens_and_outliers_are_counted_apart():
    source, sae = ToySource(), SAE(SAEConfig(16, 64, 3))
    got = evaluate_sae(sae, source, TEXTS, batch_tokens=64, max_norm=3.0)
    x = torch.cat([r.x_ND for r in source.residuals(TEXTS, special=True)])
    with torch.no_grad():
        out = sae(x)
    assert got["n_tokens_all"] == got["n_tokens"] + len(TEXTS) == len(x)
    assert (
        got["fvu_all"]
        == pytest.approx(((x - out.x_BD).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item(), rel=1e-4)
        and abs(got["fvu_all"] - got["fvu"]) > 0.01
    )
    assert got["ce_original_all"] == pytest.approx(
        source.edited_losses(TEXTS[::4], dict(original=None), special=True)["original"][0]
    )
    few = evaluate_sae(sae, source, TEXTS, batch_tokens=64, max_norm=3.0, loss_texts=9)
    assert few["fvu"] == got["fvu"] and few["ce_original"] == pytest.approx(
        source.edited_losses(TEXTS[:9], dict(original=None))["original"][0]
    )


def test_fvu_survives_a_large_mean():
    torch.manual_seed(0)
    sae = SAE(SAEConfig(16, 64, 4)).double()
    x = torch.randn(500, 16, dtype=torch.float64)

    def fvu(x):
        sums = Sums(sae)
        with torch.no_grad():
            sae.b_dec.copy_(x.mean(0))
            [sums.add(part, sae(part)) for part in x.split(100)]
        return sums.numbers()["fvu"]

    assert fvu(x) == pytest.approx(fvu(x + 1e6), rel=1e-6)


def test_density_histogram_by_hand():
    histogram = density_histogram(torch.tensor([0, 1, 10, 1000]), 1000, bins=6)
    assert (
        histogram["density_counts"] == [0, 0, 0, 1, 1, 1]
        and np.isclose(histogram["density_edges"], range(-6, 1)).all()
    )


def test_progress_reports_training_and_evaluation(tmp_path, monkeypatch):
    seen = []

    def record(iterable, label, **options):
        for item in iterable:
            seen.append(label)
            yield item

    monkeypatch.setattr(module, "progress", record)
    sae = train_sae(ToySource(), TEXTS, settings(), tmp_path).sae
    evaluate_sae(sae, ToySource(), TEXTS)
    assert seen.count("training the SAE") == 24 and "evaluating the SAE" in seen


def test_shares_make_the_loss_of_the_whole_batch():
    torch.manual_seed(0)
    config = settings(
        shards=3, tokens_per_step=60, aux_coef=0.5, dead_tokens=0, batch_tokens=32, prefixes=(16,)
    )
    training = Training(ToySource(), TEXTS, config)
    x = torch.randn(60, 16) * torch.linspace(0.5, 2, 60)[:, None] + 1
    whole = sae_losses(training.sae, x, 3, torch.arange(64), 8, 0.5)
    (want,) = torch.autograd.grad(whole.total, [training.sae.W_enc])
    losses = [sae_losses(training.sae, part, 3, torch.arange(64), 8, 0.5) for part in x.split(20)]
    shares = batch_shares(x.split(20), [one.fvu for one in losses])
    assert torch.allclose(
        sum(share * one.fvu for (share, _), one in zip(shares, losses)), whole.fvu
    ) and torch.allclose(sum(share * one.auxk for (_, share), one in zip(shares, losses)), whole.auxk)
    training.adam.step = lambda: None
    training.config = replace(config, k_start=3)
    update(training, list(x.split(20)))
    assert (
        torch.allclose(training.sae.W_enc.grad, want, atol=1e-6 * want.abs().max().item())
        and (training.idle_H == 0).sum() < 64
    )


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def die_in_a_step(work: str, step: int):
    """A process on a job folder; the second one is killed in the middle of a step, when Adam has moved and the counters have not."""
    count = module.count

    def count_or_die(training, losses):
        if training.done == step and training.buffers[0].x_SD is not None and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        count(training, losses)

    module.count = count_or_die
    sys.exit(main([work]))


def test_two_processes_killed_and_launched_again_equal_one_unbroken(tmp_path, monkeypatch):
    from fac_synthesis.models.backbone import Backbone, tiny_model, word_tokenizer

    torch.manual_seed(0)
    words = word_tokenizer(TEXTS)
    backbone, step, work = (
        Backbone(tiny_model("llama", len(words), 16, 2), words, layer=1),
        random.SystemRandom().randrange(6, 14),
        tmp_path / "two",
    )
    config = settings(shards=2, n_steps=13, aux_coef=1 / 8, dead_tokens=300, window_texts=8, max_norm=3.0)
    one = train_anywhere(backbone, TEXTS, config, tmp_path / "one")
    write_job(backbone, TEXTS, config, work)
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_sae_pretraining as t; t.die_in_a_step({str(work)!r}, {step})"
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**env, "RANK": str(rank)}, stderr=subprocess.DEVNULL
        )
        for rank in (0, 1)
    ]
    first, second = [child.wait(120) for child in children]
    assert first != 0 and second == -signal.SIGKILL
    assert last_checkpoint(work).name == f"step-{(step - 1) // 5 * 5:08d}" and sorted(
        f.name for f in last_checkpoint(work).iterdir()
    ) == ["shard-0.pt", "shard-1.pt", "training.pt"]
    monkeypatch.setenv("FAC_LAUNCH", f"--multi_gpu --num_processes 2 --main_process_port {free_port()}")
    two = train_anywhere(backbone, TEXTS, config, work)
    assert (
        max(
            (a - b).abs().max().item()
            for a, b in zip(one.sae.parameters(), two.sae.parameters(), strict=True)
        )
        <= 1e-6
        and one.sae.config == two.sae.config
    ), step
    pd.testing.assert_frame_equal(one.history, two.history, rtol=1e-6)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert same(train_anywhere(backbone, TEXTS, config, work).sae, two.sae), (
        "a finished job is not started again"
    )


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
        module.my_shards(3)


def test_the_refusal_of_a_launched_training_reaches_the_caller(tmp_path, monkeypatch):
    (tmp_path / "job.json").touch()
    monkeypatch.setenv("FAC_LAUNCH", "--num_processes 2")

    class Process:
        stdout, returncode = (), 1

        def __init__(self, *_, **__):
            (tmp_path / "refused.txt").write_text("this training needs more")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(subprocess, "Popen", Process)
    with pytest.raises(UserError, match="needs more"):
        train_anywhere(
            SimpleNamespace(device=torch.device("cpu"), model=torch.nn.Linear(1, 1)),
            TEXTS,
            settings(),
            tmp_path,
        )


def test_batchtopk_ends_as_a_threshold(tmp_path):
    trained = train_sae(
        ToySource(),
        TEXTS,
        settings(activation="batchtopk", n_steps=150, learning_rate=1e-2, prefixes=[16, 32]),
        tmp_path,
    )
    sae, x = trained.sae, torch.cat([r.x_ND for r in ToySource().residuals(TEXTS)])
    with torch.no_grad():
        out = sae(x)
    l0 = (out.values_BK > 0).sum(1).float()
    assert (
        sae.config.activation == "threshold"
        and sae.config.prefixes == (16, 32)
        and (sae.threshold_H > 0).all()
    )
    assert 2 < l0.mean() < 4 and l0.std() > 0.2, "about k on average, and not k for each token"
    assert evaluate_sae(sae, ToySource(), TEXTS)["fvu"] < 0.3
    trained.save(tmp_path / "sae")
    assert torch.equal(SAE.load(tmp_path / "sae").threshold_H, sae.threshold_H)


def test_batchtopk_threshold_survives_a_checkpoint(tmp_path):
    config = settings(activation="batchtopk", n_steps=12)
    whole, part = (Training(ToySource(), TEXTS, config) for _ in range(2))
    for _ in range(9):
        whole.step()
        part.step()
    save_checkpoint(part, {}, tmp_path)
    again = Training(ToySource(), TEXTS, config)
    load_checkpoint(again, {}, last_checkpoint(tmp_path))
    for _ in range(3):
        whole.step()
        again.step()
    assert torch.equal(whole.theta, again.theta) and whole.theta > 0


def test_estimating_changes_nothing(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    expected = estimate(ToySource(), TEXTS, settings(), tmp_path)
    assert torch.equal(torch.get_rng_state(), before) and not list(tmp_path.iterdir())
    assert expected.stepping_s > 0 and expected.reading_s > 0 and "of memory" in str(expected)


def test_estimated_reading_knows_what_is_remembered(tmp_path):
    epoch = len(torch.cat([r.x_ND for r in ToySource().residuals(TEXTS)]))
    read = lambda **changes: (
        estimate(ToySource(), TEXTS, settings(n_steps=100, max_norm=0, **changes), tmp_path).read_tokens
    )
    everything = 100 * 64 + 0.75 * 256
    assert (
        read(keep_gb=1.0) == pytest.approx(epoch, rel=0.1)
        and read(keep_gb=0.0) == everything
        and read(store=True) == pytest.approx(epoch, rel=0.1)
    )
    assert read(keep_gb=epoch * 16 * 4 / 2 / 1e9) == pytest.approx((everything + epoch) / 2, rel=0.1)


@pytest.mark.parametrize("n_latents,steps", [(256, 60), (2048, 30), (8192, 15)])
def test_estimated_time_is_the_measured_one(tmp_path, monkeypatch, n_latents, steps):
    monkeypatch.setattr(
        module, "clock", lambda device: time.process_time()
    )  # of this process, whatever else the machine does
    config = settings(
        n_latents=n_latents,
        n_steps=steps,
        tokens_per_step=256,
        batch_tokens=256,
        buffer_tokens=1024,
        window_texts=30,
        keep_gb=0.0,
        aux_coef=0.0,
    )
    seen = []
    for _ in range(8):
        expected, training, began = (
            estimate(ToySource(), TEXTS, config, tmp_path),
            Training(ToySource(), TEXTS, config),
            time.process_time(),
        )
        for _ in range(steps):
            training.step()
        seen.append((expected.reading_s + expected.stepping_s) / (time.process_time() - began))
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
        train_sae(ToySource(), TEXTS, settings(n_latents=4096), tmp_path)


SIZES = [
    dict(n_latents=4096, tied=False),
    dict(n_latents=16384),
    dict(n_latents=1024, tokens_per_step=4096, buffer_tokens=65536),
]


def measure_memory():
    """Print the growth of the peak that each size causes, in bytes."""

    def status(key):
        return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

    class Wide(ToySource):
        d_model = 512

        def residuals(self, texts, **_):
            for _ in range(4):
                yield SimpleNamespace(x_ND=torch.randn(512, 512))

    for i, size in enumerate([dict(n_latents=256), *SIZES]):  # the first loads what torch loads late
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        training = Training(Wide(), TEXTS, sized(size))
        for _ in range(2):
            training.step()
        if i:
            print(status("VmHWM") - before)
        del training


def sized(size) -> TrainConfig:
    return settings(
        **{
            **dict(
                tokens_per_step=1024,
                batch_tokens=512,
                buffer_tokens=8192,
                k_start=3,
                aux_coef=0.0,
                keep_gb=0.01,
            ),
            **size,
        }
    )


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell a process's peak memory"
)
def test_estimated_memory_is_the_measured_one():
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_sae_pretraining as t; t.measure_memory()"
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    measured = list(
        map(
            int,
            subprocess.run(
                [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
            ).stdout.split(),
        )
    )
    for size, found in zip(SIZES, measured, strict=True):
        expected = sum(memory_parts(sized(size), 512).values())
        assert 0.75 < expected / found < 1.25, (size, expected, found)
