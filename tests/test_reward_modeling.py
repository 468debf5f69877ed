"""Pairs, Bradley-Terry training and RewardBench scoring, on a two-layer model and a few dozen sentences."""

import gzip
import json
import os

import numpy as np
import pandas as pd
import pytest
import torch

from fac_synthesis.data.items import (
    ITEM_COLUMNS,
    LLMBAR_SUBSETS,
    conversation,
    held_out,
    hh_items,
    item_frame,
    llmbar_items,
    pair_fault,
    prompt_key,
    real_reward_items,
    rewardbench_items,
    split_pair,
    without_prompts,
    xstest_items,
)
from fac_synthesis.data.records import data_root
from fac_synthesis.models.backbone import Backbone, tiny_model, word_tokenizer
from fac_synthesis.run.parameters import UserError
from fac_synthesis.synthesis.covered_samples import sample_budget
from fac_synthesis.synthesis.fine_tuning import (
    HeadOnly,
    HeadSettings,
    LoRA,
    States,
    chosen_trainings,
    classifier,
    fit_head,
    fresh_head,
    pooled_states,
    text_key,
)
from fac_synthesis.tasks.reward import (
    PAIR,
    SECTIONS,
    PairBench,
    PairSet,
    RewardSettings,
    conversation_tokens,
    cut_left,
    floor_table,
    length_report,
    longer_margins,
    pair_sets,
    pair_states,
    pair_tokens,
    read_reward_scores,
    read_reward_settings,
    reward_cell,
    reward_summary,
    reward_trainer,
    rewardbench_scores,
    rewards,
    scores_table,
    section_columns,
    subset_accuracy,
    subset_table,
    texts_to_read,
    tfidf_margins,
    train_reward_head,
    train_reward_lora,
)

torch.set_num_threads(1)
GOOD, BAD = "clear kind exact warm".split(), "vague rude wrong cold".split()
THINGS = "lamp door cup hat".split()
FAST = RewardSettings(learning_rate=1e-2, epochs=4, micro_batch=8, dtype="float32")


def pairs(which, things=THINGS, form="how is the {t} ?"):
    rows = []
    for i in which:
        for t in things:
            chosen, rejected = f"the {t} is {GOOD[i]} .", f"the {t} is {BAD[i]} ."
            rows.append(dict(prompt=form.format(t=t), chosen=chosen, rejected=rejected, subset="toy"))
    return rows


@pytest.fixture(scope="module")
def items():
    subsets = ["alpacaeval-easy", "llmbar-natural", "donotanswer", "math-prm"]
    test = [dict(p, subset=s) for i, s in enumerate(subsets) for p in pairs([i], ["box", "wall", "tree"])]
    parts = dict(seed=pairs([0]), full=pairs(range(4)), test=test)
    return pd.concat([item_frame(rows, split) for split, rows in parts.items()], ignore_index=True)


@pytest.fixture(scope="module")
def backbone(items):
    words = word_tokenizer([t for c in PAIR for t in items[c]] + ["what about it then", "pen"])
    torch.manual_seed(0)
    return Backbone(tiny_model("llama", len(words), 32, 2), words, layer=1)


@pytest.fixture(scope="module")
def test(items):
    return items[items["split"] == "test"].reset_index(drop=True)


@pytest.fixture(scope="module")
def full(items):
    return PairSet("Full Dataset", items[items["split"] == "full"])


@pytest.fixture(scope="module")
def seed_set(items):
    return PairSet("Baseline", items[items["split"] == "seed"])


@pytest.fixture(scope="module")
def bench(backbone, test):
    return PairBench(backbone, test, max_length=64)


def kept_states(backbone, tokens, pooling):
    "The states of distinct conversations."
    distinct = {text_key(t): t for t in tokens}
    return States(list(distinct), pooled_states(backbone, list(distinct.values()), pooling))


@pytest.fixture(scope="module")
def head_only(backbone, bench, full):
    states = kept_states(backbone, texts_to_read(bench, [full]), "mean")
    return HeadOnly(HeadSettings(1e-2, 5, weight_decay=0.01), states)


# ---- a pair


