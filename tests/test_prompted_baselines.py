"Alpaca, Evol-Instruct, Magpie, CoT-Self-Instruct, SAO: each filter refuses what it should."

import dataclasses

import numpy as np
import pytest
import torch
from baseline_writers import (
    BACKGROUND,
    JUDGING,
    SEEDS,
    TASK,
    WORDS,
    Fixed,
    Writer,
    notes,
    sentence,
    user,
)

from fac_synthesis.data.planted_tasks import planted_wording
from fac_synthesis.models.backbone import Backbone, tiny_model, word_tokenizer
from fac_synthesis.models.language_models import LocalModel, Sampling, prompt_ids
from fac_synthesis.models.prompts import natural_wording
from fac_synthesis.synthesis.baseline_rounds import Job, Rounds
from fac_synthesis.synthesis.contrastive_pairs import Decoding
from fac_synthesis.synthesis.prompted_baselines import (
    Dialogues,
    Evolution,
    NoUserTurns,
    UserTurns,
    agreement,
    alpaca,
    alpaca_fault,
    consistent,
    cot_self_instruct,
    evol_instruct,
    evolution_fault,
    final_answer,
    likelihoods,
    list_parts,
    lowest_reward_faults,
    magpie,
    own_answer,
    pre_query_ids,
    sao,
    split_list,
    text_and_answer,
    user_turns,
)
from fac_synthesis.synthesis.text_similarity import Vocabulary


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    words = word_tokenizer(BACKGROUND + SEEDS + ["write a message about : lock , wall . like this not"])
    return Backbone(tiny_model("llama", len(words), 32, 2), words, layer=1, max_length=64)


def job_of(lm, budget=20, **more):
    "A job on the small seed set."
    return Job(TASK, SEEDS, lm, budget, **{**dict(background=BACKGROUND, batch=16), **more})


def in_turn(replies):
    "A generator that says these texts one after the other."
    left = iter(replies)
    return Fixed(lambda prompt, j: next(left))


# ---- Alpaca


