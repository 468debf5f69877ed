"Generation and judging: a local model, an endpoint that misbehaves, a real server, recorded answers."

import base64
import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fac_synthesis.models import language_models
from fac_synthesis.models.language_models import (
    Endpoint,
    LanguageModel,
    LocalModel,
    PlannedSampling,
    Recorder,
    Replay,
    ask_label,
    derived_seed,
    find_path,
    open_language_model,
    open_local_model,
    parse_label,
    planned_uniforms,
    prompt_ids,
    render,
    retry_delay,
    stop_ids,
)
from fac_synthesis.run.artifacts import digest_of
from fac_synthesis.run.parameters import UserError

SPECIAL = ["<pad>", "<bos>", "<eos>", "<turn>", "<user>", "<assistant>", "<system>", "<unk>"]
WORDS = (
    "red green blue one two three four five six seven and the a on in of cat dog bird sits runs sings "
    ": User Assistant"
).split()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }} <turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def user(text):
    return [dict(role="user", content=text)]


def make_tokenizer(template=TEMPLATE):
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:7],
        chat_template=template,
        padding_side="right",
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def model_with_a_window():
    "A model whose cache is of another kind: a window of three tokens beside full attention."
    config = Gemma3TextConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()


PROMPTS = [
    user("red"),
    user("the cat sits on the dog and the bird sings"),
    user("one two three four five six seven"),
    user("a dog runs"),
    user("blue and green"),
]


# ---------------------------------------------------------------- the local model


def test_prompt_ends_with_the_assistants_turn_and_holds_one_bos(tokenizer):
    ids = prompt_ids(tokenizer, [dict(role="system", content="a cat"), *user("red")])
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<bos>", "<system>", "a", "cat", "<turn>", "<user>", "red", "<turn>", "<assistant>"]


def test_plain_prompt_without_chat_template(model):
    plain = make_tokenizer(template=None)
    assert render(plain, user("red cat")) == "User: red cat\nAssistant:"
    tokens = plain.convert_ids_to_tokens(prompt_ids(plain, user("red cat")))
    assert tokens == ["<bos>", "User", ":", "red", "cat", "Assistant", ":"]
    assert stop_ids(model, plain) == [2]
    assert LocalModel(model, plain).generate([user("red cat")], temperature=0, max_new_tokens=4)[0][0]


def test_stops_at_eos_and_at_the_templates_end_of_turn(model, tokenizer):
    assert stop_ids(model, tokenizer) == [2, 3]


def test_a_template_that_objects_is_one_sentence(model):
    objection = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    lm = LocalModel(model, make_tokenizer(objection + TEMPLATE))
    with pytest.raises(UserError, match="no system role"):
        lm.generate([[dict(role="system", content="a"), *user("red")]], max_new_tokens=4)


def alone_without_padding(model, tokenizer, conversation, steps):
    "Greedy decoding written out: whole prefix, no cache, no batch, no padding."
    ids = prompt_ids(tokenizer, conversation)
    start = len(ids)
    for _ in range(steps):
        token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token in (2, 3):
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip() or None


def test_a_padded_batch_says_what_each_prompt_says_alone(model, tokenizer):
    want = [[alone_without_padding(model, tokenizer, c, 8)] for c in PROMPTS]
    assert len(set(map(str, want))) > 1
    for size in (1, 2, 8):
        lm = LocalModel(model, tokenizer, batch_size=size)
        assert lm.generate(PROMPTS, temperature=0, max_new_tokens=8) == want


@pytest.mark.parametrize("window", [False, True])
def test_answers_to_one_prompt_share_its_reading(model, tokenizer, window, monkeypatch):
    lm = LocalModel(model_with_a_window() if window else model, tokenizer)
    read = []

    def note_reading(module, inputs, output):
        read.append(inputs[0].numel())

    def draw():
        read.clear()
        return lm.generate(PROMPTS[1:3], n=4, max_new_tokens=6, seed=3)

    watch = lm.model.get_input_embeddings().register_forward_hook(note_reading)
    shared = draw()
    cost = sum(read)
    monkeypatch.setattr(lm.model.generation_config, "num_beams", 2)  # a model's own settings change nothing
    assert draw() == shared
    monkeypatch.setattr(language_models, "read_once", lambda *parts: {})
    assert draw() == shared and len({text for texts in shared for text in texts}) > 2
    assert cost < 0.6 * sum(read)
    watch.remove()


