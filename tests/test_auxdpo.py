"""Claim: auxdpo.py minimises the loss of the AuxDPO paper, section 4.2, in theta and in delta, at the price of DPO.

- The bandit of Proposition 3: the published numbers, and what has to hold for any pair counts.
- delta = 0 is DPO to the bit; the larger lambda is, the nearer it stays to that; one epoch moves delta far.
- The solver's parabola lies above the loss. No step goes up, and the steps end where the derivatives of the written-out
  objective (finite differences) vanish.
- The public notebook's own formula, with a backward pass per response, has the same penalty and the same gradient in delta.
- The penalty sees the whole dataset, whatever the batch; ranks and micro-batches do not matter.
- The first pass, which gives the margins, keeps the graph of the micro-batch that comes first in the backward pass.
- The sketches are found by content; delta is restored from the file of its checkpoint, and never older than that.
"""

import json
import math
import shutil
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


def with_delta(split, **changes):
    """What prepare_delta adds for the first step: no delta has moved."""
    count = len(split["pairs"])
    state = dict(delta=torch.zeros(count, 2).double(), margins=torch.zeros(count).double(), c=torch.zeros(40).double())
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


def make_split(count=12, dim=40, seed=0, weight=False, room=0, start=0.0):
    """Random pairs; delta start at N(0, start^2); the last `room` numbers of a sketch are empty."""
    rng = np.random.default_rng(seed)
    pairs = [dict(id=str(i)) | (dict(weight=rng.uniform(0.5, 2)) if weight else {}) for i in range(count)]
    sketch = rng.normal(size=(count, 2, dim)) * rng.uniform(1, 4, (count, 2, 1)) + rng.normal(size=dim)
    sketch = np.pad(sketch, ((0, 0), (0, 0), (0, room)))
    delta = torch.from_numpy(rng.normal(0, 1, (count, 2)) * start)
    split = with_delta(dict(pairs=pairs, sketch=sketch), delta=delta)
    split["c"] = torch.from_numpy(true_c(split))
    return split, torch.from_numpy(rng.normal(0, 2, count))


def copy_of(split):
    """For another run from the same state."""
    return split | {name: split[name].clone() for name in ("delta", "margins", "c")}


def true_c(split):
    return np.einsum("ns,nsk->k", split["delta"].numpy(), split["sketch"])


def objective(delta, rows, margins, split, args):
    """The paper's loss, written out, times N, as far as it depends on the delta (n, 2) of a batch."""
    total, loss = len(split["pairs"]), 0.0
    for i, row in enumerate(rows):
        m = margins[row].item() + delta[i, 0] - delta[i, 1]
        loss += split["pairs"][row].get("weight", 1.0) * np.logaddexp(0, -m)
    everything = split["delta"].numpy().copy()
    everything[rows] = delta
    c = sum(everything[i, s] * split["sketch"][i, s] for i in range(total) for s in range(2))
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
}


@pytest.mark.parametrize("name", CASES)
def test_the_solver_never_goes_up_and_ends_where_every_derivative_vanishes(name):
    split, margins = make_split(weight="weights" in name, start=0.5)
    rows, args = np.array([7, 2, 11, 5]), arguments(**dict(delta_steps=1) | CASES[name])
    others = np.delete(split["delta"].numpy(), rows, 0)
    values = []
    for _ in range(300):
        values.append(objective(split["delta"][rows].numpy(), rows, margins, split, args))
        auxdpo.update_delta(rows, margins, split, args)
    delta = split["delta"][rows].numpy()
    values.append(objective(delta, rows, margins, split, args))
    assert (np.diff(values) < 1e-9).all()
    assert values[-1] < values[0] - 0.01
    assert np.array_equal(np.delete(split["delta"].numpy(), rows, 0), others)  # nothing else has moved
    for i in range(len(rows)):
        for side in (0, 1):
            step = np.zeros_like(delta)
            step[i, side] = 1e-4
            up, down = (objective(delta + sign * step, rows, margins, split, args) for sign in (1, -1))
            assert abs(up - down) / 2e-4 < 1e-3, (i, side)
    np.testing.assert_allclose(split["c"], true_c(split), atol=1e-9)  # the running sum


