"""Claim: auxdpo.py minimises the loss of the AuxDPO paper, section 4.2, in theta and in delta, at the price of DPO.

- The bandit of Proposition 3: the published numbers; with one delta per response, each once, theta does not depend on
  pair counts, through the script's own functions; if each response counts as often as it is compared, it does.
- delta = 0 is DPO to the bit; the larger lambda is, the nearer it stays to that; one epoch moves delta far.
- The solver's parabola lies above the loss. No step goes up, and the steps end where the derivatives of the written-out
  objective (a float64 loop; finite differences) vanish: with one delta per response, and with two per pair as in the paper.
- A constant on the delta of a prompt changes neither c nor a margin. Ten copies of a pair are one of weight ten.
- The public notebook's own formula, with a backward pass per response, has the same penalty and the same gradient in delta.
- The penalty sees the whole dataset, whatever the batch; ranks and micro-batches do not matter.
- The first pass, which gives the margins, keeps the graph of the micro-batch that comes first in the backward pass.
- The sketches are found by content; delta is restored from the file of its checkpoint, and never older than that.
"""

import json
import math
import types

import bandit
import datasets
import numpy as np
import pytest
import torch
from conftest import random_pairs, split_of, tiny_policy
from test_sketch import gradients

import auxdpo
import dpo

pytestmark = pytest.mark.usefixtures("process_group")
SIZES = [(1, 1, 4), (7, 9, 1), (12, 5, 17), (2, 21, 2), (9, 3, 11), (3, 3, 3)]
DEFAULTS = {name: value for name, value in vars(auxdpo.Args).items() if name in auxdpo.Args.__dataclass_fields__}


def arguments(**changes):
    return types.SimpleNamespace(**DEFAULTS | dict(layout="packed") | changes)


# ---- the bandit of Proposition 3

COUNTS = [(1, 1, 10), (1, 1, 1), (10, 1, 1), (1, 10, 3)]


def test_the_published_numbers_of_the_bandit_to_four_digits():
    counts = (1, 1, 10)
    for theta, reward, found in [(0.40062, 0.89563, bandit.dpo(counts)), (0.09784, 0.96903, bandit.ipo(counts)),
                                 (-0.5, 1.19928, bandit.exact(counts)[0])]:
        assert found == pytest.approx(theta, abs=2e-5)
        assert bandit.expected_reward(found) == pytest.approx(reward, abs=2e-5)


@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("counts", COUNTS)
def test_theta_does_not_depend_on_pair_counts_and_reward_plus_delta_is_the_true_reward(counts, beta):
    theta, delta = bandit.exact(counts, beta)
    assert theta == pytest.approx(-1 / (2 * beta), abs=1e-4)
    assert (bandit.SCORES @ delta).abs() < 1e-9
    total = beta * theta * bandit.FEATURES + delta
    torch.testing.assert_close(total - total[2], bandit.REWARD, rtol=0, atol=2e-3)


# METHODS 5.3: pair counts, theta of DPO, of a delta per response that counts as often as it is compared, and once
SHARED = [((1, 1, 10), 0.401, 0.143, -0.5), ((1, 1, 1), -0.426, -0.5, -0.5), ((10, 1, 1), -0.489, -0.5, -0.5),
          ((1, 10, 1), -1.316, -1.143, -0.5)]


@pytest.mark.slow
@pytest.mark.parametrize("counts, of_dpo, often, once", SHARED)
def test_with_each_response_once_theta_is_minus_a_half_for_all_counts(counts, of_dpo, often, once):
    assert bandit.dpo(counts) == pytest.approx(of_dpo, abs=1e-3)
    assert bandit.shared(counts, often=True) == pytest.approx(often, abs=1e-3)
    for penalty in (0.1, 10.0):
        theta = bandit.shared(counts, penalty)
        assert theta == pytest.approx(once, abs=1e-3)
        assert bandit.expected_reward(theta) == pytest.approx(1.199, abs=1e-3)


def test_dpo_changes_its_sign_with_the_counts():
    assert bandit.dpo((1, 1, 10)) > 0.3 and bandit.dpo((1, 1, 1)) < -0.3


def test_a_penalty_by_scores_ends_in_the_null_space_and_a_ridge_ends_at_dpo():
    counts = (1, 1, 10)
    for weight in (0.1, 10.0, 1e4):
        assert bandit.soft(counts, weight)[0] == pytest.approx(-0.5, abs=1e-3)
    assert bandit.soft(counts, 1e6, ridge=True)[0] == pytest.approx(bandit.dpo(counts), abs=1e-4)
    assert bandit.soft(counts, 1.0, ridge=True)[0] == pytest.approx(0.0577, abs=1e-3)  # between the two


