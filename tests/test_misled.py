"""tests/bench/misled.py claims, and this file tests:

- each order has its three versions compared 1 : 1 : 10 times, and Bradley-Terry labels weigh both orders of a pair;
- the orders that are measured on were not trained on;
- the expected reward is exact: a policy that is indifferent earns the mean of the four glove sentences;
- the forks of auxdpo.py replace what they say they replace.
"""
import math
from collections import Counter

import demo_world
import misled
import pytest


def test_the_rows_have_the_counts_that_mislead():
    rows, unseen = misled.make_rows("hard", seed=1)
    assert len(rows) == 30 * 12 and len(unseen) == 144 - 30
    for prompt, found in _by_prompt(rows).items():
        assert sorted(Counter((row["chosen"], row["rejected"]) for row in found).values()) == [1, 1, 10]
        for row in found:
            assert demo_world.true_reward(prompt, row["chosen"]) > demo_world.true_reward(prompt, row["rejected"])
    assert not {row["prompt"] for row in rows} & {prompt for prompt, _ in unseen}


def test_bradley_terry_labels_weigh_both_orders_of_a_pair():
    rows, unseen = misled.make_rows("bradley_terry", seed=1)
    assert len(rows) == 60 * 6 and len(unseen) == 144 - 60
    for prompt, found in _by_prompt(rows).items():
        weights = {(row["chosen"], row["rejected"]): row["weight"] for row in found}
        for (one, other), weight in weights.items():
            gap = demo_world.true_reward(prompt, one) - demo_world.true_reward(prompt, other)
            assert weight / (weight + weights[other, one]) == pytest.approx(1 / (1 + math.exp(-gap)))
        assert sum(weights.values()) == pytest.approx(12)


def _by_prompt(rows):
    found = {}
    for row in rows:
        found.setdefault(row["prompt"], []).append(row)
    return found


def test_a_policy_that_is_indifferent_earns_the_mean(tmp_path):
    import torch

    conversations = demo_world.draw_conversations(64, seed=0)
    tokenizer = demo_world.make_tokenizer(conversations)
    model = demo_world.make_model(tokenizer, 16, 1)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # every token is as likely as any other
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, unseen = misled.make_rows("hard", seed=1)
    lengths = {kind: len(tokenizer(misled.answer("", kind))["input_ids"]) for kind in demo_world.GLOVE_REWARDS}
    weights = {kind: len(tokenizer) ** -float(length) for kind, length in lengths.items()}
    mean = sum(demo_world.GLOVE_REWARDS[kind] * weight for kind, weight in weights.items()) / sum(weights.values())
    assert misled.expected_reward(tmp_path, unseen[:2]) == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("name", [*misled.EDITS, "ipo", "dpop"])
def test_a_fork_is_a_script_with_other_lines(name, tmp_path):
    path = misled.script_of(name, tmp_path)
    compile(path.read_text(), str(path), "exec")
    original = (misled.ROOT / ("auxdpo.py" if name in misled.EDITS else "dpo.py")).read_text()
    changed = set(original.splitlines()) - set(path.read_text().splitlines())
    assert 1 <= len(changed) <= 2