def test_ten_steps_are_enough_from_nothing():
    """What is left of the way down after the default number of steps, for weak and strong penalties."""
    for weight in (0.1, 1.0, 10.0, 100.0):
        split, margins = make_split(count=64, dim=300)  # independent scores: the minimum is not at infinity
        rows, values = np.arange(32), []
        for steps in (DEFAULTS["delta_steps"], 2000):
            copy, args = copy_of(split), arguments(penalty_weight=weight, delta_steps=steps)
            auxdpo.update_delta(rows, margins, copy, args)
            values.append(objective(copy["delta"][rows].numpy(), rows, margins, copy, args))
        start = objective(np.zeros((32, 2)), rows, margins, split, args)
        assert start - values[0] > 0.99 * (start - values[1]) > 0, (weight, start, values)


def test_the_larger_lambda_the_smaller_delta_down_to_nothing():
    norms = []
    for weight in (1e-2, 1.0, 1e2, 1e4, 1e8):
        split, margins = make_split(dim=80)  # 24 responses: their scores are independent
        auxdpo.update_delta(np.arange(12), margins, split, arguments(penalty_weight=weight))
        norms.append(auxdpo.delta_metrics(split, arguments())["delta/norm"])
    assert all(a > b for a, b in zip(norms, norms[1:])) and norms[0] > 1 and norms[-1] < 1e-5


def test_random_geometry_is_a_ridge_with_the_norms_of_the_scores():
    """With orthogonal scores every delta pays for itself, lambda |g|^2 delta^2 / 4N."""
    split, margins = make_split(dim=8)
    args, rows = arguments(geometry="random", penalty_weight=10.0, delta_steps=200), np.array([3, 4, 9])
    auxdpo.update_delta(rows, margins, split, args)
    delta = split["delta"][rows].numpy()
    slope = -1 / (1 + np.exp(margins[rows].numpy() + delta[:, 0] - delta[:, 1]))
    pull = 10.0 / (2 * 12) * np.linalg.norm(split["sketch"][rows], axis=2) ** 2 * delta
    np.testing.assert_allclose(pull, np.stack([-slope, slope], 1), atol=1e-8)


def test_margins_and_weights_that_are_not_finite_are_no_error_of_the_solver():
    """The training loop will see that the gradient is not finite, and name the pairs."""
    for bad in (math.nan, math.inf, -math.inf):
        split, margins = make_split()
        margins[3] = bad
        auxdpo.update_delta(np.arange(6), margins, split, arguments())
        total = margins + split["delta"][:, 0] - split["delta"][:, 1]
        assert not total[3].isfinite()
    split, margins = make_split()
    split["pairs"][3]["weight"] = math.nan
    auxdpo.update_delta(np.arange(6), margins, split, arguments())
    assert split["delta"][3].isnan().all()


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


def test_log_probs_that_are_kept_give_the_losses_and_gradients_of_new_ones(tiny_model):
    pairs, policy = random_pairs(SIZES), tiny_policy(auxdpo, tiny_model("llama"))
    split = with_delta(split_of(pairs, tiny_policy(dpo, tiny_model("llama", seed=1))), delta=torch.randn(6, 2).double())
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