# ---- the loss


def test_the_loss_is_a_loop_over_pairs():
    rng, beta = np.random.default_rng(0), 0.3
    logps, ref, delta = rng.normal(-5, 3, (3, 2, 7))
    args = arguments(beta=beta)
    losses, metrics = auxdpo.preference_loss(*map(torch.from_numpy, (logps, ref, delta)), torch.ones(2, 7), args)
    for i in range(7):
        margin = beta * ((logps[0, i] - ref[0, i]) - (logps[1, i] - ref[1, i]))
        full = margin + delta[0, i] - delta[1, i]
        assert losses[i] == pytest.approx(math.log1p(math.exp(-full)))
        assert metrics["rewards/margins"][i] == pytest.approx(margin)  # the policy's own, without delta
        assert metrics["rewards/accuracies"][i] == (margin > 0)
        assert metrics["delta/accuracies"][i] == (full > 0)
        assert (metrics["delta/chosen"][i], metrics["delta/rejected"][i]) == (delta[0, i], delta[1, i])


def state_of(responses, prompts, sketch, weights=None, **changes):
    """What prepare_delta makes for the first step of pairs with these responses (N, 2) and prompts (N,); sketch (U, K)."""
    columns = dict(prompt_id=prompts) | ({} if weights is None else dict(weight=weights))
    train = dict(pairs=datasets.Dataset.from_dict(columns), responses=np.array(responses))
    auxdpo.prepare_delta(dict(train=train, val=dict(train)), "", arguments(**changes | dict(geometry="ridge")))
    if changes.get("geometry") != "ridge":
        train |= dict(sketch=sketch, c=torch.zeros(sketch.shape[1]).double())
    return train


def per_pair(count):
    """Responses and prompts of pairs that have nothing in common."""
    return np.arange(2 * count).reshape(-1, 2), np.arange(count)


def with_delta(split, **changes):
    """A split whose delta are all 0, two per pair."""
    count = len(split["pairs"])
    state = dict(delta=torch.zeros(2 * count).double(), margins=torch.zeros(count).double(), index=per_pair(count)[0])
    return split | state | changes


@pytest.mark.parametrize("layout", ["packed", "separate"])
def test_delta_zero_gives_the_gradients_of_dpo_to_the_bit(tiny_model, layout):
    pairs, reference = random_pairs(SIZES), tiny_policy(dpo, tiny_model("llama", seed=1))
    split = split_of(pairs, reference)
    both = {}
    for script in (dpo, auxdpo):
        policy = tiny_policy(script, tiny_model("llama"), layout)
        losses, _ = script.pair_losses(policy, np.arange(len(pairs)), with_delta(split), arguments(layout=layout, label_smoothing=0.0, sft_weight=0.0))
        losses.mean().backward()
        both[script] = losses, {name: weight.grad.full_tensor() for name, weight in policy.named_parameters()}
    assert torch.equal(both[dpo][0], both[auxdpo][0])
    for name, grad in both[dpo][1].items():
        assert torch.equal(grad, both[auxdpo][1][name]), name


# ---- the delta-subproblem


# Two prompts with three and four responses, compared in cycles and some of them often; a third one with a single pair.
RESPONSES = [(0, 1), (1, 2), (2, 0), (2, 0), (2, 0), (3, 4), (4, 5), (5, 6), (6, 3), (4, 6), (1, 0), (7, 8)]
PROMPTS = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 2]


def make_split(count=12, dim=40, seed=0, weight=False, room=0, start=0.0, delta="per_pair", geometry="scores"):
    """A state with random scores (U, dim + room), the last `room` numbers empty, and delta from N(0, start^2), and margins
    (N,). RESPONSES if delta are shared, else `count` pairs with delta of their own."""
    rng = np.random.default_rng(seed)
    responses, prompts = (RESPONSES, PROMPTS) if delta == "shared" else per_pair(count)
    size = np.max(responses) + 1
    sketch = rng.normal(size=(size, dim)) * rng.uniform(1, 4, (size, 1)) + rng.normal(size=dim)
    sketch = np.pad(sketch, ((0, 0), (0, room)))
    weights = rng.uniform(0.5, 2, len(prompts)) if weight else None
    split = state_of(responses, prompts, sketch, weights, delta=delta, geometry=geometry)
    split["delta"] = torch.from_numpy(rng.normal(0, 1, size) * start)
    split["c"] = torch.from_numpy(true_c(split["delta"].numpy(), split, delta, geometry))
    return split, torch.from_numpy(rng.normal(0, 2, len(prompts)))


