"The seven baselines: names, garbage, budgets, seeds, resumed runs; and notebook 32 on stand-ins."

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from baseline_writers import BACKGROUND, GARBAGE, SEEDS, TASK, Fixed, Writer, notes
from stage_cells import run_cells

from fac_synthesis.data.planted_tasks import planted_wording
from fac_synthesis.data.records import Record
from fac_synthesis.data.sources import open_task
from fac_synthesis.features.activations import FeatureReader
from fac_synthesis.models.backbone import Backbone, tiny_model, word_tokenizer
from fac_synthesis.models.prompts import natural_wording
from fac_synthesis.run.artifacts import remember_digest
from fac_synthesis.run.parameters import LeftOut, published
from fac_synthesis.run.stages import stage_output, stage_record
from fac_synthesis.sae.core import SAE, SAEConfig
from fac_synthesis.synthesis import baseline_rounds, baselines, prompted_baselines
from fac_synthesis.synthesis.baseline_rounds import Job, candidates_of
from fac_synthesis.synthesis.baselines import (
    BASELINES,
    discarded_table,
    named_baselines,
    not_made_table,
    read_samples,
    refused_items,
)
from fac_synthesis.synthesis.covered_samples import NO_BUDGET

NATURAL, PLANTED = natural_wording(TASK.kind, TASK.goal), planted_wording(TASK)
each = pytest.mark.parametrize("method", list(BASELINES))


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    words = word_tokenizer(BACKGROUND + SEEDS + ["write a message about : lock , wall . like this not"])
    return Backbone(tiny_model("llama", len(words), 32, 2), words, layer=1, max_length=64)


@pytest.fixture
def make(backbone):
    "make(method, lm, work=..., **fields of the job): the method's result on the small seed set."

    def call(method, lm=None, work=None, **changed):
        own = dict(backbone=backbone) if method in ("Prismatic Synthesis", "SynAlign") else {}
        if method == "Prismatic Synthesis":
            own["dims"] = 64
        fields = dict(budget=20, wording=NATURAL, background=BACKGROUND, batch=16) | changed
        return BASELINES[method](Job(TASK, SEEDS, lm or Writer(), **fields), work=work, **own)

    return call


# ---- all seven


def test_the_names_are_those_of_table_1(refused):
    rows = list(dict.fromkeys(published("table01").row))
    assert list(BASELINES) == rows[rows.index("Full Dataset") + 1 : rows.index("Ours")]
    assert list(named_baselines(["SAO", "Alpaca"])) == ["SAO", "Alpaca"]
    assert "Alpacca" in refused(lambda: named_baselines(["Alpacca"]))


COLUMNS = ["method", "text", "label", "latent", "rank", "score", "generator", "provenance"]
FAULTS = {"no answer", "empty", "# words", "repeats itself", "repeats the request", "broken characters"}


@each
@pytest.mark.parametrize("wording", [NATURAL, PLANTED], ids=["natural", "planted"])
def test_survives_a_tenth_of_garbage_and_says_why(method, wording, make, monkeypatch, capsys):
    looked = []

    def counting(task, asks, replies, *rest):
        looked.append(sum(map(len, replies)))
        return candidates_of(task, asks, replies, *rest)

    monkeypatch.setattr(baseline_rounds, "candidates_of", counting)
    if wording is PLANTED:  # ranking by likelihood has its own test
        monkeypatch.setattr(
            prompted_baselines, "first_is_better", lambda rounds, pairs, number: [True] * len(pairs)
        )
    lm = Writer(GARBAGE)
    made = make(method, lm, budget=60, wording=wording)
    s = made.samples
    assert list(s.columns) == COLUMNS and len(s) == 60 and s["rank"].tolist() == list(range(60))
    assert set(s.method) == {method} and set(s.generator) == {"writer"}
    assert set(s.label) == {1} and set(s.latent) == {-1}
    assert s.text.is_unique and not set(s.text) & set(SEEDS) and s.text.map(TASK.fault).eq("").all()
    before = made.discarded["no plan"] + made.discarded["no attributes"]
    assert len(s) + made.discarded.total() == sum(looked) + before, "every candidate is kept or counted"
    assert len(lm.given) > 3 and len(FAULTS & set(made.discarded)) >= 2
    assert min(made.discarded.values()) > 0
    said = capsys.readouterr().out
    assert f"{method}: 60 of 60 samples" in said and all(reason in said for reason in made.discarded)
    assert all({"prompt", "parents", "round"} <= set(row) for row in notes(made))


