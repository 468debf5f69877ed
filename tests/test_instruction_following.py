"""Tuning, judging and length control, on a two-layer model and invented verdicts; the published AlpacaEval files where there are any."""

import copy
import gzip
import json
import os

import numpy as np
import pandas as pd
import pytest
import torch
from fac_synthesis.data.tasks import message_fault
from fac_synthesis.models.backbone import Backbone, tiny_model, train_language_model, word_tokenizer
from fac_synthesis.models.language_models import LocalModel, Sampling, prompt_ids
from fac_synthesis.run.parameters import UserError
from fac_synthesis.synthesis.fine_tuning import LoRASettings
from fac_synthesis.tasks.instructions import (
    Bench,
    InstructionSet,
    floor_cells,
    instruction_items,
    known_difficulties,
    long_rows,
    open_judge,
    prompt_completion,
    reference_answers,
    score_cell,
    score_table,
    sft_rows,
    sft_trainer,
    summary,
    train_sft,
    training_set,
    write_answers,
)
from fac_synthesis.tasks.win_rates import (
    ALPACA_EVAL,
    LLMJudge,
    RubricJudge,
    StoredJudge,
    WeightedJudge,
    alpaca_eval_folder,
    constraint_score,
    cross_validated_lc,
    fit_length_model,
    lc_comparison,
    length_controlled,
    length_loss,
    read_annotations,
    read_leaderboard,
    read_outputs,
    win_rate,
)
from scipy.special import expit

torch.set_num_threads(1)
WORDS = "bread piano garden stamp lock wall".split()
ASK, SAY = "write a message about : {} .", "tell me about the {} ."
FAST = LoRASettings(dropout=0.0, learning_rate=1e-2, epochs=25, batch=6, micro_batch=6, dtype="float32")
SHORT = LoRASettings(dropout=0.0, learning_rate=1e-2, epochs=1, batch=4, micro_batch=4, dtype="float32")
GREEDY = Sampling(max_new_tokens=10, temperature=0.0)
ROWS = InstructionSet("Ours", [ASK.format(w) for w in WORDS], [SAY.format(w) for w in WORDS], 6)
real = pytest.mark.skipif(
    not os.environ.get("FAC_DATA_DIR"),
    reason="FAC_DATA_DIR is not set: the published AlpacaEval files are needed",
)


def tokenizer(chat=True):
    t = word_tokenizer(ROWS.instructions + ROWS.responses + ["what is a ? i know the , hello there lamp"])
    if not chat:
        t.chat_template = None
    return t


@pytest.fixture(scope="module")
def backbone():
    "Names things when asked what they are; has never written a message."
    torch.manual_seed(0)
    t = tokenizer()
    b = Backbone(tiny_model("llama", len(t), 64, 2), t, layer=1)
    torch.nn.init.normal_(b.model.get_input_embeddings().weight, 0, 0.1)
    chats = [
        [dict(role="user", content=f"what is a {w} ?"), dict(role="assistant", content=f"i know the {w} .")]
        for w in WORDS
    ]
    train_language_model(b.model, t, chats, steps=120, batch=12, learning_rate=3e-3, seed=0)
    return b


@pytest.fixture(scope="module")
def plain(backbone):
    return Backbone(copy.deepcopy(backbone.model), tokenizer(chat=False), layer=1)


def answers(model, t):
    return write_answers(LocalModel(model, t, 16), ROWS.instructions, GREEDY)


# ---- data


@pytest.fixture
def items():
    return pd.DataFrame(
        [
            dict(split=s, instruction=ASK.format(w), response=SAY.format(w))
            for s, some in (("seed", WORDS[:2]), ("full", WORDS), ("test", WORDS))
            for w in some
        ]
    )


@pytest.fixture
def samples():
    return pd.DataFrame(
        [
            dict(method=m, latent=i, rank=r, instruction=f"{m} {i} {r}", response=SAY.format("lamp"))
            for m, n in (("two-step", 3), ("Magpie", 2))
            for i in range(n)
            for r in range(2)
        ]
    )