def copy_of(split):
    """For another run from the same state."""
    return split | {name: split[name].clone() for name in ("delta", "margins", "c")}


def true_c(values, split, delta="shared", geometry="scores"):
    """c for delta `values` (U,), a loop: sum_u delta_u (g_u - mean of its prompt). In the paper, with two delta per
    pair, sum_u delta_u g_u."""
    size, rows = len(values), split["index"]
    scores = np.eye(size) if geometry == "ridge" else np.array(split["sketch"], float)
    if delta == "per_pair":
        return sum(values[u] * scores[u] for u in range(size))
    prompt = {u: PROMPTS[i] if len(rows) == len(PROMPTS) else 0 for i in range(len(rows)) for u in rows[i]}
    total = np.zeros(scores.shape[1])
    for u in range(size):
        siblings = [scores[other] for other in range(size) if prompt[other] == prompt[u]]
        total += values[u] * (scores[u] - np.mean(siblings, 0))
    return total


def objective(delta, rows, margins, split, args):
    """The loss of METHODS 5.3, written out, times N, of these rows and the penalty lambda |v c / 2N|^2, v = 2N / U."""
    total, loss = len(split["index"]), 0.0
    for row in rows:
        chosen, rejected = split["index"][row]
        m = margins[row].item() + delta[chosen] - delta[rejected]
        loss += split["weights"][row].item() * np.logaddexp(0, -m)
    c = 2 * total / len(delta) * true_c(delta, split, args.delta, args.geometry)
    return loss + total * args.penalty_weight * np.sum((c / (2 * total)) ** 2)


def test_the_parabola_of_a_step_lies_above_the_loss_and_touches_it():
    """One pair, z its margin, no penalty: the solver goes to the minimum of the parabola at m, and from there we know it."""
    def loss(m):
        return np.logaddexp(0, -m)

    one, none, args = torch.ones(1).double(), torch.zeros(1).double(), arguments(delta_steps=1)
    everywhere = np.linspace(-40, 40, 4001)
    for m in (-9.0, -1.0, -1e-3, 1e-3, 0.5, 4.0):
        slope = (loss(m + 1e-5) - loss(m - 1e-5)) / 2e-5
        lowest = auxdpo.minimise(none, m * one, one, one[None], none[None], none, args).item()  # from m to the minimum
        curvature = -slope / lowest
        parabola = loss(m) + slope * (everywhere - m) + curvature / 2 * (everywhere - m) ** 2
        assert (parabola - loss(everywhere) > -1e-6).all()
        assert curvature == pytest.approx(np.tanh(m / 2) / (2 * m), rel=1e-4)


