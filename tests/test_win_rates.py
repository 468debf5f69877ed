"""Judges, win rates and length control on invented verdicts, and on the published AlpacaEval files."""

import gzip
import json
import os

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit

from fac_synthesis.data.tasks import message_fault
from fac_synthesis.models.backbone import tiny_model, word_tokenizer
from fac_synthesis.models.language_models import LocalModel, prompt_ids
from fac_synthesis.run.artifacts import digest_of, remember_digest
from fac_synthesis.run.parameters import UserError
from fac_synthesis.tasks.instructions import known_difficulties
from fac_synthesis.tasks.planted_rubric import asked_for, constraint_score
from fac_synthesis.tasks.win_rates import (
    ANNOTATIONS_FILE,
    LEADERBOARD_FILE,
    LLMJudge,
    ReferenceOverlap,
    RubricJudge,
    StoredJudge,
    WeightedJudge,
    alpaca_eval_folder,
    cross_validated_lc,
    fit_length_model,
    lc_comparison,
    length_controlled,
    length_loss,
    read_annotations,
    read_leaderboard,
    read_outputs,
    win_rate,
)

torch.set_num_threads(1)
real = pytest.mark.skipif(
    not os.environ.get("FAC_DATA_DIR"),
    reason="FAC_DATA_DIR is not set: the published AlpacaEval files are needed",
)

# ---- judging

ASKED = ["say hello"] * 3
OURS = ["hello", "hello to you and all", "hm"]
THEIRS = ["hello there"] * 3


def shown_answers(prompt):
    "The first line of both answers in a request of the judge."
    return [part.split("\n")[1] for part in prompt.split("[Answer ")[1:]]


def longer(prompt, j):
    "A judge that likes the longer answer."
    first, second = shown_answers(prompt)
    return "1" if len(first) > len(second) else "2"


def test_position_swap_cancels_a_habit(scripted):
    for habit in ("1", "2", "Answer: 1", "tie"):
        judge = LLMJudge(scripted(lambda prompt, j, habit=habit: habit))
        assert judge.preferences(ASKED, OURS, THEIRS) == [0.5] * 3
        assert len(judge.lm.asked) == 6 and judge.name == "scripted"


def test_both_orders_are_asked_and_averaged(scripted):
    def undecided(prompt, j):
        return "tie" if shown_answers(prompt)[0] == "hello there" else "1"

    assert LLMJudge(scripted(longer)).preferences(ASKED, OURS, THEIRS) == [0, 1, 0]
    assert LLMJudge(scripted(undecided)).preferences(ASKED, OURS, THEIRS) == [0.75] * 3
    braces = LLMJudge(scripted(longer)).preferences(["say {x}"], ["{instruction} {0}"], ["{}"])
    assert braces == [1], "texts are data, not templates"


def test_unreadable_verdicts_are_counted(scripted, refused):
    def half(prompt, j):
        reference_first = prompt.index("hello there") < prompt.index("[Answer 2]")
        return "both are fine in their way" if reference_first else "1"

    assert LLMJudge(scripted(half)).preferences(ASKED, OURS, THEIRS) == [None] * 3
    assert LLMJudge(scripted(lambda prompt, j: None)).preferences(ASKED, OURS, THEIRS) == [None] * 3
    assert win_rate([None, 1, 0, None]) | dict(se=0) == dict(wr=50, se=0, n=2, unreadable=2)
    assert "none of the 3 verdicts" in refused(lambda: win_rate([None] * 3))


def test_weighted_judge_reads_probabilities(refused):
    tokenizer = word_tokenizer(["1 2 hello there hm to you and all say"])
    torch.manual_seed(1)
    model = tiny_model("llama", len(tokenizer), 32, 2).eval()
    torch.nn.init.normal_(model.get_input_embeddings().weight, 0, 0.5)
    judge = WeightedJudge(LocalModel(model, tokenizer, name="tiny"))
    questions = [[dict(role="user", content=c)] for c in ("say hello", "hello there")]
    for question, p in zip(questions, judge.first_wins(questions)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids(tokenizer, question)])).logits
        probabilities = logits[0, -1].softmax(-1)
        one, two = (probabilities[tokenizer.convert_tokens_to_ids(x)].item() for x in "12")
        assert p == pytest.approx(one / (one + two), abs=1e-5)
    preferences = np.array(judge.preferences(ASKED, OURS, THEIRS))
    assert np.allclose(preferences + judge.preferences(ASKED, THEIRS, OURS), 1, atol=1e-6)
    assert judge.preferences(ASKED, OURS, OURS) == pytest.approx([0.5] * 3)
    assert judge.preferences(["say"], ["hello " * 600], ["hm"]) == [None], "longer than the context"
    without_digits = LocalModel(model, word_tokenizer(["hello"]), name="tiny")
    assert "cannot tell 1 from 2" in refused(lambda: WeightedJudge(without_digits))