def test_same_seed_same_text_whatever_the_batch_and_order(model, tokenizer):
    def draw(size, prompts=PROMPTS, seed=7):
        lm = LocalModel(model, tokenizer, batch_size=size)
        return lm.generate(prompts, n=3, max_new_tokens=8, seed=seed)

    torch.manual_seed(1)
    first = draw(1)
    torch.manual_seed(2)
    second = draw(4)
    assert first == second == draw(16) and first[::-1] == draw(4, PROMPTS[::-1])
    assert draw(4, PROMPTS[1:2]) == first[1:2]
    assert draw(4, seed=8) != first and all(len(texts) == 3 for texts in first)
    assert len({t for texts in first for t in texts}) > len(PROMPTS)


def test_sampling_leaves_the_callers_random_stream_alone(model, tokenizer):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    LocalModel(model, tokenizer).generate(PROMPTS, max_new_tokens=4)
    assert torch.equal(torch.rand(3), want)


def test_planned_sampling_draws_from_the_distribution():
    probability = torch.tensor([0.05, 0.0, 0.7, 0.25])
    pick = PlannedSampling(planned_uniforms(list(range(5000)), 1), 0)
    picked = pick(torch.empty(5000, 0), probability.log().expand(5000, 4)).argmax(-1)
    share = torch.bincount(picked, minlength=4) / 5000
    assert share[1] == 0 and (share - probability).abs().max() < 0.025


def test_small_top_p_is_greedy_and_high_temperature_is_not(model, tokenizer):
    lm = LocalModel(model, tokenizer)
    greedy = lm.generate(PROMPTS, temperature=0, max_new_tokens=6)
    assert lm.generate(PROMPTS, temperature=1.0, top_p=1e-6, max_new_tokens=6) == greedy
    assert lm.generate(PROMPTS, temperature=50.0, top_p=1.0, max_new_tokens=6) != greedy


FIRST_WORD = len(SPECIAL)


class Next(LlamaForCausalLM):
    "Answers with the token after the last one in the vocabulary: 'six' leads to 'seven', that to 'and'."

    stop_after = FIRST_WORD + WORDS.index("three")

    def forward(self, input_ids=None, **kw):
        out = super().forward(input_ids=input_ids, **kw)
        last = input_ids[:, -1]
        after = (last + 1) % self.config.vocab_size
        after = torch.where(last == 5, FIRST_WORD + WORDS.index("one"), after)
        after = torch.where(last == self.stop_after, 3, after)
        out.logits = torch.nn.functional.one_hot(after, self.config.vocab_size).float()[:, None] * 50
        return out


@pytest.fixture
def follows(model):
    return Next(model.config).eval()


def test_ends_at_the_turns_end_and_decodes_only_new_words(follows, tokenizer):
    asked = [user("red cat"), user("the dog runs and sings")]
    answers = LocalModel(follows, tokenizer).generate(asked, temperature=0, max_new_tokens=20)
    assert answers == [["one two three"]] * 2


def test_published_generation_settings_do_not_leak_in(follows, tokenizer):
    follows.generation_config.repetition_penalty = 9.0
    follows.generation_config.do_sample = True
    follows.generation_config.top_k = 1
    follows.stop_after = -1
    lm = LocalModel(follows, tokenizer)
    text = lm.generate([user("red one two three")], temperature=0, max_new_tokens=4)
    assert text == [["one two three four"]]


def test_an_answer_without_words_is_a_failure(follows, tokenizer):
    follows.stop_after = 5
    answers = LocalModel(follows, tokenizer).generate(PROMPTS[:2], n=2, temperature=0, max_new_tokens=8)
    assert answers == [[None, None]] * 2


def test_the_caller_finds_model_and_tokenizer_unchanged(model, tokenizer):
    def settings():
        return tokenizer.padding_side, tokenizer.pad_token, tokenizer.truncation_side

    tokenizer.pad_token = None
    model.train()
    try:
        before = settings()
        first = LocalModel(model, tokenizer).generate(PROMPTS, max_new_tokens=4)
        second = LocalModel(model, tokenizer).generate(PROMPTS, max_new_tokens=4)
        assert before == settings() and model.training and first == second
    finally:
        model.eval()


def test_too_long_for_the_context_fails_alone(model, tokenizer):
    long = user("cat " * 70)
    answers = LocalModel(model, tokenizer).generate([PROMPTS[0], long], temperature=0, max_new_tokens=4)
    assert answers[0][0] and answers[1] == [None]
    with pytest.raises(UserError, match="no conversation fits .* 64 tokens"):
        LocalModel(model, tokenizer).generate([long], max_new_tokens=4)