CASES = {
    "the paper": {},
    "a weak penalty": dict(penalty_weight=0.05),
    "weights": {},
    "shared": dict(delta="shared"),
    "shared, a weak penalty": dict(delta="shared", penalty_weight=0.05),
    "shared, weights": dict(delta="shared"),
    "shared, a ridge": dict(delta="shared", geometry="ridge", penalty_weight=20.0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_solver_never_goes_up_and_ends_where_every_derivative_vanishes(name):
    args = arguments(**dict(delta_steps=1, delta="per_pair") | CASES[name])
    split, margins = make_split(weight="weights" in name, start=0.5, delta=args.delta, geometry=args.geometry)
    batch, rows = np.array([7, 2, 11, 5]), np.array([7, 2, 11, 5])
    if args.delta == "shared":  # all pairs of the prompts 0 and 1, with margins as they were last seen
        batch, rows = np.array([7, 2]), np.arange(11)
        split["margins"] += torch.from_numpy(np.random.default_rng(1).normal(0, 2, 12))
        margins[[row for row in range(12) if row not in batch]] = math.nan  # these are not known
    used = np.unique(split["index"][rows])
    others = np.delete(split["delta"].numpy(), used)
    assert len(others) > 0
    split["margins"][batch] = margins[batch]
    values = [objective(split["delta"].numpy(), rows, split["margins"], split, args)]
    for _ in range(300):
        auxdpo.update_delta(batch, margins, split, args)
        values.append(objective(split["delta"].numpy(), rows, split["margins"], split, args))
    delta = split["delta"].numpy().copy()
    assert torch.equal(split["margins"][batch], margins[batch])
    assert (np.diff(values) < 1e-9).all()
    assert values[-1] < values[0] - 0.01
    assert np.array_equal(np.delete(delta, used), others)  # nothing else has moved
    for u in used:
        step = np.zeros_like(delta)
        step[u] = 1e-4
        up, down = (objective(delta + sign * step, rows, split["margins"], split, args) for sign in (1, -1))
        assert abs(up - down) / 2e-4 < 1e-3, u
    np.testing.assert_allclose(split["c"], true_c(delta, split, args.delta, args.geometry), atol=1e-9)


@pytest.mark.parametrize("geometry", ["scores", "ridge"])
def test_a_constant_on_the_delta_of_a_prompt_changes_neither_c_nor_a_margin(geometry):
    split, margins = make_split(delta="shared", geometry=geometry)
    scores, columns = auxdpo.centred_scores(np.arange(9), split, arguments(geometry=geometry))
    for prompt in range(3):
        of_prompt = {u for pair, own in zip(RESPONSES, PROMPTS) for u in pair if own == prompt}
        constant = torch.tensor([3.0 if u in of_prompt else 0.0 for u in range(9)]).double()
        assert (scores.T @ constant).abs().max() < 1e-12 and scores.abs().max() > 0.5
        assert (constant[split["index"][:, 0]] == constant[split["index"][:, 1]]).all()


def test_ten_copies_of_a_pair_are_one_pair_of_weight_ten():
    found, rng = [], np.random.default_rng(0)
    sketch = rng.normal(size=(3, 5))
    margins = rng.normal(0, 2, 3)
    for copies, weights in [(1, (1.0, 1.0, 10.0)), (10, None)]:
        responses = [(0, 1), (1, 2)] + [(2, 0)] * copies
        split = state_of(responses, [0] * len(responses), sketch, weights)
        # N lambda |c / U|^2 is proportional to N: let both have the same penalty
        args = arguments(delta_steps=200, penalty_weight=12.0 / len(responses))
        auxdpo.update_delta(np.arange(len(responses)), torch.from_numpy(margins[[0, 1] + [2] * copies]), split, args)
        found.append(split["delta"].numpy() - split["delta"].mean().item())  # a constant is free
    np.testing.assert_allclose(found[0], found[1], atol=1e-9)
    assert np.abs(found[0]).max() > 0.1


def test_a_batch_of_prompts_with_very_many_pairs_takes_2048_of_them_and_its_own_first():
    count, rng = 3000, np.random.default_rng(0)
    responses = np.column_stack([rng.integers(0, 50, count), rng.integers(50, 100, count)])
    split = state_of(responses, [0] * count, rng.normal(size=(100, 4)))
    batch = np.array([2999, 5, 17])
    rows = auxdpo.rows_of_groups(batch, split, arguments())
    assert rows[:3].tolist() == batch.tolist() and len(set(rows)) == len(rows) == 2048
    assert np.array_equal(rows, auxdpo.rows_of_groups(batch, split, arguments()))  # on any rank
    auxdpo.update_delta(batch, torch.zeros(count).double(), split, arguments())
    np.testing.assert_allclose(split["c"], true_c(split["delta"].numpy(), split, delta="shared"), atol=1e-9)
    assert len(auxdpo.rows_of_groups(np.arange(2500), split, arguments())) == 2500


def test_the_run_begins_by_saying_on_how_many_margins_delta_can_act(capsys):
    make_split(delta="shared")  # prompts with 6 pairs of 3 responses, 5 of 4, 1 of 2: cycles 4 + 2 + 0
    assert "N = 12, U = 9, S = 3: sharing delta can act on 6 of N margins" in capsys.readouterr().out
    make_split()
    assert "N = 12, U = 24, S = 12: sharing delta can act on 0 of N margins" in capsys.readouterr().out


def test_pairs_of_a_prompt_that_have_no_response_in_common_are_groups_of_their_own():
    """A constant on either moves no margin, and must not move c; one that connects them makes them one."""
    responses = [(0, 1), (1, 0), (2, 3)]
    assert auxdpo.connected_groups(np.array(responses)).tolist() == [0, 0, 2, 2]
    assert auxdpo.connected_groups(np.array([*responses, (3, 1)])).tolist() == [0, 0, 0, 0]
    chain = np.column_stack([np.arange(50, 0, -1), np.arange(49, -1, -1)])
    assert not auxdpo.connected_groups(np.random.default_rng(0).permutation(chain)).any()
    split = state_of(responses, [0, 0, 0], np.random.default_rng(0).normal(size=(4, 6)))
    scores, _ = auxdpo.centred_scores(np.arange(4), split, arguments())
    assert (scores.T @ torch.tensor([1.0, 1.0, -1.0, -1.0]).double()).abs().max() < 1e-12
    assert auxdpo.rows_of_groups(np.array([2]), split, arguments()).tolist() == [2]


def test_ten_steps_are_enough_from_nothing():
    """What is left of the way down after the default number of steps, for weak and strong penalties."""
    for weight in (0.1, 1.0, 10.0, 100.0):
        split, margins = make_split(count=64, dim=300)  # independent scores: the minimum is not at infinity
        rows, values = np.arange(32), []
        for steps in (DEFAULTS["delta_steps"], 2000):
            copy, args = copy_of(split), arguments(penalty_weight=weight, delta_steps=steps, delta="per_pair")
            auxdpo.update_delta(rows, margins, copy, args)
            values.append(objective(copy["delta"].numpy(), rows, margins, copy, args))
        start = objective(np.zeros(128), rows, margins, split, args)
        assert start - values[0] > 0.99 * (start - values[1]) > 0, (weight, start, values)


@pytest.mark.parametrize("delta", ["shared", "per_pair"])
def test_the_larger_lambda_the_smaller_delta_down_to_nothing(delta):
    norms = []
    for weight in (1e-2, 1.0, 1e2, 1e4, 1e8):
        split, margins = make_split(dim=80, delta=delta)  # independent scores
        auxdpo.update_delta(np.arange(12), margins, split, arguments(penalty_weight=weight, delta=delta))
        norms.append(auxdpo.delta_metrics(split, arguments())["delta/norm"])
    assert all(a > b for a, b in zip(norms, norms[1:])) and norms[-1] < 1e-5
    assert norms[0] > dict(shared=0.9, per_pair=1)[delta]


def test_the_ridge_of_two_delta_per_pair_is_a_square_of_each():
    """With orthogonal unit scores every delta pays for itself, lambda delta^2 / 4N."""
    args, rows = arguments(geometry="ridge", penalty_weight=10.0, delta_steps=200, delta="per_pair"), np.array([3, 4, 9])
    split, margins = make_split(dim=8, delta="per_pair", geometry="ridge")
    auxdpo.update_delta(rows, margins, split, args)
    delta = split["delta"][split["index"][rows]].numpy()
    slope = -1 / (1 + np.exp(margins[rows].numpy() + delta[:, 0] - delta[:, 1]))
    np.testing.assert_allclose(10.0 / (2 * 12) * delta, np.stack([-slope, slope], 1), atol=1e-8)
    assert auxdpo.delta_metrics(split, args)["penalty"] == pytest.approx(10.0 * (delta**2).sum() / 24**2)


def test_margins_and_weights_that_are_not_finite_are_no_error_of_the_solver():
    """The training loop will see that the gradient is not finite, and name the pairs."""
    args = arguments(delta="per_pair")
    for bad in (math.nan, math.inf, -math.inf):
        split, margins = make_split()
        margins[3] = bad
        auxdpo.update_delta(np.arange(6), margins, split, args)
        delta = split["delta"][split["index"]]
        assert not (margins + delta[:, 0] - delta[:, 1])[3].isfinite()
    split, margins = make_split()
    split["weights"][3] = math.nan
    auxdpo.update_delta(np.arange(6), margins, split, args)
    assert split["delta"][split["index"][3]].isnan().all()


# ---- the first pass


def test_the_margins_of_the_first_pass_are_those_of_the_second(tiny_model):
    """first_pass, before delta is known, and pair_losses, after, agree; so beta is in both."""
    pairs, policy = random_pairs(SIZES), tiny_policy(auxdpo, tiny_model("llama"))
    split = with_delta(split_of(pairs, tiny_policy(dpo, tiny_model("llama", seed=1))))
    args, parts = arguments(beta=0.7), [np.array([1, 4, 0]), np.array([], int), np.array([2, 3])]
    margins, computed = auxdpo.first_pass(policy, parts, split, args)
    _, sums = auxdpo.pair_losses(policy, np.arange(5), split, args)
    assert margins.sum().item() == pytest.approx(sums["rewards/margins"].item(), rel=1e-5)
    assert margins[5] == 0 and (margins[:5] != 0).all()
    assert [rows.tolist() for rows, _ in computed] == [[2, 3], [], [1, 4, 0]]  # the backward pass begins with the last
    assert [logps is None for _, logps in computed] == [False, True, True]
    truth = policy(dpo.collate([pairs[i] for i in (2, 3)], "packed"))
    assert torch.equal(computed[0][1], truth) and computed[0][1].requires_grad


def test_the_first_pass_waits_for_the_gpu_only_after_all_micro_batches(tiny_model, monkeypatch):
    pairs, policy, order, copy = random_pairs(SIZES), tiny_policy(auxdpo, tiny_model("llama")), [], torch.Tensor.cpu
    split = with_delta(split_of(pairs, tiny_policy(dpo, tiny_model("llama", seed=1))))
    policy.register_forward_pre_hook(lambda *_: order.append("forward"))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: order.append("wait") or copy(tensor))
    auxdpo.first_pass(policy, [np.array([1, 4]), np.array([0]), np.array([2, 3])], split, arguments())
    assert order == ["forward"] * 3 + ["wait"] * 3


def test_log_probs_that_are_kept_give_the_losses_and_gradients_of_new_ones(tiny_model):
    pairs, policy = random_pairs(SIZES), tiny_policy(auxdpo, tiny_model("llama"))
    split = with_delta(split_of(pairs, tiny_policy(dpo, tiny_model("llama", seed=1))), delta=torch.randn(12).double())
    args, parts, found = arguments(), [np.array([1, 4, 0]), np.array([2, 3, 5])], []
    for keep in (True, False):
        _, computed = auxdpo.first_pass(policy, parts, split, args)
        losses = []
        for rows, logps in computed:
            losses.append(auxdpo.pair_losses(policy, rows, split, args, logps if keep else None)[0])
            losses[-1].sum().backward()
        found.append((torch.cat(losses), [weight.grad.full_tensor() for weight in policy.parameters()]))
        policy.zero_grad()
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


def test_with_full_checkpointing_no_block_runs_more_often_than_in_dpo(tiny_model):
    """Graphs that hold inputs of blocks alone are kept for four micro-batches: forward, and again in the backward pass."""
    pairs, policy = random_pairs(SIZES), tiny_policy(auxdpo, tiny_model("llama"), checkpointing="full")
    split = with_delta(split_of(pairs, tiny_policy(dpo, tiny_model("llama", seed=1))))
    parts, calls = [np.array([row]) for row in (1, 4, 0, 2, 3)], []
    policy.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(0))
    _, computed = auxdpo.first_pass(policy, parts, split, arguments(activation_checkpointing="full"))
    assert len(calls) == 5 and [logps is None for _, logps in computed] == [False] * 4 + [True]
    for rows, logps in computed[:4]:
        truth = policy(dpo.collate([pairs[i] for i in rows], "packed"))
        assert torch.equal(logps, truth)
        calls.clear()
        logps.sum().backward()
        assert len(calls) == 1