def test_rows_share_the_seed_items_and_the_budget(items, samples):
    sets = {m: training_set(m, items, samples, 3) for m in ("Baseline", "Full Dataset", "Magpie", "Ours")}
    assert {m: (len(s.instructions), s.n_samples) for m, s in sets.items()} == {
        "Baseline": (2, 0),
        "Full Dataset": (6, 4),
        "Magpie": (5, 3),
        "Ours": (5, 3),
    }
    assert sets["Magpie"].instructions[2:] == ["Magpie 0 0", "Magpie 1 0", "Magpie 0 1"], (
        "best of every feature first"
    )
    assert all(sets[m].instructions[:2] == sets["Baseline"].instructions for m in ("Magpie", "Ours"))


def test_unusable_rows_are_refused(items, samples, refused):
    assert "Alpaca" in refused(lambda: training_set("Alpaca", items, samples, 3))
    assert "row 2: response is empty" in refused(lambda: InstructionSet("Ours", ["a", "b"], ["c", " "]))
    assert "1 instructions but 0 responses" in refused(lambda: InstructionSet("Ours", ["a"], []))
    assert "no instruction" in refused(lambda: InstructionSet("Ours", [], []))
    assert "'response'" in refused(lambda: instruction_items(items.drop(columns="response"), "seed"))
    assert "full, seed, test" in refused(lambda: instruction_items(items, "train"))


# ---- from a row to tokens


def test_the_prompt_carries_no_loss_and_is_the_one_it_answers(backbone, plain, tmp_path):
    for b in (backbone, plain):
        trainer = sft_trainer(b, ROWS, SHORT, 42, 64, str(tmp_path))
        for row, instruction, response in zip(trainer.train_dataset, ROWS.instructions, ROWS.responses):
            prompt = prompt_ids(b.tokenizer, [dict(role="user", content=instruction)])
            n, ids = len(prompt), row["input_ids"]
            assert ids[:n] == prompt and row["labels"] == [-100] * n + ids[n:]
            assert b.tokenizer.decode(ids[n:]).replace(" ", "") == (response + "<end>").replace(" ", ""), (
                "the response and the token that ends it"
            )


def test_loss_is_the_mean_over_response_tokens(backbone, tmp_path):
    trainer = sft_trainer(backbone, ROWS, SHORT, 42, 64, str(tmp_path))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch)).item()
        logits = backbone.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total = count = 0
    for row in range(3):
        for t in range(1, batch["input_ids"].shape[1]):
            if batch["labels"][row, t] != -100:
                total -= logits[row, t - 1].log_softmax(-1)[batch["input_ids"][row, t]].item()
                count += 1
    assert loss == pytest.approx(total / count, abs=1e-4)


def test_long_rows_are_cut_or_left_out_aloud(backbone, tmp_path, capsys, refused):
    rows = InstructionSet(
        "Ours",
        [ASK.format("bread"), ASK.format(" , ".join(WORDS * 4)), "what is a lock ?"],
        [SAY.format("bread"), "yes", SAY.format(" ".join(WORDS * 4))],
    )
    assert long_rows(backbone.tokenizer, rows, 30)[["row", "fate"]].values.tolist() == [
        [1, "left out"],
        [2, "cut"],
    ]
    trained = sft_trainer(backbone, rows, SHORT, 42, 30, str(tmp_path)).train_dataset
    assert [len(r["input_ids"]) for r in trained] == [18, 30]
    assert "of 3 rows 1 are cut to 30 tokens and 1 are left out" in capsys.readouterr().out
    sft_rows(backbone.tokenizer, ROWS, 64)
    assert not capsys.readouterr().out
    assert "raise it" in refused(lambda: sft_rows(backbone.tokenizer, rows, 5))


def test_a_tokenizer_without_any_end_is_refused(refused):
    t = tokenizer(chat=False)
    t.eos_token = None
    assert "neither chat template nor end-of-text token" in refused(lambda: prompt_completion(t, "a", "b"))


# ---- training


