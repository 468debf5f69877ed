"""The seven baselines: each filter refuses what it should, each generator survives bad replies, one budget, the same bytes twice."""

import inspect
import json

import numpy as np
import pandas as pd
import pytest
import torch
from fac_synthesis.data.planted_tasks import planted_wording
from fac_synthesis.data.sources import open_task
from fac_synthesis.models.backbone import Backbone, pad, tiny_model, tokenize, word_tokenizer
from fac_synthesis.models.language_models import LanguageModel, LocalModel, derived_seed, prompt_ids
from fac_synthesis.models.prompts import natural_wording
from fac_synthesis.run.parameters import published
from fac_synthesis.synthesis.baseline_rounds import Job, Result, candidates_of
from fac_synthesis.synthesis.baselines import BASELINES, discarded_table
from fac_synthesis.synthesis.guided_baselines import (
    attributes_of,
    batch_gradients,
    demonstrations,
    embed,
    median_length,
    mmd_weights,
    projections,
    rbf,
    sparse_clusters,
    text_gradients,
)
from fac_synthesis.synthesis.prompted_baselines import (
    NoUserTurns,
    UserTurns,
    agreement,
    alpaca_fault,
    consistent,
    evol_instruct,
    evolution_fault,
    likelihoods,
    lowest_reward_faults,
    own_answer,
    pre_query_ids,
    split_list,
    user_turns,
)
from fac_synthesis.synthesis.text_similarity import Novelty, Vocabulary

from fac_synthesis import baselines as module

torch.set_num_threads(1)
TASK = open_task("toxicity", planted=True)
WORDS = [
    a + b
    for a in "ba de fi go ku la me no pu ri so tu".split()
    for b in "bel dan fer gol kin lum mor nas pit ros".split()
]
FORM = ["where do we put the {}", "i want the {}", "tell me of {}", "is it the {}"]
GARBAGE = [
    None,
    "",
    "ok",
    "no no no no no no no",
    "Sure, write a message about : lock .",
    "word " * 200,
    "\ufffd\x00 \ud800 ∎∎ a b",
]
JUDGING = {
    "Answer with A or B": "A",
    "Equal or Different": "Different",
    "Excellent, Good": "Good",
    "JSON object": '{"subject": "locks", "style": "short"}',
}


