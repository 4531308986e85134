"""Claim: the gradient of a batch does not depend on how many ranks share it, nor on the micro-batches.

With every algorithm, the same batch goes through pair_losses and backward in 1, 2 and 4 processes, in micro-batches as small and
as large as can be, also with fewer pairs than ranks. The loss agrees to 1e-6, the gradient of every
parameter to 1e-4 of its norm, and so do the metrics of evaluate(). Below: what micro_batches promises, on
random batches.

This file is also the program that the processes run: torchrun tests/test_ranks.py OUT, MODELS as JSON.
"""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import auxdpo
import dpo
import dpo_norm
import simpo
import wpo
from conftest import random_pairs, tiny_policy

SCRIPTS = {script.__name__: script for script in (dpo, dpo_norm, simpo, wpo, auxdpo)}
PLANS = [
    ("dpo", "llama", "packed"),
    ("dpo", "llama-tied", "packed"),
    ("dpo", "llama-tied", "concatenated"),
    ("dpo", "llama-tied", "separate"),
    ("dpo", "gemma2", "packed"),
    ("dpo", "gpt2", "packed"),
    ("dpo", "mixtral", "packed"),
    ("dpo", "lfm2", "concatenated"),
    *((name, "llama-tied", layout) for name in list(SCRIPTS)[1:] for layout in ("packed", "separate")),
    ("auxdpo", "llama-tied", "packed, full"),  # all micro-batches keep their graphs
]
SIZES = [(1, 1, 4), (7, 9, 1), (23, 5, 17), (2, 30, 2), (12, 3, 11), (3, 3, 3), (5, 8, 6)]
CASES = {
    "seven pairs, small": (7, True),
    "seven pairs, large": (7, False),
    "three pairs": (3, False),
    "one pair": (1, False),
}  # pairs, whether max_tokens is as small as can be


def make_split(name="dpo"):
    pairs = random_pairs(SIZES)
    ref = np.random.default_rng(5).normal(-20, 5, (len(pairs), 2)).astype(np.float32)
    rows = [pair | {"weight": 1 + 0.1 * i} for i, pair in enumerate(pairs)]
    split = dict(rows=rows, lengths=np.array(SIZES)) | ({} if name == "simpo" else dict(ref=ref))
    if name == "auxdpo":
        sketch = np.random.default_rng(6).normal(size=(len(pairs), 2, 24))
        split |= dict(ref=np.pad(ref, ((0, 0), (0, 3))), sketch=sketch, c=torch.zeros(24).double())
    return split


def one_step(script, policy, split, layout, count, small):
    """What main() does up to the optimiser, for the first `count` pairs -> loss, pairs dealt, gradients."""
    rank, world, (layout, _, checkpointing) = dist.get_rank(), dist.get_world_size(), layout.partition(", ")
    rows = np.arange(count)[::-1].copy()
    limit = int(script.pair_costs(split["lengths"][rows], layout).max()) if small else 10_000
    args = types.SimpleNamespace(
        layout=layout,
        max_tokens=limit,
        activation_checkpointing=checkpointing or "off",
        beta=0.3,
        gamma_beta_ratio=0.5,
        label_smoothing=0.1,
        sft_weight=0.2,
        router_aux_coef=0.0,
        **dict(penalty_weight=3.0, penalty="dataset", delta_steps=10, delta_learning_rate=1.0, null="soft"),
        **dict(geometry="scores", amplitude=0.0, delta_cap=0.0, delta_inside_beta=False),
    )
    totals, lists = {}, script.micro_batches(rows, split["lengths"], layout, limit, world)
    mine = lists[rank::world]
    if script is auxdpo:
        margins, outputs = script.forward_first(policy, mine, split, args)
        script.update_delta(rows, margins, split, args)
    for part in mine:
        run = (lambda *_: outputs.pop()) if script is auxdpo and outputs else policy
        losses = script.pair_losses(run, part, split, totals, args)
        (losses.sum() * world / len(rows)).backward()
    dealt = [None] * world
    dist.all_gather_object(dealt, [part.tolist() for part in mine])
    grads = {name: weight.grad.full_tensor().clone() for name, weight in policy.named_parameters()}
    policy.zero_grad()
    means = script.mean_over_pairs(totals)
    return dict(
        delta=split["ref"][:, 2:4].copy() if script is auxdpo else np.zeros(1),
        loss=means["loss"], dealt=dealt, grads=grads, eval=script.evaluate(policy, split, args)
    )


def all_steps(folders):
    """{(script, family, layout, case): one_step}"""
    results = {}
    for name, family, layout in PLANS:
        policy = tiny_policy(SCRIPTS[name], folders[family], layout.split(", ")[0], (layout.split(", ") + ["off"])[1])
        for case, (count, small) in CASES.items():
            step = one_step(SCRIPTS[name], policy, make_split(name), layout, count, small)
            results[name, family, layout, case] = step
    return results


@pytest.fixture(scope="module")
def folders(tiny_model):
    return {family: tiny_model(family) for _, family, _ in PLANS}


@pytest.fixture(scope="module")
def alone(folders, process_group):
    return all_steps(folders)


@pytest.fixture(scope="module", params=[2, 4])
def shared(request, folders, tmp_path_factory):
    """The results of so many processes, started by torchrun as on any machine."""
    out = tmp_path_factory.mktemp("ranks") / "results.pt"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(request.param),
        __file__,
        str(out),
        json.dumps(folders),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return request.param, torch.load(out, weights_only=False)