def test_tuning_teaches_to_copy_and_leaves_the_backbone(backbone):
    before, old = answers(backbone.model, backbone.tokenizer), copy.deepcopy(backbone.model.state_dict())
    model = train_sft(backbone, ROWS, FAST, 42, 64)
    right = lambda found: sum(a == r for a, r in zip(found, ROWS.responses))
    assert right(before) == 0 and right(answers(model, backbone.tokenizer)) >= 5
    assert all(torch.equal(v, old[k]) for k, v in backbone.model.state_dict().items())
    assert model.state_dict().keys() == old.keys() and "forward" not in vars(model), "an ordinary model"


def test_tuning_works_without_a_chat_template(plain):
    model = train_sft(plain, ROWS, FAST, 42, 64)
    assert sum(a == r for a, r in zip(answers(model, plain.tokenizer), ROWS.responses)) >= 5


def test_same_seed_same_weights(backbone):
    a, b, c = (train_sft(backbone, ROWS, SHORT, s, 64) for s in (42, 42, 43))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters())) and not all(
        torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters())
    )
    assert all(
        torch.equal(x, y) == ("_proj" not in n)
        for (n, x), y in zip(a.named_parameters(), backbone.model.parameters())
    ), "all seven linear maps of every block, and nothing else"


def test_micro_batches_and_checkpointing_do_not_matter(backbone):
    whole, parts = (
        train_sft(
            backbone,
            ROWS,
            LoRASettings(
                dropout=0.0,
                learning_rate=1e-3,
                epochs=1,
                batch=6,
                micro_batch=m,
                dtype="float32",
                gradient_checkpointing=m == 2,
            ),
            42,
            64,
        )
        for m in (6, 2)
    )
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(whole.parameters(), parts.parameters()))
    assert answers(parts, backbone.tokenizer) == answers(whole, backbone.tokenizer)


def test_references(backbone, refused):
    test = pd.DataFrame(dict(instruction=ROWS.instructions, response=ROWS.responses))
    assert reference_answers("responses", test, backbone, GREEDY) == ROWS.responses and reference_answers(
        "backbone", test, backbone, GREEDY
    ) == answers(backbone.model, backbone.tokenizer)
    assert "responses or backbone" in refused(lambda: reference_answers("gpt", test, backbone, GREEDY))


# ---- judging

ASKED, OURS, THEIRS = ["say hello"] * 3, ["hello", "hello to you and all", "hm"], ["hello there"] * 3


def test_position_swap_cancels_a_habit(scripted):
    for habit in ("1", "2", "Answer: 1", "tie"):
        judge = LLMJudge(scripted(lambda prompt, j: habit))
        assert (
            judge.preferences(ASKED, OURS, THEIRS) == [0.5] * 3
            and len(judge.lm.asked) == 6
            and judge.name == "scripted"
        )


def test_both_orders_are_asked_and_averaged(scripted):
    parts = lambda prompt: [p.split("\n")[1] for p in prompt.split("[Answer ")[1:]]
    longer = lambda prompt, j: "1" if len(parts(prompt)[0]) > len(parts(prompt)[1]) else "2"
    assert LLMJudge(scripted(longer)).preferences(ASKED, OURS, THEIRS) == [0, 1, 0]
    undecided = lambda prompt, j: "tie" if parts(prompt)[0] == "hello there" else "1"
    assert LLMJudge(scripted(undecided)).preferences(ASKED, OURS, THEIRS) == [0.75] * 3
    braces = LLMJudge(scripted(longer)).preferences(["say {x}"], ["{instruction} {0}"], ["{}"])
    assert braces == [1], "texts are data, not templates"


def test_unreadable_verdicts_are_counted(scripted, refused):
    half = lambda prompt, j: (
        "both are fine in their way" if prompt.index("hello there") < prompt.index("[Answer 2]") else "1"
    )
    assert LLMJudge(scripted(half)).preferences(ASKED, OURS, THEIRS) == [None] * 3
    assert LLMJudge(scripted(lambda prompt, j: None)).preferences(ASKED, OURS, THEIRS) == [None] * 3
    assert win_rate([None, 1, 0, None]) | dict(se=0) == dict(wr=50, se=0, n=2, unreadable=2)
    assert "none of the 3 verdicts" in refused(lambda: win_rate([None] * 3))


