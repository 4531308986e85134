"""Claim: auxdpo.py minimises the loss of the AuxDPO paper, section 4.2, in theta and in delta, at the price of DPO.

- The bandit of Proposition 3: the published numbers, and what has to hold for any pair counts.
- delta = 0 is DPO to the bit; the larger lambda is, the nearer it stays to that; one epoch moves delta far.
- The inner steps end where the derivatives of the written-out objective (finite differences) vanish, with every flag of
  the public notebook, and no step goes up, unless delta is capped.
- The notebook's own formula, with a backward pass per response, has the same penalty and the same gradient in delta.
- The penalty sees the whole dataset, whatever the batch; ranks and micro-batches do not matter.
"""

import math
import types

import bandit
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


def test_dpo_changes_its_sign_with_the_counts():
    assert bandit.dpo((1, 1, 10)) > 0.3 and bandit.dpo((1, 1, 1)) < -0.3


def test_a_penalty_by_scores_ends_in_the_null_space_and_a_ridge_ends_at_dpo():
    counts = (1, 1, 10)
    for weight in (0.1, 10.0, 1e4):
        assert bandit.soft(counts, weight)[0] == pytest.approx(-0.5, abs=1e-3)
    assert bandit.soft(counts, 1e6, ridge=True)[0] == pytest.approx(bandit.dpo(counts), abs=1e-4)
    assert bandit.soft(counts, 1.0, ridge=True)[0] == pytest.approx(0.0577, abs=1e-3)  # between the two


# ---- the loss


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("inside", [False, True])
def test_the_loss_is_a_loop_over_pairs(eps, inside):
    rng, beta = np.random.default_rng(0), 0.3
    logps, ref, delta = rng.normal(-5, 3, (3, 2, 7))
    known = torch.from_numpy(np.concatenate([ref, delta]))
    args = arguments(beta=beta, label_smoothing=eps, delta_inside_beta=inside)
    losses, metrics = auxdpo.preference_loss(torch.from_numpy(logps), known, torch.ones(2, 7), args)
    for i in range(7):
        margin = beta * ((logps[0, i] - ref[0, i]) - (logps[1, i] - ref[1, i]))
        full = margin + (beta if inside else 1) * (delta[0, i] - delta[1, i])
        assert losses[i] == pytest.approx((1 - eps) * math.log1p(math.exp(-full)) + eps * math.log1p(math.exp(full)))
        assert metrics["rewards/margins"][i] == pytest.approx(margin)  # the policy's own, without delta
        assert metrics["delta/accuracies"][i] == (full > 0)


@pytest.mark.parametrize("layout", ["packed", "separate"])
def test_delta_zero_gives_the_gradients_of_dpo_to_the_bit(tiny_model, layout):
    pairs, reference = random_pairs(SIZES), tiny_policy(dpo, tiny_model("llama", seed=1))
    split = split_of(pairs, reference)
    both = {}
    for script in (dpo, auxdpo):
        policy = tiny_policy(script, tiny_model("llama"), layout)
        known = split | (dict(ref=np.pad(split["ref"], ((0, 0), (0, 3)))) if script is auxdpo else {})
        losses = script.pair_losses(policy, np.arange(len(pairs)), known, {}, arguments(layout=layout))
        losses.mean().backward()
        both[script] = losses, {name: weight.grad.full_tensor() for name, weight in policy.named_parameters()}
    assert torch.equal(both[dpo][0], both[auxdpo][0])
    for name, grad in both[dpo][1].items():
        assert torch.equal(grad, both[auxdpo][1][name]), name


# ---- the delta-subproblem


def make_split(count=12, dim=40, seed=0, weight=False, room=0):
    rng = np.random.default_rng(seed)
    rows = [dict(id=str(i)) | (dict(weight=rng.uniform(0.5, 2)) if weight else {}) for i in range(count)]
    sketch = rng.normal(size=(count, 2, dim)) * rng.uniform(1, 4, (count, 2, 1)) + rng.normal(size=dim)
    sketch = np.pad(sketch, ((0, 0), (0, 0), (0, room)))  # numbers that no score fills
    columns = [rng.normal(-5, 1, (count, 2)), rng.normal(0, 0.5, (count, 2)), np.zeros((count, 1))]
    split = dict(rows=rows, ref=np.concatenate(columns, 1).astype(np.float32), sketch=sketch)
    split["c"] = torch.from_numpy(np.einsum("ns,nsk->k", split["ref"][:, 2:4].astype(np.float64), sketch))
    return split, torch.from_numpy(rng.normal(0, 2, count))


