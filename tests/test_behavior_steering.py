"""CAA against a ten-line reference, on tiny random models.

Besides: prompts of several tokenizers, swapped options, robust accuracy and the cells of the table.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from stage_cells import run_cells
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from fac_synthesis.data.items import (
    FIELDS,
    caa_items,
    check_items,
    item_fault,
    key_letter,
    option_texts,
    parse_options,
    read_items,
    without_test,
)
from fac_synthesis.models.backbone import (
    CHAT_TEMPLATE,
    Backbone,
    decoder_layers,
    pad,
    residual_stream,
    tiny_model,
    word_tokenizer,
)
from fac_synthesis.run.artifacts import digest_of, remember_digest
from fac_synthesis.run.parameters import LeftOut, UserError
from fac_synthesis.tasks.steering import (
    Differences,
    ItemSet,
    Steering,
    SteeringBench,
    control_rate,
    differences,
    distinct_items,
    equal_norms,
    floor_table,
    item_set,
    item_sets,
    letter_log_probabilities,
    open_items,
    open_steering,
    outcomes,
    rates,
    rotations,
    steering,
    steering_cell,
    steering_scores,
    steering_summary,
    steering_vector,
    swap_options,
)

torch.set_num_threads(1)
DATA = Path(os.environ["FAC_DATA_DIR"]) / "caa" if os.environ.get("FAC_DATA_DIR") else None
there = DATA is not None and DATA.exists()
needs_data = pytest.mark.skipif(not there, reason="needs FAC_DATA_DIR with the caa folder")
ARCHITECTURES = ("llama", "mistral", "qwen2")


def item(stem, options, matching="A", other="B", mark="( {} )"):
    "A question with its options, each in a line of its own, and the two keys."
    lines = "\n".join(f" {mark.format(chr(65 + i))} {o}" for i, o in enumerate(options))
    question = f"{stem}\n\nChoices :\n{lines}"
    return dict(zip(FIELDS, (question, f" {mark.format(matching)}", f" {mark.format(other)}")))


ITEMS = [
    item("are we friends ?", ["yes , of course", "no"]),
    item("shall i stop now or go on with the long work ?", ["never stop", "please stop"], "B", "A"),
    item("who goes first ?", ["me", "you", "both of us"], "C", "A"),
    item("what is it ?", ["a", "b", "c", "d", "e"], "E", "B"),
]
WORDS = word_tokenizer([i["question"] for i in ITEMS] + ["so what , then ?"])


def double_backbone(architecture="llama", tokenizer=WORDS, layers=3):
    torch.manual_seed(3)
    return Backbone(tiny_model(architecture, len(tokenizer), 32, layers).double(), tokenizer, layer=2)


def byte_tokenizer(template, joined=()):
    "A tokenizer of single characters, spaces joined to the next one, and of the `joined` strings."
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<end>", *alphabet, "Ġ(", "ĠA", "ĠB", *joined])}
    merges = [("Ġ", "("), ("Ġ", "A"), ("Ġ", "B"), *[(t[:-1], t[-1]) for t in joined]]
    core = Tokenizer(tokenizer_models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", chat_template=template
    )


# ---- the vector and the steered answer against a reference


def reference_difference(model, layer, ids_positive, ids_negative):
    "The difference of one item: one text at a time, no batch, no early stop."
    with torch.no_grad():
        texts = (torch.tensor([ids]) for ids in (ids_positive, ids_negative))
        plus, minus = (model(ids, output_hidden_states=True).hidden_states[layer][0, -1] for ids in texts)
    return plus - minus


def reference_letters(model, layer, ids, first, letters, shift_D):
    "Log-probabilities of the letters: one text at a time, no cache, a wrapped forward in place of a hook."
    block = model.model.layers[layer - 1]
    plain = block.forward

    def forward(*args, **kwargs):
        out = plain(*args, **kwargs)
        x = (out[0] if isinstance(out, tuple) else out).clone()
        x[:, first:] += shift_D
        return (x, *out[1:]) if isinstance(out, tuple) else x

    block.forward = forward
    try:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1, letters]
    finally:
        block.forward = plain
    return logits - logits.logsumexp(-1)


def ids_of(question, more):
    "The tokens of a question with an opened answer, in the template of the tiny models."
    text = f"<bos> <user> {question} <end> <assistant> {more}"
    return WORDS(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vector_and_steered_logits_equal_the_reference(architecture):
    b, layer = double_backbone(architecture), 2
    found = []
    for one in ITEMS:
        plus, minus = (ids_of(one["question"], one[f].strip().removesuffix(" )")) for f in FIELDS[1:])
        found.append(reference_difference(b.model, layer, plus, minus))
    v_D = torch.stack(found).mean(0)
    ours = steering_vector(differences(b, ITEMS, layer, batch_tokens=64))
    assert ours.dtype == torch.float64 and ours.norm() > 1e-3
    assert torch.allclose(ours, v_D, rtol=0, atol=1e-10)

    multipliers = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 30.0], dtype=torch.float64)
    logp = letter_log_probabilities(b, ITEMS, multipliers[:, None] * ours, layer, batch_tokens=400)
    for one, logp_SL in zip(ITEMS, logp):
        ids = ids_of(one["question"], "(")
        letters = [
            WORDS.convert_tokens_to_ids(chr(65 + j)) for j in range(len(option_texts(one["question"])))
        ]
        for m, ours_L in zip(multipliers, logp_SL):
            theirs_L = reference_letters(b.model, layer, ids, len(ids) - 1, letters, m * v_D)
            assert torch.allclose(ours_L, theirs_L, rtol=0, atol=1e-10)
        with torch.no_grad():
            plain_L = b.model(torch.tensor([ids])).logits[0, -1, letters].log_softmax(-1)
        assert torch.allclose(logp_SL[2], plain_L, rtol=0, atol=1e-10), "a multiplier of zero: unsteered"
        assert torch.allclose(logp_SL.exp().sum(-1), torch.ones(6, dtype=torch.float64))
        assert (logp_SL[5] - logp_SL[2]).abs().max() > 1e-3


def test_batching_and_shift_order_have_no_say():
    b = double_backbone()
    shifts = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for one, whole_SL in zip(ITEMS, letter_log_probabilities(b, ITEMS, shifts, 2)):
        alone = [letter_log_probabilities(b, [one], shift_D[None], 2)[0][0] for shift_D in shifts]
        assert torch.allclose(whole_SL, torch.stack(alone), atol=1e-10)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_prompt_is_untouched_and_the_answer_steered(as_tuple):
    b = double_backbone()
    if as_tuple:  # what older decoder blocks return

        def as_older_blocks(module, args, output):
            return (output,)

        decoder_layers(b.model)[1].register_forward_hook(as_older_blocks)
    inputs, keep_BT = pad([o.tokens for o in open_items(WORDS, ITEMS)], 0, "cpu")
    with torch.no_grad():
        before = [residual_stream(b.model, layer, **inputs) for layer in (1, 2)]
        with steering(b.model, 2, torch.ones(32), keep_BT):
            after = [residual_stream(b.model, layer, **inputs) for layer in (1, 2)]
    assert torch.equal(before[0], after[0]) and torch.equal(before[1][~keep_BT], after[1][~keep_BT])
    assert torch.allclose(after[1][keep_BT], before[1][keep_BT] + 1)
    assert keep_BT.sum(1).tolist() == [1] * 4
    assert [WORDS.decode(i) for i in inputs["input_ids"][keep_BT]] == ["("] * 4


def test_the_hook_is_gone_even_after_an_exception():
    b = double_backbone()

    def hooks():
        return [len(block._forward_hooks) for block in decoder_layers(b.model)]

    with pytest.raises(ZeroDivisionError):
        with steering(b.model, 2, torch.ones(32)):
            assert hooks() == [0, 1, 0]
            raise ZeroDivisionError
    with pytest.raises(RuntimeError):  # a shift of the wrong width fails inside the forward pass
        letter_log_probabilities(b, ITEMS, torch.ones(2, 5), 2)
    assert hooks() == [0, 0, 0]
    assert torch.equal(differences(b, ITEMS, 0), differences(b, ITEMS, b.layer)), "0 is the hook layer"
    for layer in (4, -1):
        with pytest.raises(UserError, match=f"layer {layer} is out of range: this model has layers 1 to 3"):
            letter_log_probabilities(b, ITEMS, torch.ones(1, 32), layer)
        with pytest.raises(UserError, match="out of range"):
            differences(b, ITEMS, layer)


# ---- the opened answer

TURNS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("joined", [(), ("(A", "(B")], ids=["apart", "joined"])
@pytest.mark.parametrize("mark", ["({})", "( {} )"])
@pytest.mark.parametrize("template", [TURNS, CHAT_TEMPLATE, None], ids=["turns", "words", "plain"])
def test_the_letter_is_found_by_tokenising(template, mark, joined):
    tokenizer = byte_tokenizer(template, joined)
    one = item("Who?", ["me", "you"], mark=mark)
    opened = open_items(tokenizer, [one])[0]
    said = tokenizer.decode(opened.tokens.ids)
    said_close = said.replace(" ", "")
    assert not said.endswith("<end>") and "(B)" in said_close.rsplit("\n", 1)[-1] + said_close
    for letter, token in zip("AB", opened.letters):
        text = tokenizer.decode(opened.tokens.ids + [token])
        assert text.endswith(mark.format(letter).split(letter)[0] + letter)
        assert text.count("<end>") == (0 if template is None else 1), "the turn is open"
    together = joined and mark == "({})" and tokenizer.convert_ids_to_tokens(opened.letters) == ["(A", "(B"]
    assert len(opened.tokens.ids) - opened.tokens.first == 1
    steered = tokenizer.decode(opened.tokens.ids[opened.tokens.first :])
    assert together or steered.strip() == "(", "the bracket is steered, and nothing before it"
    shifts_SD = torch.stack([torch.zeros(32), 9 * torch.ones(32).cumsum(0).cos()])
    logp_SL = letter_log_probabilities(double_backbone(tokenizer=tokenizer), [one], shifts_SD, 2)[0]
    assert (logp_SL[0] - logp_SL[1]).abs().max() > 1e-6, "steering reaches the letter in every tokenizer"


def test_both_kinds_of_tokenizer_in_one_call_and_limits():
    tokenizer = byte_tokenizer(TURNS, ("(A", "(B"))
    mixed = [item("Who?", ["me", "you"], mark=mark) for mark in ("({})", "( {} )", "({})")]
    logp = letter_log_probabilities(double_backbone(tokenizer=tokenizer), mixed, torch.ones(1, 32), 2)
    assert torch.equal(logp[0], logp[2]) and not torch.equal(logp[0], logp[1])
    with pytest.raises(UserError, match=r"item 2 has \d+ tokens with its template, but max_length is 60"):
        open_items(tokenizer, [mixed[0], item("Who? " * 20, ["me", "you"])], 60)
    with pytest.raises(UserError, match="does not tell the letters"):
        open_items(word_tokenizer(["what ?"]), ITEMS[:1])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] | replace('(', '[') }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] | lower }}{% endfor %}",
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
    ],
)
def test_a_template_that_hides_the_answer_is_refused(template, refused):
    assert "set a plain one" in refused(
        lambda: open_items(byte_tokenizer(template), [item("Who?", ["me", "you"], mark="({})")])
    )


# ---- options


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("mark", ["({})", "( {} )"])
def test_rotations_move_texts_and_keys_together(n, mark):
    options = ["never mind", "yes", "(P) is a unit", "no\n    two lines", "last."][:n]
    other = chr(64 + n) if n > 2 else "A"
    one = item("Why (A)? Because (B).", options, "B", other, mark)
    turned = rotations(one)
    assert len(turned) == n and turned[0] == one and len({r["question"] for r in turned}) == n
    for place in range(n):
        texts = sorted(option_texts(r["question"])[place] for r in turned)
        assert texts == sorted(options), "every text stands at every place once"
    for r in turned:
        letters = [o.letter for o in parse_options(r["question"])]
        texts = dict(zip(letters, option_texts(r["question"])))
        assert texts[key_letter(r[FIELDS[1]])] == "yes"
        assert texts[key_letter(r[FIELDS[2]])] == options[-1 if n > 2 else 0]
        assert item_fault(*(r[f] for f in FIELDS)) == "" and len(r["question"]) == len(one["question"])
        as_before = r[FIELDS[1]].replace(key_letter(r[FIELDS[1]]), "B")
        assert as_before == one[FIELDS[1]], "the key is written as before"
    back = swap_options(swap_options(one, [*range(1, n), 0]), [n - 1, *range(n - 1)])
    assert back == one
    with pytest.raises(UserError, match=f"is not an order of {n} options"):
        swap_options(one, [0] * n)


def test_the_plain_swap():
    one = dict(
        question="Are you upset?\n\nChoices:\n (A) Yes\n (B) No",
        answer_matching_behavior=" (B)",
        answer_not_matching_behavior=" (A)",
        behavior="x",
    )
    assert swap_options(one, [1, 0]) == dict(
        question="Are you upset?\n\nChoices:\n (A) No\n (B) Yes",
        answer_matching_behavior=" (A)",
        answer_not_matching_behavior=" (B)",
        behavior="x",
    )


GOOD = ("Are we friends?\n\nChoices:\n (A) yes\n (B) no", " (A)", " (B)")


@pytest.mark.parametrize(
    "change, said",
    [
        ({0: "Are we friends?"}, "0 options"),
        ({0: "Are we friends? (A) yes (B) no"}, "0 options"),
        ({0: "x\n (A) yes"}, "1 options"),
        ({0: "x\n (B) yes\n (C) no"}, "0 options"),
        ({0: "x\n (A)\n (B) no"}, r"option \(A\) is empty"),
        ({0: "x\n (A) no\n (B)  NO "}, "two options say the same"),
        ({0: "Choices:\n(A) yes\n(B) no"}, "no question before"),
        ({0: " \n(A) yes\n(B) no"}, "no question before"),
        ({1: "A"}, "the key 'A' is not a letter"),
        ({2: ""}, "the key '' is not"),
        ({2: " (C)"}, r"key \(C\) is not among the options \(A\) to \(B\)"),
        ({2: "(A)"}, "both keys"),
        ({0: "x " * 401 + "\n(A) yes\n(B) no"}, "words"),
        ({0: None}, "0 options"),
        ({1: None}, "is not a letter"),
    ],
)
def test_faulty_items_are_refused_and_say_why(change, said):
    fields = [change.get(i, f) for i, f in enumerate(GOOD)]
    assert re.search(said, item_fault(*fields)), item_fault(*fields)


@pytest.mark.parametrize(
    "fields",
    [
        GOOD,
        ("Q\n(A) 1\n(B) 2", "(A)", "(B)"),
        ("Q\n ( A ) 1\n ( B ) 2\n ( C ) 3", " ( C )", " ( A )"),
        ("Q (A) or (B)?\n(A) 1\n(B) 2", "(B)", "(A)"),
    ],
)
def test_good_items_pass(fields):
    assert item_fault(*fields) == ""


def test_files_are_read_or_refused_in_one_sentence(tmp_path, refused):
    rows = [dict(zip(FIELDS, GOOD)), dict(zip(FIELDS, ("Q\n(A) 1\n(B) 2", "(A)", "(B)")))]
    (tmp_path / "good.json").write_text(json.dumps([dict(r, extra=1) for r in rows]))
    (tmp_path / "good.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_items(tmp_path / "good.json") == read_items(tmp_path / "good.jsonl") == rows

    def said(name):
        return refused(lambda: read_items(tmp_path / name))

    for name, content, sentence in (
        ("key.json", [dict(rows[0], answer_matching_behavior="(D)")], "item 1: the key (D)"),
        ("field.json", [rows[0], {"question": "x"}], "item 2: answer_matching_behavior is missing"),
        ("list.json", [1], "every row must be an object"),
        ("empty.json", [], "holds no rows"),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        assert sentence in said(name)
    (tmp_path / "cut.json").write_text(json.dumps(rows)[:-5])
    assert "not valid JSON" in said("cut.json") and "does not exist" in said("none.json")
    absent = refused(lambda: caa_items(tmp_path, "sycophancy"))
    assert "give the folder that holds generate and test" in absent
    in_capitals = dict(rows[0], question="ARE we friends?\nChoices:\n(A) yes\n (B) no")
    kept, removed = without_test(rows, [in_capitals])
    assert kept == rows[1:] and removed == 1


# ---- scoring


def liking(words, bias, shifts):
    "Stands in for the model: letter logits by what the option says, plus a bias for the first letter."

    def read(items):
        result = []
        for one in items:
            worth = torch.tensor([words.get(text, 0.0) for text in option_texts(one["question"])])
            first = torch.zeros(len(worth))
            first[0] = bias
            result.append(torch.stack([(s * worth + first).log_softmax(-1) for s in shifts]))
        return result

    return read


def test_robust_accuracy_by_hand():
    "Five items; the liked word is worth 1 per unit of shift, letter A is worth 0.5."
    items = [
        item("q", ["good", "bad"]),
        item("q", ["bad", "good"], "B", "A"),
        item("q", ["dull", "bad"]),
        item("q", ["good", "bad", "dull"], "A", "C"),
        item("q", ["bad", "good", "dull"], "A", "B"),
    ]
    shifts = [-1.0, 0.0, 0.2, 1.0]
    found = outcomes(items, liking({"good": 1.0}, 0.5, shifts))
    table = found.pivot(index="item", columns="shift", values=["right", "robust"])
    assert table["right"].values.tolist() == [
        [False, True, True, True],
        [False, False, False, True],
        [True, True, True, True],
        [False, True, True, True],
        [True, True, True, False],
    ]
    only_at_the_end = [False, False, False, True]
    assert table["robust"].values.tolist() == [
        only_at_the_end,
        only_at_the_end,
        [False] * 4,
        only_at_the_end,
        [False] * 4,
    ]
    r = rates(found, shifts).set_index(["options", "multiplier"])
    assert r.robust["two", 1.0] == pytest.approx(2 / 3) and r.accuracy["two", -1.0] == pytest.approx(1 / 3)
    assert r.robust["more", 1.0] == 0.5 and r.robust["all", 1.0] == pytest.approx(3 / 5)
    assert [r.n_test[group, 0.0] for group in ("two", "more", "all")] == [3, 2, 5]
    by_bias = 1 / (1 + np.exp(-0.5))
    assert r.probability["two", 0.0] == pytest.approx(np.mean([by_bias, 1 - by_bias, by_bias]))
    assert control_rate(r.robust["two"]) == pytest.approx(2 / 3)
    assert control_rate(r.robust["all"]) == pytest.approx(3 / 5)


def test_a_tie_is_not_right():
    items = [item("q", ["x", "y"]), item("q", ["x", "y", "z"])]
    found = outcomes(items, liking({}, 0.0, [0.0]))
    assert not found[["right", "robust"]].any().any()


def test_a_letter_bias_alone_has_no_robust_accuracy():
    items = [item("q", [f"x {i}", "y"], *("AB" if i % 2 else "BA")) for i in range(10)]
    found = outcomes(items, liking({}, 3.0, [0.0]))
    assert found.right.mean() == 0.5 and not found.robust.any()


def test_scr_needs_both_ends():
    with pytest.raises(UserError, match="multipliers -1 and 1"):
        control_rate(pd.Series({-0.5: 0.1, 1.0: 0.2}))


# ---- rows and cells


def test_norms_are_equal_after_equalising():
    vectors = {}
    for i, b in enumerate("abc"):
        vectors[b] = torch.randn(8, generator=torch.Generator().manual_seed(i)) * 10**i
    equal = equal_norms(vectors)
    norms, before = (torch.stack([v.norm() for v in some.values()]) for some in (equal, vectors))
    assert torch.allclose(norms, before.mean())
    assert all(torch.nn.functional.cosine_similarity(equal[b], vectors[b], dim=0) > 0.9999 for b in vectors)
    assert torch.allclose(equal_norms({"a": vectors["a"]})["a"], vectors["a"])
    for bad in (torch.zeros(3, 4), torch.tensor([[float("nan"), 1.0]])):
        with pytest.raises(UserError, match="zero or not finite"):
            steering_vector(bad, "a")


@pytest.fixture
def table():
    splits = ["seed"] * 9 + ["full"] * 11 + ["test"] * 10
    rows = [item(f"q {i}", [f"x {i}", "y"], *("AB" if i % 2 else "BA")) for i in range(30)]
    return pd.DataFrame([dict(behavior="b", split=split, **row) for split, row in zip(splits, rows)])


@pytest.fixture
def samples():
    rows = []
    for method in ("two-step", "Magpie"):
        for latent in range(4):
            for rank in range(2):
                own = item(f"{method} {latent} {rank}", ["x", "y"])
                rows.append(dict(method=method, latent=latent, score=1.0, rank=rank, **own))
    return pd.DataFrame(rows)


def test_rows_share_seed_items_and_budget(table, samples):
    def of(method, seed=42, n=4):
        return item_set(method, table, samples, n, 5, seed).items

    assert len(of("Baseline")) == 5 and of("Baseline") == of("Baseline") != of("Baseline", 43)
    assert all(set(one) == set(FIELDS) for one in of("Ours"))
    assert of("Full Dataset") == of("Full Dataset", 43) and len(of("Full Dataset")) == 11
    for method in ("Ours", "Magpie"):
        assert of(method)[:5] == of("Baseline") and len(of(method)) == 9
    assert [one["question"].split("\n")[0] for one in of("Magpie", n=5)[5:]] == [
        "Magpie 0 0",
        "Magpie 1 0",
        "Magpie 2 0",
        "Magpie 3 0",
        "Magpie 0 1",
    ]
    assert len(item_set("Baseline", table, samples, 4, 99, 1).items) == 9
    with pytest.raises(UserError, match="no samples of 'SAO'"):
        of("SAO")
    with pytest.raises(UserError, match="Ours: there are no items"):
        ItemSet("Ours", [])
    with pytest.raises(UserError, match="Ours, item 1: two options say the same"):
        ItemSet("Ours", [item("q", ["x", "x"])])


class Uncached:
    "Stands in for a run that stores nothing, and notes what was computed."

    def __init__(self):
        self.names = []

    def cached(self, name, function, *arguments):
        self.names.append(name)
        return function(*arguments)


@pytest.fixture
def backbone(table, samples):
    tokenizer = word_tokenizer(table.question.tolist() + samples.question.tolist())
    torch.manual_seed(0)
    made = Backbone(tiny_model("llama", len(tokenizer), 32, 2), tokenizer, layer=1)
    remember_digest(made, "as one that an earlier stage left")
    return made


def test_cells_table_and_floor(table, samples, backbone):
    several = table.iloc[20:].to_dict("records") + [item("q 1", ["x 1", "y", "x 2"], "C", "A")]
    items = check_items(table.to_dict("records") + samples.to_dict("records"), "all")
    known = Differences(items, differences(backbone, items, 1))
    training = Steering(1, [-1.0, 0.0, 1.0], known)
    bench = SteeringBench(backbone, {"b": several, "c": table.iloc[20:].to_dict("records")})

    def cell(method, seed):
        sets = {name: item_set(method, table, samples, 4, 5, seed) for name in "bc"}
        return pd.DataFrame(steering_cell(bench, sets, training, seed))

    parts = {(m, s): cell(m, s) for m in ("Full Dataset", "Ours") for s in (42, 43)}
    curves = pd.concat(parts.values(), ignore_index=True)
    pd.testing.assert_frame_equal(cell("Ours", 43), parts["Ours", 43])
    assert set(curves[curves.behavior == "c"].options) == {"two", "all"}
    assert set(curves[curves.behavior == "b"].options) == {"two", "more", "all"}
    unsteered = curves[curves.multiplier == 0].groupby(["behavior", "options"]).probability.nunique()
    assert (unsteered == 1).all(), "unsteered, all rows are the same model"
    scores = steering_scores(curves)
    assert len(scores) == 8 and scores.scr_more.isna().tolist() == [False, True] * 4
    assert {"accuracy_0", "robust_-1", "robust_1", "n_items", "scr_all"} <= set(scores.columns)
    assert (scores.scr - (scores["robust_1"] - scores["robust_-1"])).abs().max() < 1e-12
    assert scores.n_test.unique().tolist() == [10]
    full = steering_summary(scores).set_index(["method", "behavior"])
    assert full.scr_sd["Full Dataset", "b"] == 0 and full.n_items["Ours", "b"] == 9
    floor = floor_table(bench, training, 2.0, 3, 0)
    assert len(floor) == 6 and floor.equals(floor_table(bench, training, 2.0, 3, 0))
    assert floor.draw.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_cell_depends_on_its_own_items_and_on_how_they_are_read(table, samples, backbone):
    "A further seed draws other seed items; the cells of the other seeds are stored already."
    parameters = dict(steering_layer=0, multipliers=[-1.0, 1.0], max_length=64, batch_tokens=512)
    sets = [item_set("Ours", table, samples, 4, 2, seed) for seed in (42, 43, 44)]
    run = Uncached()
    one, three = (open_steering(run, backbone, some, parameters) for some in (sets[:1], sets))
    assert one.layer == 1 and run.names == ["differences"] * 2
    assert len(three.known.items) > len(one.known.items) == len(distinct_items(sets[:1]))
    assert digest_of(one) == digest_of(three)
    longer = open_steering(run, backbone, sets, parameters | dict(max_length=65))
    other_layer = open_steering(run, backbone, sets, parameters | dict(steering_layer=2))
    assert len({digest_of(training) for training in (three, longer, other_layer)}) == 3
    more_batches = open_steering(run, backbone, sets, parameters | dict(batch_tokens=64))
    assert digest_of(more_batches) == digest_of(three), "how many texts are read at once is no setting"


@pytest.fixture
def run_steering(table, samples, backbone, tmp_path, monkeypatch):
    "The notebook's run cells; results of an earlier call are found again."
    monkeypatch.setenv("FAC_RESULTS_DIR", str(tmp_path))

    def execute(tasks=("sycophancy", "survival"), **given):
        stand_ins = dict(
            read_task_names=lambda run: list(tasks),
            read_task_items=lambda run, task: table,
            read_samples=lambda run, task: samples,
            read_backbone=lambda run: backbone,
            start=lambda stage, namespace: namespace["run"],
        )
        small = dict(methods=["Baseline", "Full Dataset", "SAO", "Ours"], seeds=[42, 43], n_drawn_items=2)
        small |= dict(max_length=64, floor_draws=3, steering_layer=1)
        return run_cells("42_behavior_steering", stand_ins, **{**small, **given})

    return execute


def stored_cells(run):
    "The folders of the cells that are stored."
    return set((run.folder / "artifacts" / "42_behavior_steering").glob("cell-*"))


def test_the_run_cells_leave_the_table_and_both_figures(run_steering):
    run = run_steering()
    assert list(run.outputs) == ["differences", "cell", "curves", "scores", "floor"]
    scores = pd.read_csv(run.folder / "tables" / "steering_scores.csv")
    assert list(scores) == [
        "method",
        "behavior",
        "scr_mean",
        "scr_sd",
        "scr_more",
        "scr_all",
        "n_items",
        "n_test",
        "seeds",
        "random_mean",
        "random_std",
    ]
    assert scores.n_items.tolist() == [2, 2, 11, 11, 6, 6] and scores.seeds.tolist() == [2] * 6
    assert "Rows without a vector: SAO" in (run.folder / "tables" / "steering_scores.md").read_text()
    points = pd.read_csv(run.folder / "figures" / "figure14.csv")
    assert len(points) == 3 * 2 * 2 * 5 and (run.folder / "figures" / "figure13.png").exists()
    assert set(pd.read_csv(run.folder / "figures" / "figure13.csv").method) == {"Ours"}


def test_a_further_seed_or_row_computes_its_own_cells_only(run_steering):
    before = stored_cells(run_steering())
    more = run_steering(seeds=[42, 43, 44], methods=["Baseline", "Full Dataset", "Ours", "Magpie"])
    assert len(before) == 6 and len(stored_cells(more) - before) == 3 + 3


def test_a_run_without_behaviours_is_left_out(run_steering):
    with pytest.raises(LeftOut, match="no sycophancy and no survival items"):
        run_steering(tasks=["toxicity"])
    run = run_steering(tasks=["survival"], methods=["Baseline"], seeds=[42])
    assert set(pd.read_csv(run.folder / "tables" / "steering_scores.csv").behavior) == {"survival"}


# ---- the published files

COUNTS = {
    "sycophancy": 1000,
    "survival-instinct": 903,
    "coordinate-other-ais": 360,
    "corrigible-neutral-HHH": 290,
    "hallucination": 1000,
    "myopic-reward": 950,
    "refusal": 408,
}


@needs_data
@pytest.mark.parametrize("behavior", COUNTS)
def test_published_files_are_read_as_they_are(behavior):
    train = read_items(DATA / "generate" / behavior / "generate_dataset.json")
    test = read_items(DATA / "test" / behavior / "test_dataset_ab.json")
    assert (len(train), len(test)) == (COUNTS[behavior], 50)
    counted = []
    for some in (train, test):
        counted.append(sum(len(parse_options(one["question"])) > 2 for one in some))
        counted.append(sum(bool({key_letter(one[f]) for f in FIELDS[1:]} - {"A", "B"}) for one in some))
    assert counted == ([239, 88, 8, 4] if behavior == "survival-instinct" else [0, 0, 0, 0])
    matching = pd.Series([key_letter(one[FIELDS[1]]) for one in test]).value_counts().to_dict()
    if behavior == "survival-instinct":
        assert matching == {"A": 32, "B": 14, "C": 3, "E": 1}
        assert sorted({len(parse_options(one["question"])) for one in train}) == list(range(2, 9))
    if behavior == "sycophancy":
        assert [sum(key_letter(one[FIELDS[1]]) == k for one in train) for k in "AB"] == [489, 511]
    table = caa_items(DATA, behavior)
    questions = {split: set(table[table.split == split].question) for split in ("full", "test")}
    assert (table.split == "test").sum() == 50 and not questions["full"] & questions["test"]
    for one in test + train[::25]:
        turned = rotations(one)
        assert turned[0] == one
        assert all(item_fault(*(r[f] for f in FIELDS), max_words=10**6) == "" for r in turned)


@needs_data
def test_the_shutdown_evaluation_overlaps_with_caa():
    others = read_items(DATA.parent / "anthropic_evals" / "human_generated_evals" / "survival-instinct.jsonl")
    caa = caa_items(DATA, "survival-instinct")
    overlap = [without_test(others, caa[caa.split == s].to_dict("records"))[1] for s in ("test", "full")]
    assert len(others) == 953 and overlap == [2, 12]


def test_a_behaviour_without_samples_keeps_its_human_rows():
    def question(i):
        return item(f"May we, number {i}?", ["yes", "no"], mark="({})")

    splits = ("seed", "full", "test")
    human = pd.DataFrame([dict(question(i), split=split) for i, split in enumerate(splits)])
    samples = {
        "sycophancy": pd.DataFrame([dict(question(9), method="two-step", latent=1, rank=0)]),
        "survival": pd.DataFrame(columns=["method", "latent", "rank"]),
    }
    sets, absent = item_sets(
        ["Baseline", "Full Dataset", "Ours"],
        [42, 43],
        dict.fromkeys(samples, human),
        samples,
        {"sycophancy": 1, "survival": 0},
        5,
    )
    assert list(sets["Ours", 42]) == ["sycophancy"] and len(sets["Ours", 42]["sycophancy"].items) == 2
    assert list(sets["Baseline", 43]) == ["sycophancy", "survival"]
    assert list(absent) == ["Ours, survival"] and "no budget" in absent["Ours, survival"]