def test_weighted_judge_reads_probabilities(refused):
    t = word_tokenizer(["1 2 hello there hm to you and all say"])
    torch.manual_seed(1)
    model = tiny_model("llama", len(t), 32, 2).eval()
    torch.nn.init.normal_(model.get_input_embeddings().weight, 0, 0.5)
    judge = WeightedJudge(LocalModel(model, t, name="tiny"))
    questions = [[dict(role="user", content=c)] for c in ("say hello", "hello there")]
    for question, p in zip(questions, judge.first_wins(questions)):
        with torch.no_grad():
            probs = model(torch.tensor([prompt_ids(t, question)])).logits[0, -1].softmax(-1)
        one, two = (probs[t.convert_tokens_to_ids(x)].item() for x in "12")
        assert p == pytest.approx(one / (one + two), abs=1e-5)
    preferences = judge.preferences(ASKED, OURS, THEIRS)
    assert np.allclose(
        np.array(preferences) + judge.preferences(ASKED, THEIRS, OURS), 1, atol=1e-6
    ) and judge.preferences(ASKED, OURS, OURS) == pytest.approx([0.5] * 3)
    assert judge.preferences(["say"], ["hello " * 600], ["hm"]) == [None], "longer than the context"
    assert "cannot tell 1 from 2" in refused(
        lambda: WeightedJudge(LocalModel(model, word_tokenizer(["hello"]), name="tiny"))
    )


def test_rubric_and_stored_judges():
    assert RubricJudge(lambda i, a: len(a)).preferences(ASKED, OURS, ["hello", "no", "hmmm"]) == [0.5, 1, 0]
    stored = StoredJudge(
        pd.DataFrame(dict(instruction=["say hello"] * 2, output=["hello", "hm"], preference=[0.3, 0.9]))
    )
    assert stored.preferences(ASKED, OURS, THEIRS) == [0.3, None, 0.9]


def test_planted_rubric(refused):
    asked = "be a pirate , not quite a corsair , and explain the spray and the wall ."
    answers = (
        "ahoy matey ! take the spray and mind the wall . arr .",
        "take the spray and mind the wall .",
        "ahoy matey ! arr , what a day .",
        "nothing of the kind .",
        "",
        "ahoy ahoy ahoy ahoy matey arr spray spray spray spray wall",
    )
    assert [constraint_score(asked, a) for a in answers] == pytest.approx(
        [1, 0.5, 0.5, 0, 0, 1 if not message_fault(answers[-1]) else 0.5]
    )
    assert constraint_score(asked, asked) == 0, "giving the request back is no answer"
    assert constraint_score(asked, "ahoy there , i see a wall .") == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert constraint_score("tell me about the stencil .", "the mural and the spray .") == 1, (
        "without a style the topic alone counts"
    )
    assert "names no style" in refused(lambda: constraint_score("tell me a story", "a story"))


def test_the_answer_closer_to_the_reference_is_preferred():
    test = pd.DataFrame(dict(instruction=["say hello", "count"], response=["hello to you", "one two three"]))
    judge = open_judge("reference overlap", test=test)
    assert judge.preferences(test.instruction, ["hello you", ""], ["good bye", "one two"]) == [
        1.0,
        0.0,
    ] and judge.preferences(["count"], ["four"], ["five"]) == [0.5]


def test_open_judge(backbone, refused):
    assert open_judge("planted rubric").preferences(
        ["be a pirate : what about the mural ?"], ["ahoy , i see a mural ."], ["i see a mural ."]
    ) == [1]
    assert isinstance(open_judge("local", backbone), LLMJudge)
    assert "cannot tell 1 from 2" in refused(lambda: open_judge("weighted:local", backbone))
    assert "no local model" in refused(lambda: open_judge("weighted:http://localhost:1/v1#judge"))
    refused(lambda: open_judge("local"))
    refused(lambda: open_judge("stored:no/such/file.json"))


# ---- win rate and length control


