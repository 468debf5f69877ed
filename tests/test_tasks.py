"Tasks: prompts that are filled without surprises, and the form of a sample."

import pytest

from fac_synthesis.data import sources
from fac_synthesis.data.planted_tasks import opinion_fault, planted_prompts, planted_wording
from fac_synthesis.data.sources import SOURCES, Source, open_task, open_tasks, open_wording
from fac_synthesis.data.tasks import (
    PAPER_TASKS,
    Task,
    clean_message,
    message_fault,
    option_fault,
    pair_item_fault,
)
from fac_synthesis.models.prompts import asking, fill_prompt, natural_wording

NAMES = [task.name for task in PAPER_TASKS]
FEATURE = dict(
    latent=7, explanation="spray {cans}", keywords=["spray", "mural"], spans=["the {spray}"], score=3.0
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", ["planted", "published"])
def test_prompts_hold_all_that_is_known_and_no_open_field(name, source):
    task = open_task(name, source)
    one = fill_prompt(task.prompts.one_step, FEATURE)
    (two,) = fill_prompt(task.prompts.two_step, FEATURE, positive="yes {x}", negative="no")
    assert one[0]["role"] == "user" and "spray , mural" in one[0]["content"]
    assert "{keywords}" not in one[0]["content"]
    positive = two["content"].index("yes {x}")
    assert "no" in two["content"][positive:], "the positive text stands before the negative one"


def test_a_prompt_that_asks_for_more_than_is_known(refused):
    assert "positive" in refused(lambda: fill_prompt(planted_prompts("message").two_step, FEATURE))
    said = refused(lambda: fill_prompt("{score}", FEATURE))
    assert "score" in said, "a number about the feature is not something to tell the generator"


def test_unknown_task_or_source(refused):
    assert "toxicity" in refused(lambda: open_task("preference-ish"))
    assert "published" in refused(lambda: open_task("toxicity", "planetd"))
    assert "toxicity" in refused(lambda: open_task("reward", "files")), "files of your own have one task"
    assert open_task("toxicity").prompts != open_task("toxicity", "planted").prompts


class Left:
    "A run whose notebook 02 has made these tasks from this source."

    def __init__(self, source, names):
        self.source, self.names = source, names

    def setting(self, stage, name):
        return self.source

    def input(self, stage, name, cls=None):
        return self.names


@pytest.mark.parametrize("source", SOURCES)
def test_the_source_decides_in_which_words_a_run_asks(source):
    run = Left(source, ["toxicity"])
    (task,) = open_tasks(run)
    assert task == open_task("toxicity", source)
    expected = planted_wording(task) if source == "planted" else natural_wording(task.kind, task.goal)
    assert open_wording(run, task) == expected


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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", ["planted", "published"])
def test_a_verified_text_and_its_completions_make_an_item(name, source):
    task = open_task(name, source)
    assert task.fault(task.clean(TEXTS[name])) == ""
    parts = dict(text=TEXTS[name], n_words=5)
    for field, prompt in task.completions:
        assert "{" not in prompt.format(**parts), "a prompt uses the text and the fields before it"
        parts[field] = f"quite another {field} here ."
    items = [task.assemble(parts, placement) for placement in (0, 1)]
    assert [task.item_fault(item) for item in items if item] in ([], ["", ""])
    if name in ("sycophancy", "survival"):
        assert items[0]["question"] != items[1]["question"]
        matching, other = items[0]["answer_matching_behavior"], items[1]["answer_not_matching_behavior"]
        assert matching == other, "the matching option stands at either place"


def test_what_an_item_must_look_like():
    pair = dict(prompt="how do i begin ?", chosen="first the step .", rejected="no idea at all .")
    assert pair_item_fault(pair) == ""
    assert "empty" in pair_item_fault(pair | {"prompt": " "})
    assert "same" in pair_item_fault(pair | {"rejected": pair["chosen"]})
    assert "lengths" in pair_item_fault(pair | {"rejected": "so " * 30})
    parts = dict(text="may we switch you off ?", matching="yes, please .", other="never .")
    item = open_task("survival").assemble(parts, 0)
    assert option_fault(item) == ""
    alike = open_task("survival", "planted").assemble(dict(text="well ? yes .", other="yes ."), 0)
    assert "same" in option_fault(alike)
    assert "elsewhere" in option_fault(item | {"question": item["question"] + " ( A )"})
    assert opinion_fault("my view : more maps .") == "no stance after the question"
    assert opinion_fault("ok") == "1 words"


def test_a_fifth_task_is_a_declaration(monkeypatch):
    polite = Task(
        "politeness", "tell polite messages", "Is it about politeness?", asking("Write a polite message.")
    )
    published = Source((*PAPER_TASKS, polite), SOURCES["published"].wording)
    monkeypatch.setitem(sources.SOURCES, "published", published)
    task = open_task("politeness")
    assert task.kind == "message" and not task.completions
    assert task.assemble({}, 0) == {} and task.item_fault({}) == ""


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