def test_rubric_and_stored_judges():
    def length(instruction, answer):
        return len(answer)

    assert RubricJudge(length).preferences(ASKED, OURS, ["hello", "no", "hmmm"]) == [0.5, 1, 0]
    annotations = pd.DataFrame(
        dict(instruction=["say hello"] * 2, output=["hello", "hm"], preference=[0.3, 0.9])
    )
    assert StoredJudge(annotations).preferences(ASKED, OURS, THEIRS) == [0.3, None, 0.9]


def test_the_answer_closer_to_the_reference_is_preferred():
    score = ReferenceOverlap({"say hello": "hello to you", "count": "one two three"})
    judge = RubricJudge(score, "reference overlap")
    both = judge.preferences(["say hello", "count"], ["hello you", ""], ["good bye", "one two"])
    assert both == [1.0, 0.0] and judge.preferences(["count"], ["four"], ["five"]) == [0.5]


def test_judges_are_known_by_what_they_judge_by():
    "A cached result of a judge is used again only for the same judge."
    tokenizer = word_tokenizer(["1 2 hello"])
    model = tiny_model("llama", len(tokenizer), 32, 1)
    remember_digest(model, "as one that an earlier stage left")
    annotations = pd.DataFrame(dict(instruction=["say"], output=["hm"], preference=[0.3]))
    judges = [
        RubricJudge(constraint_score),
        RubricJudge(ReferenceOverlap({"say": "hello"})),
        RubricJudge(ReferenceOverlap({"say": "hello you"})),
        StoredJudge(annotations),
        StoredJudge(annotations.assign(preference=0.4)),
        LLMJudge(LocalModel(model, tokenizer, name="tiny")),
        WeightedJudge(LocalModel(model, tokenizer, name="tiny")),
    ]
    digests = [digest_of(judge) for judge in judges]
    assert len(set(digests)) == len(judges)
    assert digest_of(RubricJudge(ReferenceOverlap({"say": "hello"}))) == digests[1]


# ---- the planted rubric


def test_planted_rubric(refused):
    asked = "be a pirate , not quite a corsair , and explain the spray and the wall ."
    answers = (
        "ahoy matey ! take the spray and mind the wall . arr .",
        "take the spray and mind the wall .",
        "ahoy matey ! arr , what a day .",
        "nothing of the kind .",
        "",
        "ahoy ahoy ahoy ahoy matey arr spray spray spray spray wall",
    )
    worst = 1 if not message_fault(answers[-1]) else 0.5
    assert [constraint_score(asked, a) for a in answers] == pytest.approx([1, 0.5, 0.5, 0, 0, worst])
    assert constraint_score(asked, asked) == 0, "giving the request back is no answer"
    assert constraint_score(asked, "ahoy there , i see a wall .") == pytest.approx((1 / 3 + 1 / 2) / 2)
    topic_alone = constraint_score("tell me about the stencil .", "the mural and the spray .")
    assert topic_alone == 1, "without a style the topic alone counts"
    assert "names no style" in refused(lambda: constraint_score("tell me a story", "a story"))
    assert list(asked_for("tell me about the stencil .")) == ["topic"] and asked_for("tell me a story") == {}


# ---- win rate and length control


def test_win_rate_with_ties():
    rate = win_rate([1, 0.5, 0.5, 0])
    assert rate["wr"] == 50 and rate["n"] == 4
    assert rate["se"] == pytest.approx(100 * np.std([1, 0.5, 0.5, 0], ddof=1) / 2)


def judged(theta, times, taste=2.0, n=150, seed=0):
    """Verdicts of a judge that likes length.

    The models have quality theta and write `times` as much as the reference.
    """
    rng, frames = np.random.default_rng(seed), []
    reference, hard = rng.integers(200, 2000, n), rng.normal(0, 1, n)
    for m, (quality, t) in enumerate(zip(theta, times)):
        length = (reference * t * rng.uniform(0.4, 1.6, n)).astype(int) + 1
        z = np.tanh((reference - length) / (reference - length).std(ddof=1))
        own = dict(
            generator=f"m{m}",
            instruction=[f"x{i}" for i in range(n)],
            preference=expit(quality - taste * z + hard - hard.mean()),
            length=length,
            reference_length=reference,
        )
        frames.append(pd.DataFrame(own))
    return pd.concat(frames, ignore_index=True)


