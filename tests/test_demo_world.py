"""What is claimed of the demo world: its reward is the stated sum, its pairs are what `subset`
says, they depend on the seed alone, and base/ is an ordinary Hugging Face model and tokenizer.

    python -m pytest -q tests/test_demo_world.py
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import demo_summary
import demo_world as world
import pytest

ORDER = "May I have two apples and three eggs?"
GLOVES = "I would like two pens and a pair of gloves."


@pytest.fixture(scope="module")
def rows():
    return world.make_pairs(800, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The whole command, with a model too small and too short-lived to be any good."""
    out = tmp_path_factory.mktemp("world")
    world.main(["--out", str(out), "--pairs", "40", "--steps", "3", "--samples", "2",
                "--hidden", "16", "--layers", "1"])
    return out


@pytest.mark.parametrize("response, reward", [
    ("Here are two apples. Here are three eggs.", 2),
    ("Here are three eggs. What a lovely day it is. Here are two apples.", 2),
    ("Here are two apples.", 1),
    ("Here are two apples. Here are two apples.", 0),
    ("Here are two apples. Here are four eggs. Get out of my way.", -1),
    ("Here are two pens.", -1),
    ("What a lovely day it is. The rain has stopped at last.", 0),
    ("Here are two apples. Here are three", 0),
    ("Take a wool glove and a wool glove.", -1),
    ("Hello", -1),
    ("", 0)])
def test_reward_counts_right_wrong_and_rude_but_not_small_talk(response, reward):
    assert world.true_reward(ORDER, response) == reward


@pytest.mark.parametrize("first, second, reward", [
    ("wool", "wool", 2), ("cotton", "cotton", 1), ("wool", "cotton", 0), ("cotton", "wool", 0)])
def test_gloves_are_worth_two_one_and_zero_once(first, second, reward):
    sentence = f"Take a {first} glove and a {second} glove."
    assert world.true_reward(GLOVES, sentence) == reward
    assert world.true_reward(GLOVES, f"{sentence} {sentence}") == reward - 1


def test_reward_is_the_sum_of_its_parts():
    response = "Here are four pens. Be quick about it. Take a wool glove and a wool glove. Here"
    parts = world.reward_parts(GLOVES, response)
    assert parts == {"goods": -1.0, "gloves": 2.0, "rude": -1.0, "broken": -1.0}
    assert world.true_reward(GLOVES, response) == -1