def assert_same_gradients(left, right):
    """To 1e-4 of each norm, where norms below 1e-2 of the whole gradient's count as that much."""
    whole = torch.stack([grad.norm() for grad in right.values()]).norm()
    assert whole > 0 and left.keys() == right.keys()
    wrong = {
        name: ((left[name] - grad).norm() / max(grad.norm(), 1e-2 * whole)).item()
        for name, grad in right.items()
    }
    assert {name: value for name, value in wrong.items() if not value < 1e-4} == {}


@pytest.mark.torchrun
def test_loss_and_gradient_are_the_same_on_one_two_and_four_ranks(shared, alone):
    _, results = shared
    assert results.keys() == alone.keys()
    for key, result in results.items():
        assert result["loss"] == pytest.approx(alone[key]["loss"], rel=1e-6), key
        assert_same_gradients(result["grads"], alone[key]["grads"])
        np.testing.assert_allclose(result["delta"], alone[key]["delta"], rtol=1e-4, atol=1e-6)
        assert key[0] != "auxdpo" or "seven" not in key[3] or np.abs(result["delta"]).max() > 0.1


@pytest.mark.torchrun
def test_metrics_of_evaluation_are_the_same_on_one_two_and_four_ranks(shared, alone):
    for key, result in shared[1].items():
        assert result["eval"] == pytest.approx(alone[key]["eval"], rel=1e-5, abs=1e-6), key


@pytest.mark.torchrun
def test_the_ranks_deal_each_pair_once_in_equally_many_micro_batches(shared):
    world, results = shared
    for (*_, case), result in results.items():
        dealt = result["dealt"]
        assert len(dealt) == world and len({len(lists) for lists in dealt}) == 1
        assert sorted(row for lists in dealt for part in lists for row in part) == list(
            range(CASES[case][0])
        )


@pytest.mark.torchrun
def test_with_fewer_pairs_than_ranks_the_others_compute_along(shared):
    world, results = shared
    empty = [lists for lists in results["dpo", "llama", "packed", "one pair"]["dealt"] if lists == [[]]]
    assert len(empty) == world - 1


@pytest.mark.parametrize("plan", PLANS, ids=" ".join)
def test_small_micro_batches_give_the_gradient_of_one_large_one(alone, plan):
    small, large = (alone[(*plan, f"seven pairs, {size}")] for size in ("small", "large"))
    assert len(small["dealt"][0]) > len(large["dealt"][0]) == 1
    assert small["loss"] == pytest.approx(large["loss"], rel=1e-6)
    assert_same_gradients(small["grads"], large["grads"])


# ---- micro_batches, on random batches ----


def random_deals(count=300):
    """(rows, lengths, layout, max_tokens, world), from one pair to many, from equal to very unequal."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        data = rng.integers(1, 80)
        lengths = np.ceil(rng.exponential(rng.choice([1, 30, 500]), (data, 3))).astype(np.int64) + 1
        rows = rng.permutation(data)[: rng.integers(1, data + 1)]
        layout = str(rng.choice(["packed", "concatenated", "separate"]))
        longest = int(dpo.pair_costs(lengths, layout).max())
        yield (
            rows,
            lengths,
            layout,
            int(longest * rng.choice([1, 1.3, 4, 100])),
            int(rng.integers(1, 10)),
        )


def tokens_of(part, lengths, layout):
    """What one forward pass holds, padding included."""
    prompt, chosen, rejected = lengths[part].T
    longest = (prompt + np.maximum(chosen, rejected)).max()
    return {
        "packed": lengths[part].sum(),
        "concatenated": 2 * len(part) * longest,
        "separate": len(part) * longest,
    }[layout]


def test_micro_batches_deal_every_pair_exactly_once():
    for rows, *rest in random_deals():
        lists = dpo.micro_batches(rows, *rest)
        assert sorted(np.concatenate(lists).tolist()) == sorted(rows.tolist())


def test_every_rank_gets_equally_many_micro_batches():
    for *deal, world in random_deals():
        assert len(dpo.micro_batches(*deal, world)) % world == 0


def test_no_micro_batch_exceeds_max_tokens():
    for rows, lengths, layout, max_tokens, world in random_deals():
        for part in dpo.micro_batches(rows, lengths, layout, max_tokens, world):
            assert len(part) == 0 or tokens_of(part, lengths, layout) <= max_tokens


def test_a_micro_batch_is_empty_only_if_there_are_fewer_pairs_than_micro_batches():
    for rows, *deal, world in random_deals():
        lists = dpo.micro_batches(rows, *deal, world)
        empty = sum(len(part) == 0 for part in lists)
        assert empty == max(0, len(lists) - len(rows)) < world


def test_one_rank_with_enough_room_takes_the_batch_in_one_forward_pass():
    for rows, lengths, layout, _, _ in random_deals(50):
        assert len(dpo.micro_batches(rows, lengths, layout, 10**9, 1)) == 1


@pytest.mark.parametrize("layout", ["packed", "concatenated", "separate"])
def test_the_bound_counts_the_tokens_that_collate_makes(layout):
    split = make_split()
    for max_tokens in (80, 100, 200):  # 80: the longest pair, alone and padded
        for part in dpo.micro_batches(np.arange(7), split["lengths"], layout, max_tokens, 2):
            batches = dpo.collate([split["rows"][i] for i in part], layout)
            sizes = [batch["input_ids"].numel() for batch in batches]
            assert max(sizes) <= tokens_of(part, split["lengths"], layout) <= max_tokens


if __name__ == "__main__":
    dpo.start_process_group("float32")
    torch.set_num_threads(1)
    found = all_steps(json.loads(sys.argv[2]))
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