def test_the_exact_null_space_is_kept_batch_after_batch_and_the_joint_minimum_is_reached():
    split, margins = make_split(count=10, dim=16, weight=True, room=8)  # 20 delta, 16 equations
    split["projection"] = auxdpo.null_projection(split["sketch"])
    assert split["projection"].trace().item() == pytest.approx(4)
    args, rng = arguments(null="exact"), np.random.default_rng(0)
    for _ in range(8):  # epochs of batches of two, as in training
        for rows in rng.permutation(10).reshape(5, 2):
            auxdpo.update_delta(rows, margins, split, args)
    delta = split["delta"].numpy()
    assert np.abs(delta).max() > 0.05
    assert np.abs(true_c(split)).max() < 1e-4 * np.abs(delta).sum()
    np.testing.assert_allclose(split["c"], true_c(split), atol=1e-9)
    weights = np.array([pair["weight"] for pair in split["pairs"]])
    slope = -weights / (1 + np.exp(margins.numpy() + delta[:, 0] - delta[:, 1]))  # d loss / d margin
    slopes = np.stack([slope, -slope], 1).flatten()  # d loss / d delta
    assert np.abs(split["projection"].numpy() @ slopes).max() < 1e-3  # along the null space nothing is left


def test_margins_of_pairs_outside_the_batch_are_those_that_were_seen_last():
    split, margins = make_split(count=10, dim=16, room=8)
    split["projection"] = auxdpo.null_projection(split["sketch"])
    auxdpo.update_delta(np.array([1, 2]), margins, split, arguments(null="exact"))
    assert split["margins"].nonzero().flatten().tolist() == [1, 2]
    auxdpo.update_delta(np.array([5]), margins + 1, split, arguments(null="exact"))
    assert torch.equal(split["margins"][[1, 2, 5]], margins[[1, 2, 5]] + torch.tensor([0, 0, 1]))


def test_the_exact_null_space_is_the_limit_of_the_penalty():
    split, margins = make_split(count=10, dim=16, room=8)  # 4 directions: too few for all 10 pairs
    split["projection"] = auxdpo.null_projection(split["sketch"])
    losses = []
    for changes in (dict(null="exact"), dict(penalty_weight=1e7)):
        copy = copy_of(split)
        auxdpo.update_delta(np.arange(10), margins, copy, arguments(delta_steps=300, **changes))
        m = margins + copy["delta"][:, 0] - copy["delta"][:, 1]
        losses.append(np.logaddexp(0, -m.numpy()).mean())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_independent_scores_have_no_null_space_and_the_run_says_so():
    for count, dim in [(5, 40), (30, 16)]:  # too many numbers for 10 responses; 16 numbers that 60 responses fill
        split, _ = make_split(count=count, dim=dim)
        with pytest.raises(SystemExit, match="independent; train less .--train_modules"):
            auxdpo.null_projection(split["sketch"])
    with pytest.raises(SystemExit, match="small data, not for 4097 pairs; use --null soft"):
        auxdpo.null_projection(np.zeros((4097, 2, 1)))


# ---- files


@pytest.fixture
def folder(tmp_path):
    """A data folder with two references, each with sketches of two sizes; splits of the second; an empty --out."""
    (tmp_path / "out").mkdir()
    for reference in (1, 2):
        for dim in (3, 4):
            own = tmp_path / f"ref-{reference}" / f"sketch-{dim}"
            own.mkdir(parents=True)
            sketch = np.full((5, 2, dim), 10 * reference + dim, np.float16)
            sketch[:, 1] = 1  # of rejected responses
            np.save(own / "train-sketch.npy", sketch)
            key = auxdpo.sketch_key(arguments(sketch_dim=dim))
            (own / "meta.json").write_text(json.dumps(dict(key=key, args={}, sha256={})))
        np.save(tmp_path / f"ref-{reference}" / "train-logps.npy", np.full((5, 2), -reference, np.float32))
    return tmp_path


def splits_of(reference):
    train = dict(pairs=[dict(id=str(i)) for i in range(5)], ref_logps=np.full((5, 2), -reference, np.float32))
    return dict(train=train, val=dict(pairs=train["pairs"][:2], ref_logps=train["ref_logps"][:2]))


def test_sketches_are_those_of_the_reference_whose_log_probs_are_used(folder):
    for reference in (1, 2):
        for dim in (3, 4):
            splits = splits_of(reference)
            auxdpo.prepare_delta(splits, 0, arguments(data=str(folder), sketch_dim=dim))
            train, val = splits["train"], splits["val"]
            assert (train["sketch"][:, 0] == 10 * reference + dim).all()
            assert train["delta"].shape == (5, 2) and val["delta"].shape == (2, 2) and train["c"].shape == (dim,)
            assert not train["delta"].any() and not val["delta"].any() and not train["c"].any()


