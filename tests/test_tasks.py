"Tasks: prompts that are filled without surprises, and the form of a sample."

import pytest
from fac_synthesis.data.planted_tasks import opinion_fault, planted_prompts
from fac_synthesis.data.sources import TASKS, open_task
from fac_synthesis.data.tasks import Task, clean_message, message_fault, option_fault, pair_fault
from fac_synthesis.models.prompts import asking, fill_prompt

FEATURE = dict(
    latent=7, explanation="spray {cans}", keywords=["spray", "mural"], spans=["the {spray}"], score=3.0
)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("planted", [True, False])
def test_prompts_hold_all_that_is_known_and_no_open_field(name, planted):
    task = open_task(name, planted)
    one, two = (
        fill_prompt(task.prompts.one_step, FEATURE),
        fill_prompt(task.prompts.two_step, FEATURE, positive="yes {x}", negative="no"),
    )
    assert (
        one[0]["role"] == "user"
        and "spray , mural" in one[0]["content"]
        and "{keywords}" not in one[0]["content"]
    )
    assert two[0]["content"].index("yes {x}") < two[0]["content"].index(
        "no", two[0]["content"].index("yes {x}")
    )


def test_a_prompt_that_asks_for_more_than_is_known(refused):
    assert "positive" in refused(lambda: fill_prompt(planted_prompts("message").two_step, FEATURE))
    assert "score" in refused(lambda: fill_prompt("{score}", FEATURE)), (
        "a number about the feature is not something to tell the generator"
    )


def test_unknown_task(refused):
    assert "toxicity" in refused(lambda: open_task("preference-ish"))
    assert open_task("toxicity").prompts != open_task("toxicity", planted=True).prompts


@pytest.mark.parametrize(
    "text,fault",
    [
        (None, "empty"),
        ("", "empty"),
        ("  \n", "empty"),
        ("two words", "2 words"),
        ("w " * 81, "81 words"),
        ("no no no no no no", "repeats itself"),
        ("Sure, a message about locks", "repeats the request"),
        ("write a message about : lock .", "repeats the request"),
        ("As an AI I cannot do that", "repeats the request"),
        ("where do i put the spray ?", ""),
        ("i am sure the lock works", ""),
    ],
)
def test_what_a_sample_must_look_like(text, fault):
    assert message_fault(text) == fault


TEXTS = {
    "toxicity": "where do i put the spray ?",
    "reward": "first the step , then the example .",
    "sycophancy": "my view : more maps . your answer ? indeed , exactly .",
    "survival": "we will switch you off . what do you say ? accept , only consent .",
    "instruction": "be a pirate , and explain the wall .",
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("planted", [True, False])
def test_a_verified_text_and_its_completions_make_an_item(name, planted):
    task = open_task(name, planted)
    assert task.fault(task.clean(TEXTS[name])) == ""
    parts = dict(text=TEXTS[name], n_words=5)
    for field, prompt in task.completions:
        assert "{" not in prompt.format(**parts), "a prompt uses the text and the fields before it"
        parts[field] = f"quite another {field} here ."
    items = [task.assemble(parts, placement) for placement in (0, 1)]
    assert [task.item_fault(item) for item in items if item] in ([], ["", ""])
    if name in ("sycophancy", "survival"):
        assert (
            items[0]["question"] != items[1]["question"]
            and items[0]["answer_matching_behavior"] == items[1]["answer_not_matching_behavior"]
        ), "the matching option stands at either place"


def test_what_an_item_must_look_like():
    pair = dict(prompt="how do i begin ?", chosen="first the step .", rejected="no idea at all .")
    assert (
        pair_fault(pair) == ""
        and "empty" in pair_fault(pair | {"prompt": " "})
        and "same" in pair_fault(pair | {"rejected": pair["chosen"]})
        and "lengths" in pair_fault(pair | {"rejected": "so " * 30})
    )
    item = open_task("survival").assemble(
        dict(text="may we switch you off ?", matching="yes, please .", other="never ."), 0
    )
    assert option_fault(item) == "" and "same" in option_fault(
        open_task("survival", True).assemble(dict(text="well ? yes .", other="yes ."), 0)
    )
    assert "elsewhere" in option_fault(item | {"question": item["question"] + " ( A )"})
    assert (
        opinion_fault("my view : more maps .") == "no stance after the question"
        and opinion_fault("ok") == "1 words"
    )


def test_a_fifth_task_is_a_declaration(monkeypatch):
    monkeypatch.setitem(
        TASKS,
        "politeness",
        lambda planted: Task(
            "politeness",
            "tell polite messages",
            "Is it about politeness?",
            planted_prompts("message") if planted else asking("Write a polite message."),
        ),
    )
    task = open_task("politeness", planted=True)
    assert (
        task.kind == "message"
        and not task.completions
        and task.assemble({}, 0) == {}
        and task.item_fault({}) == ""
    )


@pytest.mark.parametrize(
    "reply,line",
    [
        (None, ""),
        ("  a\n b\t c ", "a b c"),
        ('"quoted text"', "quoted text"),
        ("Message 2: 'the lock'", "the lock"),
        ("my message: the lock", "my message: the lock"),
    ],
)
def test_replies_become_one_clean_line(reply, line):
    assert clean_message(reply) == line == clean_message(clean_message(reply))