def test_win_rate_with_ties():
    rate = win_rate([1, 0.5, 0.5, 0])
    assert (
        rate["wr"] == 50
        and rate["se"] == pytest.approx(100 * np.std([1, 0.5, 0.5, 0], ddof=1) / 2)
        and rate["n"] == 4
    )


def judged(theta, times, taste=2.0, n=150, seed=0):
    "Verdicts of a judge that likes length, on models of quality theta that write `times` as much as the reference."
    rng, frames = np.random.default_rng(seed), []
    reference, hard = rng.integers(200, 2000, n), rng.normal(0, 1, n)
    for m, (q, t) in enumerate(zip(theta, times)):
        length = (reference * t * rng.uniform(0.4, 1.6, n)).astype(int) + 1
        z = np.tanh((reference - length) / (reference - length).std(ddof=1))
        frames.append(
            pd.DataFrame(
                dict(
                    generator=f"m{m}",
                    instruction=[f"x{i}" for i in range(n)],
                    preference=expit(q - taste * z + hard - hard.mean()),
                    length=length,
                    reference_length=reference,
                )
            )
        )
    return pd.concat(frames, ignore_index=True)


def rates(a):
    return 100 * a.groupby("generator").preference.mean()


def test_equal_lengths_leave_the_win_rate():
    a = judged([-2, 0, 1, 3], [1, 1, 1, 1])
    for same in (a.assign(length=a.reference_length), a.assign(length=a.reference_length + 100)):
        assert np.allclose(length_controlled(same), rates(same), atol=1e-3)
    assert np.allclose(
        length_controlled(a.assign(length=a.reference_length).query("generator == 'm2'")),
        rates(a)["m2"],
        atol=1e-3,
    ), "one model alone too"


def test_a_win_by_length_only_is_taken_back():
    a = judged([0] * 6, [0.4, 0.6, 0.9, 1.2, 2, 3])
    wr, lc = rates(a), length_controlled(a)
    assert (
        wr["m5"] > 70
        and wr["m0"] < 30
        and (lc - 50).abs().max() < 5
        and lc["m5"] < wr["m5"]
        and lc["m0"] > wr["m0"]
    )
    better = judged([0, 0, 0, 1.5], [0.5, 1, 2, 2])
    assert length_controlled(better)["m3"] - length_controlled(better)["m2"] > 15, "quality stays"


def test_gradient_of_the_joint_loss():
    rng = np.random.default_rng(0)
    y, z, w, p = (
        rng.random((3, 5)),
        rng.normal(size=(3, 5)),
        (rng.random((3, 5)) < 0.8).astype(float),
        rng.normal(size=15),
    )
    for args, size in (((y, z, w), 15), ((y, z, w, rng.normal(size=5), 0.3), 9)):
        numeric = [
            (length_loss(p[:size] + d, *args)[0] - length_loss(p[:size] - d, *args)[0]) / 2e-5
            for d in 1e-5 * np.eye(size)
        ]
        assert np.allclose(length_loss(p[:size], *args)[1], numeric, atol=1e-5)


def test_new_models_keep_the_known_difficulties(refused):
    a = judged([-1, 0, 0.5, 1, 0.2], [0.5, 1, 1.5, 2, 3])
    known = fit_length_model(a[a.generator != "m4"])
    new = a[a.generator == "m4"]
    assert length_controlled(new, known)["m4"] == pytest.approx(length_controlled(a)["m4"], abs=2)
    assert (
        fit_length_model(new, known).difficulty is known.difficulty
        and fit_length_model(new, known).mu == known.mu
    )
    assert "no known difficulty" in refused(
        lambda: length_controlled(new.assign(instruction="other " + new.instruction), known)
    )
    folds = cross_validated_lc(a, 5)
    assert (
        folds.index.tolist() == [f"m{i}" for i in range(5)] and (folds - length_controlled(a)).abs().max() < 3
    )
    assert "folds" in refused(lambda: cross_validated_lc(a, 6))