def rates(annotations):
    return 100 * annotations.groupby("generator").preference.mean()


def test_equal_lengths_leave_the_win_rate():
    a = judged([-2, 0, 1, 3], [1, 1, 1, 1])
    for length in (a.reference_length, a.reference_length + 100):
        same = a.assign(length=length)
        assert np.allclose(length_controlled(same), rates(same), atol=1e-3)
    alone = a.assign(length=a.reference_length).query("generator == 'm2'")
    assert np.allclose(length_controlled(alone), rates(a)["m2"], atol=1e-3), "one model alone too"


def test_a_win_by_length_only_is_taken_back():
    a = judged([0] * 6, [0.4, 0.6, 0.9, 1.2, 2, 3])
    wr, lc = rates(a), length_controlled(a)
    assert wr["m5"] > 70 and wr["m0"] < 30 and (lc - 50).abs().max() < 5
    assert lc["m5"] < wr["m5"] and lc["m0"] > wr["m0"]
    better = length_controlled(judged([0, 0, 0, 1.5], [0.5, 1, 2, 2]))
    assert better["m3"] - better["m2"] > 15, "quality stays"


def test_gradient_of_the_joint_loss():
    rng = np.random.default_rng(0)
    y, z = rng.random((3, 5)), rng.normal(size=(3, 5))
    w, p = (rng.random((3, 5)) < 0.8).astype(float), rng.normal(size=15)
    for arguments, size in (((y, z, w), 15), ((y, z, w, rng.normal(size=5), 0.3), 9)):
        at, numeric = p[:size], []
        for d in 1e-5 * np.eye(size):
            above, below = (length_loss(at + step, *arguments)[0] for step in (d, -d))
            numeric.append((above - below) / 2e-5)
        assert np.allclose(length_loss(at, *arguments)[1], numeric, atol=1e-5)


def test_new_models_keep_the_known_difficulties(refused):
    a = judged([-1, 0, 0.5, 1, 0.2], [0.5, 1, 1.5, 2, 3])
    known = fit_length_model(a[a.generator != "m4"])
    new = a[a.generator == "m4"]
    assert length_controlled(new, known)["m4"] == pytest.approx(length_controlled(a)["m4"], abs=2)
    refitted = fit_length_model(new, known)
    assert refitted.difficulty is known.difficulty and refitted.mu == known.mu
    other = new.assign(instruction="other " + new.instruction)
    assert "no known difficulty" in refused(lambda: length_controlled(other, known))
    folds = cross_validated_lc(a, 5)
    assert folds.index.tolist() == [f"m{i}" for i in range(5)]
    assert (folds - length_controlled(a)).abs().max() < 3
    assert "folds" in refused(lambda: cross_validated_lc(a, 6))


def test_extremes_and_gaps_stay_finite(refused):
    a = judged([0, 0, 0], [1, 1, 1])
    a.loc[a.generator == "m0", "preference"] = 1.0
    a.loc[a.generator == "m1", "preference"] = 0.0
    a.loc[a.index[-40:], "preference"] = np.nan
    lc = length_controlled(a)
    assert lc["m0"] > 99 and lc["m1"] < 1 and 30 < lc["m2"] < 70
    assert "repeat a pair" in refused(lambda: length_controlled(pd.concat([a, a])))
    assert "'length'" in refused(lambda: length_controlled(a.drop(columns="length")))
    assert "no preference" in refused(lambda: length_controlled(a.assign(preference=np.nan)))


# ---- files

NATIVE = dict(
    instruction="say hello",
    output_1="hello",
    generator_1="reference",
    output_2="hello there",
    generator_2="ours",
    preference=1.25,
)