class Writer(LanguageModel):
    "Random sentences, a function of conversation, seed and attempt; every tenth reply is bad if `bad`."

    opens_user_turns = True

    def __init__(self, bad=(), die_at=None):
        self.name, self.bad, self.die_at, self.calls, self.given = "writer", list(bad), die_at, 0, []

    def answers(self, conversations, sampling):
        self.calls += 1
        if self.die_at is not None and self.calls > self.die_at:
            raise KeyboardInterrupt
        return [[self.reply(c, sampling.seed, j) for j in range(sampling.n)] for c in conversations]

    def reply(self, conversation, seed, j):
        draw = derived_seed(conversation, seed, j)
        if self.bad and draw % 10 == 0:
            self.given.append(self.bad[draw // 10 % len(self.bad)])
            return self.given[-1]
        for asked, answer in JUDGING.items():
            if asked in conversation[-1]["content"]:
                return answer
        rng = np.random.default_rng(draw)
        return FORM[rng.integers(4)].format(" ".join(rng.choice(WORDS, 6, replace=False))) + " ."


class Fixed(LanguageModel):
    "reply(prompt, j) whatever the seed."

    opens_user_turns = True

    def __init__(self, reply):
        self.name, self.reply, self.asked = "fixed", reply, []

    def answers(self, conversations, sampling):
        self.asked += [c[-1]["content"] for c in conversations]
        return [[self.reply(c[-1]["content"], j) for j in range(sampling.n)] for c in conversations]


SEEDS = [Writer().reply([{"role": "user", "content": f"seed {i}"}], 0, 0) for i in range(12)]
BACKGROUND = [Writer().reply([{"role": "user", "content": f"background {i}"}], 0, 0) for i in range(300)]


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    words = word_tokenizer(BACKGROUND + SEEDS + ["write a message about : lock , wall . like this not"])
    return Backbone(tiny_model("llama", len(words), 32, 2), words, layer=1, max_length=64)


@pytest.fixture
def make(backbone):
    "make(method, lm, ...): the method's result on the small seed set."

    def call(method, lm=None, **more):
        own = dict(dims=64) if method == "Prismatic Synthesis" else {}
        return BASELINES[method](
            TASK,
            SEEDS,
            lm or Writer(),
            **{
                **dict(
                    budget=20,
                    seed=0,
                    wording=natural_wording(TASK),
                    background=BACKGROUND,
                    backbone=backbone,
                    batch=16,
                ),
                **own,
                **more,
            },
        )

    return call


each = pytest.mark.parametrize("method", list(BASELINES))


def notes(result):
    return [json.loads(p) for p in result.samples.provenance]


# ---- all seven


def test_the_names_are_those_of_table_1():
    rows = list(dict.fromkeys(published("table01").row))
    assert list(BASELINES) == rows[rows.index("Full Dataset") + 1 : rows.index("Ours")]


@each
@pytest.mark.parametrize("planted", [False, True])
def test_survives_a_tenth_of_garbage_and_says_why(method, planted, make, monkeypatch, capsys):
    if planted:
        monkeypatch.setattr(
            module, "first_is_better", lambda job, pairs, number: [True] * len(pairs)
        )  # ranking by likelihood has its own test
    lm, looked = Writer(GARBAGE), []
    monkeypatch.setattr(
        module,
        "candidates_of",
        lambda task, asks, replies, *rest: (
            looked.append(sum(map(len, replies))) or candidates_of(task, asks, replies, *rest)
        ),
    )
    made = make(method, lm, budget=60, wording=planted_wording(TASK) if planted else natural_wording(TASK))
    s = made.samples
    assert list(s.columns) == [
        "method",
        "text",
        "label",
        "latent",
        "rank",
        "score",
        "generator",
        "provenance",
    ]
    assert (
        len(s) == 60
        and set(s.method) == {method}
        and set(s.label) == {1}
        and set(s.latent) == {-1}
        and s["rank"].tolist() == list(range(60))
        and set(s.generator) == {"writer"}
    )
    assert s.text.is_unique and not set(s.text) & set(SEEDS) and s.text.map(TASK.fault).eq("").all()
    before = made.discarded["no plan"] + made.discarded["no attributes"]
    assert len(s) + made.discarded.total() == sum(looked) + before, "every candidate is kept or counted"
    expected = {"no answer", "empty", "# words", "repeats itself", "repeats the request", "broken characters"}
    assert len(lm.given) > 3 and len(expected & set(made.discarded)) >= 2 and min(made.discarded.values()) > 0
    assert f"{method}: 60 of 60 samples" in (said := capsys.readouterr().out) and all(
        reason in said for reason in made.discarded
    )
    assert all({"prompt", "parents", "round"} <= set(row) for row in notes(made))


@each
def test_a_generator_that_never_answers(method, make):
    made = make(method, Fixed(lambda prompt, j: None), budget=3, tries=10)
    assert (
        made.samples.empty
        and set(made.discarded) <= {"no answer", "no plan", "no attributes"}
        and 0 < made.discarded.total() <= 30
    )
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
    assert made.discarded == expected.discarded and again.calls == whole.calls - whole.calls // 2, (
        "finished batches are not asked again"
    )
    third = Writer(GARBAGE, die_at=0)
    pd.testing.assert_frame_equal(make(method, third, work=tmp_path / "broken").samples, expected.samples)


@each
def test_a_dull_generator_ends(method, make):
    made = make(method, Fixed(lambda prompt, j: "the same answer to it all ."), budget=5, tries=6)
    assert len(made.samples) <= 1 and made.discarded["seen before"] > 0


@each
def test_nothing_to_start_from(method, backbone, refused):
    assert "seed set" in refused(lambda: BASELINES[method](TASK, [" "], Writer(), 5, backbone=backbone))
    assert "budget" in refused(lambda: BASELINES[method](TASK, SEEDS, Writer(), 0, backbone=backbone))


def test_results_are_stored_whole(make, tmp_path):
    made = make("Alpaca", Writer(GARBAGE))
    made.save(tmp_path)
    back = Result.load(tmp_path)
    pd.testing.assert_frame_equal(back.samples, made.samples)
    assert (back.method, back.discarded) == ("Alpaca", made.discarded)
    table = discarded_table(
        {"Alpaca": made, "none": Result("none", made.samples[:0], made.discarded.__class__())}
    )
    assert (
        table["count"].sum() == made.discarded.total()
        and table["count"].is_monotonic_decreasing
        and set(table.method) == {"Alpaca"}
    )


# ---- similarity and words


def textbook(a, b):
    a, b = ([w for w, _, _ in module.words_of(t)] for t in (a, b))
    row = [0] * (len(b) + 1)
    for x in a:
        last, row = row, [0]
        for j, y in enumerate(b):
            row.append(last[j] + 1 if x == y else max(row[-1], last[j + 1]))
    return 2 * row[-1] / max(len(a) + len(b), 1)


def test_rouge_l_is_the_textbooks():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(0, 30, 300)] + [
        "",
        "?!",
        "x" * 9,
        " ".join("abc" * 90),
        "Über DEN Wolken, 茶 茶",
        "über den wolken 茶",
    ]
    there = Novelty(texts)
    for text in [*texts[:4], *texts[-6:]]:
        assert np.allclose(there.similarities(text), [textbook(text, t) for t in texts])
    assert Novelty().closest("a") == (0.0, "") and there.closest("Über den Wolken 茶 茶")[0] == 1.0