# ---- the exact null space


def exact_split(delta, **changes):
    """A state in which few numbers bind many delta, and the projection; margins."""
    split, margins = make_split(count=10, dim=dict(per_pair=16, shared=2)[delta], room=8, delta=delta, **changes)
    split["projection"] = auxdpo.null_projection(split, arguments(null="exact", delta=delta))
    return split, margins


def test_the_exact_null_space_is_kept_batch_after_batch_and_the_joint_minimum_is_reached():
    # 20 delta and 16 equations; 9 delta and 2 equations, of which 3 directions are constants on a prompt
    for delta, free in (("per_pair", 4), ("shared", 7)):
        split, margins = exact_split(delta, weight=True)
        assert split["projection"].trace().item() == pytest.approx(free)
        args, rng = arguments(null="exact", delta=delta), np.random.default_rng(0)
        for _ in range(8):  # epochs of batches of two, as in training
            for rows in rng.permutation(len(margins)).reshape(-1, 2):
                auxdpo.update_delta(rows, margins, split, args)
        found, c = split["delta"].numpy(), true_c(split["delta"].numpy(), split, delta=delta)
        assert np.abs(found).max() > 0.05
        assert np.abs(c).max() < 1e-4 * np.abs(found).sum()
        np.testing.assert_allclose(split["c"], c, atol=1e-9)
        differences = found[split["index"][:, 0]] - found[split["index"][:, 1]]
        slope = -split["weights"].numpy() / (1 + np.exp(margins.numpy() + differences))  # d loss / d margin
        slopes = np.zeros(len(found))
        for i, (chosen, rejected) in enumerate(split["index"]):
            slopes[chosen] += slope[i]
            slopes[rejected] -= slope[i]
        assert np.abs(split["projection"].numpy() @ slopes).max() < 1e-3  # along the null space nothing is left