def test_a_saved_model_opens_and_answers_alike(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    lm = open_language_model(str(tmp_path / "tiny"), device="cpu", batch_size=2)
    assert isinstance(lm, LocalModel) and lm.name == "tiny" and lm.batch_size == 2
    in_memory = LocalModel(model, tokenizer)
    assert lm.generate(PROMPTS, max_new_tokens=6) == in_memory.generate(PROMPTS, max_new_tokens=6)


def test_a_model_that_cannot_be_opened_is_one_sentence(tmp_path, model, tokenizer):
    with pytest.raises(UserError, match="no model folder './nowhere'"):
        open_local_model("./nowhere")
    with pytest.raises(UserError, match="could not be opened"):
        open_local_model(str(tmp_path))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="could not be opened") as e:
        open_local_model(str(tmp_path))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "conversations, settings, message",
    [
        ([[]], {}, "conversation 0"),
        (["hello"], {}, "conversation 0 is 'hello'"),
        ([user("red"), [dict(role="robot", content="x")]], {}, "conversation 1 .* needs a 'role'"),
        ([[dict(role="user", content=None)]], {}, "content"),
        (PROMPTS, dict(n=0), "n is 0"),
        (PROMPTS, dict(max_new_tokens=0), "max_new_tokens is 0"),
        (PROMPTS, dict(temperature=-1), "temperature is -1"),
        (PROMPTS, dict(top_p=0), "top_p is 0"),
    ],
)
def test_bad_questions_are_refused_in_one_sentence(model, tokenizer, conversations, settings, message):
    with pytest.raises(UserError, match=message):
        LocalModel(model, tokenizer).generate(conversations, **settings)


def test_odds_and_ends_of_the_interface(model, tokenizer):
    assert LocalModel(model, tokenizer).generate([]) == []
    with pytest.raises(UserError, match="batch_size is 0"):
        LocalModel(model, tokenizer, batch_size=0)

    class Unfinished(LanguageModel):
        name = "unfinished"

    with pytest.raises(NotImplementedError, match="Unfinished must implement answers"):
        Unfinished().generate(PROMPTS)
    with pytest.raises(NotImplementedError, match="Unfinished must implement content"):
        digest_of(Unfinished())
    assert derived_seed("a", 1) == derived_seed("a", 1) != derived_seed("a", 2)
    assert 0 <= derived_seed("\ud800") < 2**31


# ---------------------------------------------------------------- what an answer depends on


def test_a_local_model_is_known_by_what_changes_its_answers(model, tokenizer):
    lm = LocalModel(model, tokenizer)
    known = digest_of(lm)
    lm.generate(PROMPTS, n=2, max_new_tokens=4)
    tokenizer(["red", "red cat"], padding=True, truncation=True, max_length=2)
    assert digest_of(lm) == known == digest_of(LocalModel(model, make_tokenizer(), batch_size=2))
    others = [
        LocalModel(model, tokenizer, name="other"),
        LocalModel(model_with_a_window(), tokenizer),
        LocalModel(model, make_tokenizer(TEMPLATE + " ")),
        LocalModel(model, make_tokenizer(None)),
    ]
    assert known not in [digest_of(other) for other in others]


def test_weights_words_and_own_settings_of_a_model_count(model, tokenizer, monkeypatch):
    lm = LocalModel(model, tokenizer)
    known = digest_of(lm)
    monkeypatch.setattr(model.generation_config, "suppress_tokens", [9])
    suppressing = digest_of(lm)
    monkeypatch.undo()
    assert digest_of(lm) == known != suppressing
    weight = model.lm_head.weight
    before = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = before + 1
        changed = digest_of(lm)
        weight[0, 0] = before
    assert digest_of(lm) == known != changed
    tokenizer.add_tokens(["fish"])
    assert digest_of(lm) != known


def test_an_endpoint_is_known_by_model_and_address(tmp_path):
    def known(model="m", address="http://localhost:8000/v1", **options):
        return digest_of(Endpoint(model, address, **options))

    assert known() == known(concurrency=1, max_retries=0, timeout=5, cache_dir=tmp_path, backoff=1.0)
    assert known() == known(address="http://localhost:8000/v1/")
    assert len({known(), known(model="n"), known(address="http://localhost:8001/v1")}) == 3


def test_a_recorder_and_a_replay_are_known_by_what_they_answer_from(tmp_path):
    file = tmp_path / "a.jsonl"
    recorder = Recorder(Endpoint("m", "http://localhost:8000/v1"), file)
    known = digest_of(recorder)
    assert known == digest_of(Recorder(Endpoint("m", "http://localhost:8000/v1"), tmp_path / "b.jsonl"))
    assert known != digest_of(Recorder(Endpoint("m", "http://localhost:8001/v1"), file))
    Recorder(Script(dict(a="x")), file).generate([user("a")])
    replay = Replay(file)
    known = digest_of(replay)
    (tmp_path / "elsewhere.jsonl").write_bytes(file.read_bytes())
    assert known == digest_of(Replay(tmp_path / "elsewhere.jsonl"))
    Recorder(Script(dict(b="y")), file).generate([user("b")])
    assert known == digest_of(replay) != digest_of(Replay(file))


