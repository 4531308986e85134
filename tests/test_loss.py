"""Claim: the loss is that of the paper, and so are its gradient, its metrics and what it is minimised with.

Independent truths: a loop in pure Python (float64) written from the definition

    D = (s_w - s_l) - (r_w - r_l);   L = -(1 - eps) log sigmoid(beta D) - eps log sigmoid(-beta D)

with s the policy's and r the reference's summed log-probs (chosen w, rejected l), its derivative by hand, and
TRL's DPOTrainer on the same tokens and weights. Also: the SFT term, the weight column, how the sums of
micro-batches become the means of the log, the learning rates, and which pairs stand in which step.
"""

import math
import random
import types

import numpy as np
import pytest
import torch

import dpo
from conftest import assert_same_gradients, random_pairs, split_of, tiny_policy, trl_dpo_loss

LOGPS = [
    [-10.0, -3.0, -50.0, -7.5, -1.0],
    [-12.0, -3.0, -20.0, -7.0, -2.0],
]  # (chosen, rejected) x 5 pairs
REFERENCE = [[-11.0, -3.0, -40.0, -7.5, -1.5], [-11.0, -3.0, -40.0, -7.5, -2.5]]
LENGTHS = [[4, 1, 20, 3, 1], [5, 1, 9, 3, 2]]


def arguments(**changes):
    defaults = dict(beta=0.1, label_smoothing=0.0, sft_weight=0.0, layout="packed")
    return types.SimpleNamespace(**defaults | changes)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(s_w, s_l, r_w, r_l, beta, eps):
    """The loss of one pair, and its derivative with respect to s_w (that to s_l is the opposite)."""
    margin = beta * ((s_w - s_l) - (r_w - r_l))
    loss = -(1 - eps) * math.log(sigmoid(margin)) - eps * math.log(sigmoid(-margin))
    return loss, beta * (-(1 - eps) * sigmoid(-margin) + eps * sigmoid(margin))


def losses_of(logps, reference, dtype=torch.float64, **changes):
    logps = torch.tensor(logps, dtype=dtype, requires_grad=True)
    losses, metrics = dpo.preference_loss(
        logps, torch.tensor(reference, dtype=dtype), torch.tensor(LENGTHS), arguments(**changes)
    )
    return logps, losses, metrics


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 5.0])
def test_loss_and_gradient_are_those_of_a_loop_over_the_definition(beta, eps):
    logps, losses, _ = losses_of(LOGPS, REFERENCE, beta=beta, label_smoothing=eps)
    losses.sum().backward()
    for i in range(5):
        four = [LOGPS[0][i], LOGPS[1][i], REFERENCE[0][i], REFERENCE[1][i]]
        loss, slope = by_hand(*four, beta, eps)
        assert losses[i].item() == pytest.approx(loss, rel=1e-12)
        assert logps.grad[:, i].tolist() == pytest.approx([slope, -slope], rel=1e-12)


def test_a_margin_of_one_costs_0_313():
    _, losses, metrics = losses_of([[-1.0], [-2.0]], [[-2.0], [-2.0]], beta=1.0)
    assert losses.item() == pytest.approx(0.31326168751822286, rel=1e-12)  # log(1 + 1/e)
    assert metrics["rewards/margins"].item() == 1.0


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0, 100.0])
def test_the_loss_is_log_2_when_the_policy_is_the_reference(beta, eps):
    for dtype, places in ((torch.float64, 1e-15), (torch.float32, 1e-7)):
        _, losses, metrics = losses_of(LOGPS, LOGPS, dtype, beta=beta, label_smoothing=eps)
        assert losses.tolist() == pytest.approx([math.log(2)] * 5, abs=places)
        assert metrics["rewards/accuracies"].tolist() == [0.5] * 5