def test_margins_of_pairs_outside_the_batch_are_those_that_were_seen_last():
    split, margins = exact_split("per_pair")
    args = arguments(null="exact", delta="per_pair")
    auxdpo.update_delta(np.array([1, 2]), margins, split, args)
    assert split["margins"].nonzero().flatten().tolist() == [1, 2]
    auxdpo.update_delta(np.array([5]), margins + 1, split, args)
    assert torch.equal(split["margins"][[1, 2, 5]], margins[[1, 2, 5]] + torch.tensor([0, 0, 1]))


@pytest.mark.parametrize("delta", ["shared", "per_pair"])
def test_the_exact_null_space_is_the_limit_of_the_penalty(delta):
    split, margins = exact_split(delta)  # too few directions for all pairs
    losses = []
    for changes in (dict(null="exact"), dict(penalty_weight=1e7)):
        copy = copy_of(split)
        auxdpo.update_delta(np.arange(len(margins)), margins, copy, arguments(delta_steps=300, delta=delta, **changes))
        found = copy["delta"][copy["index"]]
        losses.append(np.logaddexp(0, -(margins + found[:, 0] - found[:, 1]).numpy()).mean())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_independent_scores_have_no_null_space_and_the_run_says_so():
    for count, dim in [(5, 40), (30, 16)]:  # too many numbers for 10 responses; 16 numbers that 60 responses fill
        split, _ = make_split(count=count, dim=dim)
        with pytest.raises(SystemExit, match="independent; train less .--train_modules"):
            auxdpo.null_projection(split, arguments(delta="per_pair"))
    split, _ = make_split(delta="shared", dim=40)  # only the constants are left
    with pytest.raises(SystemExit, match="the scores of 9 responses, as 40 numbers, are independent"):
        auxdpo.null_projection(split, arguments())
    with pytest.raises(SystemExit, match="not for 9 responses; use --null soft"):
        auxdpo.null_projection(split, arguments(geometry="ridge"))