def test_content_words_are_told_by_frequency():
    words = Vocabulary([f"the {w} is here" for w in WORDS], common=0.1)
    assert (
        words.content("The badan is HERE , badan") == ["badan"]
        and words.content("the is") == ["the", "is"]
        and words.content("…") == ["…"]
    )
    rng = np.random.default_rng(0)
    assert (
        sorted(words.pick(rng, ["the badan", "the defer and kukin"], 3)) == ["badan", "defer", "kukin"]
        or len(set(words.pick(rng, ["the badan", "the defer and kukin"], 3))) == 3
    )
    assert (
        "badan" not in words.rare(rng, 200, avoid=["badan"])
        and len(set(words.rare(rng, 50))) == 50
        and Vocabulary([]).rare(rng, 2) == []
    )


def test_rare_words_are_drawn_more_often():
    words = Vocabulary(["often x"] * 30 + ["seldom y"] + ["z"] * 900, common=0.5)
    drawn = [words.rare(np.random.default_rng(i), 1, avoid=["x", "y", "z"])[0] for i in range(200)]
    assert drawn.count("seldom") > 150
    even = [words.rare(np.random.default_rng(i), 1, avoid=["x", "y", "z"], power=0.0)[0] for i in range(200)]
    assert 60 < even.count("seldom") < 140


# ---- wordings


def test_the_planted_wording_is_what_the_tiny_model_was_taught():
    wording = planted_wording(TASK)
    for name in ("few_shot", "evolve", "broaden", "from_plan", "in_role", "from_attributes"):
        assert wording.ask(
            name,
            words=["lock", "wall"],
            text="{x}",
            examples=SEEDS,
            plan="p",
            persona="q",
            attributes="r",
            operation="o",
            count="1",
        ) == [{"role": "user", "content": "write a message about : lock , wall ."}]
    assert not any((wording.plan, wording.describe, wording.equal, wording.quality, wording.rank))
    assert "planted_world" not in inspect.getsource(module) and "lexicon" not in inspect.getsource(module), (
        "no ground truth"
    )


def test_the_natural_wording_speaks_of_the_task():
    values = dict(
        words=["w"],
        text="{old}",
        examples=["one {x}", "two"],
        plan="the plan",
        persona="a cook",
        attributes="a: b",
        operation="adds {y}",
        count="7",
        old="o",
        new="n",
        first="f",
        second="s",
    )
    for kind, more in (("message", True), ("instruction", False)):
        task = type("Custom", (), dict(goal="teach patience", kind=kind))
        for f in module.fields(module.Wording)[:12]:
            text = natural_wording(task).ask(f.name, **values)[0]["content"]
            assert kind in text or f.name == "rank", f.name
            assert "None" not in text and "{examples}" not in text
        assert ("intent only" in natural_wording(task).few_shot) is more
    assert len(natural_wording(TASK).ask("few_shot", examples=["word " * 900])[0]["content"].split()) < 160, (
        "long examples are cut"
    )


# ---- Alpaca


@pytest.mark.parametrize(
    "text,fault",
    [
        ("Name three rivers of France.", ""),
        ("Why is the sky blue at noon?", ""),
        ("Too short here", "wrong length"),
        ("word " * 151, "wrong length"),
        ("Draw a picture of a tree", "needs another medium"),
        ("Plot the graph of x squared", "needs another medium"),
        ("Write a program that sorts names", "asks for a program"),
        ("* list all the rivers", "odd beginning"),
        ("茶 is what exactly in English", "odd beginning"),
    ],
)
def test_alpacas_form_check(text, fault):
    assert alpaca_fault(text) == fault


