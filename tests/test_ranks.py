"""Claim: the gradient of a batch does not depend on how many ranks share it, nor on the micro-batches.

With every algorithm, the same batch goes through pair_losses and backward in 1, 2 and 4 processes, in
micro-batches as small and as large as can be, also with fewer pairs than ranks, with checkpointing, with
LoRA, with groups of ranks that each hold a copy of the weights, and with --zero 2 and 3. The loss agrees to 1e-6, the gradient
of every parameter to 1e-4 of its norm, and so do the metrics of evaluate(). Below: what micro_batches
promises, on random batches and against all ways to deal a few pairs.

This file is also the program that the processes run: torchrun tests/test_ranks.py OUT, MODELS as JSON.
"""

import importlib.util
import itertools
import json
import math
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
LAYOUTS = ["packed", "concatenated", "separate"]
PLANS = [  # script, family, layout, and what else
    ("dpo", "llama", "packed", ""),
    ("dpo", "llama-tied", "packed", ""),
    ("dpo", "llama-tied", "concatenated", ""),
    ("dpo", "llama-tied", "separate", ""),
    ("dpo", "gemma2", "packed", ""),
    ("dpo", "gpt2", "packed", ""),
    ("dpo", "mixtral", "packed", ""),
    ("dpo", "lfm2", "concatenated", ""),
    ("dpo", "llama", "packed", "groups"),  # of half of the ranks
    ("dpo", "llama-tied", "packed", "groups"),
    ("dpo", "llama", "packed", "full"),  # checkpointing
    ("dpo", "llama-tied", "packed", "selective"),
    ("dpo", "llama", "packed", "zero2"),  # else one rank has 2, several have 3
    ("dpo", "llama-tied", "packed", "zero2"),
    ("dpo", "llama", "packed", "zero3"),
    ("dpo", "llama", "packed", "zero2 groups full"),
    ("auxdpo", "llama-tied", "packed", "zero2"),
    ("auxdpo", "llama-tied", "packed", "full"),  # the last micro-batches keep their graphs
]
PLANS += [(name, "llama-tied", "packed", "") for name in SCRIPTS if name != "dpo"]
PLANS += [(name, "llama-tied", "separate", "") for name in SCRIPTS if name != "dpo"]
if importlib.util.find_spec("peft"):
    PLANS += [("dpo", "llama", "packed", "lora"), ("dpo", "llama", "packed", "zero2 lora")]
SIZES = [(1, 1, 4), (7, 9, 1), (23, 5, 17), (2, 30, 2), (12, 3, 11), (3, 3, 3), (5, 8, 6)]
CASES = {  # pairs, whether max_tokens is as small as can be
    "seven pairs, small": (7, True),
    "seven pairs, large": (7, False),
    "three pairs": (3, False),
    "one pair": (1, False),
}


def make_split(name="dpo"):
    pairs, rng = random_pairs(SIZES), np.random.default_rng(5)
    pairs = [pair | {"weight": 1 + 0.1 * i} for i, pair in enumerate(pairs)]
    split = dict(pairs=pairs, lengths=np.array(SIZES))
    if name != "simpo":
        split["ref_logps"] = rng.normal(-20, 5, (len(pairs), 2)).astype(np.float32)
    if name == "auxdpo":  # as prepare_delta makes it, for responses to two prompts that stand in several pairs
        index = np.array([(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3), (3, 5)])
        split |= dict(index=index, groups=np.array([0, 0, 0, 3, 3, 3]), source=np.arange(6))
        split["sketch"] = np.random.default_rng(6).normal(size=(6, 24))
        split["weights"] = torch.tensor([pair["weight"] for pair in pairs]).double()
        split |= {name: torch.zeros(size).double() for name, size in dict(delta=6, margins=7, c=24).items()}
    return split


def arguments(layout, max_tokens, how):
    return types.SimpleNamespace(
        layout=layout,
        max_tokens=max_tokens,
        activation_checkpointing=next((kind for kind in ("full", "selective") if kind in how), "off"),
        beta=0.3,
        gamma_beta_ratio=0.5,
        label_smoothing=0.1,
        sft_weight=0.2,
        **dict(penalty_weight=1.0, delta_steps=10, null="soft", geometry="scores", delta="shared"),
    )