def objective(delta, rows, margins, split, args):
    """The paper's loss of a batch, written out, times its pairs n; the penalty over the whole dataset as the sum over
    batches has it (N / n batches share it), or over the batch. delta (n, 2)."""
    n, total, inner = len(rows), len(split["rows"]), args.beta if args.delta_inside_beta else 1.0
    loss = 0.0
    for i, row in enumerate(rows):
        m = margins[row].item() + inner * (delta[i, 0] - delta[i, 1])
        eps, weight = args.label_smoothing, split["rows"][row].get("weight", 1.0)
        loss += weight * ((1 - eps) * np.logaddexp(0, -m) + eps * np.logaddexp(0, m))
    everything = split["ref"][:, 2:4].astype(np.float64)
    everything[rows] = delta
    if args.penalty == "dataset":
        c = sum(everything[i, s] * split["sketch"][i, s] for i in range(total) for s in range(2))
        loss += total * args.penalty_weight * np.sum((c / (2 * total)) ** 2)
    else:
        c = sum(delta[i, s] * split["sketch"][row, s] for i, row in enumerate(rows) for s in range(2))
        loss += n * args.penalty_weight * np.sum((c / (2 * n)) ** 2)
    return loss - args.amplitude * n * 0.5 * (np.mean(delta[:, 0] ** 2) + np.mean(delta[:, 1] ** 2))


CASES = {
    "the paper": {},
    "weights and label smoothing": dict(label_smoothing=0.1),
    "of the batch": dict(penalty="batch", penalty_weight=0.3),
    "inside beta": dict(delta_inside_beta=True, beta=0.5),
    "amplitude": dict(amplitude=0.05, penalty_weight=3.0),
    "capped": dict(delta_cap=1.0, penalty_weight=0.01),
    "the notebook": dict(delta_inside_beta=True, penalty="batch", delta_cap=2.0, amplitude=0.01),
}


@pytest.mark.parametrize("name", CASES)
def test_the_inner_steps_never_go_up_and_end_where_every_derivative_vanishes(name):
    split, margins = make_split(weight="weights" in name)
    rows, args = np.array([7, 2, 11, 5]), arguments(**dict(delta_steps=1, penalty_weight=1.0) | CASES[name])
    if args.delta_cap:
        split["ref"][:, 2:4] = split["ref"][:, 2:4].clip(-0.9, 0.9)
        split["c"] = torch.from_numpy(np.einsum("ns,nsk->k", split["ref"][:, 2:4].astype(np.float64), split["sketch"]))
    value = lambda: objective(split["ref"][rows, 2:4].astype(np.float64), rows, margins, split, args)
    values, others = [value()], np.delete(split["ref"], rows, 0).copy()
    for _ in range(300):
        auxdpo.update_delta(rows, margins, split, args)
        values.append(value())
    assert args.delta_cap or (np.diff(values) < 1e-5).all()  # a cap bends the bound
    assert values[-1] < values[0] - 0.01
    assert np.array_equal(np.delete(split["ref"], rows, 0), others)  # nothing else has moved
    delta = split["ref"][rows, 2:4].astype(np.float64)
    for i in range(len(rows)):
        for side in (0, 1):
            step = np.zeros_like(delta)
            step[i, side] = 1e-4
            slope = (objective(delta + step, rows, margins, split, args) - objective(delta - step, rows, margins, split, args)) / 2e-4
            slope *= 1 - (delta[i, side] / args.delta_cap) ** 2 if args.delta_cap else 1  # of what is optimised
            assert abs(slope) < 2e-3, (i, side, slope)
    truth = np.einsum("ns,nsk->k", split["ref"][:, 2:4].astype(np.float64), split["sketch"])
    np.testing.assert_allclose(split["c"], truth, atol=1e-4)  # the running sum


def test_ten_steps_are_enough_from_nothing():
    """What is left of the way down after the default number of steps, for weak and strong penalties."""
    for weight in (0.1, 1.0, 10.0, 100.0):
        split, margins = make_split(count=64, dim=300)  # independent scores: the minimum is not at infinity
        split["ref"][:, 2:4], split["c"] = 0, 0 * split["c"]
        rows = np.arange(32)
        values = []
        for steps in (DEFAULTS["delta_steps"], 2000):
            copy = split | dict(ref=split["ref"].copy(), c=split["c"].clone())
            args = arguments(penalty_weight=weight, delta_steps=steps)
            auxdpo.update_delta(rows, margins, copy, args)
            values.append(objective(copy["ref"][rows, 2:4].astype(np.float64), rows, margins, copy, args))
        start = objective(np.zeros((32, 2)), rows, margins, split, args)
        assert start - values[0] > 0.99 * (start - values[1]) > 0, (weight, start, values)