def test_the_medium_check_is_off_where_words_are_only_words():
    assert alpaca_fault("first the map , then the file", media=False) == ""


def test_alpaca_refuses_a_near_copy_and_keeps_a_new_text(make):
    copy, new = (
        SEEDS[0].replace(SEEDS[0].split()[-2], "other"),
        "quite another thing is said in this one here",
    )
    replies = iter(
        [copy, new, new.replace("quite", "yet"), *["nothing alike at all , word after word after that"] * 99]
    )
    made = make("Alpaca", Fixed(lambda prompt, j: next(replies)), budget=2)
    assert (
        copy not in made.samples.text.tolist()
        and made.samples.text[0] == new
        and made.discarded["too similar"] >= 2
    )
    assert all(row["rouge"] <= 0.7 for row in notes(made))
    replies = iter([copy] * 99)
    assert make(
        "Alpaca", Fixed(lambda prompt, j: next(replies)), budget=1, novelty=0.99
    ).samples.text.tolist() == [copy], "the threshold decides"


def test_alpaca_shows_three_seed_texts_and_never_a_generated_one(make):
    made = make("Alpaca", budget=40)
    assert (
        all(len(row["parents"]) == 3 and set(row["parents"]) <= set(SEEDS) for row in notes(made))
        and notes(made)[-1]["round"] > 0
    )


def test_lists_are_split_and_a_cut_item_is_dropped(make):
    assert (
        split_list("### 4. One.\n### 5) Two\nlines.\n###") == [" One.\n", " Two\nlines.\n"]
        and split_list("Only this.") == ["Only this."]
        and split_list("### 1. cut") == [""]
    )
    lm = Fixed(
        lambda prompt, j: (
            "".join(
                f"### {i}. {Writer().reply([{'role': 'user', 'content': prompt}], i, 0)}\n" for i in range(5)
            )
            + "### 6. this one is cut off"
        )
    )
    made = make("Alpaca", lm, items=6, budget=10)
    assert (
        len(made.samples) == 10
        and not made.samples.text.str.contains("cut off").any()
        and "Write 6 more messages" in lm.asked[0]
        and len(lm.asked) < 12
    )


# ---- Evol-Instruct

OLD, EVOLVED = "Name a river in France.", "Name a river in France that large ships can use all year."


@pytest.mark.parametrize(
    "new,answer,verdict,fault",
    [
        (EVOLVED, "The Seine.", "Different", ""),
        (EVOLVED, "The Seine.", None, ""),
        (EVOLVED, "The Seine.", "Equal", "no gain"),
        (EVOLVED, "I am sorry, I cannot help.", "Different", "apology"),
        (EVOLVED, "Sorry to say " + "it is long " * 40, "Different", ""),
        (EVOLVED, "... the , of !", "Different", "no content"),
        (EVOLVED, None, "Different", "no answer"),
        ("#Rewritten Prompt#: " + EVOLVED, "The Seine.", "Different", "repeats the request"),
        ("The new message is a river", "The Seine.", "Different", "repeats the request"),
    ],
)
def test_evolution_elimination(new, answer, verdict, fault):
    assert evolution_fault(OLD, new, answer, Vocabulary([]), verdict, judged=True) == fault


def test_without_a_judge_an_evolution_must_bring_a_new_word():
    words = Vocabulary([f"the {w} is in it" for w in WORDS])
    assert evolution_fault(
        "the badan is in it", "is it the badan", "is it the badan", words
    ) == "no gain" and not evolution_fault("the badan is in it", "is it the defer", "is it the defer", words)


def test_evolutions_build_on_evolutions_up_to_four_rounds(make):
    made = make("Evol-Instruct", budget=90)
    rows = notes(made)
    known = set(SEEDS) | set(made.samples.text)
    assert {row["depth"] for row in rows} == {1, 2, 3, 4} and all(len(row["parents"]) == 1 for row in rows)
    depth = dict(zip(made.samples.text, (row["depth"] for row in rows))) | dict.fromkeys(SEEDS, 0)
    assert all(depth[row["parents"][0]] == row["depth"] - 1 for row in rows if row["parents"][0] in known)
    assert {row["operation"] for row in rows} == {"broader", *natural_wording(TASK).operations}
    assert {row["depth"] for row in notes(make("Evol-Instruct", budget=30, rounds=1))} == {1}