@pytest.mark.parametrize(
    "text, fault",
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


def test_alpaca_refuses_a_near_copy_and_keeps_a_new_text():
    copy = SEEDS[0].replace(SEEDS[0].split()[-2], "other")
    new = "quite another thing is said in this one here"
    alike = ["nothing alike at all , word after word after that"] * 99
    made = alpaca(job_of(in_turn([copy, new, new.replace("quite", "yet"), *alike]), budget=2))
    assert copy not in made.samples.text.tolist() and made.samples.text[0] == new
    assert made.discarded["too similar"] >= 2 and all(row["rouge"] <= 0.7 for row in notes(made))
    made = alpaca(job_of(in_turn([copy] * 99), budget=1), novelty=0.99)
    assert made.samples.text.tolist() == [copy], "the threshold decides"


def test_alpaca_shows_three_seed_texts_and_never_a_generated_one():
    rows = notes(alpaca(job_of(Writer(), budget=40)))
    assert all(len(row["parents"]) == 3 and set(row["parents"]) <= set(SEEDS) for row in rows)
    assert rows[-1]["round"] > 0


def test_lists_are_split_and_a_cut_item_is_dropped():
    assert split_list("### 4. One.\n### 5) Two\nlines.\n###") == [" One.\n", " Two\nlines.\n"]
    assert split_list("Only this.") == ["Only this."] and split_list("### 1. cut") == [""]
    assert split_list("###\n###\n###") == [] and list_parts("### 1. cut") == [("", {})]

    def reply(prompt, j):
        items = [f"### {i}. {sentence(prompt, i)}\n" for i in range(5)]
        return "".join(items) + "### 6. this one is cut off"

    lm = Fixed(reply)
    made = alpaca(job_of(lm, budget=10), items=6)
    assert len(made.samples) == 10 and not made.samples.text.str.contains("cut off").any()
    assert "Write 6 more messages" in lm.asked[0] and len(lm.asked) < 12


# ---- Evol-Instruct

OLD, EVOLVED = "Name a river in France.", "Name a river in France that large ships can use all year."


@pytest.mark.parametrize(
    "new, answer, verdict, fault",
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
    same, other = "is it the badan", "is it the defer"
    assert evolution_fault("the badan is in it", same, same, words) == "no gain"
    assert not evolution_fault("the badan is in it", other, other, words)


def test_evolutions_build_on_evolutions_up_to_four_rounds():
    made = evol_instruct(job_of(Writer(), budget=90))
    rows = notes(made)
    known = set(SEEDS) | set(made.samples.text)
    assert {row["depth"] for row in rows} == {1, 2, 3, 4} and all(len(row["parents"]) == 1 for row in rows)
    depth = dict.fromkeys(SEEDS, 0) | {t: row["depth"] for t, row in zip(made.samples.text, rows)}
    for row in rows:
        (parent,) = row["parents"]
        assert parent not in known or depth[parent] == row["depth"] - 1
    operations = natural_wording(TASK.kind, TASK.goal).operations
    assert {row["operation"] for row in rows} == {"broader", *operations}
    once = evol_instruct(job_of(Writer(), budget=30), max_depth=1)
    assert {row["depth"] for row in notes(once)} == {1}


def test_a_failed_evolution_goes_back_and_a_deep_one_leaves():
    evolution = Evolution(Rounds(job_of(Writer()), "Evol-Instruct", Decoding()), max_depth=1)
    evolution.take(np.random.default_rng(0), 3)
    first, second, third = (text for text, _ in evolution.current)
    evolution.give_back({1: "evolved"})
    assert not evolution.current and list(evolution.pool)[-2:] == [(first, 0), (third, 0)]
    assert second not in {text for text, _ in list(evolution.pool)[-2:]}


def test_instructions_are_answered_before_they_are_kept():
    task = dataclasses.replace(TASK, name="i", kind="instruction", fault=lambda text: "")

    def reply(prompt, j):
        if prompt.startswith("evolved"):
            return "Sorry, no."
        return JUDGING["Equal or Different"] if "Equal or" in prompt else f"evolved {sentence(prompt)}"

    made = evol_instruct(Job(task, SEEDS, Fixed(reply), 3, tries=5))
    assert made.samples.empty and made.discarded["apology"] == 15


# ---- Magpie


def test_magpie_asks_nothing_and_filters_by_length_grade_and_answer():
    texts = ["too short now", " ".join(WORDS[:70]), *(f"{' '.join(WORDS[i : i + 5])} ?" for i in range(8))]
    count = iter(range(10**6))

    def reply(prompt, j):
        if "Excellent, Good" in prompt:
            return "Poor" if WORDS[0] in prompt.split() else "I cannot say"
        if prompt in texts:
            place = texts.index(prompt)
            return "word " * (1 + place) if place != 9 else None
        return texts[next(count) % len(texts)]

    job = job_of(Fixed(reply), budget=4, tries=3)
    made = magpie(job, oversample=1.5, min_words=4, max_words=60)
    assert made.samples.text.tolist() == texts[8:4:-1], (
        "the longest answers, longest first; an unclear grade is no objection"
    )
    discarded = {"low quality": 1, "shorter answer": 2, "length filter": 2, "no answer": 1}
    assert {reason: made.discarded[reason] for reason in discarded} == discarded
    assert {row["prompt"] for row in notes(made)} == {""}
    assert all(row["parents"] == [] and row["answer"] for row in notes(made))


@pytest.mark.parametrize(
    "template, expected",
    [
        (None, "<bos> <user>"),
        (
            "{% for m in messages %}{{ '<user> sys : ' + m['content'] + ' <end>' }}{% endfor %}",
            "<user> sys :",
        ),
    ],
)
def test_the_pre_query_part_is_the_tokenizers_own(template, expected):
    words = word_tokenizer(["sys : a", *SEEDS])
    if template:
        words.chat_template = template
    assert words.convert_ids_to_tokens(pre_query_ids(words)) == expected.split()


def test_user_turns_follow_the_template_and_do_not_depend_on_the_batch(backbone):
    asks = [user(f"draw {i}") for i in range(5)]
    settings = dict(n=2, max_new_tokens=8, temperature=1.0, top_p=1.0, seed=3)

    def turns(batch_size, **changed):
        local = LocalModel(backbone.model, backbone.tokenizer, batch_size)
        return UserTurns(local).generate(asks, **{**settings, **changed})

    one, many = turns(1), turns(4)
    assert one == many and len({t for row in one for t in row}) > 5
    greedy = turns(4, temperature=0.0, n=1)
    assert len({row[0] for row in greedy}) == 1, "the request itself is never read"
    ids = torch.tensor([pre_query_ids(backbone.tokenizer)])
    mask = torch.ones_like(ids)
    expected = backbone.model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    text = backbone.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert greedy[0][0] == (text or None)


@pytest.mark.parametrize("kind, expected", [("answer", "so it is"), ("opinion", "i like maps so it is")])
def test_a_dialogue_is_the_reply_or_the_turn_with_its_reply(kind, expected):
    turns = Fixed(lambda prompt, j: "i like maps" if "1" in prompt else None)
    replies = Fixed(lambda prompt, j: "so it is" if prompt == "i like maps" else None)
    drawn = Dialogues(turns, replies, kind).answers([user("draw 1"), user("draw 2")], Sampling(n=2))
    assert drawn == [[expected] * 2, [None] * 2] and replies.asked == ["i like maps"], (
        "each turn is asked once"
    )


def test_magpie_with_a_chat_endpoint(refused):
    chat = Fixed(lambda prompt, j: "x")
    chat.opens_user_turns = False
    assert "local model" in refused(lambda: magpie(job_of(chat)))
    with pytest.raises(NoUserTurns):
        user_turns(chat)


def test_magpie_on_a_local_model(backbone):
    local = LocalModel(backbone.model, backbone.tokenizer, 16, name="tiny")
    job = job_of(local, budget=3, wording=planted_wording(TASK))
    made = magpie(job, decoding=Decoding(max_new_tokens=10, temperature=1.0, top_p=1.0))
    assert len(made.samples) == 3 and set(made.samples.generator) == {"tiny"}


# ---- CoT-Self-Instruct


def test_answer_consistency():
    assert own_answer("What is 3 + 4?\nAnswer: 7") == ("What is 3 + 4?", "7")
    assert own_answer("What is it?\n**Answer:** seven.") == ("What is it?", "seven")
    assert own_answer("No answer: here") == ("No answer: here", "")
    assert text_and_answer("No answer: here") == [("No answer: here", dict(answer=""))]
    assert final_answer("It is so.\n\n Seven. ") == "seven" and final_answer(" ") == ""
    assert consistent("7", ["It is\nAnswer: 7", "7.", "8"])
    assert not consistent("7", ["8", "8", "7"]) and not consistent("7", ["7", "8"])
    assert not consistent("7", [])


def test_a_text_with_its_own_answer_is_kept_only_if_the_majority_agrees():
    right, wrong = "what is the sum of three and four", "what is the sum of four and four"

    def reply(prompt, j):
        if prompt == right:
            return ["Answer: 7", "Answer: 7", "Answer: 9"][j % 3]
        if prompt == wrong:
            return f"Answer: {j}"
        if "Plan for" in prompt:
            return f"{right if 'badan' in prompt else wrong}\nAnswer: 7"
        return "badan" if j == 0 and len(prompt) % 2 else "defer"

    made = cot_self_instruct(job_of(Fixed(reply), budget=2, tries=20))
    assert made.samples.text.tolist() == [right] and made.discarded["inconsistent answers"] == 1
    assert notes(made)[0]["answer"] == "7"


def test_the_lowest_reward_decides():
    assert lowest_reward_faults([[0.9, 0.2], [0.6, 0.5], [], [0.3, 0.4]], 0.5) == [
        "low worst answer",
        "",
        "no answer",
        "",
    ]
    assert lowest_reward_faults([[0.1], [0.2]], 0.0) == ["", ""]
    assert lowest_reward_faults([], 0.5) == [] and lowest_reward_faults([[]], 0.5) == ["no answer"]
    answers = [["take the bus", "take the bus", "take a bus"], ["yes", "no"], ["alone"]]
    rewards = agreement(["a", "b", "c"], answers)
    assert min(rewards[0]) > 0.5 and rewards[1] == [0.0, 0.0] and rewards[2] == [0.0]


def test_cot_keeps_the_better_half_by_any_reward():
    def reward(texts, answers):
        return [[float(len(t)), 999.0] for t in texts]

    made = cot_self_instruct(job_of(Writer()), drop=0.5, reward=reward)
    assert made.discarded["low worst answer"] >= 5
    assert all(row["lowest_reward"] == len(t) for row, t in zip(notes(made), made.samples.text))
    assert all(row["plan"] and len(row["parents"]) == 2 for row in notes(made))
    everything = cot_self_instruct(job_of(Writer()), drop=0.0, reward=reward)
    assert everything.discarded["low worst answer"] == 0


# ---- SAO


def test_likelihoods_are_the_models(backbone):
    lm = LocalModel(backbone.model, backbone.tokenizer, 2)
    asks = [user(t) for t in SEEDS[:5]]
    replies = [*BACKGROUND[:4], BACKGROUND[4] + " " + BACKGROUND[5]]
    for conversation, reply, value in zip(asks, replies, likelihoods(lm, asks, replies)):
        p = prompt_ids(lm.tokenizer, conversation)
        r = lm.tokenizer(reply, add_special_tokens=False)["input_ids"]
        logp = backbone.model(torch.tensor([p + r])).logits[0].log_softmax(-1)
        of_reply = [logp[len(p) + i - 1, t].item() for i, t in enumerate(r)]
        assert np.isclose(value, np.mean(of_reply), atol=1e-4)
    assert likelihoods(lm, asks[:2], ["", replies[0]])[0] == -np.inf


def judge(prompt, j):
    "Prefers the text that comes first in the alphabet; writes otherwise."
    if "A or B" not in prompt:
        return sentence(prompt, 0) if not j else Writer().reply(user(prompt), 0, j)
    first, second = (prompt.split(f"\n{x}: ")[1].split("\n")[0] for x in "AB")
    return "A" if first < second else "B"


def test_sao_keeps_the_text_that_the_model_itself_prefers():
    made = sao(job_of(Fixed(judge), budget=10))
    assert all(text < row["rejected"] for text, row in zip(made.samples.text, notes(made)))
    assert made.discarded["lost the ranking"] >= 10


def test_a_judge_that_likes_a_position_decides_nothing():
    biased = Fixed(lambda prompt, j: "B" if "A or B" in prompt else judge(prompt, j))
    assert len(sao(job_of(biased, budget=10)).samples) == 10


def test_sao_needs_two_texts_to_rank():
    lonely = Fixed(lambda prompt, j: None if j else judge(prompt, j))
    made = sao(job_of(lonely, budget=3, tries=10))
    assert made.samples.empty and made.discarded["no pair"] > 0


def test_sao_without_a_judge_ranks_by_likelihood(backbone, refused):
    local = LocalModel(backbone.model, backbone.tokenizer, 16)
    planted = planted_wording(TASK)
    made = sao(job_of(local, budget=4, wording=planted), decoding=Decoding(max_new_tokens=10))
    assert len(made.samples) == 4
    for text, row in zip(made.samples.text, notes(made)):
        good, bad = likelihoods(local, [user(row["prompt"])] * 2, [text, row["rejected"]])
        assert good >= bad and len(row["persona"].split(" , ")) == 3
    assert "natural wording" in refused(lambda: sao(job_of(Writer(), wording=planted)))