def test_the_gradient_is_beta_times_sigmoid_of_minus_the_margin():
    logps, losses, metrics = losses_of(LOGPS, REFERENCE, beta=0.3)
    losses.sum().backward()
    slope = 0.3 * torch.sigmoid(-metrics["rewards/margins"].detach())
    torch.testing.assert_close(logps.grad, torch.stack([-slope, slope]), rtol=1e-12, atol=0)


def test_the_gradient_at_the_reference_is_half_of_beta_for_every_pair():
    logps, losses, _ = losses_of(LOGPS, LOGPS, beta=0.3)
    losses.sum().backward()
    assert logps.grad.tolist() == [[-0.15] * 5, [0.15] * 5]


def test_a_hopeless_pair_has_a_finite_loss_and_the_full_gradient():
    logps, losses, _ = losses_of([[-1e4], [-1.0]], [[-1.0], [-1e4]], torch.float32, beta=1.0)
    losses.sum().backward()
    assert losses.item() == pytest.approx(19998) and logps.grad.flatten().tolist() == [-1.0, 1.0]


def test_label_smoothing_of_one_half_has_its_minimum_at_the_reference():
    logps, losses, _ = losses_of(LOGPS, LOGPS, label_smoothing=0.5)
    losses.sum().backward()
    assert logps.grad.abs().max() == 0


def test_rewards_are_beta_times_the_log_ratios_and_ties_count_half():
    _, _, metrics = losses_of(LOGPS, REFERENCE, beta=0.5)
    assert metrics["rewards/chosen"].tolist() == [0.5, 0.0, -5.0, 0.0, 0.25]
    assert metrics["rewards/rejected"].tolist() == [-0.5, 0.0, 10.0, 0.25, 0.25]
    assert metrics["rewards/margins"].tolist() == [1.0, 0.0, -15.0, -0.25, 0.0]
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.5, 0.0, 0.0, 0.5]
    assert (
        metrics["logps/chosen"].tolist() == LOGPS[0]
        and metrics["logps/rejected"].tolist() == LOGPS[1]
    )
    assert (
        metrics["lengths/chosen"].tolist() == LENGTHS[0]
        and metrics["lengths/rejected"].tolist() == LENGTHS[1]
    )


def test_a_margin_that_is_rounding_is_a_tie_and_a_larger_one_is_not():
    """Margins of log-probs near -100 are rounded to 1e-5: at step 0 none is a preference."""
    margins = [0.0, 9e-5, -9e-5, 1.1e-4, -1.1e-4]
    zeros = [0.0] * 5
    _, _, metrics = losses_of([margins, zeros], [zeros, zeros], beta=1.0)
    assert metrics["rewards/accuracies"].tolist() == [0.5, 0.5, 0.5, 1.0, 0.0]


# ---- pair_losses: what else is in the loss that is optimised ----


def optimised(args, weights=None, part=range(5)):
    """pair_losses with LOGPS in the place of a model -> logps, losses, sums."""
    pairs = random_pairs([(2, chosen, rejected) for chosen, rejected in zip(*LENGTHS)])
    pairs = [
        pair | ({} if weights is None else {"weight": w})
        for pair, w in zip(pairs, weights or [0] * 5)
    ]
    lengths = np.array([(2, chosen, rejected) for chosen, rejected in zip(*LENGTHS)])
    split = dict(pairs=pairs, lengths=lengths, ref_logps=np.array(REFERENCE, np.float32).T)
    part = np.array(part, int)
    logps = torch.tensor(LOGPS)[:, part if len(part) else [0]].requires_grad_()
    return logps, *dpo.pair_losses(lambda batches: logps, part, split, args)


def test_without_options_the_optimised_losses_are_the_preference_losses():
    _, losses, sums = optimised(arguments())
    wanted = [by_hand(*four, 0.1, 0.0)[0] for four in zip(*LOGPS, *REFERENCE)]
    assert losses.tolist() == pytest.approx(wanted, rel=1e-6)
    assert (
        sums["loss"].item()
        == sums["preference_loss"].item()
        == pytest.approx(sum(wanted), rel=1e-6)
    )
    assert sums["pairs"] == 5 and sums["tokens"] == 10 + sum(sum(LENGTHS, []))