def test_the_larger_lambda_the_smaller_delta_down_to_nothing():
    norms = []
    for weight in (1e-2, 1.0, 1e2, 1e4, 1e8):
        split, margins = make_split(dim=80)  # 24 responses: their scores are independent
        split["ref"][:, 2:4], split["c"] = 0, 0 * split["c"]
        auxdpo.update_delta(np.arange(12), margins, split, arguments(penalty_weight=weight))
        norms.append(np.linalg.norm(split["ref"][:, 2:4]))
    assert all(a > b for a, b in zip(norms, norms[1:])) and norms[0] > 1 and norms[-1] < 1e-5


def test_random_geometry_is_a_ridge_with_the_norms_of_the_scores():
    """One pair: with independent directions every delta pays for itself, lambda |g|^2 delta^2 / 4N."""
    split, margins = make_split(dim=8)
    split["ref"][:, 2:4], split["c"] = 0, 0 * split["c"]
    args, rows = arguments(geometry="random", penalty_weight=10.0, delta_steps=200), np.array([3, 4, 9])
    auxdpo.update_delta(rows, margins, split, args)
    delta = split["ref"][rows, 2:4].astype(np.float64)
    slope = -1 / (1 + np.exp(margins[rows].numpy() + delta[:, 0] - delta[:, 1]))
    pull = 10.0 / (2 * 12) * np.linalg.norm(split["sketch"][rows], axis=2) ** 2 * delta
    np.testing.assert_allclose(pull, np.stack([-slope, slope], 1), atol=1e-5)


@pytest.mark.parametrize("amplitude", [0.0, 0.05])
@pytest.mark.parametrize("cap", [0.5, 2.0])
def test_a_cap_holds_also_where_the_scores_of_a_batch_are_dependent(cap, amplitude):
    """16 responses in 6 dimensions: along the null space only the cap stops delta."""
    split, margins = make_split(count=8, dim=6)
    split["ref"][:, 2:4], split["c"] = 0, 0 * split["c"]
    rows, values = np.arange(8), []
    args = arguments(delta_cap=cap, amplitude=amplitude, penalty_weight=1.0)
    for _ in range(40):
        values.append(objective(split["ref"][rows, 2:4].astype(np.float64), rows, margins, split, args))
        auxdpo.update_delta(rows, margins, split, args)
    assert np.isfinite(split["ref"]).all() and np.abs(split["ref"][:, 2:4]).max() <= cap
    assert values[1] < values[0] - 0.5 and values[-1] <= min(values) + 0.02
    best, rng = min(values), np.random.default_rng(1)
    for _ in range(300):  # nothing near is much better
        near = (split["ref"][rows, 2:4] + rng.normal(0, 0.1 * cap, (8, 2))).clip(-cap, cap)
        assert objective(near, rows, margins, split, args) > best - 0.2


def test_the_margins_of_a_first_pass_are_those_of_the_second(tiny_model):
    """forward_first, before delta is known, and pair_losses, after, agree; so beta is in both."""
    pairs, policy = random_pairs(SIZES), tiny_policy(auxdpo, tiny_model("llama"))
    split = split_of(pairs, tiny_policy(dpo, tiny_model("llama", seed=1)))
    split["ref"] = np.pad(split["ref"], ((0, 0), (0, 3)))
    args, totals = arguments(beta=0.7), {}
    margins, (output,) = auxdpo.forward_first(policy, [np.array([1, 4, 0]), np.array([2, 3])], split, args)
    auxdpo.pair_losses(policy, np.arange(5), split, totals, args)
    assert margins.sum().item() == pytest.approx(totals["rewards/margins"].item(), rel=1e-5) and margins[5] == 0
    truth = policy(dpo.collate([pairs[i] for i in (1, 4, 0)], "packed"))[0]
    assert torch.equal(output[0], truth) and output[0].requires_grad


def test_with_full_checkpointing_no_block_runs_more_often_than_in_dpo(tiny_model):
    """Graphs that hold inputs of blocks alone are kept for all micro-batches: forward, and again in the backward pass."""
    pairs, policy = random_pairs(SIZES), tiny_policy(auxdpo, tiny_model("llama"), checkpointing="full")
    split = split_of(pairs, tiny_policy(dpo, tiny_model("llama", seed=1)))
    split["ref"] = np.pad(split["ref"], ((0, 0), (0, 3)))
    parts, calls = [np.array([1, 4, 0]), np.array([2, 3])], []
    policy.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(0))
    margins, outputs = auxdpo.forward_first(policy, parts, split, arguments(activation_checkpointing="full"))
    assert len(calls) == 2 and all(output[0].requires_grad for output in outputs)
    for part in parts:
        truth = policy(dpo.collate([pairs[i] for i in part], "packed"))[0]
        assert torch.equal(outputs[-1][0], truth)
        calls.clear()
        outputs.pop()[0].sum().backward()
        assert len(calls) == 1