# ---- files


@pytest.fixture
def folder(tmp_path):
    """A data folder with two references, each with sketches of two sizes; splits of the second; an empty --out."""
    (tmp_path / "out").mkdir()
    for reference in (1, 2):
        for dim in (3, 4):
            own = tmp_path / f"ref-{reference}" / f"sketch-{dim}"
            own.mkdir(parents=True)
            sketch = np.full((7, dim), 10 * reference + dim, np.float16)
            sketch[1::2] = 1  # of those with odd numbers
            np.save(own / "train-sketch.npy", sketch)
            key = auxdpo.sketch_key(arguments(sketch_dim=dim))
            (own / "meta.json").write_text(json.dumps(dict(key=key, args={}, sha256={})))
        np.save(tmp_path / f"ref-{reference}" / "train-logps.npy", np.full(7, -reference, np.float32))
    return tmp_path


def splits_of(reference):
    """Five pairs of seven responses to two prompts."""
    pairs = datasets.Dataset.from_dict(dict(prompt_id=[0, 0, 0, 1, 1]))
    responses = np.array([(0, 1), (1, 2), (2, 0), (3, 4), (5, 6)])
    train = dict(pairs=pairs, responses=responses, ref_logps=np.full((5, 2), -reference, np.float32))
    return dict(train=train, val=dict(pairs=pairs.select(range(2)), ref_logps=train["ref_logps"][:2]))


def test_sketches_are_those_of_the_reference_whose_log_probs_are_used(folder):
    for reference in (1, 2):
        for dim in (3, 4):
            for delta, count in (("shared", 7), ("per_pair", 10)):
                splits = splits_of(reference)
                auxdpo.prepare_delta(splits, f"ref-{reference}", arguments(data=str(folder), sketch_dim=dim, delta=delta))
                train, val = splits["train"], splits["val"]
                assert (train["sketch"][::2] == 10 * reference + dim).all()
                assert train["delta"].shape == (count,) and train["c"].shape == (dim,)
                assert not train["delta"].any() and not train["c"].any()
                assert not val["delta"][val["index"]].any() and val["index"].shape == (2, 2)
                # both kinds of delta find the sketches of their responses
                assert np.array_equal(train["source"][train["index"]], train["responses"])


def test_a_ridge_needs_no_sketches(tmp_path):
    splits = splits_of(1)
    auxdpo.prepare_delta(splits, "", arguments(data=str(tmp_path), geometry="ridge"))
    assert "sketch" not in splits["train"] and splits["train"]["c"].shape == (7,)