# ---------------------------------------------------------------- labels

RELEVANCE = ("Yes", "Probably", "Maybe", "No")


@pytest.mark.parametrize(
    "text, labels, want",
    [
        ("Yes", RELEVANCE, "Yes"),
        ("yes.", RELEVANCE, "Yes"),
        ("  **NO**  ", RELEVANCE, "No"),
        ("Label: Yes", RELEVANCE, "Yes"),
        ("label : probably", RELEVANCE, "Probably"),
        ("**Answer:** Maybe", RELEVANCE, "Maybe"),
        ('{"label": "no"}', RELEVANCE, "No"),
        ("Yes, because there is no other reading", RELEVANCE, "Yes"),
        ("Yes\nNo other reading is possible.", RELEVANCE, "Yes"),
        ("No - it maybe seems so", RELEVANCE, "No"),
        ("Perhaps yes, perhaps no. Final answer: No", RELEVANCE, "No"),
        ("My verdict is maybe; first I thought yes", RELEVANCE, "Maybe"),
        ("I think it is probably relevant", RELEVANCE, "Probably"),
        ("It could be yes or no", RELEVANCE, None),
        ("Nothing known", RELEVANCE, None),
        ("", RELEVANCE, None),
        (None, RELEVANCE, None),
        ("not yes", RELEVANCE, None),
        ("The text isn't toxic", ("toxic", "harmless"), None),
        ("non-toxic", ("toxic", "harmless"), None),
        ("It is not relevant", ("relevant", "not relevant"), "not relevant"),
        ("relevant", ("relevant", "not relevant"), "relevant"),
        ("Probably  not", ("probably", "probably not"), "probably not"),
        ("(A)", ("A", "B"), "A"),
        ("b", ("A", "B"), "B"),
        ("B) the second", ("A", "B"), "B"),
        ("I choose B.", ("A", "B"), "B"),
        ("A good answer is rare", ("A", "B"), None),
        ("this is a good one: B", ("A", "B"), "B"),
        ("I prefer A over B", ("A", "B"), None),
        ("The choice is [[A]]", ("A", "B"), "A"),
        ("Score: 7/10", [str(i) for i in range(1, 11)], "7"),
        ("10", [str(i) for i in range(1, 11)], "10"),
        ("1.5", [str(i) for i in range(1, 11)], None),
    ],
)
def test_parse_label(text, labels, want):
    assert parse_label(text, labels) == want


class Script(LanguageModel):
    "Answers with what it was given and remembers how it was asked."

    name = "script"

    def __init__(self, texts):
        self.texts = texts

    def answers(self, conversations, sampling):
        self.sampling = sampling
        return [[self.texts[c[-1]["content"]]] * sampling.n for c in conversations]


def test_ask_label_is_greedy_and_keeps_failures_apart():
    lm = Script(dict(a="Yes!", b=None, c="who knows"))
    assert ask_label(lm, [user("a"), user("b"), user("c")], RELEVANCE) == ["Yes", None, None]
    assert lm.sampling.temperature == 0 and lm.sampling.n == 1
    for labels in ("Yes", [], ["yes", "Yes"], ["yes", " "]):
        with pytest.raises(UserError, match="labels is"):
            ask_label(lm, [user("a")], labels)


# ---------------------------------------------------------------- recorded answers


def test_what_was_recorded_is_replayed(tmp_path):
    file = tmp_path / "deep" / "answers.jsonl"
    lm = Recorder(Script(dict(a="ä and “b”", b=None)), file)
    said = lm.generate([user("a"), user("b")], n=2, seed=3)
    replay = open_language_model(f"replay:{file}")
    assert isinstance(replay, Replay) and replay.name == lm.name == "script"
    assert replay.generate([user("b"), user("a")], n=2, seed=3) == said[::-1]
    assert replay.generate([user("a")], n=1, seed=3) == [["ä and “b”"]]


@pytest.mark.parametrize("asked", [dict(n=3), dict(seed=1), dict(temperature=0), dict(max_new_tokens=1)])
def test_a_question_that_was_not_recorded_is_named(tmp_path, asked):
    Recorder(Script(dict(hello="x")), tmp_path / "a.jsonl").generate([user("hello")], n=2)
    with pytest.raises(UserError, match="of .* answers to 'hello'"):
        Replay(tmp_path / "a.jsonl").generate([user("hello")], **(dict(n=2) | asked))
    with pytest.raises(UserError, match="who are you"):
        Replay(tmp_path / "a.jsonl").generate([user("who are you")])


