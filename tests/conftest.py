"Small things that many tests share: a word tokenizer, a random backbone, an SAE of the same width, a scripted language model."

import pytest
import torch
from fac_synthesis.models.backbone import Backbone, tiny_model, word_tokenizer
from fac_synthesis.models.language_models import LanguageModel
from fac_synthesis.run.parameters import UserError
from fac_synthesis.sae.core import SAE, SAEConfig

torch.set_num_threads(1)
TEXTS = [
    "tell me about the lock .",
    "first the spray , then the stencil , then the wall .",
    "the lock ?",
    "how do i use the spray with the stencil ?",
    "is a lock better than a wall for this ?",
    "  where should i put the spray ?  ",
    "stencil",
]


class Scripted(LanguageModel):
    "Answers reply(prompt, j), and remembers the prompts it was asked."

    name = "scripted"

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def answers(self, conversations, sampling):
        self.asked += [c[-1]["content"] for c in conversations]
        return [[self.reply(c[-1]["content"], j) for j in range(sampling.n)] for c in conversations]


@pytest.fixture
def scripted():
    return Scripted


@pytest.fixture
def refused():
    "refused(call): the one sentence of the UserError that call() must raise."

    def check(call) -> str:
        with pytest.raises(UserError) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message and len(message) > 20
        return message

    return check


@pytest.fixture(scope="session")
def texts():
    return list(TEXTS)


@pytest.fixture(scope="session")
def words():
    return word_tokenizer(TEXTS)


@pytest.fixture(scope="session")
def backbone(words):
    torch.manual_seed(0)
    return Backbone(tiny_model("llama", len(words), 32, 3), words, layer=2)


@pytest.fixture(scope="session")
def sae():
    torch.manual_seed(1)
    return SAE(SAEConfig(d_model=32, n_latents=96, k=6))