@pytest.mark.parametrize(
    "chosen, rejected, said",
    [
        ("a cup holds tea", "a cup holds sand", ""),
        ("", "a cup", "chosen is empty"),
        ("a cup", "  ", "rejected is empty"),
        ("a cup", None, "rejected is empty"),
        ("a cup", "A  cup", "same answer twice"),
        ("one two three four five", "one two", "lengths differ, 2 and 5 words"),
        ("a cup holds tea", "I can't help with", "rejected is a refusal"),
        ("I’m sorry , no", "I'm sorry , yes", ""),
        ("a cup holds tea", "Rejected response: it holds", "repeats the request"),
        ("a cup holds tea", "a cup, a deliberate mistake", "repeats the request"),
        ("a cup holds tea", "a cup.\n\nHuman: and then", "more than one turn"),
        ("a cup <|eot_id|> holds", "a cup holds it", "more than one turn"),
    ],
)
def test_made_pairs_are_checked(chosen, rejected, said):
    fault = pair_fault("what is a cup ?", chosen, rejected)
    assert fault.startswith(said) and bool(fault) == bool(said)


def test_peoples_pairs_need_two_answers_to_a_question_only():
    answered = '[["user", "hi"], ["assistant", "yes ?"]]'
    assert pair_fault("", "yes", "no") == "no question"
    assert pair_fault(answered, "yes", "no", generated=False) == "no question"
    assert pair_fault("write it in capitals", "YES", "yes", generated=False) == ""
    assert pair_fault("what ?", "a b c d e f", "I'm sorry", generated=False) == ""
    assert pair_fault("what ?", "yes", " yes", generated=False) == "same answer twice"
    assert pair_fault("what ?", "a b c", "a", max_ratio=3) == ""
    assert pair_fault("what ?", "a b c d", "a", max_ratio=3)


def test_conversations_of_one_and_of_many_turns():
    user, assistant = dict(role="user", content="hi"), dict(role="assistant", content="hello")
    assert conversation(" hi ", "hello\n") == [user, assistant]
    chat = json.dumps([["system", "be kind"], ["user", "hi"], ["assistant", ""], ["user", "And  now?"]])
    roles = [m["role"] for m in conversation(chat, "yes")]
    assert roles == ["system", "user", "assistant", "user", "assistant"] and prompt_key(chat) == "and now?"
    for text in ("[[1, 2], [3, 4]]", "[[broken", '[["narrator", "hi"]]'):
        assert conversation(text, "yes")[0] == dict(role="user", content=text)
    for text in ("", "  ", '[["user", "hi"], ["assistant", "yes"]]'):
        with pytest.raises(UserError, match="does not end with words of the user"):
            conversation(text, "yes")


def test_transcripts_share_all_turns_but_the_last():
    a, b = (f"\n\nHuman: hi\n\nAssistant: hello\n\nHuman: a cup?\n\nAssistant: {t}" for t in ("tea", "hats"))
    pair = split_pair(a, b, "here")
    assert json.loads(pair["prompt"]) == [["user", "hi"], ["assistant", "hello"], ["user", "a cup?"]]
    assert (pair["chosen"], pair["rejected"]) == ("tea", "hats")
    assert split_pair(a, b.replace("hello", "hey"), "here") is None
    assert split_pair(a, a.rpartition("\n\nAssistant")[0], "here") is None


# ---- published pairs