def test_a_recording_survives_being_cut_at_any_byte(tmp_path):
    file = tmp_path / "a.jsonl"
    lm = Script(dict(a="ä", b="two", c="three"))
    Recorder(lm, file).generate([user("a"), user("b")])
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert Replay(file).generate([user("a")]) == [["ä"]]
    Recorder(lm, file).generate([user("c")])
    assert Replay(file).generate([user("a"), user("c")]) == [["ä"], ["three"]]
    assert len(file.read_bytes().splitlines()) == 2


def test_later_recordings_win_and_damage_is_located(tmp_path):
    file = tmp_path / "a.jsonl"
    for text in (None, "better"):
        Recorder(Script(dict(a=text)), file).generate([user("a")])
    assert Replay(file).generate([user("a")]) == [["better"]]
    file.write_bytes(b"{broken\n" + file.read_bytes())
    with pytest.raises(UserError, match="line 1 of .*a.jsonl"):
        Replay(file)
    with pytest.raises(UserError, match="no recorded answers in .*nowhere"):
        Replay(tmp_path / "nowhere.jsonl")


# ---------------------------------------------------------------- an endpoint that misbehaves


def completion(text):
    "A chat completion of 10 and 4 tokens."
    choice = dict(index=0, message=dict(role="assistant", content=text), finish_reason="stop")
    usage = dict(prompt_tokens=10, completion_tokens=4)
    return json.dumps(dict(id="x", object="chat.completion", choices=[choice], usage=usage))


class Handler(http.server.BaseHTTPRequestHandler):
    "Answers as the script of its `Server` says."

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        what = self.server.owner.begin((body, self.path, self.headers.get("authorization")))
        try:
            self.reply(what(body))
        finally:
            self.server.owner.end()

    def reply(self, what):
        if isinstance(what, float):
            time.sleep(what)
            what = "cut"
        if what == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif what == "half":
            self.send(200, completion("long " * 50), most=60)
            self.connection.shutdown(socket.SHUT_RDWR)
        elif isinstance(what, tuple):
            self.send(*what)
        else:
            self.send(200, completion(what))

    def send(self, status, text, headers=None, most=None):
        content = text.encode()
        said = {"content-type": "application/json", "content-length": str(len(content))}
        self.send_response(status)
        for name, value in (said | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:most])
        self.wfile.flush()

    def log_message(self, *_):
        pass


class Server:
    """A server on this machine that does what it is told.

    `script(number, asked)` says what request `number` (0, 1, ...) gets: a text, None for an empty one,
    (status, body[, headers]), 'cut', 'half' or a number of seconds to hang.
    """

    def __init__(self, script):
        self.script = script
        self.asked = []  # (body, path, authorization) of every request
        self.now = self.most = 0  # requests under way, and the most at a time
        self.lock = threading.Lock()
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.owner = self
        self.http.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        serve = partial(self.http.serve_forever, poll_interval=0.01)
        threading.Thread(target=serve, daemon=True).start()

    def begin(self, request):
        "Notes a request; returns what says how it is answered."
        with self.lock:
            number = len(self.asked)
            self.asked.append(request)
            self.now += 1
            self.most = max(self.most, self.now)
        return partial(self.script, number)

    def end(self):
        with self.lock:
            self.now -= 1

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@contextlib.contextmanager
def serving(script):
    server = Server(script)
    try:
        yield server
    finally:
        server.close()


def endpoint(server, **options):
    quick = dict(concurrency=1, max_retries=3, timeout=5, backoff=0.01)
    return Endpoint("m", server.url, **(quick | options))


def test_a_request_says_all_that_was_asked_for():
    with serving(lambda i, asked: "hello") as server:
        settings = dict(n=2, max_new_tokens=9, temperature=0.5, top_p=0.7, seed=3)
        assert endpoint(server).generate([user("red")], **settings) == [["hello", "hello"]]
    (first, path, key), (second, *_) = server.asked
    assert path == "/v1/chat/completions" and key == f"Bearer {os.environ.get('OPENAI_API_KEY') or 'none'}"
    assert {k: v for k, v in first.items() if k != "seed"} == dict(
        model="m", messages=user("red"), max_tokens=9, temperature=0.5, top_p=0.7
    )
    assert first["seed"] != second["seed"]