def test_the_sft_term_adds_the_cross_entropy_per_chosen_token():
    _, plain, _ = optimised(arguments())
    logps, losses, sums = optimised(arguments(sft_weight=0.5))
    per_token = [-LOGPS[0][i] / LENGTHS[0][i] for i in range(5)]
    assert (losses - plain).tolist() == pytest.approx([0.5 * x for x in per_token], rel=1e-5)
    assert sums["preference_loss"].item() == pytest.approx(plain.sum().item(), rel=1e-6)
    losses.sum().backward()
    for i, four in enumerate(zip(*LOGPS, *REFERENCE)):
        slope = by_hand(*four, 0.1, 0.0)[1]
        assert logps.grad[:, i].tolist() == pytest.approx(
            [slope - 0.5 / LENGTHS[0][i], -slope], rel=1e-5
        )


def test_the_weight_column_multiplies_the_loss_of_its_pair():
    weights = [1.0, 0.0, 2.0, 0.5, 1.0]
    _, plain, _ = optimised(arguments())
    logps, losses, sums = optimised(arguments(), weights)
    assert losses.tolist() == pytest.approx(
        [w * x for w, x in zip(weights, plain.tolist())], rel=1e-6
    )
    assert sums["preference_loss"].item() == pytest.approx(plain.sum().item(), rel=1e-6)
    losses.sum().backward()
    assert logps.grad[:, 1].tolist() == [0.0, 0.0] and logps.grad[0, 0] != 0


def test_a_rank_without_pairs_adds_nothing_to_loss_gradient_or_metrics():
    logps, losses, sums = optimised(arguments(sft_weight=1.0), part=[])
    losses.sum().backward()
    assert losses.sum() == 0 and logps.grad.abs().sum() == 0
    assert {name for name, value in sums.items() if value != 0} == set()


def test_the_log_has_the_means_over_all_pairs_and_the_sums_of_pairs_and_tokens(process_group):
    """Two micro-batches of three and two pairs, and one of none."""
    parts = [optimised(arguments(), part=part)[2] for part in ([0, 1, 2], [3, 4], [])]
    means, (_, losses, metrics) = dpo.mean_over_pairs(parts), losses_of(LOGPS, REFERENCE)
    assert means.pop("pairs") == 5
    assert means.pop("tokens") == 10 + sum(sum(LENGTHS, []))
    truth = metrics | dict(loss=losses, preference_loss=losses)
    assert means.keys() == truth.keys()
    for name, value in means.items():
        assert value == pytest.approx(truth[name].double().mean().item(), rel=1e-6), name


# ---- TRL, an independent implementation, on the same weights and tokens ----


PAIRS = [(3, 4, 2), (1, 9, 7), (12, 1, 5), (6, 6, 1)]


@pytest.fixture(scope="module")
def policy_and_reference(tiny_model, process_group):
    return tiny_policy(dpo, tiny_model("llama")), tiny_policy(dpo, tiny_model("llama", seed=1))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_loss_gradient_and_metrics_are_those_of_trl_on_the_same_pairs(
    tiny_model, trl_trainer, policy_and_reference, beta
):
    import trl

    trainer = trl_trainer(trl.DPOTrainer, trl.DPOConfig, tiny_model("llama", seed=1), beta=beta)
    (policy, reference), pairs = policy_and_reference, random_pairs(PAIRS)
    theirs = trl_dpo_loss(trainer, pairs)
    theirs.backward()
    split = split_of(pairs, reference)
    losses, sums = dpo.pair_losses(policy, np.arange(4), split, arguments(beta=beta))
    losses.mean().backward()
    assert abs(losses.mean().item() - math.log(2)) > 0.01  # the reference is another model
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    assert_same_gradients(policy, trainer)
    policy.zero_grad()
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    ):
        assert sums[name].item() / 4 == pytest.approx(
            trainer._metrics["train"][name][-1], rel=1e-4
        ), name