@each
def test_a_generator_that_never_answers(method, make):
    made = make(method, Fixed(lambda prompt, j: None), budget=3, tries=10)
    assert made.samples.empty and set(made.discarded) <= {"no answer", "no plan", "no attributes"}
    assert 0 < made.discarded.total() <= 30
    assert made.samples.columns.tolist() == make(method, budget=1).samples.columns.tolist()


@each
@pytest.mark.parametrize("budget", [1, 3, 33])
def test_the_budget_is_met_and_never_exceeded(method, budget, make):
    assert len(make(method, budget=budget).samples) == budget


@each
def test_same_seed_same_samples(method, make):
    first, again, other = make(method), make(method), make(method, seed=1)
    pd.testing.assert_frame_equal(first.samples, again.samples)
    assert first.discarded == again.discarded and set(first.samples.text) != set(other.samples.text)


@each
def test_a_killed_run_goes_on_to_the_same_result(method, make, tmp_path):
    whole = Writer(GARBAGE)
    expected = make(method, whole, work=tmp_path / "whole")
    broken, again = Writer(GARBAGE, die_at=whole.calls // 2), Writer(GARBAGE)
    with pytest.raises(KeyboardInterrupt):
        make(method, broken, work=tmp_path / "broken")
    made = make(method, again, work=tmp_path / "broken")
    pd.testing.assert_frame_equal(made.samples, expected.samples)
    assert made.discarded == expected.discarded
    assert again.calls == whole.calls - whole.calls // 2, "finished batches are not asked again"
    third = Writer(GARBAGE, die_at=0)
    pd.testing.assert_frame_equal(make(method, third, work=tmp_path / "broken").samples, expected.samples)


@each
def test_a_dull_generator_ends(method, make):
    made = make(method, Fixed(lambda prompt, j: "the same answer to it all ."), budget=5, tries=6)
    assert len(made.samples) <= 1 and made.discarded["seen before"] > 0


@each
def test_nothing_to_start_from(method, refused):
    assert "seed set" in refused(lambda: BASELINES[method](Job(TASK, [" "], Writer(), 5)))
    assert "budget" in refused(lambda: BASELINES[method](Job(TASK, SEEDS, Writer(), 0)))


def test_the_account_names_refused_items_and_methods_that_were_not_made(make):
    made = {"SAO": make("SAO", Writer(GARBAGE))}
    items = made["SAO"].samples.assign(item_fault=["no question"] * 2 + [""] * 18)
    refused_now = refused_items(items)
    assert refused_now.to_dict("records") == [dict(method="SAO", reason="no question", count=2)]
    assert refused_items(items.assign(item_fault="")).empty
    parts = [discarded_table(made), refused_now, not_made_table({"Magpie": "no user turns"})]
    assert pd.concat(parts)["count"].sum() == made["SAO"].discarded.total() + 2
    assert [list(part) for part in parts] == [["method", "reason", "count"]] * 3


# ---- the notebook

SETTINGS = dict(methods=["Alpaca", "Magpie", "SynAlign"], batch=16, max_new_tokens=12)


class Corpora:
    "The corpora of a task."

    def __getitem__(self, role):
        return [Record(text, 1, "seed") for text in SEEDS]

    def texts(self, role):
        return BACKGROUND


def covered_samples(n):
    "Two-step samples of n features."
    return pd.DataFrame(
        dict(
            method=["two-step"] * n,
            text=[f"{text} again" for text in SEEDS[:n]],
            label=1,
            latent=range(n),
            rank=0,
            score=2.0,
            generator="writer",
            item_fault="",
        )
    )


@pytest.fixture
def baselines_on(backbone, tmp_path, monkeypatch):
    "baselines_on(budgets, lm, **parameters): notebook 32 where synthesis left so many samples of each task."
    monkeypatch.setenv("FAC_RESULTS_DIR", str(tmp_path))
    monkeypatch.setenv("FAC_RESOLVED", "1")
    remember_digest(backbone, "the backbone of the tests")  # as if it was loaded
    torch.manual_seed(1)
    reader = FeatureReader(SAE(SAEConfig(d_model=32, n_latents=96, k=6)), backbone)

    def call(budgets, lm=None, **given):
        def covered(run, task):
            return covered_samples(budgets[task])

        monkeypatch.setattr(baselines, "read_covered_samples", covered)
        stand_ins = dict(
            open_tasks=lambda run: [open_task(name, "planted") for name in budgets],
            open_wording=lambda run, task: NATURAL,
            open_reader=lambda run: reader,
            open_generator=lambda run, generation, reader: lm or Writer(),
            read_generation=lambda run: None,
            read_delta=lambda run: 0.0,
            read_corpora=lambda run, task: Corpora(),
            read_missing=lambda run, task: pd.DataFrame(dict(latent=range(96))),
            read_covered_samples=covered,
        )
        return run_cells("32_baselines", stand_ins, **{**SETTINGS, **given})

    return call


def artifacts(run):
    "name -> key of what a run stored."
    pairs = [output["folder"].rsplit("/", 1)[1].rsplit("-", 1) for output in run.outputs.values()]
    return dict(pairs)


def test_the_notebook_makes_one_budget_for_every_method(baselines_on):
    run = baselines_on(dict(toxicity=12, reward=5))
    table = pd.read_csv(run.folder / "tables/baselines.csv")
    assert table.budget.tolist() == [12] * 3 + [5] * 3 and table.method.tolist() == SETTINGS["methods"] * 2
    assert (table.samples <= table.budget).all() and table.fac_missing.between(0, 1).all()
    assert (run.folder / "figures/baselines_discarded.png").exists()
    assert stage_record("32_baselines", "mini")["metrics"]["toxicity, Alpaca, samples"] == 12
    samples = read_samples(run, "reward")
    assert samples.method.tolist()[:5] == ["two-step"] * 5 and samples.index.is_unique
    own = samples[samples.method != "two-step"]
    assert own.item_fault.eq("").all() and own.prompt.ne("").all(), "items of the task, ready for training"


def test_a_setting_of_one_method_makes_no_other_again(baselines_on):
    before = artifacts(baselines_on(dict(toxicity=6)))
    after = artifacts(baselines_on(dict(toxicity=6), novelty=0.4))
    changed = {name for name in before if before[name] != after[name]}
    assert changed and all("Alpaca" in name for name in changed - {"samples_toxicity", "discarded"})
    fewer = artifacts(baselines_on(dict(toxicity=6), methods=["Magpie"]))
    assert fewer["toxicity_Magpie"] == before["toxicity_Magpie"]
    other = artifacts(baselines_on(dict(toxicity=6), seed=1))
    assert all(before[name] != other[name] for name in before)


def test_no_budget_at_all_is_one_sentence(baselines_on, capsys):
    with pytest.raises(LeftOut) as left:
        baselines_on(dict(toxicity=0, reward=0))
    assert str(left.value) == NO_BUDGET and f"left out: {NO_BUDGET}\n" in capsys.readouterr().out
    record = stage_record("32_baselines", "mini")
    assert record["metrics"] == {"left_out": NO_BUDGET} and "samples_toxicity" in record["outputs"]


def test_later_stages_can_read_that_there_are_no_samples(baselines_on):
    with pytest.raises(LeftOut):
        baselines_on(dict(toxicity=0))
    assert read_samples(SimpleNamespace(input=stage_output), "toxicity").empty


def test_a_task_without_a_budget_leaves_the_others_alone(baselines_on):
    run = baselines_on(dict(toxicity=0, reward=5))
    assert set(pd.read_csv(run.folder / "tables/baselines.csv").task) == {"reward"}
    discarded = pd.read_csv(run.folder / "figures/baselines_discarded.csv")
    assert discarded[discarded.task == "toxicity"].reason.tolist() == [NO_BUDGET] * 3


def test_a_method_that_the_generator_cannot_serve_is_named(baselines_on):
    chat = Writer()
    chat.opens_user_turns = False
    run = baselines_on(dict(toxicity=6), chat)
    assert pd.read_csv(run.folder / "tables/baselines.csv").method.tolist() == ["Alpaca", "SynAlign"]
    with pytest.raises(LeftOut, match="local model"):
        baselines_on(dict(toxicity=6), chat, methods=["Magpie"])
