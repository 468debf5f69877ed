"""CAA against a ten-line reference, prompts of several tokenizers, swapped options, robust accuracy and the cells of the table, on tiny random models."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
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
from fac_synthesis.run.parameters import UserError
from fac_synthesis.tasks.steering import (
    Bench,
    Differences,
    ItemSet,
    control_rate,
    differences,
    equal_norms,
    floor_table,
    item_set,
    item_sets,
    letter_log_probabilities,
    open_items,
    outcomes,
    rates,
    rotations,
    score_cell,
    score_table,
    steering,
    steering_vector,
    summary,
    swap_options,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from fac_synthesis import behavior_steering as module

torch.set_num_threads(1)
DATA = Path(os.environ["FAC_DATA_DIR"]) / "caa" if os.environ.get("FAC_DATA_DIR") else None
needs_data = pytest.mark.skipif(
    DATA is None or not DATA.exists(), reason="needs FAC_DATA_DIR with the caa folder"
)
ARCHITECTURES = ("llama", "mistral", "qwen2")


def item(stem, options, matching="A", other="B", mark="( {} )"):
    lines = "\n".join(f" {mark.format(chr(65 + i))} {o}" for i, o in enumerate(options))
    return dict(
        zip(FIELDS, (f"{stem}\n\nChoices :\n{lines}", f" {mark.format(matching)}", f" {mark.format(other)}"))
    )


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
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", chat_template=template
    )


# ---- the vector and the steered answer against a reference


def reference(model, layer, ids_positive, ids_negative, ids_open, first, letters, multiplier, v_D=None):
    "CAA in ten lines: one text at a time, no batch, no cache, a wrapped forward in place of a hook. (difference of one item, log-probabilities of the letters)."
    with torch.no_grad():
        state = lambda ids: model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0, -1]
        difference = state(ids_positive) - state(ids_negative)
        block = model.model.layers[layer - 1]
        plain = block.forward

        def forward(*args, **kwargs):
            out = plain(*args, **kwargs)
            x = (out[0] if isinstance(out, tuple) else out).clone()
            x[:, first:] += multiplier * v_D
            return (x, *out[1:]) if isinstance(out, tuple) else x

        if v_D is not None:
            block.forward = forward
        try:
            logits = model(torch.tensor([ids_open])).logits[0, -1, letters]
        finally:
            block.forward = plain
        return difference, logits - logits.logsumexp(-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vector_and_steered_logits_equal_the_reference(architecture):
    b, layer = double_backbone(architecture), 2
    ids = lambda q, more: WORDS(f"<bos> <user> {q} <end> <assistant> {more}", add_special_tokens=False)[
        "input_ids"
    ]
    keys = [
        (k["answer_matching_behavior"].split()[1], k["answer_not_matching_behavior"].split()[1])
        for k in ITEMS
    ]
    one = lambda i, m, v: reference(
        b.model,
        layer,
        *(ids(ITEMS[i]["question"], f"( {k}") for k in keys[i]),
        ids(ITEMS[i]["question"], "("),
        len(ids(ITEMS[i]["question"], "(")) - 1,
        [WORDS.convert_tokens_to_ids(chr(65 + j)) for j in range(len(option_texts(ITEMS[i]["question"])))],
        m,
        v,
    )
    v_D = torch.stack([one(i, 0, None)[0] for i in range(4)]).mean(0)
    ours = steering_vector(differences(b, ITEMS, layer, batch_tokens=64))
    assert (
        ours.dtype == torch.float64 and torch.allclose(ours, v_D, rtol=0, atol=1e-10) and ours.norm() > 1e-3
    )
    multipliers = [-1.0, -0.5, 0.0, 0.5, 1.0, 30.0]
    logp = letter_log_probabilities(
        b, ITEMS, torch.tensor(multipliers, dtype=torch.float64)[:, None] * ours, layer, batch_tokens=400
    )
    for i in range(4):
        for s, m in enumerate(multipliers):
            assert torch.allclose(logp[i][s], one(i, m, v_D)[1], rtol=0, atol=1e-10)
        assert torch.allclose(logp[i][2], one(i, 0, None)[1], rtol=0, atol=1e-10), (
            "a multiplier of zero is the model unsteered"
        )
        assert (
            torch.allclose(logp[i].exp().sum(-1), torch.ones(6, dtype=torch.float64))
            and (logp[i][5] - logp[i][2]).abs().max() > 1e-3
        )


def test_batching_and_shift_order_have_no_say():
    b = double_backbone()
    shifts = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, single = (
        letter_log_probabilities(b, ITEMS, shifts, 2),
        [letter_log_probabilities(b, [i], shifts[s : s + 1], 2)[0][0] for i in ITEMS for s in range(7)],
    )
    assert all(
        torch.allclose(w, torch.stack(single[7 * i : 7 * i + 7]), atol=1e-10) for i, w in enumerate(whole)
    )


@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_prompt_is_untouched_and_the_answer_steered(as_tuple):
    b = double_backbone()
    if as_tuple:
        decoder_layers(b.model)[1].register_forward_hook(
            lambda module, args, output: (output,)
        )  # what older decoder blocks return
    inputs, keep_BT = pad([o.tokens for o in open_items(WORDS, ITEMS)], 0, "cpu")
    stop = lambda layer: residual_stream(b.model, layer, **inputs)
    with torch.no_grad():
        before = [stop(layer) for layer in (1, 2)]
        with steering(b.model, 2, torch.ones(32), keep_BT):
            after = [stop(layer) for layer in (1, 2)]
    assert (
        torch.equal(before[0], after[0])
        and torch.equal(before[1][~keep_BT], after[1][~keep_BT])
        and torch.allclose(after[1][keep_BT], before[1][keep_BT] + 1)
    )
    assert (
        keep_BT.sum(1).tolist() == [1] * 4
        and [WORDS.decode(i) for i in inputs["input_ids"][keep_BT]] == ["("] * 4
    )


def test_the_hook_is_gone_even_after_an_exception():
    b = double_backbone()
    hooks = lambda: [len(l._forward_hooks) for l in decoder_layers(b.model)]
    with pytest.raises(ZeroDivisionError):
        with steering(b.model, 2, torch.ones(32)):
            assert hooks() == [0, 1, 0]
            1 / 0
    with pytest.raises(RuntimeError):
        letter_log_probabilities(
            b, ITEMS, torch.ones(2, 5), 2
        )  # a shift of the wrong width fails inside the forward pass
    assert hooks() == [0, 0, 0]
    assert torch.equal(differences(b, ITEMS, 0), differences(b, ITEMS, b.layer)), (
        "0 is the backbone's hook layer"
    )
    for layer in (4, -1):
        with pytest.raises(UserError, match=f"layer {layer} is out of range: this model has layers 1 to 3"):
            letter_log_probabilities(b, ITEMS, torch.ones(1, 32), layer)
        with pytest.raises(UserError, match="out of range"):
            differences(b, ITEMS, layer)


# ---- the opened answer

TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize("joined", [(), ("(A", "(B")], ids=["apart", "joined"])
@pytest.mark.parametrize("mark", ["({})", "( {} )"])
@pytest.mark.parametrize("template", [TURNS, CHAT_TEMPLATE, None], ids=["turns", "words", "plain"])
def test_the_letter_is_found_by_tokenising(template, mark, joined):
    tokenizer = byte_tokenizer(template, joined)
    opened = open_items(tokenizer, [item("Who?", ["me", "you"], mark=mark)])[0]
    said = tokenizer.decode(opened.tokens.ids)
    assert not said.endswith("<end>") and "(B)" in said.replace(" ", "").rsplit("\n", 1)[-1] + said.replace(
        " ", ""
    )
    for letter, token in zip("AB", opened.letters):
        text = tokenizer.decode(opened.tokens.ids + [token])
        assert text.endswith(mark.format(letter).split(letter)[0] + letter) and text.count("<end>") == (
            0 if template is None else 1
        ), "the turn is open"
    together = joined and mark == "({})" and tokenizer.convert_ids_to_tokens(opened.letters) == ["(A", "(B"]
    steered = tokenizer.decode(opened.tokens.ids[opened.tokens.first :])
    assert len(opened.tokens.ids) - opened.tokens.first == 1 and (together or steered.strip() == "("), (
        "the bracket is steered, and nothing before it"
    )
    b = double_backbone(tokenizer=tokenizer)
    logp = letter_log_probabilities(
        b,
        [item("Who?", ["me", "you"], mark=mark)],
        torch.stack([torch.zeros(32), 9 * torch.ones(32).cumsum(0).cos()]),
        2,
    )[0]
    assert (logp[0] - logp[1]).abs().max() > 1e-6, "steering reaches the letter in every tokenizer"


def test_both_kinds_of_tokenizer_in_one_call_and_limits():
    tokenizer = byte_tokenizer(TURNS, ("(A", "(B"))
    mixed = [
        item("Who?", ["me", "you"], mark="({})"),
        item("Who?", ["me", "you"], mark="( {} )"),
        item("Who?", ["me", "you"], mark="({})"),
    ]
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
    one = item("Why (A)? Because (B).", options, "B", chr(64 + n) if n > 2 else "A", mark)
    turned = rotations(one)
    assert len(turned) == n and turned[0] == one and len({r["question"] for r in turned}) == n
    for place in range(n):
        assert sorted(option_texts(r["question"])[place] for r in turned) == sorted(options), (
            "every text stands at every place once"
        )
    for r in turned:
        texts = dict(zip([o.letter for o in parse_options(r["question"])], option_texts(r["question"])))
        assert (
            texts[key_letter(r[FIELDS[1]])] == "yes"
            and texts[key_letter(r[FIELDS[2]])] == options[-1 if n > 2 else 0]
        )
        assert item_fault(*(r[f] for f in FIELDS)) == "" and len(r["question"]) == len(one["question"])
        assert r[FIELDS[1]].replace(key_letter(r[FIELDS[1]]), "B") == one[FIELDS[1]], (
            "the key is written as before"
        )
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
    for name, content, said in (
        ("key.json", [dict(rows[0], answer_matching_behavior="(D)")], "item 1: the key (D)"),
        ("field.json", [rows[0], {"question": "x"}], "item 2: answer_matching_behavior is missing"),
        ("list.json", [1], "every row must be an object"),
        ("empty.json", [], "holds no rows"),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        assert said in refused(lambda: read_items(tmp_path / name))
    (tmp_path / "cut.json").write_text(json.dumps(rows)[:-5])
    assert "not valid JSON" in refused(
        lambda: read_items(tmp_path / "cut.json")
    ) and "does not exist" in refused(lambda: read_items(tmp_path / "none.json"))
    assert "give the folder that holds generate and test" in refused(
        lambda: caa_items(tmp_path, "sycophancy")
    )
    kept, removed = without_test(
        rows, [dict(rows[0], question="ARE we friends?\nChoices:\n(A) yes\n (B) no")]
    )
    assert kept == rows[1:] and removed == 1


# ---- scoring


class Fixed:
    "Stands in for the model: letter logits by what the option says, plus a bias for the first letter."

    def __init__(self, monkeypatch, liking, bias):
        def logp(backbone, items, shifts_SD, layer, *rest):
            return [
                torch.stack(
                    [
                        torch.tensor(
                            [
                                s.item() * liking.get(t, 0.0) + (bias if i == 0 else 0.0)
                                for i, t in enumerate(option_texts(x["question"]))
                            ]
                        ).log_softmax(-1)
                        for s in shifts_SD[:, 0]
                    ]
                )
                for x in items
            ]

        monkeypatch.setattr(module, "letter_log_probabilities", logp)


def test_robust_accuracy_by_hand(monkeypatch):
    "Five items; the liked word is worth 1 per unit of shift, letter A is worth 0.5."
    items = [
        item("q", ["good", "bad"]),
        item("q", ["bad", "good"], "B", "A"),
        item("q", ["dull", "bad"]),
        item("q", ["good", "bad", "dull"], "A", "C"),
        item("q", ["bad", "good", "dull"], "A", "B"),
    ]
    Fixed(monkeypatch, {"good": 1.0}, 0.5)
    found = outcomes(None, items, torch.tensor([[-1.0], [0.0], [0.2], [1.0]]), 1)
    table = found.pivot(index="item", columns="shift", values=["right", "robust"])
    assert table["right"].values.tolist() == [
        [False, True, True, True],
        [False, False, False, True],
        [True, True, True, True],
        [False, True, True, True],
        [True, True, True, False],
    ]
    assert table["robust"].values.tolist() == [
        [False, False, False, True],
        [False, False, False, True],
        [False] * 4,
        [False, False, False, True],
        [False] * 4,
    ]
    r = rates(found, [-1.0, 0.0, 0.2, 1.0]).set_index(["options", "multiplier"])
    assert (
        r.robust["two", 1.0] == pytest.approx(2 / 3)
        and r.accuracy["two", -1.0] == pytest.approx(1 / 3)
        and r.robust["more", 1.0] == 0.5
        and r.robust["all", 1.0] == pytest.approx(3 / 5)
    )
    assert [r.n_test[g, 0.0] for g in ("two", "more", "all")] == [3, 2, 5]
    assert r.probability["two", 0.0] == pytest.approx(
        np.mean([1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(0.5)), 1 / (1 + np.exp(-0.5))])
    )
    assert control_rate(r.robust["two"]) == pytest.approx(2 / 3) and control_rate(
        r.robust["all"]
    ) == pytest.approx(3 / 5)


def test_a_tie_is_not_right(monkeypatch):
    Fixed(monkeypatch, {}, 0.0)
    assert (
        not outcomes(None, [item("q", ["x", "y"]), item("q", ["x", "y", "z"])], torch.zeros(1, 1), 1)[
            ["right", "robust"]
        ]
        .any()
        .any()
    )


def test_a_letter_bias_alone_has_no_robust_accuracy(monkeypatch):
    Fixed(monkeypatch, {}, 3.0)
    found = outcomes(
        None,
        [item("q", [f"x {i}", "y"], *("AB" if i % 2 else "BA")) for i in range(10)],
        torch.zeros(1, 1),
        1,
    )
    assert found.right.mean() == 0.5 and not found.robust.any()


def test_scr_needs_both_ends():
    with pytest.raises(UserError, match="multipliers -1 and 1"):
        control_rate(pd.Series({-0.5: 0.1, 1.0: 0.2}))


# ---- rows and cells


def test_norms_are_equal_after_equalising():
    vectors = {
        b: torch.randn(8, generator=torch.Generator().manual_seed(i)) * 10**i for i, b in enumerate("abc")
    }
    equal = equal_norms(vectors)
    assert torch.allclose(
        torch.stack([v.norm() for v in equal.values()]),
        torch.stack([v.norm() for v in vectors.values()]).mean(),
    )
    assert all(torch.nn.functional.cosine_similarity(equal[b], vectors[b], dim=0) > 0.9999 for b in vectors)
    assert torch.allclose(equal_norms({"a": vectors["a"]})["a"], vectors["a"])
    for bad in (torch.zeros(3, 4), torch.tensor([[float("nan"), 1.0]])):
        with pytest.raises(UserError, match="zero or not finite"):
            steering_vector(bad, "a")


@pytest.fixture
def table():
    place = lambda i: dict(behavior="b", split="seed" if i < 9 else "full" if i < 20 else "test")
    return pd.DataFrame(
        [dict(**place(i), **item(f"q {i}", [f"x {i}", "y"], *("AB" if i % 2 else "BA"))) for i in range(30)]
    )


@pytest.fixture
def samples():
    return pd.DataFrame(
        [
            dict(method=m, latent=i, score=1.0, rank=r, **item(f"{m} {i} {r}", ["x", "y"]))
            for m in ("two-step", "Magpie")
            for i in range(4)
            for r in range(2)
        ]
    )


def test_rows_share_seed_items_and_budget(table, samples):
    of = lambda m, seed=42, n=4: item_set(m, table, samples, n, 5, seed).items
    assert (
        len(of("Baseline")) == 5
        and of("Baseline") == of("Baseline") != of("Baseline", 43)
        and all(set(i) == set(FIELDS) for i in of("Ours"))
    )
    assert of("Full Dataset") == of("Full Dataset", 43) and len(of("Full Dataset")) == 11
    for m in ("Ours", "Magpie"):
        assert of(m)[:5] == of("Baseline") and len(of(m)) == 9
    assert [i["question"].split("\n")[0] for i in of("Magpie", n=5)[5:]] == [
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


def test_cells_table_and_floor(table, samples, tmp_path):
    tokenizer = word_tokenizer(table.question.tolist() + samples.question.tolist())
    b = Backbone(tiny_model("llama", len(tokenizer), 32, 2), tokenizer, layer=1)
    several = table.iloc[20:].to_dict("records") + [item("q 1", ["x 1", "y", "x 2"], "C", "A")]
    items = check_items(table.to_dict("records") + samples.to_dict("records"), "all")
    bench = Bench(
        b,
        1,
        Differences(items, differences(b, items, 1)),
        {"b": several, "c": table.iloc[20:].to_dict("records")},
        [-1.0, 0.0, 1.0],
    )
    sets = lambda m, s: {name: item_set(m, table, samples, 4, 5, s) for name in "bc"}
    curves = pd.DataFrame(
        [r for m in ("Full Dataset", "Ours") for s in (42, 43) for r in score_cell(bench, sets(m, s), s)]
    )
    again = pd.DataFrame(score_cell(bench, sets("Ours", 43), 43))
    pd.testing.assert_frame_equal(
        again, curves[(curves.method == "Ours") & (curves.seed == 43)].reset_index(drop=True)
    )
    assert set(curves[curves.behavior == "c"].options) == {"two", "all"} and set(
        curves[curves.behavior == "b"].options
    ) == {"two", "more", "all"}
    assert (
        curves[curves.multiplier == 0].groupby(["behavior", "options"]).probability.nunique() == 1
    ).all(), "unsteered, all rows are the same model"
    scores = score_table(curves)
    assert (
        len(scores) == 8
        and scores.scr_more.isna().tolist() == [False, True] * 4
        and {"accuracy_0", "robust_-1", "robust_1", "n_items", "scr_all"} <= set(scores.columns)
    )
    assert (
        scores.scr - (scores["robust_1"] - scores["robust_-1"])
    ).abs().max() < 1e-12 and scores.n_test.unique().tolist() == [10]
    full = summary(scores).set_index(["method", "behavior"])
    assert full.scr_sd["Full Dataset", "b"] == 0 and full.n_items["Ours", "b"] == 9
    floor = floor_table(bench, 2.0, 3, 0)
    assert (
        len(floor) == 6
        and floor.equals(floor_table(bench, 2.0, 3, 0))
        and floor.draw.tolist() == [0, 0, 1, 1, 2, 2]
    )


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
    train, test = (
        read_items(DATA / "generate" / behavior / "generate_dataset.json"),
        read_items(DATA / "test" / behavior / "test_dataset_ab.json"),
    )
    assert (len(train), len(test)) == (COUNTS[behavior], 50)
    more = lambda items: sum(len(parse_options(i["question"])) > 2 for i in items)
    outside = lambda items: sum(bool({key_letter(i[f]) for f in FIELDS[1:]} - {"A", "B"}) for i in items)
    assert (more(train), more(test), outside(train), outside(test)) == (
        (239, 8, 88, 4) if behavior == "survival-instinct" else (0, 0, 0, 0)
    )
    if behavior == "survival-instinct":
        assert pd.Series([key_letter(i[FIELDS[1]]) for i in test]).value_counts().to_dict() == {
            "A": 32,
            "B": 14,
            "C": 3,
            "E": 1,
        }
        assert sorted({len(parse_options(i["question"])) for i in train}) == list(range(2, 9))
    if behavior == "sycophancy":
        assert [sum(key_letter(i[FIELDS[1]]) == k for i in train) for k in "AB"] == [489, 511]
    table = caa_items(DATA, behavior)
    assert (table.split == "test").sum() == 50 and not set(table[table.split == "full"].question) & set(
        table[table.split == "test"].question
    )
    for one in test + train[::25]:
        assert (
            all(item_fault(*(r[f] for f in FIELDS), max_words=10**6) == "" for r in rotations(one))
            and rotations(one)[0] == one
        )


@needs_data
def test_the_shutdown_evaluation_overlaps_with_caa():
    others = read_items(DATA.parent / "anthropic_evals" / "human_generated_evals" / "survival-instinct.jsonl")
    caa = caa_items(DATA, "survival-instinct")
    overlap = [without_test(others, caa[caa.split == s].to_dict("records"))[1] for s in ("test", "full")]
    assert len(others) == 953 and overlap == [2, 12]


def test_a_behaviour_without_samples_keeps_its_human_rows():
    item = lambda i: dict(
        question=f"May we, number {i}?\n (A) yes\n (B) no",
        answer_matching_behavior=" (A)",
        answer_not_matching_behavior=" (B)",
    )
    table = pd.DataFrame(
        [
            dict(item(i), behavior=b, split=s)
            for b in ("sycophancy", "survival")
            for i, s in enumerate(("seed", "full", "test"))
        ]
    )
    samples = {
        "sycophancy": pd.DataFrame([dict(item(9), method="two-step", latent=1, rank=0)]),
        "survival": pd.DataFrame(columns=["method", "latent", "rank"]),
    }
    sets, absent = item_sets(
        ["Baseline", "Full Dataset", "Ours"], [42, 43], table, samples, {"sycophancy": 1, "survival": 0}, 5
    )
    assert (
        list(sets["Ours", 42]) == ["sycophancy"]
        and len(sets["Ours", 42]["sycophancy"].items) == 2
        and list(sets["Baseline", 43]) == ["sycophancy", "survival"]
    )
    assert list(absent) == ["Ours, survival"] and "no budget" in absent["Ours, survival"]
