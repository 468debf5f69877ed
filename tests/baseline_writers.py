"What the tests of the baselines share: random words, two generators without a model, a task and its texts."

import json

import numpy as np

from fac_synthesis.data.sources import open_task
from fac_synthesis.models.language_models import LanguageModel, derived_seed
from fac_synthesis.synthesis.baseline_rounds import Result

TASK = open_task("toxicity", "planted")
BEGINNINGS = "ba de fi go ku la me no pu ri so tu".split()
ENDINGS = "bel dan fer gol kin lum mor nas pit ros".split()
WORDS = [beginning + ending for beginning in BEGINNINGS for ending in ENDINGS]
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
    name = "writer"

    def __init__(self, bad=(), die_at=None):
        self.bad, self.die_at = list(bad), die_at
        self.calls, self.given = 0, []

    def content(self):
        return dict(name=self.name, bad=self.bad)

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
    name = "fixed"

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def answers(self, conversations, sampling):
        self.asked += [c[-1]["content"] for c in conversations]
        return [[self.reply(c[-1]["content"], j) for j in range(sampling.n)] for c in conversations]


def user(text):
    "A conversation of one message."
    return [{"role": "user", "content": text}]


def sentence(prompt, attempt=0):
    "What the writer says to a prompt."
    return Writer().reply(user(prompt), attempt, 0)


SEEDS = [sentence(f"seed {i}") for i in range(12)]
BACKGROUND = [sentence(f"background {i}") for i in range(300)]


def notes(result: Result) -> list[dict]:
    "The provenance of the samples."
    return [json.loads(provenance) for provenance in result.samples.provenance]