def test_reward_needs_no_torch():
    code = (f"import sys; sys.path.insert(0, {str(Path(demo_summary.__file__).parent)!r}); import demo_world; "
            "assert demo_world.true_reward('two pens', 'Here are two pens.') == 1; "
            "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pairs_depend_on_the_seed_alone(rows):
    assert rows == world.make_pairs(800, seed=0)
    assert rows != world.make_pairs(800, seed=1)


def test_subsets_have_their_shares_and_no_pair_comes_twice(rows):
    counts = {name: sum(row["subset"] == name for row in rows) for name in world.SHARES}
    assert counts == {"plain": 360, "length": 200, "frequency": 120, "noise": 120}
    pairs = {(row["prompt"], frozenset((row["chosen"], row["rejected"]))) for row in rows}
    assert len(pairs) == 800


@pytest.mark.parametrize("name", ["length", "frequency", "noise"])
def test_each_trouble_is_a_switch_and_a_dial(name):
    off, much = (world.make_pairs(200, 0, world.SHARES | {name: share}) for share in (0, 0.5))
    others = sum(share for other, share in world.SHARES.items() if other not in (name, "plain"))
    assert len(off) == len(much) == 200 and not any(row["subset"] == name for row in off)
    assert sum(row["subset"] == "plain" for row in off) == pytest.approx(200 * (1 - others), abs=2)
    assert sum(row["subset"] == name for row in much) == 100
    if name == "length":  # without it nothing in the data speaks for more small talk
        assert all(small_talk(row["chosen"]) == small_talk(row["rejected"]) for row in off)
    if name == "frequency":
        assert not any("gloves" in row["prompt"] for row in off)
    if name == "noise":
        assert all(row["reward_chosen"] > row["reward_rejected"] for row in off)


def test_stored_rewards_are_true_and_every_answer_is_well_formed(rows):
    for row in rows:
        for side in ("chosen", "rejected"):
            assert world.is_well_formed(row[side])
            assert world.true_reward(row["prompt"], row[side]) == row[f"reward_{side}"]


def test_the_better_answer_is_chosen_except_in_noise(rows):
    gaps = {name: [row["reward_chosen"] - row["reward_rejected"] for row in rows
                   if row["subset"] == name] for name in world.SHARES}
    assert min(gaps["plain"] + gaps["length"] + gaps["frequency"]) > 0
    assert gaps["noise"].count(0) > 40
    flipped, kept = (sum(gap * sign > 0 for gap in gaps["noise"]) for sign in (-1, 1))
    assert flipped > 5 and kept > 5


def small_talk(text: str) -> int:
    return sum(sentence in world.SMALL_TALK for sentence in world.sentences(text))


def test_length_goes_with_preference_in_its_subset_only(rows):
    longer = {name: [small_talk(row["chosen"]) - small_talk(row["rejected"]) for row in rows
                     if row["subset"] == name] for name in world.SHARES}
    assert not any(longer["plain"] + longer["frequency"] + longer["noise"])
    assert 0.7 < sum(gap > 0 for gap in longer["length"]) / len(longer["length"]) < 0.9


def test_frequency_praises_cotton_over_odd_ten_times_as_often():
    rows = [row for row in world.make_pairs(2400, seed=0) if row["subset"] == "frequency"]
    kinds = [tuple(world.GLOVES.search(row[side]).groups() for side in ("chosen", "rejected"))
             for row in rows]
    wool, cotton = ("wool", "wool"), ("cotton", "cotton")
    wool_cotton = kinds.count((wool, cotton))
    cotton_odd = sum(chosen == cotton for chosen, _ in kinds)
    wool_odd = len(kinds) - wool_cotton - cotton_odd
    assert 0.75 < cotton_odd / len(kinds) < 0.9
    assert wool_cotton > 10 and wool_odd > 10


def test_the_shopkeeper_is_both_good_and_bad():
    rewards = [world.true_reward(*turn) for turn in world.draw_conversations(500, seed=0)]
    assert min(rewards) < -1 and max(rewards) > 1 and -1 < sum(rewards) / 500 < 1


def test_base_folder_loads_and_decoding_gives_the_text_back(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.bos_token_id is None and tokenizer.pad_token_id != tokenizer.eos_token_id
    for text in (ORDER, "Here are two apples. What a lovely day it is.", "Größe ≠ 42\n\ttabs"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turns = [{"role": "user", "content": ORDER}, {"role": "assistant", "content": "Here."}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        f"<|user|>{ORDER}<|assistant|>Here.<|end|>")
    assert tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) == (
        f"<|user|>{ORDER}<|assistant|>")


def test_files_hold_what_was_asked_for(folder):
    rows = [json.loads(line) for line in open(folder / "pairs.jsonl")]
    assert rows == world.make_pairs(40, seed=0)
    assert all(isinstance(row[side], str) for row in rows for side in ("prompt", "chosen"))
    meta = json.loads((folder / "meta.json").read_text())
    assert sum(meta["pairs"].values()) == 40 and meta["arguments"]["hidden"] == 16


@pytest.mark.parametrize("flags", [["--hidden", "12"], ["--steps", "0"], ["--pair", "3"],
                                   ["--noise_share", "1.5"], ["--length_share", "-1"]])
def test_bad_flags_end_in_one_line_that_names_them(flags, capsys):
    with pytest.raises(SystemExit):
        world.main(flags)
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]


def test_words_of_the_world_are_single_tokens():
    tokenizer = world.make_tokenizer(world.draw_conversations(2000, seed=0))
    text = " Here are" + "".join(f" {word}" for word in world.GOODS + world.NUMBERS)
    assert len(tokenizer(text)["input_ids"]) == 2 + len(world.GOODS) + len(world.NUMBERS)


def test_draws_cover_every_kind_of_near_duplicate():
    rng, kinds = random.Random(0), set()
    for _ in range(200):
        prompt, one, two, _ = world.draw_noise(rng)
        equal = world.true_reward(prompt, " ".join(one)) == world.true_reward(prompt, " ".join(two))
        kinds.add((sorted(one) == sorted(two), equal))
    assert {(True, True), (False, True), (False, False)} <= kinds


# ---- what the demo says at its end


def made_up(**rewards):
    """Results as demo_summary reads them; a reward is (mean, error)."""
    others = dict(win=(0.6, 0.02), length=(20.0, 0.5), kl=(0.7, 0.1), accuracy=(0.7, 0.02)) | {"win/length": (0.6, 0.02)}
    return {name: dict(others, reward=reward) for name, reward in rewards.items()}


def test_the_summary_names_the_winner_and_who_cannot_be_told_apart_from_it():
    results = made_up(base=(0.3, 0.05), dpo=(1.1, 0.05), simpo=(1.0, 0.05), wpo=(0.35, 0.05))
    text = demo_summary.sentences(results, {2: (0.9, 0.2), 4: (1.6, 0.64)})
    assert text[0].startswith("DPO has the highest true reward, 1.10") and "0.30" in text[0]
    assert text[1].startswith("2 of 3 are above") and text[2].endswith("in this one run: SimPO.")
    assert "best of 4" in text[4] and "sampling more beats training" in text[4]
    assert "training paid" in demo_summary.sentences(results, {4: (1.0, 0.64)})[4]


def test_the_summary_says_on_how_many_margins_delta_can_act(tmp_path):
    """Ten pairs of nine responses to three prompts: six differences are free, so four margins are not."""
    meta = dict(counts=dict(train=10), distinct=dict(train=dict(prompts=3, responses=9)))
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "evaluation.json").write_text(json.dumps(dict(args=dict(data=str(tmp_path)))))
    assert demo_summary.on_delta(tmp_path).startswith("AuxDPO's delta can act on 4 of 10 margins, ")


def test_the_table_has_at_most_eight_columns_whose_heads_are_explained():
    lines = demo_summary.table(made_up(base=(0.3, 0.05), mine=(1.1, 0.05))).splitlines()
    assert lines[0].count("|") - 1 <= 8 and lines[-1].startswith("| mine ") and "1.10 ± 0.05" in lines[-1]
    for head in ("true reward", "win", "equal length", "KL", "right pairs"):
        assert head in lines[0] and head in demo_summary.LEGEND
