"""The benchmark: what it times is right, what it cannot run it says, and its sums add up."""

import pandas as pd
import pytest
import torch

import fac_synthesis.sae.benchmark as module
from fac_synthesis.sae.benchmark import (
    IMPLEMENTATIONS,
    Case,
    LlamaShape,
    correctness,
    gradient_error,
    harvest_rate,
    language_model_rate,
    machine,
    measure,
    peak_mb,
    random_llama,
    summarise,
    sweep,
)

torch.set_num_threads(1)
CASE = Case(d_model=16, n_latents=64, k=4, tokens=32)
SHAPE = LlamaShape(width=32, layers=3, heads=4, kv_heads=2, mlp=64, vocabulary=50)
OURS = [name for name in IMPLEMENTATIONS if name not in module.PACKAGES]


def test_correctness_covers_both_choices_and_both_decoders_and_would_notice_a_wrong_gradient(monkeypatch):
    table = correctness("cpu")
    assert len(table) == 4 and table.float64.max() < 1e-10 < table.bfloat16_product.max() < 0.3
    right = module.dense_losses
    monkeypatch.setattr(module, "dense_losses", lambda *a, **k: 1.001 * right(*a, **k))
    assert gradient_error("cpu", torch.float64, True) > 1e-4


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_each_implementation_runs_or_says_that_it_is_not_installed(name):
    times = measure(CASE, [name], rounds=2)
    assert list(times.implementation.unique()) == [name]
    if module.installed(name):
        assert len(times) == 2 and (times.ms > 0).all() and (times.note == "").all()
    else:
        assert times.note.tolist() == ["not installed"] and times.ms.isna().all()


@pytest.mark.parametrize("name", [name for name in OURS if "encode" not in name] + list(module.PACKAGES))
def test_a_timed_step_learns(monkeypatch, name):
    if not module.installed(name):
        pytest.skip(f"{name} is not installed")
    torch.manual_seed(0)
    made, adam = [], torch.optim.Adam

    def kept(parameters, **options):
        made.append(list(parameters))
        return adam(made[-1], **options)

    monkeypatch.setattr(module.torch.optim, "Adam", kept)
    step = IMPLEMENTATIONS[name](CASE, CASE.x_BD())
    before = [p.detach().clone() for p in made[0]]
    step()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, made[0]))
    assert moved >= 3, "encoder, decoder and biases move"


def test_a_library_that_fails_and_one_that_needs_too_much_are_results(monkeypatch):
    def fails(case, x_BD):
        raise RuntimeError("no driver")

    def large(case, x_BD):
        raise torch.OutOfMemoryError("80 GB")

    monkeypatch.setattr(module, "installed", lambda name: True)
    monkeypatch.setitem(IMPLEMENTATIONS, "sparsify", fails)
    monkeypatch.setitem(IMPLEMENTATIONS, "dense, tied", large)
    times = measure(CASE, ["ours, tied", "dense, tied", "sparsify"], rounds=1)
    assert dict(zip(times.implementation, times.note)) == {
        "ours, tied": "",
        "dense, tied": "out of memory",
        "sparsify": "fails here: RuntimeError",
    }
    table = summarise(pd.concat([times, measure(CASE, ["ours, untied"], rounds=1)]))
    assert len(table) == 4
    monkeypatch.setitem(IMPLEMENTATIONS, "ours, tied", fails)
    with pytest.raises(RuntimeError, match="no driver"):
        measure(CASE, ["ours, tied"], rounds=1)


def test_summary_compares_like_with_like():
    fastest = {
        "ours, tied": 9,
        "ours, untied": 19,
        "dense, tied": 49,
        "dense, untied": 59,
        "SAELens": 99,
        "encode only": 4,
    }
    rows = []
    for number in range(3):
        for name, ms in fastest.items():
            size = dict(k=4, tokens=100, peak_mb=1.0, note="")
            rows.append(dict(size, implementation=name, round=number, ms=ms + number))
    table = summarise(pd.DataFrame(rows)).set_index("implementation")
    assert table.ours_is_faster_by[["dense, tied", "dense, untied", "SAELens"]].tolist() == [5, 3, 5]
    assert table.ours_is_faster_by[["ours, tied", "encode only"]].isna().all()
    assert table.tokens_per_s["ours, tied"] == 10_000


def test_memory_is_what_the_step_needs_at_its_peak():
    def step():
        return (torch.ones(4_000_000) + 1).sum()  # two arrays of 16 MB

    peak = peak_mb(step, "cpu")
    if peak != peak:
        pytest.skip("this system does not tell the peak of resident memory")
    assert 24 < peak < 48


def test_harvest_counts_the_operations_of_the_blocks_below_the_hook():
    model = random_llama(SHAPE, "cpu")
    numbers = harvest_rate(model, layers=2, text_tokens=16, batch_tokens=64, rounds=1)
    weights = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32  # q and o, k and v, feed-forward, norms
    assert numbers["gflop_per_token"] == pytest.approx(2 * (2 * weights + 2 * 16 * 32) / 1e9)
    assert numbers["tflops"] == pytest.approx(numbers["tokens_per_s"] * numbers["gflop_per_token"] / 1e3)


def test_machine_names_hardware_and_versions():
    about = machine("cpu")
    assert about["torch"] == torch.__version__ and about["device"] and about["threads"] >= 1


def test_a_sweep_covers_every_size_and_names_the_machine(monkeypatch):
    monkeypatch.setattr(module, "IMPLEMENTATIONS", {"ours, tied": IMPLEMENTATIONS["ours, tied"]})
    cases = [CASE, Case(d_model=16, n_latents=64, k=8, tokens=16)]
    times = sweep(cases, rounds=2, about=dict(device="here", threads=1))
    assert times[["k", "tokens"]].drop_duplicates().values.tolist() == [[4, 32], [8, 16]]
    assert len(times) == 4 and (times.device == "here").all() and (times.threads == 1).all()


def test_the_rate_is_that_of_the_whole_model_given():
    numbers = language_model_rate(SHAPE, "cpu", text_tokens=16, batch_tokens=64, rounds=1, about={})
    two_blocks = harvest_rate(random_llama(SHAPE, "cpu"), layers=2, text_tokens=16, batch_tokens=64, rounds=1)
    assert numbers["gflop_per_token"] == pytest.approx(1.5 * two_blocks["gflop_per_token"])


def test_a_missing_name_of_the_processor_is_no_error(monkeypatch):
    monkeypatch.setattr(module.Path, "exists", lambda self: False)
    assert module.processor_name() == (module.platform.processor() or module.platform.machine())