def one_step(script, policy, split, plan, case):
    """What main() does up to the optimiser with the first pairs -> loss, pairs dealt, gradients."""
    rank, world = dist.get_rank(), dist.get_world_size()
    count, small = CASES[case]
    *_, layout, how = plan
    rows = np.arange(count)[::-1].copy()
    limit = int(script.pair_tokens(split["lengths"][rows], layout).max()) if small else 10_000
    args, sums = arguments(layout, limit, how), []
    mine = script.micro_batches(rows, split["lengths"], args, world)[rank::world]
    parts = [(part,) for part in mine]  # and, in AuxDPO, log-probs that are known
    if script is auxdpo:
        margins, parts = script.first_pass(policy, mine, split, args)
        script.update_delta(rows, margins, split, args)
    for i, (part, *known) in enumerate(parts):
        policy.set_reshard_after_backward(policy.reshards or i == len(parts) - 1)
        losses, metrics = script.pair_losses(policy, part, split, args, *known)
        (losses.sum() / len(rows) * world).backward()
        sums.append(metrics)
    dealt = [None] * world
    dist.all_gather_object(dealt, [part.tolist() for part in mine])
    grads = {}
    for name, weight in policy.named_parameters():
        if weight.requires_grad:
            grads[name] = weight.grad.full_tensor().clone()
    policy.zero_grad()
    delta = split["delta"].clone() if script is auxdpo else torch.zeros(1)
    of_ranks = [None] * world
    dist.all_gather_object(of_ranks, delta)
    assert all(torch.equal(each, delta) for each in of_ranks)  # to the bit
    evaluation = dict(split, delta=0 * delta) if script is auxdpo else split  # as that of val
    return dict(loss=script.mean_over_pairs(sums)["loss"], dealt=dealt, grads=grads, delta=delta,
                eval=script.evaluate(policy, evaluation, args))