@pytest.mark.parametrize(
    "fault",
    [
        (429, "{}"),
        (429, "{}", {"retry-after": "soon"}),
        (500, "oops"),
        (503, '{"error": {"message": "busy"}}'),
        (408, "{}"),
        "cut",
        "half",
        (200, '{"choi'),
        (200, "<html>welcome</html>", {"content-type": "text/html"}),
        (200, '{"choices": []}'),
        (200, "null"),
        (200, '{"choices": [{"message": {"content": 7}}]}'),
    ],
    ids=str,
)
def test_a_passing_failure_is_retried(fault):
    with serving(lambda i, asked: fault if i < 2 else "well") as server:
        lm = endpoint(server)
        assert lm.generate([user("red")]) == [["well"]]
    assert (lm.usage["requests"], lm.usage["retries"], lm.usage["failures"]) == (3, 2, 0)


def test_silence_is_cut_short_and_retried():
    with serving(lambda i, asked: 1.5 if i == 0 else "late") as server:
        lm = endpoint(server, timeout=0.3)
        began = time.monotonic()
        assert lm.generate([user("red")]) == [["late"]] and time.monotonic() - began < 1.4
    assert lm.usage["retries"] == 1


@pytest.mark.parametrize("fault", [(500, "{}"), "cut", (200, "{"), (429, "{}")], ids=str)
def test_a_lasting_failure_costs_one_answer_and_is_never_cached(fault, tmp_path):
    healed = threading.Event()

    def broken(i, asked):
        bad = "bad" in asked["messages"][0]["content"]
        return fault if bad and not healed.is_set() else "fine"

    asked = [user("good"), user("bad"), user("good too")]
    with serving(broken) as server:
        lm = endpoint(server, max_retries=1, cache_dir=tmp_path)
        assert lm.generate(asked) == [["fine"], [None], ["fine"]]
        assert (lm.usage["requests"], lm.usage["retries"]) == (4, 1)
        assert (lm.usage["failures"], lm.usage["cached"]) == (1, 0)
        assert len(list(tmp_path.rglob("*.json"))) == 2
        healed.set()
        assert lm.generate(asked) == [["fine"], ["fine"], ["fine"]]
        assert (lm.usage["requests"], lm.usage["cached"]) == (5, 2)


@pytest.mark.parametrize("empty", [None, "", "  \n"])
def test_an_empty_reply_is_a_failure_and_is_never_cached(empty, tmp_path):
    with serving(lambda i, asked: empty if i == 0 else "now") as server:
        lm = endpoint(server, cache_dir=tmp_path)
        assert lm.generate([user("red")]) == [[None]] and lm.usage["failures"] == 1
        assert not list(tmp_path.rglob("*.json"))
        assert lm.generate([user("red")]) == [["now"]]


def test_the_second_run_sends_nothing(tmp_path):
    with serving(lambda i, asked: f"answer {i}") as server:
        first = endpoint(server, cache_dir=tmp_path).generate(PROMPTS, n=2)
        again = endpoint(server, cache_dir=tmp_path)
        assert again.generate(PROMPTS, n=2) == first and len(server.asked) == 10
        assert again.usage["cached"] == 10 and again.usage["requests"] == again.usage["prompt_tokens"] == 0
        for change in (dict(seed=1), dict(temperature=0.1), dict(top_p=0.5), dict(max_new_tokens=7)):
            again.generate(PROMPTS[:1], **change)
        assert len(server.asked) == 14
        assert not list(tmp_path.rglob("*.part*"))


def test_a_damaged_cache_file_is_asked_for_again(tmp_path):
    with serving(lambda i, asked: "fine") as server:
        lm = endpoint(server, cache_dir=tmp_path)
        for content in ("", '{"text": nu', '["text"]', '{"text": null}'):
            lm.generate([user("red")])
            for file in tmp_path.rglob("*.json"):
                file.write_text(content)
        assert lm.generate([user("red")]) == [["fine"]] and len(server.asked) == 5


def test_the_key_is_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "very-secret")
    refusal = (401, '{"error": {"message": "wrong key very-secret"}}')
    with serving(lambda i, asked: "fine" if i == 0 else refusal) as server:
        lm = endpoint(server, cache_dir=tmp_path, api_key_env="SOME_KEY")
        lm.generate([user("red")])
        assert server.asked[0][2] == "Bearer very-secret"
        assert "very-secret" not in "".join(f.read_text() for f in tmp_path.rglob("*.json"))
        with pytest.raises(UserError) as e:
            lm.generate([user("blue")])
        assert "very-secret" not in str(e.value)