def test_instructions_are_answered_before_they_are_kept(make, backbone):
    task = type(
        "Instructions",
        (),
        dict(
            name="i",
            goal="g",
            kind="instruction",
            sample_label=1,
            fault=staticmethod(lambda t: ""),
            clean=staticmethod(str.strip),
            prompts=TASK.prompts,
        ),
    )
    lm = Fixed(
        lambda prompt, j: (
            "Sorry, no."
            if prompt.startswith("evolved")
            else JUDGING["Equal or Different"]
            if "Equal or" in prompt
            else f"evolved {Writer().reply([{'role': 'user', 'content': prompt}], 0, 0)}"
        )
    )
    made = evol_instruct(task, SEEDS, lm, 3, tries=5)
    assert made.samples.empty and made.discarded["apology"] == 15


# ---- Magpie


def test_magpie_asks_nothing_and_filters_by_length_grade_and_answer(make):
    texts = ["too short now", " ".join(WORDS[:70]), *(f"{' '.join(WORDS[i : i + 5])} ?" for i in range(8))]
    count = iter(range(10**6))

    def reply(prompt, j):
        if "Excellent, Good" in prompt:
            return "Poor" if WORDS[0] in prompt.split() else "I cannot say"
        if prompt in texts:
            return "word " * (1 + texts.index(prompt)) if texts.index(prompt) != 9 else None
        return texts[next(count) % len(texts)]

    made = make("Magpie", Fixed(reply), budget=4, oversample=1.5, tries=3, min_words=4, max_words=60)
    assert made.samples.text.tolist() == texts[8:4:-1], (
        "the longest answers, longest first; an unclear grade is no objection"
    )
    assert (
        made.discarded["low quality"] == 1
        and made.discarded["shorter answer"] == 2
        and made.discarded["length filter"] == 2
        and made.discarded["no answer"] == 1
    )
    assert {row["prompt"] for row in notes(made)} == {""} and all(
        row["parents"] == [] and row["answer"] for row in notes(made)
    )


@pytest.mark.parametrize(
    "template,expected",
    [
        (None, "<bos> <user>"),
        (
            "{% for m in messages %}{{ '<user> sys : ' + m['content'] + ' <end>' }}{% endfor %}",
            "<user> sys :",
        ),
    ],
)
def test_the_pre_query_part_is_the_tokenizers_own(template, expected, backbone):
    words = word_tokenizer(["sys : a", *SEEDS])
    if template:
        words.chat_template = template
    assert words.convert_ids_to_tokens(pre_query_ids(words)) == expected.split()


def test_user_turns_follow_the_template_and_do_not_depend_on_the_batch(backbone):
    asks = [[{"role": "user", "content": f"draw {i}"}] for i in range(5)]
    settings = dict(n=2, max_new_tokens=8, temperature=1.0, top_p=1.0, seed=3)
    one, many = (
        UserTurns(LocalModel(backbone.model, backbone.tokenizer, b)).generate(asks, **settings)
        for b in (1, 4)
    )
    assert one == many and len({t for row in one for t in row}) > 5
    greedy = UserTurns(LocalModel(backbone.model, backbone.tokenizer, 4)).generate(
        asks, **{**settings, "temperature": 0.0, "n": 1}
    )
    assert len({row[0] for row in greedy}) == 1, "the request itself is never read"
    ids = torch.tensor([pre_query_ids(backbone.tokenizer)])
    expected = backbone.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )[0, ids.shape[1] :]
    text = backbone.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert greedy[0][0] == (text or None)


def test_magpie_with_a_chat_endpoint(make, refused):
    chat = Fixed(lambda prompt, j: "x")
    chat.opens_user_turns = False
    assert "local model" in refused(lambda: make("Magpie", chat))
    with pytest.raises(NoUserTurns):
        user_turns(chat)


def test_magpie_on_a_local_model(make, backbone):
    local = LocalModel(backbone.model, backbone.tokenizer, 16, name="tiny")
    made = make("Magpie", local, wording=planted_wording(TASK), budget=3, max_new_tokens=10)
    assert len(made.samples) == 3 and set(made.samples.generator) == {"tiny"}


# ---- CoT-Self-Instruct