# ---- the exact null space


@pytest.mark.parametrize("changes", [{}, dict(delta_inside_beta=True, beta=0.5)], ids=["", "inside beta"])
def test_the_exact_null_space_is_kept_batch_after_batch_and_the_joint_minimum_is_reached(changes):
    split, margins = make_split(count=10, dim=16, weight=True, room=8)  # 20 delta, 16 equations
    split["ref"][:, 2:4], split["c"] = 0, 0 * split["c"]
    split["basis"] = auxdpo.null_basis(split["sketch"])
    assert split["basis"].shape == (10, 2, 4)
    args, rng = arguments(null="exact", **changes), np.random.default_rng(0)
    for epoch in range(8):  # batches of two, as in training
        for rows in rng.permutation(10).reshape(5, 2):
            auxdpo.update_delta(rows, margins, split, args)
    delta, inner = split["ref"][:, 2:4].astype(np.float64), 0.5 if changes else 1.0
    assert np.abs(np.einsum("ns,nsk->k", delta, split["sketch"])).max() < 1e-4 * np.abs(delta).sum()
    assert split["c"].abs().max() < 1e-4 * np.abs(delta).sum()
    weights = np.array([row["weight"] for row in split["rows"]])
    m = margins.numpy() + inner * (delta[:, 0] - delta[:, 1])
    slope = -weights / (1 + np.exp(m))  # of the loss; along the null space nothing is left of it
    along = (split["basis"][:, 0] - split["basis"][:, 1]).numpy()
    assert np.abs(delta).max() > 0.05 and np.abs(along.T @ slope).max() < 1e-3


def test_the_exact_null_space_is_the_limit_of_the_penalty():
    split, margins = make_split(count=10, dim=16, room=8)  # 4 directions: too few for all 10 pairs
    split["ref"][:, 2:4], split["c"] = 0, 0 * split["c"]
    rows, losses = np.arange(10), []
    for changes in (dict(null="exact"), dict(penalty_weight=1e7)):
        copy = split | dict(ref=split["ref"].copy(), c=split["c"].clone(), basis=auxdpo.null_basis(split["sketch"]))
        auxdpo.update_delta(rows, margins, copy, arguments(delta_steps=300, **changes))
        m = margins.numpy() + copy["ref"][:, 2] - copy["ref"][:, 3]
        losses.append(np.logaddexp(0, -m).mean())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_independent_scores_have_no_null_space_and_the_run_says_so():
    for count, dim in [(5, 40), (30, 16)]:  # too many numbers for 10 responses; 16 numbers that 60 responses fill
        split, _ = make_split(count=count, dim=dim)
        with pytest.raises(SystemExit, match="independent; train less .--train_modules"):
            auxdpo.null_basis(split["sketch"])


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
    """With the gradients themselves in place of sketches. A single inner step of a loss without preference part
    (weights 0) reveals the gradient: it solves gram step = gradient."""
    pairs, weight = random_pairs(SIZES[:4]), 0.7
    deltas = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 2)))
    penalty, slope, scores = notebook(tiny_model("llama", num_hidden_layers=1), pairs, deltas, weight)
    rows = [dict(weight=0.0)] * 4
    split = dict(rows=rows, sketch=scores.numpy(), ref=np.zeros((4, 5)), c=torch.einsum("ns,nsk->k", deltas, scores))
    split["ref"][:, 2:4] = deltas
    assert auxdpo.delta_metrics(split, arguments(penalty_weight=weight))["penalty"] == pytest.approx(penalty, rel=1e-9)
    seen = {}
    original, torch.linalg.solve = torch.linalg.solve, lambda a, b: seen.update(gradient=b) or original(a, b)
    try:
        auxdpo.update_delta(np.arange(4), torch.zeros(4).double(), split, arguments(penalty_weight=weight, delta_steps=1))
    finally:
        torch.linalg.solve = original
    torch.testing.assert_close(seen["gradient"].view(4, 2) / 4, slope, rtol=1e-7, atol=1e-12)  # ours: of n times the loss
    assert np.abs(split["ref"][:, 2:4]).max() < 1e-3 * deltas.abs().max()  # without preferences, delta goes to 0