def test_extremes_and_gaps_stay_finite(refused):
    a = judged([0, 0, 0], [1, 1, 1])
    a.loc[a.generator == "m0", "preference"], a.loc[a.generator == "m1", "preference"] = 1.0, 0.0
    a.loc[a.index[-40:], "preference"] = np.nan
    lc = length_controlled(a)
    assert lc["m0"] > 99 and lc["m1"] < 1 and 30 < lc["m2"] < 70
    assert "repeat a pair" in refused(lambda: length_controlled(pd.concat([a, a])))
    assert "'length'" in refused(lambda: length_controlled(a.drop(columns="length")))
    assert "no preference" in refused(lambda: length_controlled(a.assign(preference=np.nan)))


# ---- files

NATIVE = dict(
    instruction="say hello",
    output_1="hello",
    generator_1="reference",
    output_2="hello there",
    generator_2="ours",
    preference=1.25,
)


def test_both_layouts_of_annotations(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps([NATIVE, NATIVE | dict(preference=0), NATIVE | dict(preference=None)])
    )
    compiled = dict(
        instruction="say hello", generator="ours", output="hello there", output_1_len=5, preference=1.25
    )
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((json.dumps(compiled) + "\n").encode()))
    a, b = read_annotations(tmp_path / "a.json"), read_annotations(tmp_path / "b.jsonl.gz")
    assert a.preference.tolist() == [0.25, 0.5], "0 is a draw; a row without verdict is left out"
    assert (
        a.iloc[0].to_dict()
        == b.iloc[0].to_dict()
        == dict(
            generator="ours",
            instruction="say hello",
            output="hello there",
            preference=0.25,
            length=11,
            reference_length=5,
        )
    )


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(preference=2.5), "between 1"),
        (dict(preference="nan?"), "must be a number"),
        (dict(preference=[1]), "must be a number"),
        (dict(instruction=None), "instruction is missing"),
        (dict(output_2=7), "output_2 is int"),
        (dict(output_1=None), "output_1 is missing"),
        (dict(preference=float("inf")), "between 1"),
    ],
)
def test_wrong_annotations_are_refused_with_their_place(tmp_path, refused, wrong, said):
    (tmp_path / "a.json").write_text(json.dumps([NATIVE, NATIVE | wrong]))
    message = refused(lambda: read_annotations(tmp_path / "a.json"))
    assert said in message and "item 2" in message


def test_other_wrong_files(tmp_path, refused):
    (tmp_path / "empty.json").write_text(json.dumps([NATIVE | dict(preference=None)]))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"instruction": "a"}\n' * 99)[:40])
    (tmp_path / "board.csv").write_text(",win_rate,standard_error\nours,1,2\n")
    (tmp_path / "bad.csv").write_text(
        ",win_rate,standard_error,length_controlled_winrate\nours,1,2,\ntheirs,many,2,3\n"
    )
    (tmp_path / "out.json").write_text(json.dumps([dict(instruction="a", output=None, generator="ours")]))
    assert "no row with a preference" in refused(lambda: read_annotations(tmp_path / "empty.json"))
    refused(lambda: read_annotations(tmp_path / "cut.jsonl.gz"))
    refused(lambda: read_annotations(tmp_path / "missing.json"))
    assert "length_controlled_winrate" in refused(lambda: read_leaderboard(tmp_path / "board.csv"))
    assert "line 3: win_rate is 'many'" in refused(lambda: read_leaderboard(tmp_path / "bad.csv"))
    assert "output is missing" in refused(lambda: read_outputs(tmp_path / "out.json"))
    (tmp_path / "good.csv").write_text(",win_rate,standard_error,length_controlled_winrate\nours,1,2,\n")
    board = read_leaderboard(tmp_path / "good.csv")
    assert board.loc["ours", "win_rate"] == 1 and np.isnan(board.loc["ours", "length_controlled_winrate"])
    assert "no row for m0" in refused(lambda: lc_comparison(judged([0, 1], [1, 2]), board, 2))


@pytest.fixture(scope="module")
def alpaca_eval():
    folder = alpaca_eval_folder()
    return folder, read_annotations(folder / ALPACA_EVAL[0]), read_leaderboard(folder / ALPACA_EVAL[1])