def test_label_smoothing_is_that_of_trl_on_one_pair(tiny_model, trl_trainer, policy_and_reference):
    """TRL's label smoothing is in its "aot" loss, which sorts the pairs: for one pair it is cDPO."""
    import trl

    flags = dict(beta=0.5, loss_type="aot", label_smoothing=0.2)
    trainer = trl_trainer(trl.DPOTrainer, trl.DPOConfig, tiny_model("llama", seed=1), **flags)
    policy, reference = policy_and_reference
    for pair in random_pairs(PAIRS):
        args = arguments(beta=0.5, label_smoothing=0.2)
        losses, _ = dpo.pair_losses(policy, np.arange(1), split_of([pair], reference), args)
        assert losses.item() == pytest.approx(trl_dpo_loss(trainer, [pair]).item(), rel=1e-5)


def test_the_average_of_log_2_comes_out_of_a_model_that_is_its_own_reference(policy_and_reference):
    policy, pairs = policy_and_reference[0], random_pairs(PAIRS)
    split = split_of(pairs, policy)
    losses, _ = dpo.pair_losses(policy, np.arange(4), split, arguments(beta=5.0))
    assert losses.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-5)


# ---- learning rates and the order of the pairs ----


def rates(schedule, steps=10, warmup=0.2):
    args = types.SimpleNamespace(schedule=schedule, warmup=warmup, learning_rate=1.0)
    return [dpo.learning_rate(step, steps, args) for step in range(steps)]


def test_the_linear_schedule_rises_in_the_warm_up_and_falls_to_one_step_before_zero():
    assert rates("linear") == pytest.approx(
        [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )


def test_the_cosine_schedule_is_at_one_half_in_the_middle_of_its_fall():
    values = rates("cosine")
    assert values[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and values[6] == pytest.approx(0.5)
    assert values[4] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert values[9] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)


def test_the_constant_schedule_stays_at_the_peak_after_the_warm_up():
    assert rates("constant") == pytest.approx([1 / 3, 2 / 3] + [1] * 8)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_no_step_is_wasted_on_a_learning_rate_of_zero_or_above_the_peak(schedule, warmup):
    for steps in (1, 2, 3, 10, 100):
        assert all(0 < rate <= 1 for rate in rates(schedule, steps, warmup)), steps


def test_without_warm_up_the_first_step_has_the_peak_rate():
    assert rates("linear", 4, 0.0) == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4])


@pytest.mark.parametrize("pairs, size", [(10, 5), (10, 3), (7, 7), (1, 1), (100, 32)])
def test_every_epoch_has_every_pair_once(pairs, size):
    args, steps = types.SimpleNamespace(seed=0, batch_size=size), math.ceil(pairs / size)
    for epoch in range(3):
        rows = [dpo.batch_rows(epoch * steps + i, pairs, args) for i in range(steps)]
        assert sorted(np.concatenate(rows)) == list(range(pairs))
        assert [len(part) for part in rows[:-1]] == [size] * (steps - 1) and len(rows[-1]) > 0


def test_epochs_and_seeds_have_different_orders():
    def order(seed, epoch):
        return tuple(dpo.batch_rows(epoch, 100, types.SimpleNamespace(seed=seed, batch_size=100)))

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_the_pairs_of_a_step_depend_on_seed_and_step_only():
    def rows(step, **other):
        return dpo.batch_rows(
            step, 50, types.SimpleNamespace(seed=3, batch_size=8, **other)
        ).tolist()

    before = [rows(step) for step in range(20)]
    for module in (random, np.random, torch.random):
        (module.seed if module is not torch.random else torch.manual_seed)(99)
    steps = list(range(20))
    random.shuffle(steps)
    assert {step: rows(step, layout="separate", max_tokens=1) for step in steps} == dict(
        enumerate(before)
    )