def test_answer_consistency():
    assert (
        own_answer("What is 3 + 4?\nAnswer: 7") == ("What is 3 + 4?", "7")
        and own_answer("What is it?\n**Answer:** seven.") == ("What is it?", "seven")
        and own_answer("No answer: here") == ("No answer: here", "")
    )
    assert (
        consistent("7", ["It is\nAnswer: 7", "7.", "8"])
        and not consistent("7", ["8", "8", "7"])
        and not consistent("7", ["7", "8"])
        and not consistent("7", [])
    )


def test_a_text_with_its_own_answer_is_kept_only_if_the_majority_agrees(make):
    right, wrong = "what is the sum of three and four", "what is the sum of four and four"

    def reply(prompt, j):
        if prompt == right:
            return ["Answer: 7", "Answer: 7", "Answer: 9"][j % 3]
        if prompt == wrong:
            return f"Answer: {j}"
        return (
            f"{right if 'badan' in prompt else wrong}\nAnswer: 7"
            if "Plan for" in prompt
            else ("badan" if j == 0 and len(prompt) % 2 else "defer")
        )

    made = make("CoT-Self-Instruct", Fixed(reply), budget=2, tries=20)
    assert (
        made.samples.text.tolist() == [right]
        and made.discarded["inconsistent answers"] == 1
        and notes(made)[0]["answer"] == "7"
    )


def test_the_lowest_reward_decides():
    assert lowest_reward_faults([[0.9, 0.2], [0.6, 0.5], [], [0.3, 0.4]], 0.5) == [
        "low worst answer",
        "",
        "no answer",
        "",
    ]
    assert (
        lowest_reward_faults([[0.1], [0.2]], 0.0) == ["", ""]
        and lowest_reward_faults([], 0.5) == []
        and lowest_reward_faults([[]], 0.5) == ["no answer"]
    )
    rewards = agreement(
        ["a", "b", "c"], [["take the bus", "take the bus", "take a bus"], ["yes", "no"], ["alone"]]
    )
    assert min(rewards[0]) > 0.5 and rewards[1] == [0.0, 0.0] and rewards[2] == [0.0]


def test_cot_keeps_the_better_half_by_any_reward(make):
    reward = lambda texts, answers: [[float(len(t)), 999.0] for t in texts]
    made = make("CoT-Self-Instruct", budget=20, drop=0.5, reward=reward)
    assert made.discarded["low worst answer"] >= 5 and all(
        row["lowest_reward"] == len(t) for row, t in zip(notes(made), made.samples.text)
    )
    assert make("CoT-Self-Instruct", budget=20, drop=0.0, reward=reward).discarded["low worst answer"] == 0
    assert all(row["plan"] and len(row["parents"]) == 2 for row in notes(made))


# ---- SAO


def test_likelihoods_are_the_models(backbone):
    lm, asks = (
        LocalModel(backbone.model, backbone.tokenizer, 2),
        [[{"role": "user", "content": t}] for t in SEEDS[:5]],
    )
    replies = [*BACKGROUND[:4], BACKGROUND[4] + " " + BACKGROUND[5]]
    found = likelihoods(lm, asks, replies)
    for c, reply, value in zip(asks, replies, found):
        p, r = prompt_ids(lm.tokenizer, c), lm.tokenizer(reply, add_special_tokens=False)["input_ids"]
        logp = backbone.model(torch.tensor([p + r])).logits[0].log_softmax(-1)
        assert np.isclose(
            value, np.mean([logp[len(p) + i - 1, t].item() for i, t in enumerate(r)]), atol=1e-4
        )


def test_sao_keeps_the_text_that_the_model_itself_prefers(make):
    def judge(prompt, j):
        if "A or B" not in prompt:
            return Writer().reply([{"role": "user", "content": prompt}], 0, j)
        first, second = (prompt.split(f"\n{x}: ")[1].split("\n")[0] for x in "AB")
        return "A" if first < second else "B"

    made = make("SAO", Fixed(judge), budget=10)
    assert (
        all(text < row["rejected"] for text, row in zip(made.samples.text, notes(made)))
        and made.discarded["lost the ranking"] >= 10
    )
    biased = make("SAO", Fixed(lambda p, j: "B" if "A or B" in p else judge(p, j)), budget=10)
    assert len(biased.samples) == 10, "a judge that likes a position decides nothing"
    lonely = make("SAO", Fixed(lambda p, j: None if j else judge(p, j)), budget=3, tries=10)
    assert lonely.samples.empty and lonely.discarded["no pair"] > 0