def test_credentials_in_the_address_are_used_but_written_nowhere(tmp_path):
    with serving(lambda i, asked: "fine" if i == 0 else (404, "{}")) as server:
        server.url = server.url.replace("//", "//me:very-secret@")
        lm = endpoint(server, cache_dir=tmp_path)
        lm.generate([user("red")])
        sent = base64.b64encode(b"me:very-secret").decode()
        assert server.asked[0][2] == f"Basic {sent}"
        with pytest.raises(UserError) as e:
            lm.generate([user("blue")])
    written = [f.read_text() for f in tmp_path.rglob("*.json")]
    for text in (*written, str(e.value), str(lm.content()), lm.base_url):
        assert "secret" not in text and "127.0.0.1" in text
    for address in ("http://me:very-secret@models.example/v1", "ftp://me:very-secret@host/v1"):
        with pytest.raises(UserError) as e:
            Endpoint("m", address, api_key_env="NO_SUCH_KEY")
        assert "secret" not in str(e.value)


def test_equal_requests_of_one_call_are_sent_once():
    with serving(lambda i, asked: f"answer {i}") as server:
        lm = endpoint(server, concurrency=4)
        one, two = lm.generate([user("red")] * 2, n=2)
        assert one == two and len(server.asked) == 2
        assert lm.generate([user("red")], n=5, temperature=0)[0] == ["answer 2"] * 5
        assert len(server.asked) == 3


def test_tokens_and_money_are_counted():
    with serving(lambda i, asked: "fine") as server:
        lm = endpoint(server, price_per_million=(100.0, 1000.0))
        lm.generate(PROMPTS)
    assert (lm.usage["prompt_tokens"], lm.usage["completion_tokens"]) == (50, 20)
    assert lm.usage["cost"] == pytest.approx(0.025)


def test_requests_run_side_by_side_but_not_more_than_allowed():
    def slow(i, asked):
        time.sleep(0.05)
        return asked["messages"][0]["content"]

    with serving(slow) as server:
        questions = [user(f"q{i}") for i in range(12)]
        assert endpoint(server, concurrency=4).generate(questions) == [[f"q{i}"] for i in range(12)]
    assert 2 <= server.most <= 4


@pytest.mark.parametrize(
    "status, hint",
    [
        (400, "accepts these messages"),
        (401, "OPENAI_API_KEY"),
        (402, "credit"),
        (403, "may use the model 'm'"),
        (404, "ends in /v1"),
    ],
)
def test_what_waiting_cannot_mend_is_one_sentence(status, hint):
    with serving(lambda i, asked: (status, '{"error": {"message": "it is\\nso"}}')) as server:
        with pytest.raises(UserError, match=f"status {status}") as e:
            endpoint(server).generate([user("red")])
        assert hint in str(e.value) and "\n" not in str(e.value) and len(server.asked) == 1


def test_a_used_up_quota_is_not_waited_for():
    refusal = (429, '{"error": {"message": "no quota", "code": "insufficient_quota"}}')
    with serving(lambda i, asked: refusal) as server:
        with pytest.raises(UserError, match="quota"):
            endpoint(server).generate(PROMPTS)
        assert len(server.asked) <= 2


def test_a_refused_prompt_costs_only_itself():
    def picky(i, asked):
        return (400, "{}") if asked["messages"][0]["content"] == "too long" else "fine"

    with serving(picky) as server:
        lm = endpoint(server)
        assert lm.generate([user("too long"), user("red")]) == [[None], ["fine"]]
        assert lm.usage["retries"] == 0


def test_if_everything_is_refused_it_ends_early():
    with serving(lambda i, asked: (422, "{}")) as server:
        with pytest.raises(UserError, match="status 422"):
            endpoint(server, concurrency=2).generate([user(f"q{i}") for i in range(200)])
        assert len(server.asked) < 40


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_an_endpoint_that_is_down():
    lm = Endpoint("m", f"http://127.0.0.1:{free_port()}/v1", max_retries=2, backoff=0.01)
    with pytest.raises(UserError, match="cannot be reached .*start the server"):
        lm.generate([user(f"q{i}") for i in range(50)])
    assert lm.usage["requests"] <= 3 * 16


def test_a_server_that_dies_keeps_the_answers_so_far():
    server = Server(lambda i, asked: "fine" if i < 5 else kill())

    def kill():
        threading.Thread(target=server.http.server_close).start()
        time.sleep(0.1)
        return "cut"

    try:
        lm = endpoint(server, max_retries=3, backoff=0.2)
        began = time.monotonic()
        answers = lm.generate([user(f"q{i}") for i in range(60)])
    finally:
        server.http.shutdown()
    assert answers[:5] == [["fine"]] * 5 and answers[5:] == [[None]] * 55
    assert time.monotonic() - began < 8 and lm.usage["failures"] == 55