def all_steps(folders):
    """{(script, family, layout, what else, case): one_step}"""
    results = {}
    for plan in PLANS:
        name, family, layout, how = plan
        changes = dict(shard_group=max(1, dist.get_world_size() // 2)) if "groups" in how else {}
        changes |= dict(lora_rank=2) if "lora" in how else {}
        changes |= {"zero": kind[-1] for kind in how.split() if "zero" in kind}
        checkpointing = arguments(layout, 0, how).activation_checkpointing
        policy = tiny_policy(SCRIPTS[name], folders[family], layout, checkpointing, **changes)
        for case in CASES:
            results[*plan, case] = one_step(SCRIPTS[name], policy, make_split(name), plan, case)
    return results


@pytest.fixture(scope="module")
def folders(tiny_model):
    return {family: tiny_model(family) for _, family, *_ in PLANS}


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
        if key[0] == "auxdpo" and "seven" in key[-1]:
            assert result["delta"].abs().max() > 0.1


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
    dealt = results["dpo", "llama", "packed", "", "one pair"]["dealt"]
    assert len([lists for lists in dealt if lists == [[]]]) == world - 1


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=" ".join)
def test_small_micro_batches_give_the_gradient_of_one_large_one(alone, plan):
    small, large = (alone[(*plan, f"seven pairs, {size}")] for size in ("small", "large"))
    assert len(small["dealt"][0]) > len(large["dealt"][0]) == 1
    assert small["loss"] == pytest.approx(large["loss"], rel=1e-6)
    assert_same_gradients(small["grads"], large["grads"])


# ---- micro_batches, on random batches ----


def random_deals(count=300):
    """(rows, lengths, args, world), from one pair to many, from equal to very unequal."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        data = rng.integers(1, 80)
        lengths = np.ceil(rng.exponential(rng.choice([1, 30, 500]), (data, 3))).astype(int) + 1
        rows = rng.permutation(data)[: rng.integers(1, data + 1)]
        layout = str(rng.choice(LAYOUTS))
        longest = dpo.pair_tokens(lengths, layout).max()
        max_tokens = int(longest * rng.choice([1, 1.3, 4, 100]))
        yield rows, lengths, arguments(layout, max_tokens, ""), int(rng.integers(1, 10))


def tokens_of(part, lengths, layout):
    """What one forward pass holds, padding included."""
    if len(part) == 0:
        return 0
    prompt, chosen, rejected = lengths[part].T
    longest = (prompt + np.maximum(chosen, rejected)).max()
    return {
        "packed": lengths[part].sum(),
        "concatenated": 2 * len(part) * longest,
        "separate": len(part) * longest,
    }[layout]


def fullest(lists, lengths, layout):
    return max(tokens_of(part, lengths, layout) for part in lists)


def contiguous_deals(rows, lengths, count):
    """All ways to cut the pairs, longest first, into at most so many parts."""
    prompt, chosen, rejected = lengths[rows].T
    order = rows[np.argsort(-(prompt + np.maximum(chosen, rejected)), kind="stable")]
    for cuts in range(min(count, len(rows))):
        for places in itertools.combinations(range(1, len(rows)), cuts):
            yield np.split(order, places)


def small_deals():
    """Deals of so few pairs that all ways to cut them can be tried."""
    rng = np.random.default_rng(1)
    for _ in range(150):
        rows = rng.permutation(rng.integers(1, 10))
        lengths = np.ceil(rng.exponential(rng.choice([2, 30, 300]), (len(rows), 3))).astype(int)
        layout = str(rng.choice(LAYOUTS))
        longest = dpo.pair_tokens(lengths, layout).max()
        max_tokens = int(longest * rng.choice([1, 1.5, 3, 10, 100]))
        yield rows, lengths, arguments(layout, max_tokens, ""), int(rng.integers(1, 5))


def test_micro_batches_deal_every_pair_exactly_once():
    for rows, *deal in random_deals():
        lists = dpo.micro_batches(rows, *deal)
        assert sorted(np.concatenate(lists).tolist()) == sorted(rows.tolist())


def test_every_rank_gets_equally_many_micro_batches():
    for *deal, world in random_deals():
        assert len(dpo.micro_batches(*deal, world)) % world == 0


def test_no_micro_batch_exceeds_max_tokens():
    for rows, lengths, args, world in random_deals():
        lists = dpo.micro_batches(rows, lengths, args, world)
        assert fullest(lists, lengths, args.layout) <= args.max_tokens


def test_pairs_of_similar_length_go_together():
    """No pair is longer than any of an earlier micro-batch."""
    for rows, lengths, args, world in random_deals():
        lists = dpo.micro_batches(rows, lengths, args, world)
        dealt = np.concatenate(lists).astype(int)
        assert (np.diff(dpo.pair_tokens(lengths[dealt], "separate")) <= 0).all()


def test_there_are_as_few_micro_batches_as_fit_rounded_up_to_the_ranks():
    """The fewest parts among all ways to cut the pairs, longest first, with max_tokens in each."""
    for rows, lengths, args, world in small_deals():
        for fewest in range(1, len(rows) + 1):
            deals = contiguous_deals(rows, lengths, fewest)
            if any(fullest(deal, lengths, args.layout) <= args.max_tokens for deal in deals):
                break
        lists = dpo.micro_batches(rows, lengths, args, world)
        assert len(lists) == math.ceil(fewest / world) * world


def test_the_fullest_micro_batch_is_at_most_a_few_percent_above_that_of_the_best_deal():
    """All ranks wait for it. The best among all ways to cut the pairs, longest first, into as many."""
    for rows, lengths, args, world in small_deals():
        lists = dpo.micro_batches(rows, lengths, args, world)
        deals = contiguous_deals(rows, lengths, len(lists))
        best = min(fullest(deal, lengths, args.layout) for deal in deals)
        assert best <= fullest(lists, lengths, args.layout) <= 1.03 * best


def test_one_rank_with_enough_room_takes_the_batch_in_one_forward_pass():
    for rows, lengths, args, _ in random_deals(50):
        args.max_tokens = 10**9
        assert len(dpo.micro_batches(rows, lengths, args, 1)) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bound_counts_the_tokens_that_collate_makes(layout):
    split = make_split()
    for max_tokens in (80, 100, 200):  # 80: the longest pair, alone and padded
        args = arguments(layout, max_tokens, "")
        for part in dpo.micro_batches(np.arange(7), split["lengths"], args, 2):
            batches = dpo.collate([split["pairs"][i] for i in part], layout) if len(part) else []
            sizes = [batch["inputs"]["input_ids"].numel() for batch in batches]
            assert max(sizes, default=0) == tokens_of(part, split["lengths"], layout) <= max_tokens


if __name__ == "__main__":
    dpo.start_process_group("float32")
    torch.set_num_threads(1)
    found = all_steps(json.loads(sys.argv[2]))
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