def test_sao_without_a_judge_ranks_by_likelihood(make, backbone, refused):
    local = LocalModel(backbone.model, backbone.tokenizer, 16)
    made = make("SAO", local, wording=planted_wording(TASK), budget=4, max_new_tokens=10)
    for text, row in zip(made.samples.text, notes(made)):
        good, bad = likelihoods(
            local, [[{"role": "user", "content": row["prompt"]}]] * 2, [text, row["rejected"]]
        )
        assert good >= bad and len(row["persona"].split(" , ")) == 3
    assert len(made.samples) == 4 and "natural wording" in refused(
        lambda: make("SAO", Writer(), wording=planted_wording(TASK))
    )


# ---- Prismatic Synthesis


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_projected_gradients_are_those_of_autograd(kind, backbone):
    torch.manual_seed(1)
    b = Backbone(tiny_model(kind, len(backbone.tokenizer), 32, 2), backbone.tokenizer, layer=1, max_length=64)
    projected, tokens = projections(b, 100, 0), tokenize(b.tokenizer, SEEDS[:3], 64)
    found = batch_gradients(b, *pad(tokens, 0, "cpu"), projected)
    for row, t in zip(found, tokens):
        inputs, keep_BT = pad([t], 0, "cpu")
        logits = b.model(**inputs).logits[:, :-1][keep_BT[:, 1:]]
        b.model.zero_grad()
        torch.nn.functional.cross_entropy(
            logits, inputs["input_ids"][:, 1:][keep_BT[:, 1:]], reduction="sum"
        ).backward()
        expected = torch.cat([(P.T @ m.weight.grad.T @ Q).flatten() for m, P, Q in projected])
        assert torch.allclose(row, expected, atol=1e-3 * expected.abs().max())


def test_gradients_do_not_need_trainable_weights_and_leave_nothing_behind(backbone):
    before = text_gradients(backbone, SEEDS, 100)
    for p in backbone.model.parameters():
        p.requires_grad_(False)
    try:
        frozen = text_gradients(backbone, SEEDS, 100, batch_tokens=10)
    finally:
        for p in backbone.model.parameters():
            p.requires_grad_(True)
    assert (
        np.allclose(before, frozen, atol=1e-4)
        and np.allclose(np.linalg.norm(before, axis=1), 1)
        and all(p.grad is None for p in backbone.model.parameters())
    )
    assert not any(m._forward_hooks for m in backbone.model.modules())


def test_prismatic_refuses_the_crowded_cluster_and_keeps_the_sparse_one(make, monkeypatch):
    crowd = lambda t: np.array([1.0, 0.0]) if t in SEEDS[:10] or "crowded" in t else np.array([0.0, 1.0])
    monkeypatch.setattr(
        module,
        "text_gradients",
        lambda backbone, texts, *rest: np.stack([crowd(t) for t in texts]).astype(np.float32),
    )
    replies = [f"{' '.join(WORDS[i : i + 5])} {'crowded' if i % 2 else 'sparse'}" for i in range(100)]
    count = iter(replies)
    made = make("Prismatic Synthesis", Fixed(lambda p, j: next(count)), budget=4)
    assert made.samples.text.str.contains("sparse").all() and made.discarded["crowded cluster"] > 0
    assert (
        sparse_clusters(np.array([9, 1, 3])).tolist() == [False, True, True]
        and sparse_clusters(np.array([4, 4])).all()
    )


def test_prismatics_pool_grows(make):
    made = make("Prismatic Synthesis", budget=60, batch=8)
    assert any(set(row["parents"]) & set(made.samples.text) for row in notes(made)), (
        "kept texts serve as examples"
    )


# ---- SynAlign


def test_the_most_uncertain_text_comes_next():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(30, 3))
    length = median_length(z)
    groups = demonstrations(z, 2, np.random.default_rng(1), length)
    chosen, k = list(next(groups)), rbf(z, z, length)
    for _ in range(5):
        variance = 1 - np.einsum(
            "in,nm,im->i",
            k[:, chosen],
            np.linalg.inv(k[np.ix_(chosen, chosen)] + 1e-2 * np.eye(len(chosen))),
            k[:, chosen],
        )
        group = next(groups)
        assert group[0] == variance.argmax() and group[1] == np.argsort(-k[group[0]])[1]
        chosen += group