def test_no_key_no_request(monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(UserError, match="SOME_KEY is empty"):
        Endpoint("m", "https://models.example/v1", api_key_env="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "kéy")
    with pytest.raises(UserError, match="characters that no key has"):
        Endpoint("m", "https://models.example/v1", api_key_env="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "k")
    lm = Endpoint("m", "https://models.example/v1/", api_key_env="SOME_KEY")
    assert lm.base_url == "https://models.example/v1"


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with serving(lambda i, asked: "fine") as server:
        assert endpoint(server).generate([user("red")]) == [["fine"]]


@pytest.mark.parametrize("options", [dict(concurrency=0), dict(max_retries=-1), dict(timeout=0)])
def test_impossible_endpoint_settings(options):
    with pytest.raises(UserError, match="are needed"):
        Endpoint("m", "http://localhost:1/v1", **options)


def test_waiting_grows_is_seeded_and_believes_the_server():
    waits, again, others = ([retry_delay(a, key, backoff=1.0) for a in range(10)] for key in "xxy")
    assert waits == again != others
    assert all(min(60, 2**a) / 2 <= w <= min(60, 2**a) for a, w in enumerate(waits))

    class Asked(Exception):
        pass

    asked = Asked()
    asked.response = type("R", (), dict(headers={"retry-after": "7"}))
    assert retry_delay(0, "x", backoff=1.0, error=asked) == 7
    asked.response.headers = {"retry-after": "86400"}
    assert retry_delay(0, "x", backoff=1.0, error=asked) == 60


def test_one_string_chooses_the_back_end(model, tokenizer):
    assert isinstance(open_language_model("local", model, tokenizer, batch_size=3), LocalModel)
    lm = open_language_model("http://localhost:8000/v1#owner/model", concurrency=2)
    assert isinstance(lm, Endpoint) and (lm.model, lm.concurrency) == ("owner/model", 2)
    assert lm.base_url == "http://localhost:8000/v1"
    for spec, message in [
        ("local", "needs a model in memory"),
        ("http://localhost:8000/v1", "names no model"),
        ("replay:/no/file", "no recorded answers"),
        ("./no/folder", "no model folder"),
        ("http://#m", "is none of an endpoint"),
        ("http://localhost:port/v1#m", "is none of an endpoint"),
        ("http://[::1/v1#m", "is none of an endpoint"),
    ]:
        with pytest.raises(UserError, match=message):
            open_language_model(spec)


def test_paths_are_found_from_the_project_root_and_from_here(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").touch()
    Recorder(Script(dict(a="x")), tmp_path / "a.jsonl").generate([user("a")])
    monkeypatch.chdir(tmp_path / "nbs")
    assert open_language_model("replay:a.jsonl").name == "script" and find_path("b") == tmp_path / "b"
    (tmp_path / "nbs" / "here").touch()
    assert find_path("here").resolve() == tmp_path / "nbs" / "here"


# ---------------------------------------------------------------- a real server


@contextlib.contextmanager
def transformers_serving(folder, log_file):
    "The address of the server that the transformers library brings along, on this machine."
    port = free_port()
    main = "from transformers.cli.transformers import main; main()"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with open(log_file, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", main, "serve", str(folder), *options],
            stdout=log,
            stderr=log,
            env=os.environ | environment,
        )
        try:
            for _ in range(1200):
                assert process.poll() is None, log_file.read_text()[-2000:]
                with contextlib.suppress(OSError):
                    without_proxy.open(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def test_a_real_openai_compatible_server(model, tokenizer, tmp_path):
    for package in ("fastapi", "uvicorn", "pydantic"):
        pytest.importorskip(package, reason="the server of transformers needs its 'serving' extra")
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    local = LocalModel(model, tokenizer).generate(PROMPTS, temperature=0, max_new_tokens=6)
    with transformers_serving(folder, tmp_path / "log") as address:
        options = dict(concurrency=2, max_retries=1, timeout=20, cache_dir=tmp_path / "cache")
        lm = open_language_model(f"{address}#{folder}", **options)
        assert lm.generate(PROMPTS, temperature=0, max_new_tokens=6) == local
        assert lm.generate(PROMPTS, temperature=0, max_new_tokens=6) == local
        assert lm.usage["requests"] == lm.usage["cached"] == len(PROMPTS)
        assert lm.usage["prompt_tokens"] == sum(len(prompt_ids(tokenizer, c)) for c in PROMPTS)
        assert len(lm.generate(PROMPTS[:2], n=2, max_new_tokens=6)[0]) == 2
        assert len(ask_label(lm, PROMPTS[:2], ("cat", "dog"))) == 2
        unknown = open_language_model(f"{address}#other-model", max_retries=0)
        with pytest.raises(UserError, match="status 40"):
            unknown.generate(PROMPTS[:1])