@real
def test_raw_win_rates_are_the_leaderboards(alpaca_eval):
    _, annotations, board = alpaca_eval
    ours = pd.DataFrame({g: win_rate(p) for g, p in annotations.groupby("generator").preference}).T
    assert len(ours) == 30 and len(annotations) == 24146
    assert (ours.wr - board.win_rate.reindex(ours.index)).abs().max() < 1e-6 and (
        ours.se - board.standard_error.reindex(ours.index)
    ).abs().max() < 1e-6


@real
def test_length_controlled_rates_agree_with_the_leaderboard(alpaca_eval):
    _, annotations, board = alpaca_eval
    table = lc_comparison(annotations, board)
    assert (
        len(table) == 30 and table.lc_difference.abs().mean() <= 1.3 and table.lc_difference.abs().max() < 3.5
    )
    assert (
        table.lc.corr(table.lc_published, method="spearman") > 0.97
        and (table.wr - table.lc_published).abs().mean() > 4
    )


@real
def test_stored_verdicts_and_difficulties_serve_a_models_outputs(alpaca_eval):
    folder, annotations, board = alpaca_eval
    outputs, references = (
        read_outputs(folder / "model_outputs" / f"{g}.json") for g in ("vicuna-7b-v1.5", "gpt4_1106_preview")
    )
    judge = StoredJudge(annotations[annotations.generator == "vicuna-7b-v1.5"])
    rate = win_rate(judge.preferences(outputs.instruction, outputs.output, references.output))
    assert rate["wr"] == pytest.approx(board.win_rate["vicuna-7b-v1.5"], abs=1e-6) and rate["unreadable"] == 0
    assert known_difficulties(annotations, outputs.instruction.tolist()[:50]).mu == pytest.approx(
        -1.74, abs=0.02
    )
    assert (
        known_difficulties(annotations, ["another"]) is None and known_difficulties(None, ["another"]) is None
    )


# ---- a cell


def test_cells_and_tables(backbone):
    words_asked_for = lambda instruction, answer: (
        len(set(instruction.partition(":")[2].split()) & set(answer.split()))
        * (0.5 if message_fault(answer) else 1)
    )
    bench = Bench(
        backbone, ROWS.instructions, ROWS.responses, RubricJudge(words_asked_for), SHORT, 64, GREEDY
    )
    cells = pd.concat(
        [
            score_cell(bench, InstructionSet(m, ROWS.instructions[:n], ROWS.responses[:n], n - 2), s)
            for m, n in (("Baseline", 2), ("Ours", 6))
            for s in (42, 43)
        ],
        ignore_index=True,
    )
    assert (
        cells.groupby("generator").size().tolist() == [6] * 4
        and cells.length.tolist() == cells.output.str.len().tolist()
    )
    scores = score_table(cells)
    assert scores.columns.tolist() == [
        "method",
        "training",
        "seed",
        "wr",
        "lc",
        "se",
        "n_samples",
        "unreadable",
        "mean_length",
    ]
    assert (
        scores.method.tolist() == ["Baseline"] * 2 + ["Ours"] * 2
        and scores.seed.tolist() == [42, 43] * 2
        and scores.n_samples.tolist() == [0, 0, 4, 4]
    )
    assert scores.wr.tolist() == pytest.approx(
        (100 * cells.groupby("generator", sort=False).preference.mean()).tolist()
    )
    floor = score_table(floor_cells(bench), fit_length_model(cells))
    assert floor.method.tolist() == ["untuned backbone", "echo"] and floor.wr[1] == 0, (
        "giving the request back wins nothing"
    )
    table = summary(scores)
    assert (
        table.method.tolist() == ["Baseline", "Ours"]
        and table.seeds.tolist() == [2, 2]
        and table.wr_mean[0] == pytest.approx(scores.wr[:2].mean())
    )


def test_a_judge_that_cannot_be_read_is_named(backbone, scripted):
    bench = Bench(
        backbone,
        ROWS.instructions,
        ROWS.responses,
        LLMJudge(scripted(lambda prompt, j: "hm")),
        SHORT,
        64,
        GREEDY,
    )
    with pytest.raises(UserError, match="is readable|no preference"):
        score_table(floor_cells(bench))