@pytest.mark.parametrize("changes", [dict(sketch_dim=5), dict(train_modules="norm"), dict(lora_rank=2, seed=1)])
def test_without_sketches_of_these_settings_the_error_is_the_command_that_makes_them(folder, changes):
    args = arguments(**dict(data=str(folder), model="MODEL", sketch_dim=3) | changes)
    with pytest.raises(SystemExit) as error:
        auxdpo.prepare_delta(splits_of(2), "ref-2", args)
    command = f"run cache_ref.py --model 'MODEL' --data '{folder}' --dtype 'auto' --sketch_dim '{args.sketch_dim}'"
    rest = "".join(f" --{name} '{value}'" for name, value in changes.items() if name != "sketch_dim")
    assert str(error.value).endswith(command + rest)
    with pytest.raises(SystemExit, match="--model 'OTHER' --data"):
        auxdpo.prepare_delta(splits_of(2), "ref-2", types.SimpleNamespace(**vars(args) | dict(reference="OTHER")))


def test_sketches_that_are_cut_off_are_damaged(folder):
    path = folder / "ref-2" / "sketch-3" / "train-sketch.npy"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(SystemExit, match="sketch-3 is damaged: delete it, and run cache_ref.py again"):
        auxdpo.prepare_delta(splits_of(2), "ref-2", arguments(data=str(folder), sketch_dim=3))


@pytest.mark.parametrize("geometry", ["scores", "ridge"])
def test_delta_comes_back_to_the_bit_with_its_checkpoint(folder, geometry, tiny_model):
    settings = dict(data=str(folder), sketch_dim=3, out=str(folder / "out"), penalty_weight=1e-3, geometry=geometry)
    args, found = arguments(**settings), {}

    def begin():
        """Splits, and what is saved, as they are at step 0."""
        splits, policy = splits_of(2), tiny_policy(auxdpo, tiny_model("llama"))
        auxdpo.prepare_delta(splits, "ref-2", args)
        return splits, auxdpo.policy_and_delta(policy, splits["train"]), torch.optim.AdamW(policy.parameters())

    splits, saved, optimizer = begin()
    (folder / "out/log.jsonl").touch()
    for step in (1, 2, 3):
        auxdpo.update_delta(np.array([step, 0]), torch.randn(5).double(), splits["train"], args)
        auxdpo.save_checkpoint(saved, optimizer, step, args)
        found[step] = copy_of(splits["train"])
    assert [path.name for path in sorted((folder / "out").glob("step-*"))] == ["step-000002", "step-000003"]
    for step in (2, 3):
        splits, saved, optimizer = begin()
        auxdpo.load_checkpoint(saved, optimizer, step, args)
        for name in ("delta", "margins", "c"):
            assert found[step][name].any() and torch.equal(splits["train"][name], found[step][name])
        assert not splits["val"]["delta"].any()


# ---- the public notebook, from its formula


def notebook(model, pairs, deltas, weight):
    """lambda |1/2B sum_i delta_w,i grad log pi(y_w,i) + delta_l,i grad log pi(y_l,i)|^2 and its gradient in delta (n, 2),
    with 2B backward passes whose gradients are all kept."""
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in gradients(model, pairs, torch.float64)]
    deltas = deltas.clone().requires_grad_()
    vector = sum(d * g for d, g in zip(deltas.flatten(), flat)) / (2 * len(pairs))
    penalty = weight * vector.square().sum()
    penalty.backward()
    return penalty.item(), deltas.grad, torch.stack(flat).view(len(pairs), 2, -1)


def test_penalty_and_gradient_are_those_of_the_notebook_on_a_real_model(tiny_model):
    """With the gradients themselves in place of sketches. A single step of the solver for a loss without preference part
    (weights 0) reveals the gradient: it solves gram step = gradient."""
    pairs, weight = random_pairs(SIZES[:4]), 0.7
    deltas = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 2)))
    penalty, slope, scores = notebook(tiny_model("llama", num_hidden_layers=1), pairs, deltas, weight)
    args = arguments(penalty_weight=weight, delta_steps=1, delta="per_pair")
    split = state_of(*per_pair(4), scores.flatten(0, 1).numpy(), np.zeros(4), delta="per_pair")
    split["delta"] = deltas.flatten().clone()
    split["c"] = torch.einsum("ns,nsk->k", deltas, scores)
    assert auxdpo.delta_metrics(split, arguments(penalty_weight=weight))["penalty"] == pytest.approx(penalty, rel=1e-9)
    seen = {}
    original, torch.linalg.solve = torch.linalg.solve, lambda a, b: seen.update(gradient=b) or original(a, b)
    try:
        auxdpo.update_delta(np.arange(4), torch.zeros(4).double(), split, args)
    finally:
        torch.linalg.solve = original
    torch.testing.assert_close(seen["gradient"].view(4, 2) / 4, slope, rtol=1e-7, atol=1e-12)  # ours: of n times the loss
    assert split["delta"].abs().max() < 1e-3 * deltas.abs().max()  # without preferences, delta goes to 0