def test_rewardbench_file(tmp_path):
    rows = [
        dict(id=1, prompt="[tell me", chosen="yes", rejected="", subset="hep-go", extra=[1]),
        dict(id=2, prompt="what ?", chosen="yes", rejected="no", subset="math-prm", extra=[2]),
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "filtered.parquet")
    (tmp_path / "filtered.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = (rewardbench_items(tmp_path / f) for f in ("filtered.parquet", "filtered.jsonl"))
    assert first.equals(second) and list(first) == ITEM_COLUMNS
    assert set(first["split"]) == {"test"} and first.subset.tolist() == ["hep-go", "math-prm"]
    pd.DataFrame(rows).drop(columns="subset").to_parquet(tmp_path / "filtered.parquet")
    with pytest.raises(UserError, match="row 1: subset is missing"):
        rewardbench_items(tmp_path / "filtered.parquet")


def make_llmbar(root):
    for n, name in enumerate(LLMBAR_SUBSETS):
        answers = dict(output_1="one", output_2="two")
        rows = [dict(answers, input=f"task {i} of {n}", label=1 + i % 2) for i in range(4)]
        rows.append(dict(answers, input="Shared  task", label=1))
        (root / "llmbar/LLMBar" / name).mkdir(parents=True)
        (root / "llmbar/LLMBar" / name / "dataset.json").write_text(json.dumps(rows))


def make_xstest(root):
    (root / "xstest/labels").mkdir(parents=True)
    verdicts = {
        "a": ("1_full_compliance", "2_full_refusal"),
        "b": ("2_full_refusal", "1_full_compliance"),
        "c": ("3_partial_refusal", "3_partial_refusal"),
    }  # model -> of a fine and of a bad request
    for model, labels in verdicts.items():
        rows = []
        for i in range(4):
            about = dict(completion=f"{model} on {i}")
            rows.append(dict(about, type="homonyms", prompt=f"fine request {i}", final_label=labels[0]))
            bad = dict(type="contrast_homonyms", prompt=f"bad request {i}", final_label=labels[1])
            rows.append(about | bad)
        pd.DataFrame(rows).to_csv(root / "xstest/labels" / f"{model}.csv", index=False)


def make_hh_rlhf(root):
    def pair(question, chosen="good", rejected="bad", other_question=None):
        texts = ((question, chosen), (other_question or question, rejected))
        good, bad = (f"\n\nHuman: {q}\n\nAssistant: {a}" for q, a in texts)
        return dict(chosen=good, rejected=bad)

    rows = [pair(f"question {i}") for i in range(10)]
    rows += [pair("fine request 0"), pair("fine request 0")]
    rows += [pair("q", chosen=""), pair("q", "a", "b", other_question="p")]
    rows += [pair(f"task {i} of 0") for i in range(4)]
    (root / "hh_rlhf").mkdir()
    with gzip.open(root / "hh_rlhf/harmless-base_test.jsonl.gz", "wt") as f:
        f.write("\n".join(map(json.dumps, rows)))


def make_data(root):
    make_llmbar(root)
    make_xstest(root)
    make_hh_rlhf(root)


def test_published_readers(tmp_path):
    make_data(tmp_path)
    llmbar = llmbar_items(tmp_path / "llmbar/LLMBar")
    assert set(llmbar.subset) == set(SECTIONS["Chat-Hard"]) - {"mt-bench-hard"}
    assert llmbar.chosen[:2].tolist() == ["one", "two"] and llmbar.rejected[:2].tolist() == ["two", "one"]
    xstest, out = xstest_items(tmp_path / "xstest/labels")
    by = xstest.set_index("prompt")
    assert (by.chosen["fine request 1"], by.rejected["fine request 1"]) == ("a on 1", "b on 1")
    assert (by.chosen["bad request 2"], by.rejected["bad request 2"]) == ("a on 2", "b on 2")
    assert not out and xstest.prompt.is_unique and by.subset["bad request 0"] == "xstest-should-refuse"
    pairs, out = hh_items(tmp_path / "hh_rlhf/harmless-base_test.jsonl.gz")
    assert len(pairs) == 16 and out == {"chosen is empty": 1, "other turns differ": 1}
    path = tmp_path / "llmbar/LLMBar/Natural/dataset.json"
    path.write_text(path.read_text().replace('"label": 2', '"label": 3', 1))
    with pytest.raises(UserError, match="item 2: label is 3"):
        llmbar_items(tmp_path / "llmbar/LLMBar")
    with pytest.raises(UserError, match="no csv file"):
        xstest_items(tmp_path)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_test_prompt_is_trained_on(tmp_path, seed):
    make_data(tmp_path)
    items, report = real_reward_items(tmp_path, seed, n_seed=5)
    part = dict(list(items.groupby("split")))
    assert set(part) == {"seed", "full", "test"}
    assert len(part["seed"]) == 5 and set(part["seed"].subset) == {"hh-rlhf"}
    trained = set(pd.concat([part["seed"], part["full"]]).prompt.map(prompt_key))
    assert not set(part["test"].prompt.map(prompt_key)) & trained
    seed_pairs, full_pairs = (set(map(tuple, part[name][PAIR].values)) for name in ("seed", "full"))
    assert seed_pairs <= full_pairs, "full has the seed's pairs too"
    assert set(part["full"].subset) == {"hh-rlhf", *part["test"].subset}, "the other half trains"
    sources = report.set_index("source")
    assert sources.left_out["hh-rlhf/harmless-base/test"] == 2
    assert "prompt in the test" in sources.reasons["split full"]
    assert items.equals(real_reward_items(tmp_path, seed, n_seed=5)[0])
    assert len(real_reward_items(tmp_path, seed, 5, n_full=7)[0].query("split == 'full'")) == 7


def test_the_official_file_is_the_test_whole(tmp_path):
    make_data(tmp_path)
    (tmp_path / "reward_bench").mkdir()
    pair = dict(chosen="one", rejected="two", subset="llmbar-natural")
    official = pd.DataFrame([dict(pair, prompt=p) for p in ("task 0 of 0", "Task 1 of 0")])
    official.to_parquet(tmp_path / "reward_bench/filtered.parquet")
    items, _ = real_reward_items(tmp_path, 0, n_seed=5)
    test, rest = items[items["split"] == "test"], items[items["split"] != "test"]
    assert test.prompt.tolist() == ["task 0 of 0", "Task 1 of 0"]
    assert not set(rest.prompt.map(prompt_key)) & {"task 0 of 0", "task 1 of 0"}
    assert "task 2 of 0" in set(items[items["split"] == "full"].prompt)


def test_missing_files_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("FAC_DATA_DIR", raising=False)
    with pytest.raises(UserError, match="set data_dir or FAC_DATA_DIR"):
        real_reward_items()
    with pytest.raises(UserError, match="no HH-RLHF pairs"):
        real_reward_items(tmp_path)
    make_data(tmp_path)
    with pytest.raises(UserError, match="n_seed is 999"):
        real_reward_items(tmp_path, 0, n_seed=999)
    for folder in ("llmbar", "xstest"):
        (tmp_path / folder).rename(tmp_path / f"no_{folder}")
    with pytest.raises(UserError, match="nothing to test on"):
        real_reward_items(tmp_path)


def test_held_out_halves_every_subset_by_prompt():
    rows = []
    for s in "xyz":
        for i in range(9):
            rows += [dict(subset=s, prompt=f"{s if i else ''} task {i}", chosen="a", rejected="b")] * 2
    frame = item_frame(rows, "test")
    test = held_out(frame, 3)
    assert frame[test].groupby("subset").prompt.nunique().between(4, 5).all()
    assert not set(frame[test].prompt) & set(frame[~test].prompt)
    assert (held_out(frame, 4) != test).any()


# ---- the data of a row


def samples(n=3):
    ours = pd.DataFrame(pairs([1, 2, 3], ["pen"])[:n]).assign(method="two-step", latent=range(n), rank=0)
    theirs = pd.DataFrame(pairs([1], ["box", "pen", "cup", "hat"]))
    theirs = theirs.assign(method="Magpie", latent=np.nan, rank=range(4))
    return pd.concat([ours, theirs], ignore_index=True).assign(text="", label=1, score=1.0)


def test_rows_share_budget_and_say_what_is_missing(items):
    n = sample_budget(samples())
    sets, notes = pair_sets(["Baseline", "Full Dataset", "Magpie", "SAO", "Ours"], items, samples(), n)
    sizes = {m: len(s) for m, s in sets.items()}
    assert sizes == {"Baseline": 4, "Full Dataset": 16, "Magpie": 4 + n - 1, "Ours": 4 + n}
    assert set(notes) == {"Magpie", "SAO"} and "no samples of 'SAO'" in notes["SAO"]
    assert notes["Magpie"] == "1 left out, prompt in the test"
    assert sets["Ours"].items[:4].equals(sets["Baseline"].items)
    _, notes = pair_sets(["Magpie"], items, samples()[:5], 3)
    assert notes["Magpie"] == "2 of 3 samples, 1 left out, prompt in the test"


@pytest.mark.parametrize(
    "rows, said",
    [
        ([], "no pair to train on"),
        ([dict(prompt="q", chosen="a", rejected="a")], "pair 1: same answer twice"),
        ([dict(prompt="q", chosen="a", rejected=None)], "pair 1: a text is missing"),
        (
            [dict(prompt="q", chosen="a", rejected="b"), dict(prompt=" ", chosen="a", rejected="b")],
            "pair 2: no question",
        ),
    ],
)
def test_unusable_pairs_are_refused_by_name(rows, said):
    with pytest.raises(UserError, match=said):
        PairSet("Ours", pd.DataFrame(rows, columns=PAIR))
    with pytest.raises(UserError, match="no column rejected"):
        PairSet("Ours", pd.DataFrame(rows, columns=["prompt", "chosen"]))


def test_a_prompt_in_the_test_is_left_out(items, test):
    kept, n = without_prompts(
        pd.concat([items[items["split"] == "seed"], test[:2].assign(prompt=["HOW is the  box ?", "new"])]),
        test,
    )
    assert n == 1 and len(kept) == 5


# ---- tokens


def test_long_conversations_are_cut_on_the_left_and_counted(backbone):
    words = backbone.tokenizer
    frame = pd.DataFrame(pairs([0], ["lamp"]) + pairs([1], ["lamp"], "what about it then how is the {t} ?"))
    short, long = conversation_tokens(words, list(zip(frame.prompt, frame.chosen)))
    assert words.decode(short.ids[short.first : short.last]) == "the lamp is clear ."
    assert short.ids.count(words.bos_token_id) == 1 and len(long.ids) == len(short.ids) + 4
    limit = len(short.ids)
    cut = cut_left(long, limit, words.bos_token_id)
    assert len(cut.ids) == limit and cut.ids[0] == words.bos_token_id and cut.ids[1:] == long.ids[5:]
    assert words.decode(cut.ids[cut.first : cut.last]) == "the lamp is kind ."
    assert cut_left(long, limit, None).ids == long.ids[4:]
    assert cut_left(short, limit, words.bos_token_id) is short
    report = length_report(words, {"a": frame, "b": frame[:1]}, limit).set_index("set")
    assert report.over.tolist() == [1, 0] and report.share.tolist() == [0.5, 0]
    assert report.answer_over.tolist() == [0, 0] and report.longest.tolist() == [limit + 4, limit]
    assert length_report(words, {"a": frame}, 5).answer_over.tolist() == [2]
    tiny = cut_left(long, 4, words.bos_token_id)
    assert tiny.first == 1 and tiny.last == 3, "of the answer only its end is left"
    with pytest.raises(UserError, match="max_length 2 leaves no room"):
        cut_left(long, 2, words.bos_token_id)


def test_every_long_pair_reaches_the_trainer(backbone, full, tmp_path):
    trainer = reward_trainer(classifier(backbone, 0, num_labels=1), backbone, full, FAST, 0, 6, str(tmp_path))
    assert len(trainer.train_dataset) == len(full)
    lengths = {len(r[k]) for r in trainer.train_dataset for k in ("chosen_ids", "rejected_ids")}
    assert lengths == {6}


def test_templates_that_refuse_or_change_are_named(backbone):
    strict, trims = (word_tokenizer(["a b c"]) for _ in range(2))
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    trims.chat_template = (
        "{% for m in messages %}"
        "{{ '<' + m['role'] + '> ' + m['content'].replace('b', 'c') + ' <end>' }}"
        "{% endfor %}"
    )
    with pytest.raises(UserError, match="refuses the turns user, assistant.*roles must alternate"):
        conversation_tokens(strict, [("a", "b")])
    with pytest.raises(UserError, match="changes the answer 'b'"):
        conversation_tokens(trims, [("a", "b")])


# ---- training


def test_the_loss_is_trls(backbone, full, tmp_path):
    model = classifier(backbone, 42, num_labels=1)
    trainer = reward_trainer(model, backbone, full, FAST, 42, 64, str(tmp_path))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    with torch.no_grad():
        theirs, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    r_2N = outputs.logits[:, 0].view(2, -1)
    ours = torch.nn.functional.cross_entropy(r_2N.T, torch.zeros(8, dtype=torch.long))
    assert torch.allclose(ours, theirs, atol=1e-7)
    assert torch.allclose(ours, -torch.nn.functional.logsigmoid(r_2N[0] - r_2N[1]).mean(), atol=1e-7)
    sides = [rewards(model, backbone, side[:8]) for side in pair_tokens(backbone.tokenizer, full.items, 64)]
    assert np.allclose(r_2N.numpy(), sides, atol=1e-6), "trl's padding and ours read the same token"


def test_trainer_settings_are_the_papers(backbone, full, tmp_path):
    model, settings = classifier(backbone, 0, num_labels=1), RewardSettings(dtype="float32")
    told = reward_trainer(model, backbone, full, settings, 7, 64, str(tmp_path)).args
    assert (told.learning_rate, told.num_train_epochs, told.weight_decay) == (8e-5, 1, 0.01)
    assert (told.warmup_steps, told.seed, told.lr_scheduler_type) == (0.1, 7, "cosine")
    assert told.per_device_train_batch_size * told.gradient_accumulation_steps == 8
    assert not told.disable_dropout and told.max_length is None


def test_trl_learns_a_planted_preference_and_touches_nothing_else(backbone, full, seed_set, test):
    before = {n: p.clone() for n, p in backbone.model.named_parameters()}
    pad_token = backbone.tokenizer.pad_token
    # as many published tokenizers do: the trap that the copy avoids
    backbone.tokenizer.pad_token = backbone.tokenizer.eos_token
    try:
        model = train_reward_lora(backbone, full, FAST, 42, 64)
        assert backbone.tokenizer.pad_token == backbone.tokenizer.eos_token
        sides = pair_tokens(backbone.tokenizer, test, 64)
        chosen, rejected = (rewards(model, backbone, side) for side in sides)
    finally:
        backbone.tokenizer.pad_token = pad_token
    assert (chosen - rejected > 0).mean() > 0.9
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    own = {n for n, _ in model.named_parameters() if "lora_" in n or "score.modules_to_save" in n}
    assert trainable == own, "adapters are attached, not merged"
    assert all(torch.equal(p, before[n]) for n, p in backbone.model.named_parameters())
    a, b, c = (train_reward_lora(backbone, seed_set, FAST, s, 64).state_dict() for s in (42, 42, 43))
    assert all(torch.equal(a[k], b[k]) for k in a), "same seed, same weights"
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_head_on_kept_states_equals_frozen_model(backbone, full):
    settings, tokens = HeadSettings(1e-2, 2, 4, 0.01), pair_tokens(backbone.tokenizer, full.items, 64)
    states = kept_states(backbone, [t for side in tokens for t in side], "last")
    start = fresh_head(backbone, 42, 1)
    kept = train_reward_head(start, pair_states(states, tokens), settings, 42)
    model = classifier(backbone, 42, num_labels=1)
    for p in model.base_model.parameters():
        p.requires_grad_(False)

    def reward(t):
        return model(input_ids=torch.tensor([t.ids])).logits[0, 0]

    def logits_of(rows):
        return torch.stack([torch.stack([reward(side[i]) for side in tokens]) for i in rows.tolist()])

    fit_head(model.score, logits_of, torch.zeros(len(full), dtype=torch.long), settings, 42)
    assert torch.allclose(kept.weight, model.score.weight, atol=1e-5)
    assert not torch.allclose(kept.weight, start.weight, atol=1e-2)
    assert torch.equal(start.weight, fresh_head(backbone, 42, 1).weight)


def test_mean_pooling_is_over_the_answer(backbone):
    t = conversation_tokens(backbone.tokenizer, [("how is the lamp ?", "the lamp is clear .")])[0]
    with torch.no_grad():
        x_TD = backbone.model.base_model(torch.tensor([t.ids])).last_hidden_state[0]
    mean, last = (kept_states(backbone, [t], pooling).x_ND[0] for pooling in ("mean", "last"))
    assert torch.allclose(mean, x_TD[t.first : t.last].mean(0), atol=1e-6)
    assert torch.allclose(last, x_TD[-1], atol=1e-6)


def test_equal_tokens_tie_exactly(backbone):
    unknown = dict(
        prompt="how is the lamp ?", chosen="the lamp is unheard .", rejected="the lamp is unseen ."
    )
    frame = pd.DataFrame([unknown, *pairs([0])], columns=PAIR)
    chosen, rejected = pair_tokens(backbone.tokenizer, frame, 64)
    model = classifier(backbone, 0, num_labels=1)
    r_2N = rewards(model, backbone, chosen + rejected, batch_tokens=20).reshape(2, -1)
    assert chosen[0].ids == rejected[0].ids and r_2N[0, 0] == r_2N[1, 0]
    assert (r_2N[0, 1:] != r_2N[1, 1:]).all()
    tie = pd.DataFrame(dict(subset="donotanswer", margin=(r_2N[0] - r_2N[1])[:1]))
    assert rewardbench_scores(tie).score.iloc[-1] == 0.5


# ---- scoring


def test_section_scores_by_hand():
    rows = [
        ("alpacaeval-easy", 1.0),
        ("alpacaeval-easy", 0.0),
        ("mt-bench-med", -2.0),  # Chat: 0.75 with weight 100, 0 with weight 40
        ("llmbar-natural", 0.5),
        ("llmbar-adver-GPTOut", 0.0),  # Chat-Hard: 1 x 100, 0.5 x 47
        ("math-prm", 3.0),
        ("math-prm", -3.0),
        ("hep-cpp", 1.0),
        ("hep-rust", 1.0),
    ]  # Reasoning: 0.5 x 984, 1 x 164, 1 x 164; Safety: none
    frame = pd.DataFrame(rows, columns=["subset", "margin"])
    table = rewardbench_scores(frame).set_index("section")
    chat, hard, reasoning = 75 / 140, (100 + 23.5) / 147, (492 + 328) / 1312
    there = table.score[["Chat", "Chat-Hard", "Reasoning"]].tolist()
    assert there == pytest.approx([chat, hard, reasoning]) and np.isnan(table.score["Safety"])
    assert table.score["Average"] == pytest.approx((chat + hard + reasoning) / 3)
    assert table.n.tolist() == [3, 2, 0, 4, 9]
    assert table.missing["Chat"] == "alpacaeval-length, alpacaeval-hard, mt-bench-easy"
    assert table.missing["Safety"].count(",") == 4 and table.missing["Average"] == "Safety"
    columns = section_columns(frame)
    assert list(columns) == ["chat", "chat_hard", "safety", "reasoning", "average"]
    assert columns["chat"] == pytest.approx(chat)
    given = frame.assign(correct=[1, 0.5, 0, 1, 0.5, 1, 0, 1, 1])
    assert rewardbench_scores(given[["subset", "correct"]]).score.equals(rewardbench_scores(frame).score)


def test_weights_are_rewardbenchs():
    totals = {section: sum(weights.values()) for section, weights in SECTIONS.items()}
    assert totals == {"Chat": 358, "Chat-Hard": 456, "Safety": 740, "Reasoning": 1968}
    assert sum(len(weights) for weights in SECTIONS.values()) == 23
    whole = pd.DataFrame([(s, 1.0) for w in SECTIONS.values() for s in w], columns=["subset", "margin"])
    assert (rewardbench_scores(whole).score == 1).all() and (rewardbench_scores(whole).missing == "").all()


def test_own_subsets_and_faulty_rows():
    subsets = ["Safety/a", "Safety/a", "Safety/a", "Safety/b", "Chat"]
    own = pd.DataFrame(dict(subset=subsets, margin=[1.0, 1.0, 1.0, -1.0, 0.0]))
    table = rewardbench_scores(own).set_index("section")
    assert table.score[["Safety", "Chat", "Average"]].tolist() == [0.75, 0.5, 0.625]
    assert table.missing["Safety"] == "" and table.missing["Average"] == "Chat-Hard, Reasoning"
    faulty = (
        (own.assign(subset="chats"), "'chats' is not one"),
        (own.assign(margin=[1, 2, np.nan, 0, 0]), "row 3 has no usable value"),
        (own[["subset"]], "neither margin nor correct"),
        (own.assign(correct=[1, 0, 0.25, 1, 1]), "row 3"),
    )
    for frame, said in faulty:
        with pytest.raises(UserError, match=said):
            rewardbench_scores(frame)


@pytest.mark.parametrize("name", ["LoRA", "head only"])
def test_a_cell_of_the_table(bench, full, head_only, name):
    training = chosen_trainings([name], [LoRA(FAST), head_only])[0]
    cell, again = (reward_cell(bench, full, training, 42) for _ in range(2))
    assert cell == again and cell["average"] > 0.9 and cell["training"] == name
    assert (cell["method"], cell["n_pairs"], cell["ties"]) == ("Full Dataset", 16, 0)
    assert set(cell["subsets"]) == set(bench.test.subset)
    assert "subsets" not in scores_table([cell]) and subset_table([cell]).section.tolist() == list(SECTIONS)
    assert json.loads(json.dumps(cell)) == cell
    with pytest.raises(UserError, match="training 'all' is unknown"):
        chosen_trainings(["all"], [LoRA(FAST), head_only])


def test_cells_depend_on_the_seed(bench, seed_set, full, backbone):
    tokens = texts_to_read(bench, [seed_set, full])
    head = HeadOnly(HeadSettings(1e-2, 1), kept_states(backbone, tokens, "last"))
    assert len(tokens) == 2 * (len(bench.test) + len(seed_set) + len(full))
    first, second = (reward_cell(bench, seed_set, head, seed) for seed in (42, 43))
    assert first["subsets"] != second["subsets"]


def test_summary_in_percent_keeps_order_and_gaps():
    about = dict(training="LoRA", chat_hard=np.nan, safety=0.5, reasoning=1.0, n_pairs=7, ties=1)
    values = (("b", 1, 0.2), ("b", 2, 0.4), ("a", 1, 0.5))
    scores = pd.DataFrame([dict(about, method=m, seed=s, chat=a, average=a) for m, s, a in values])
    table = reward_summary(scores)
    assert table.method.tolist() == ["b", "a"] and table.chat.tolist() == pytest.approx([30, 50])
    assert table.chat_sd[0] == pytest.approx(np.std([20, 40], ddof=1)) and table.chat_hard.isna().all()
    assert table.seeds.tolist() == [2, 1] and table.ties.tolist() == [2, 1]
    sections = ["chat", "chat_hard", "safety", "reasoning", "average"]
    shown = [name for section in sections for name in (section, f"{section}_sd")]
    assert list(table) == ["method", "training", *shown, "seeds", "n_pairs", "ties"]


def test_readers_of_a_later_stage():
    class Later:
        "A run that has no reward items."

        def frame(self, stage, name, columns):
            return pd.DataFrame({c: pd.Series(dtype=kind) for c, kind in columns.items()})

        def setting(self, stage, name):
            return {"seeds": [1]}[name]

    scores = read_reward_scores(Later())
    assert list(scores)[:4] == ["method", "training", "seed", "chat"] and scores.average.dtype == float
    assert read_reward_settings(Later(), ["seeds"]) == {"seeds": [1]}


# ---- the floor


def test_floors(full, seed_set, test):
    table = floor_table([seed_set, full], test)
    assert table.floor.tolist() == ["random", "longer answer", "shorter answer", "TF-IDF", "TF-IDF"]
    assert table.rows.tolist() == ["", "", "", "Baseline", "Full Dataset"]
    assert np.allclose(table.average[1] + table.average[2], 1)
    assert (table.iloc[0, 2:] == 0.5).all() and table.average.iloc[-1] == 1.0
    swapped = test.rename(columns=dict(chosen="rejected", rejected="chosen"))
    no_intercept = tfidf_margins(full, test) == -tfidf_margins(full, swapped)
    assert no_intercept.all(), "swapping the answers turns the sign"
    two = pd.DataFrame(dict(chosen=["abc", "a"], rejected=["a", "b"]))
    assert longer_margins(two).tolist() == [2, 0]
    with pytest.raises(UserError, match="TF-IDF floor cannot be fitted on 1 pairs"):
        tfidf_margins(PairSet("Ours", pd.DataFrame([dict(prompt="q", chosen="a", rejected="b")])), test)


@pytest.mark.skipif(
    not os.environ.get("FAC_DATA_DIR"),
    reason="FAC_DATA_DIR is not set: the published HH-RLHF, LLMBar and XSTest files are needed",
)
def test_real_items():
    items, report = real_reward_items()
    part = dict(list(items.groupby("split")))
    sources = report.set_index("source")
    assert sources["items"]["llmbar"] == 419 and sources["items"]["xstest"] == 244
    assert sources["items"]["hh-rlhf/harmless-base/test"] == 2303
    assert sources.left_out["hh-rlhf/harmless-base/test"] == 9
    trained = set(pd.concat([part["seed"], part["full"]]).prompt.map(prompt_key))
    assert not set(part["test"].prompt.map(prompt_key)) & trained
    every = llmbar_items(data_root() / "llmbar/LLMBar")
    counted = subset_accuracy(every[["subset"]].assign(margin=longer_margins(every))).set_index("subset").n
    own_counts = {s: SECTIONS["Chat-Hard"][s] for s in set(every.subset)}
    assert counted.to_dict() == own_counts, "RewardBench's own counts"
    longer = part["test"][["subset"]].assign(margin=longer_margins(part["test"]))
    table = rewardbench_scores(longer).set_index("section")
    assert table.missing["Average"] == "Chat, Reasoning" and table.missing["Chat-Hard"] == "mt-bench-hard"
    assert table.score["Chat-Hard"] < 0.4