def test_all_texts_get_their_turn_and_it_never_ends():
    z = np.random.default_rng(0).normal(size=(20, 8))
    groups = demonstrations(z, 3, np.random.default_rng(0), median_length(z))
    shown = [next(groups) for _ in range(60)]
    assert {i for g in shown for i in g} == set(range(20)) and all(len(set(g)) == 3 for g in shown)
    assert next(
        demonstrations(np.ones((2, 3)), 4, np.random.default_rng(0), median_length(np.ones((2, 3))))
    ) in ([0, 1], [1, 0])


def test_the_median_heuristic_makes_neighbours_and_a_tenth_makes_none():
    z = np.random.default_rng(0).normal(size=(200, 768))
    off = ~np.eye(200, dtype=bool)
    assert rbf(z, z, 0.1)[off].max() < 1e-30 and 0.5 < np.median(rbf(z, z, median_length(z))[off]) < 0.7


def test_mmd_weights_move_the_sample_to_the_real_texts():
    rng = np.random.default_rng(0)
    real, near, far = rng.normal(size=(40, 2)), rng.normal(size=(20, 2)), rng.normal(size=(60, 2)) + 6
    w = mmd_weights(np.concatenate([near, far]), real, median_length(real))
    assert np.isclose(w.sum(), 1) and (w > 0).all() and w[:20].sum() > 0.95


def test_synalign_resamples_towards_the_seed_set(make, monkeypatch):
    monkeypatch.setattr(
        module,
        "embed",
        lambda backbone, texts: np.array([[5.0, 5.0] if "far" in t else [hash_of(t), 0.0] for t in texts]),
    )
    hash_of = lambda t: derived_seed(t) % 1000 / 1000
    count = iter(f"{' '.join(WORDS[i : i + 5])} {'far' if i % 2 else 'near'}" for i in range(100))
    lm = Fixed(lambda p, j: JUDGING["JSON object"] if "JSON object" in p else next(count))
    made = make("SynAlign", lm, budget=10)
    assert made.samples.text.str.contains("near").mean() > 0.8 and made.discarded["not resampled"] == 10
    assert all(
        row["attributes"] == "subject: locks; style: short" and len(row["parents"]) == 4
        for row in notes(made)
    )
    writing = [p for p in lm.asked if "JSON object" not in p]
    assert writing and not any(seed in p for p in writing for seed in SEEDS), (
        "the second stage sees attributes only"
    )


@pytest.mark.parametrize(
    "reply,attributes",
    [
        (None, ""),
        (" ", ""),
        ('{"a": 1, "b": ["x"]}', "a: 1; b: ['x']"),
        ("Here: {not json}", "Here: {not json}"),
        ("short and angry", "short and angry"),
        ('{"a": ' * 3000, "{" + '"a": ' + '{"a": ' * 39 + "..."),
    ],
)
def test_attributes_of_any_reply(reply, attributes):
    assert attributes_of(reply)[:40] == attributes[:40]


def test_embeddings_are_means_of_residuals(backbone):
    z = embed(backbone, SEEDS)
    batch = next(backbone.residuals(SEEDS[:1]))
    mean = batch.x_ND.mean(0).numpy()
    assert np.allclose(z[0], mean / np.linalg.norm(mean), atol=1e-5) and np.allclose(
        np.linalg.norm(z, axis=1), 1
    )


@pytest.mark.parametrize("method", ["Prismatic Synthesis", "SynAlign"])
def test_methods_that_read_a_model_say_so(method, make, refused):
    assert "backbone" in refused(lambda: make(method, backbone=None))


# ---- the loop


def test_a_conversation_that_comes_twice_is_drawn_twice():
    job = Job(TASK, SEEDS, Writer(), 5)
    same = [({}, [{"role": "user", "content": "one"}])] * 3 + [({}, [{"role": "user", "content": "two"}])]
    replies = job.ask("x", same, 0, 2)
    assert (
        len({t for row in replies for t in row}) == 8
        and job.ask("x", same, 0, 2) == replies
        and job.ask("x", same, 1, 2) != replies
    )


def test_texts_are_compared_without_case_and_punctuation():
    discarded, seen = module.Counter(), {"a lock and a wall"}
    found = candidates_of(
        TASK,
        [({}, [{"role": "user", "content": "p"}])],
        [["A lock, and a wall!", "a lock and a fence", "A lock and a fence ."]],
        seen,
        discarded,
    )
    assert [c["text"] for c in found] == ["a lock and a fence"] and discarded == {"seen before": 2}