@pytest.mark.parametrize("changes", [dict(sketch_dim=5), dict(train_modules="norm"), dict(lora_rank=2, seed=1)])
def test_without_sketches_of_these_settings_the_error_is_the_command_that_makes_them(folder, changes):
    args = arguments(**dict(data=str(folder), model="MODEL", sketch_dim=3) | changes)
    with pytest.raises(SystemExit) as error:
        auxdpo.prepare_delta(splits_of(2), 0, args)
    command = f"run cache_ref.py --model MODEL --data {folder} --dtype auto --sketch_dim {args.sketch_dim}"
    rest = "".join(f" --{name} {value}" for name, value in changes.items() if name != "sketch_dim")
    assert str(error.value).endswith(command + rest)
    with pytest.raises(SystemExit, match="--model OTHER --data"):
        auxdpo.prepare_delta(splits_of(2), 0, types.SimpleNamespace(**vars(args) | dict(reference="OTHER")))


def test_sketches_that_are_cut_off_are_damaged(folder):
    path = folder / "ref-2" / "sketch-3" / "train-sketch.npy"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(SystemExit, match="sketch-3 is damaged .*: delete it, and run cache_ref.py again"):
        auxdpo.prepare_delta(splits_of(2), 0, arguments(data=str(folder), sketch_dim=3))


def test_delta_comes_back_to_the_bit_with_its_checkpoint_and_goes_when_that_goes(folder):
    args = arguments(data=str(folder), sketch_dim=3, out=str(folder / "out"), penalty_weight=1e-3)
    splits, found = splits_of(2), {}
    auxdpo.prepare_delta(splits, 0, args)
    for step in (1, 2, 3):
        auxdpo.update_delta(np.array([step, 0]), torch.randn(5).double(), splits["train"], args)
        auxdpo.save_delta(splits["train"], step, args)
        (folder / "out" / f"step-{step:06d}").mkdir()  # as save_checkpoint does
        found[step] = copy_of(splits["train"])
        if step == 2:
            shutil.rmtree(folder / "out" / "step-000001")  # as --keep 1 does
    assert [path.name for path in sorted((folder / "out").glob("*.npz"))] == ["delta-000002.npz", "delta-000003.npz"]
    for step in (2, 3):
        splits = splits_of(2)
        auxdpo.prepare_delta(splits, step, args)
        for name in ("delta", "margins", "c"):
            assert found[step][name].any() and torch.equal(splits["train"][name], found[step][name])
        assert not splits["val"]["delta"].any()
    (folder / "out" / "delta-000003.npz").write_bytes(b"")
    with pytest.raises(SystemExit, match="delta-000003.npz is damaged .* delete it and step-000003"):
        auxdpo.prepare_delta(splits_of(2), 3, args)


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
    split = with_delta(dict(pairs=[dict(weight=0.0)] * 4, sketch=scores.numpy()), delta=deltas.clone())
    split["c"] = torch.einsum("ns,nsk->k", deltas, scores)
    assert auxdpo.delta_metrics(split, arguments(penalty_weight=weight))["penalty"] == pytest.approx(penalty, rel=1e-9)
    seen = {}
    original, torch.linalg.solve = torch.linalg.solve, lambda a, b: seen.update(gradient=b) or original(a, b)
    try:
        auxdpo.update_delta(np.arange(4), torch.zeros(4).double(), split, arguments(penalty_weight=weight, delta_steps=1))
    finally:
        torch.linalg.solve = original
    torch.testing.assert_close(seen["gradient"].view(4, 2) / 4, slope, rtol=1e-7, atol=1e-12)  # ours: of n times the loss
    assert split["delta"].abs().max() < 1e-3 * deltas.abs().max()  # without preferences, delta goes to 0