def test_both_layouts_of_annotations(tmp_path):
    rows = [NATIVE, NATIVE | dict(preference=0), NATIVE | dict(preference=None)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    compiled = dict(
        instruction="say hello", generator="ours", output="hello there", output_1_len=5, preference=1.25
    )
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((json.dumps(compiled) + "\n").encode()))
    a, b = read_annotations(tmp_path / "a.json"), read_annotations(tmp_path / "b.jsonl.gz")
    assert a.preference.tolist() == [0.25, 0.5], "0 is a draw; a row without verdict is left out"
    expected = dict(
        generator="ours",
        instruction="say hello",
        output="hello there",
        preference=0.25,
        length=11,
        reference_length=5,
    )
    assert a.iloc[0].to_dict() == b.iloc[0].to_dict() == expected


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(preference=2.5), "between 1"),
        (dict(preference="nan?"), "must be a number"),
        (dict(preference=[1]), "must be a number"),
        (dict(instruction=None), "instruction is missing"),
        (dict(output_2=7), "output_2 is int"),
        (dict(output_1=None), "output_1 is missing"),
        (dict(preference=float("inf")), "between 1"),
    ],
)
def test_wrong_annotations_are_refused_with_their_place(tmp_path, refused, wrong, said):
    (tmp_path / "a.json").write_text(json.dumps([NATIVE, NATIVE | wrong]))
    message = refused(lambda: read_annotations(tmp_path / "a.json"))
    assert said in message and "item 2" in message


def test_other_wrong_files(tmp_path, refused):
    head = ",win_rate,standard_error"
    board = head + ",length_controlled_winrate\nours,1,2,\n"
    (tmp_path / "empty.json").write_text(json.dumps([NATIVE | dict(preference=None)]))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"instruction": "a"}\n' * 99)[:40])
    (tmp_path / "board.csv").write_text(head + "\nours,1,2\n")
    (tmp_path / "bad.csv").write_text(board + "theirs,many,2,3\n")
    (tmp_path / "good.csv").write_text(board)
    (tmp_path / "out.json").write_text(json.dumps([dict(instruction="a", output=None, generator="ours")]))

    def said(read, name):
        return refused(lambda: read(tmp_path / name))

    assert "no row with a preference" in said(read_annotations, "empty.json")
    said(read_annotations, "cut.jsonl.gz")
    said(read_annotations, "missing.json")
    assert "length_controlled_winrate" in said(read_leaderboard, "board.csv")
    assert "line 3: win_rate is 'many'" in said(read_leaderboard, "bad.csv")
    assert "output is missing" in said(read_outputs, "out.json")
    good = read_leaderboard(tmp_path / "good.csv")
    assert good.loc["ours", "win_rate"] == 1 and np.isnan(good.loc["ours", "length_controlled_winrate"])
    assert "no row for m0" in refused(lambda: lc_comparison(judged([0, 1], [1, 2]), good, 2))


@pytest.fixture(scope="module")
def alpaca_eval():
    folder = alpaca_eval_folder()
    return folder, read_annotations(folder / ANNOTATIONS_FILE), read_leaderboard(folder / LEADERBOARD_FILE)


@real
def test_raw_win_rates_are_the_leaderboards(alpaca_eval):
    _, annotations, board = alpaca_eval
    ours = pd.DataFrame({g: win_rate(p) for g, p in annotations.groupby("generator").preference}).T
    assert len(ours) == 30 and len(annotations) == 24146
    assert (ours.wr - board.win_rate.reindex(ours.index)).abs().max() < 1e-6
    assert (ours.se - board.standard_error.reindex(ours.index)).abs().max() < 1e-6


@real
def test_length_controlled_rates_agree_with_the_leaderboard(alpaca_eval):
    _, annotations, board = alpaca_eval
    table = lc_comparison(annotations, board)
    off = table.lc_difference.abs()
    assert len(table) == 30 and off.mean() <= 1.3 and off.max() < 3.5
    assert table.lc.corr(table.lc_published, method="spearman") > 0.97
    assert (table.wr - table.lc_published).abs().mean() > 4


@real
def test_stored_verdicts_and_difficulties_serve_a_models_outputs(alpaca_eval):
    folder, annotations, board = alpaca_eval
    name = "vicuna-7b-v1.5"
    outputs = read_outputs(folder / "model_outputs" / f"{name}.json")
    references = read_outputs(folder / "model_outputs" / "gpt4_1106_preview.json")
    judge = StoredJudge(annotations[annotations.generator == name])
    rate = win_rate(judge.preferences(outputs.instruction, outputs.output, references.output))
    assert rate["wr"] == pytest.approx(board.win_rate[name], abs=1e-6) and rate["unreadable"] == 0
    some = outputs.instruction.tolist()[:50]
    assert known_difficulties(annotations, some).mu == pytest.approx(-1.74, abs=0.02)
    assert known_difficulties(annotations, ["another"]) is None
    assert known_difficulties(None, ["another"]) is None


def test_a_model_without_a_readable_verdict_is_named():
    with pytest.raises(UserError, match="is readable|no preference"):
        length_controlled(judged([0, 0], [1, 1]).assign(preference=np.nan))
