"""Claim: dpo_norm.py, simpo.py and wpo.py have the losses and gradients of their papers.

Independent truths: loops in pure Python (float64) over the definitions, derivatives by hand; the model's own
forward for what WPO needs of the whole distribution; TRL for what it has, each difference stated and tested:

    DPO-norm   TRL's loss_type "sigmoid_norm" is the same
    SimPO      TRL's CPOTrainer takes gamma, not gamma / beta, and adds the NLL of the chosen responses with
               weight cpo_alpha = 1 unless told otherwise: its mean over the tokens of the batch, where our
               sft_weight takes a mean over pairs (equal for one pair)
    WPO        TRL does not clamp the weight of a pair at 1

Then what connects the four losses, and what every algorithm promises.
"""

import math
import types

import numpy as np
import pytest
import torch

import dpo
import dpo_norm
import simpo
import wpo
from conftest import assert_same_gradients, random_pairs, split_of, tiny_hf_model, tiny_policy, trl_dpo_loss

SCRIPTS = {script.__name__: script for script in (dpo, dpo_norm, simpo, wpo)}
PAIRS = [(3, 4, 2), (1, 9, 7), (12, 1, 5), (6, 6, 1)]
LOGPS = [[-10.0, -3.0, -50.0, -7.5, -1.0], [-12.0, -3.0, -20.0, -7.0, -2.0]]  # (chosen, rejected) x 5
REFERENCE = [[-11.0, -3.0, -40.0, -7.5, -1.5], [-11.0, -3.0, -40.0, -7.5, -2.5]]
LENGTHS = [[4, 1, 20, 3, 1], [5, 1, 9, 3, 2]]


def arguments(**changes):
    defaults = dict(beta=0.7, gamma_beta_ratio=0.3, label_smoothing=0.0, sft_weight=0.0)
    return types.SimpleNamespace(**defaults | dict(layout="packed") | changes)


def tensors(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(margin, eps):
    """Loss of a margin, and its derivative."""
    loss = -(1 - eps) * math.log(sigmoid(margin)) - eps * math.log(sigmoid(-margin))
    return loss, -(1 - eps) * sigmoid(-margin) + eps * sigmoid(margin)


# ---- loops over the definitions ----


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_length_normalised_dpo_is_a_loop_over_equation_6_of_tulu_3(beta, eps):
    logps, ref, lengths = tensors(LOGPS, REFERENCE, LENGTHS)
    logps.requires_grad_()
    losses, metrics = dpo_norm.preference_loss(logps, ref, lengths, arguments(beta=beta, label_smoothing=eps))
    losses.sum().backward()
    for i in range(5):
        (s_w, s_l), (r_w, r_l), (n_w, n_l) = ([x[side][i] for side in (0, 1)] for x in (LOGPS, REFERENCE, LENGTHS))
        rewards = beta * (s_w / n_w - r_w / n_w), beta * (s_l / n_l - r_l / n_l)
        loss, slope = by_hand(rewards[0] - rewards[1], eps)
        assert losses[i].item() == pytest.approx(loss, rel=1e-12)
        assert logps.grad[:, i].tolist() == pytest.approx([slope * beta / n_w, -slope * beta / n_l], rel=1e-12)
        assert metrics["rewards/chosen"][i].item() == pytest.approx(rewards[0], abs=1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("beta, ratio", [(2.0, 0.25), (2.5, 0.55), (10.0, 0.5), (2.0, 0.0)])
def test_simpo_is_a_loop_over_equation_6_of_its_paper(beta, ratio, eps):
    logps, lengths = tensors(LOGPS, LENGTHS)
    logps.requires_grad_()
    args = arguments(beta=beta, gamma_beta_ratio=ratio, label_smoothing=eps)
    losses, metrics = simpo.preference_loss(logps, lengths, args)
    losses.sum().backward()
    gamma = ratio * beta
    for i in range(5):
        (s_w, s_l), (n_w, n_l) = ([x[side][i] for side in (0, 1)] for x in (LOGPS, LENGTHS))
        loss, slope = by_hand(beta / n_w * s_w - beta / n_l * s_l - gamma, eps)
        assert losses[i].item() == pytest.approx(loss, rel=1e-12)
        assert logps.grad[:, i].tolist() == pytest.approx([slope * beta / n_w, -slope * beta / n_l], rel=1e-12)
        assert metrics["rewards/chosen"][i].item() == pytest.approx(beta * s_w / n_w)
        assert metrics["rewards/margins"][i].item() == pytest.approx(beta * (s_w / n_w - s_l / n_l))  # no gamma


def test_simpo_at_a_draw_costs_the_log_of_1_plus_e_to_the_gamma():
    """gamma = 2.0 x 0.25 = 0.5: the defaults."""
    logps, lengths = tensors([[-6.0], [-3.0]], [[4], [2]])  # -1.5 per token on both sides
    losses, metrics = simpo.preference_loss(logps, lengths, simpo.Args(model="", data=""))
    assert losses.item() == pytest.approx(0.9740769841801067, rel=1e-12)  # log(1 + e^0.5)
    assert metrics["rewards/accuracies"].item() == 0.5


def test_the_defaults_are_those_of_the_papers():
    def default(script, *names):
        return [getattr(script.Args(model="", data=""), name) for name in names]

    assert default(dpo, "beta") == [0.1] and default(dpo_norm, "beta") == [5.0]
    assert default(simpo, "beta", "gamma_beta_ratio") == [2.0, 0.25] and default(wpo, "beta") == [0.01]
    assert not any(default(script, "label_smoothing", "sft_weight") != [0.0, 0.0] for script in SCRIPTS.values())


# ---- WPO ----


def wpo_by_hand(logits, targets, ref, beta, eps):
    """One pair: logits[side][t] a list over the vocabulary -> loss, weight, its gradient in the logits."""
    sums, ratios, probs = [], [], []
    for side in (0, 1):
        p = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits[side]]
        picked = [row[y] for row, y in zip(p, targets[side])]
        sums.append(sum(map(math.log, picked)))
        ratios.append(sum(math.log(q) - math.log(sum(x * x for x in row)) for q, row in zip(picked, p)) / len(p))
        probs.append(p)
    weight = min(math.exp(ratios[0] + ratios[1]), 1.0)
    loss, slope = by_hand(beta * ((sums[0] - ref[0]) - (sums[1] - ref[1])), eps)
    grads = [
        [[sign * weight * slope * beta * ((v == y) - q) for v, q in enumerate(row)] for row, y in zip(p, ys)]
        for sign, p, ys in zip((1, -1), probs, targets)
    ]
    return weight * loss, weight, grads


def wpo_scores(logits, targets):
    """What Policy makes of one pair: (2, 1, 2)."""
    sides = [wpo.token_scores(z, y).sum(1) for z, y in zip(logits, targets)]
    return torch.stack(sides)[:, None]


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("beta", [0.01, 0.5])
def test_wpo_is_a_loop_over_the_vocabulary_and_its_weight_has_no_gradient(beta, eps):
    rng, seen = torch.Generator().manual_seed(0), []
    for i in range(20):
        logits = [2 * torch.randn(n, 5, generator=rng, dtype=torch.float64) for n in (3, 4)]
        targets = [torch.randint(5, (n,), generator=rng) for n in (3, 4)]
        targets = [z.argmax(1) for z in logits] if i % 4 == 0 else targets
        for z in logits:
            z.requires_grad_()
        ref, lengths = tensors([[-3.0], [-4.0]], [[3], [4]])
        scores = wpo_scores(logits, targets)
        losses, metrics = wpo.preference_loss(scores, ref, lengths, arguments(beta=beta, label_smoothing=eps))
        losses.sum().backward()
        lists = [z.tolist() for z in logits], [y.tolist() for y in targets]
        loss, weight, grads = wpo_by_hand(*lists, (-3.0, -4.0), beta, eps)
        assert losses.item() == pytest.approx(loss, rel=1e-9)
        assert metrics["weights"].item() == pytest.approx(weight, rel=1e-9)
        assert not metrics["weights"].requires_grad
        rewards = beta * (scores[:, 0, 0] - ref[:, 0])  # without the weight
        assert metrics["rewards/chosen"].item() == pytest.approx(rewards[0].item(), rel=1e-9)
        assert metrics["rewards/margins"].item() == pytest.approx((rewards[0] - rewards[1]).item(), rel=1e-9)
        for z, grad in zip(logits, grads):
            torch.testing.assert_close(z.grad, torch.tensor(grad, dtype=torch.float64), rtol=1e-9, atol=1e-12)
        seen.append(weight)
    assert min(seen) < 0.1 and sum(weight == 1 for weight in seen) > 1  # both sides of the clamp


def test_the_weight_of_two_probabilities_by_hand():
    """p = (0.9, 0.1): sum p^2 = 0.82; the likely token has 0.9 / 0.82, the other 0.1 / 0.82."""
    logits = torch.tensor([[0.9, 0.1]]).log()
    for targets, weight in {(1, 1): (0.1 / 0.82) ** 2, (0, 1): 0.09 / 0.82**2, (0, 0): 1.0}.items():
        scores = wpo_scores([logits, logits], [torch.tensor([y]) for y in targets])
        _, metrics = wpo.preference_loss(scores, torch.zeros(2, 1), torch.ones(2, 1), arguments())
        assert metrics["weights"].item() == pytest.approx(weight, rel=1e-5)


def test_a_token_that_the_policy_samples_has_a_ratio_of_one_in_expectation():
    """E_y p(y) / sum p^2 = 1, whatever the distribution: what "sampled alignment" means."""
    logits = 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for row in logits:
        scores = wpo.token_scores(row.expand(50, 50), torch.arange(50))
        ratios = (scores[0] - scores[1]).exp()
        assert (row.softmax(0) * ratios).sum().item() == pytest.approx(1, rel=1e-12)


def test_a_vocabulary_of_equal_probabilities_has_weight_one():
    scores = wpo.token_scores(torch.full((3, 1000), 7.0), torch.tensor([0, 5, 999]))
    torch.testing.assert_close(scores[0], scores[1])


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])  # soft-caps and scales of logits
def test_the_sum_of_squares_is_that_of_the_models_own_forward(tiny_model, process_group, monkeypatch, family):
    model, pairs = tiny_hf_model(family), random_pairs(PAIRS)
    model.set_attn_implementation("eager")
    policy = tiny_policy(wpo, tiny_model(family))
    for layout in ("packed", "concatenated", "separate"):
        for chunk in (1, 7, 1024):  # of tokens, by a vocabulary of which these are 256 MiB
            monkeypatch.setattr(policy.model.config, "vocab_size", -(-(2**26) // chunk))
            with torch.no_grad():
                scores = policy(wpo.collate(pairs, layout))
            for i, pair in enumerate(pairs):
                for k, side in enumerate(("chosen", "rejected")):
                    with torch.no_grad():
                        logits = model(torch.tensor([pair["prompt"] + pair[side]])).logits[0].double()
                    p = logits[len(pair["prompt"]) - 1 : -1].softmax(1)
                    truth = [p.gather(1, torch.tensor(pair[side])[:, None]).log().sum(), (p**2).sum(1).log().sum()]
                    assert scores[k, i].tolist() == pytest.approx([x.item() for x in truth], rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("count", [1, 8])
def test_wpo_has_a_gradient_at_every_batch_size_and_weights_up_to_one(tiny_model, process_group, count):
    policy, pairs = tiny_policy(wpo, tiny_model("llama")), random_pairs((PAIRS * 2)[:count])
    pairs[0]["chosen"] = pairs[0]["rejected"][:1] * 3
    split = split_of(pairs, tiny_policy(dpo, tiny_model("llama", seed=1)))
    losses, sums = wpo.pair_losses(policy, np.arange(count), split, arguments())
    assert losses.shape == (count,) and 0 < sums["weights"] <= count
    losses.mean().backward()
    grads = [weight.grad.full_tensor() for weight in policy.parameters()]
    assert all(grad.isfinite().all() and grad.norm() > 0 for grad in grads)


# ---- identities across the scripts ----


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_length_normalised_dpo_without_reference_is_simpo_without_margin(eps):
    logps, lengths = tensors(LOGPS, LENGTHS)
    args = arguments(beta=2.0, gamma_beta_ratio=0.0, label_smoothing=eps)
    one = dpo_norm.preference_loss(logps, torch.zeros_like(logps), lengths, args)
    assert_same(one, simpo.preference_loss(logps, lengths, args))


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_wpo_with_weights_of_one_is_dpo(eps):
    logps, ref, lengths = tensors(LOGPS, REFERENCE, LENGTHS)
    args = arguments(label_smoothing=eps)
    losses, metrics = wpo.preference_loss(torch.stack([logps, logps], 2), ref, lengths, args)
    assert metrics.pop("weights").tolist() == [1.0] * 5
    assert_same((losses, metrics), dpo.preference_loss(logps, ref, lengths, args))


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_for_responses_of_one_token_length_normalised_dpo_is_dpo(eps):
    logps, ref = tensors(LOGPS, REFERENCE)
    both = [s.preference_loss(logps, ref, torch.ones(2, 5), arguments(label_smoothing=eps)) for s in (dpo_norm, dpo)]
    assert_same(*both)


def loss_of(name, logps, ref, lengths, args):
    """preference_loss of a script, with what it takes: WPO's second score makes all its weights 1."""
    if name == "wpo":
        return wpo.preference_loss(torch.stack([logps, logps], 2), ref, lengths, args)
    if name == "simpo":
        return simpo.preference_loss(logps, lengths, args)
    return SCRIPTS[name].preference_loss(logps, ref, lengths, args)


@pytest.mark.parametrize("name", SCRIPTS)
def test_label_smoothing_of_one_half_has_zero_gradient_at_zero_margin(name):
    logps = torch.tensor([[-3.0], [-8.0]], dtype=torch.float64, requires_grad=True)
    lengths, ref = torch.tensor([[2], [4]]), torch.tensor([[-3.0], [-8.0]])  # the policy is the reference
    args = arguments(label_smoothing=0.5, gamma_beta_ratio=0.5)  # -3/2 + 8/4 = 0.5, the target margin
    loss_of(name, logps, ref, lengths, args)[0].sum().backward()
    assert logps.grad.abs().max() < 1e-15


def assert_same(one, other):
    assert torch.equal(one[0], other[0]) and one[1].keys() == other[1].keys()
    for name, values in one[1].items():
        torch.testing.assert_close(values, other[1][name], rtol=0, atol=0)


# ---- what every algorithm promises ----


@pytest.mark.parametrize("name", SCRIPTS)
def test_reward_metrics_have_the_names_that_dashboards_know(name):
    logps, ref, lengths = tensors(LOGPS, REFERENCE, LENGTHS)
    losses, metrics = loss_of(name, logps, ref, lengths, arguments())
    sides = {f"{kind}/{side}" for kind in ("rewards", "logps", "lengths") for side in ("chosen", "rejected")}
    assert metrics.keys() - {"weights"} == sides | {"rewards/margins", "rewards/accuracies"}
    assert all(values.shape == losses.shape == (5,) for values in metrics.values())
    margins = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    torch.testing.assert_close(metrics["rewards/margins"], margins)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_sft_term_is_the_mean_cross_entropy_of_the_chosen_response_in_every_script(tiny_model, process_group, name):
    script, pairs = SCRIPTS[name], random_pairs(PAIRS)
    policy, split = tiny_policy(script, tiny_model("llama")), split_of(pairs, tiny_policy(dpo, tiny_model("llama", 1)))
    with_it, without = (
        script.pair_losses(policy, np.arange(4), split, arguments(sft_weight=weight))[0] for weight in (0.5, 0.0)
    )
    logps = policy(script.collate(pairs, "packed"))
    logps = logps[..., 0] if name == "wpo" else logps
    added = 0.5 * -logps[0] / torch.tensor([size[1] for size in PAIRS])
    torch.testing.assert_close(with_it - without, added, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "dpo_norm", "wpo"])
def test_the_first_loss_is_log_2_with_the_policy_as_reference(tiny_model, process_group, name):
    script, pairs = SCRIPTS[name], random_pairs(PAIRS)
    policy = tiny_policy(script, tiny_model("llama"))
    split = split_of(pairs, tiny_policy(dpo, tiny_model("llama")))
    _, sums = script.pair_losses(policy, np.arange(4), split, arguments(beta=5.0))
    loss = sums["preference_loss"] / sums.get("weights", 4)  # WPO: every loss is its weight times log 2
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert sums["rewards/accuracies"] == 2 and sums["rewards/margins"] == 0  # ties, to the bit


# ---- TRL ----


def trl_cpo_loss(trainer, pairs):
    """The padded batch that its tokenisation would make of these ids."""
    batch = {}
    for side in ("chosen", "rejected"):
        ids = [torch.tensor(pair["prompt"] + pair[side]) for pair in pairs]
        labels = [x.clone() for x in ids]
        for x, pair in zip(labels, pairs):
            x[: len(pair["prompt"])] = -100
        pad = lambda rows, value: torch.nn.utils.rnn.pad_sequence(rows, True, value)
        batch |= {f"{side}_input_ids": pad(ids, 0), f"{side}_labels": pad(labels, -100)}
        batch[f"{side}_attention_mask"] = pad([torch.ones_like(x) for x in ids], 0)
    return trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_length_normalised_dpo_is_sigmoid_norm_of_trl(tiny_model, trl_trainer, beta):
    import trl

    pairs, other = random_pairs(PAIRS), tiny_model("llama", seed=1)
    trainer = trl_trainer(trl.DPOTrainer, trl.DPOConfig, other, loss_type="sigmoid_norm", beta=beta)
    theirs = trl_dpo_loss(trainer, pairs)
    theirs.backward()
    policy = tiny_policy(dpo_norm, tiny_model("llama"))
    split = split_of(pairs, tiny_policy(dpo, other))
    losses, _ = dpo_norm.pair_losses(policy, np.arange(4), split, arguments(beta=beta))
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    assert abs(theirs.item() - math.log(2)) > 1e-3  # the reference is another model
    assert_same_gradients(policy, trainer)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_simpo_is_that_of_trl_with_gamma_as_a_product_and_without_its_nll_term(tiny_model, trl_trainer, eps):
    cpo, pairs = pytest.importorskip("trl.experimental.cpo"), random_pairs(PAIRS)
    flags = dict(loss_type="simpo", beta=2.5, simpo_gamma=2.5 * 0.55, label_smoothing=eps)
    trainer = trl_trainer(cpo.CPOTrainer, cpo.CPOConfig, cpo_alpha=0.0, **flags)
    theirs = trl_cpo_loss(trainer, pairs)
    theirs.backward()
    policy, split = tiny_policy(simpo, tiny_model("llama")), split_of(pairs, tiny_policy(dpo, tiny_model("llama")))
    del split["ref_logps"]  # there is none
    args = arguments(beta=2.5, gamma_beta_ratio=0.55, label_smoothing=eps)
    losses, _ = simpo.pair_losses(policy, np.arange(4), split, args)
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    assert_same_gradients(policy, trainer)

    default = trl_trainer(cpo.CPOTrainer, cpo.CPOConfig, **flags)
    assert default.cpo_alpha == 1.0
    args.sft_weight = 1.0
    for i, pair in enumerate(pairs):  # with one pair the two means are one
        ours, _ = simpo.pair_losses(policy, np.array([i]), split, args)
        assert ours.item() == pytest.approx(trl_cpo_loss(default, [pair]).item(), rel=1e-5)
    whole, _ = simpo.pair_losses(policy, np.arange(4), split, args)
    assert whole.mean().item() != pytest.approx(trl_cpo_loss(default, pairs).item(), rel=1e-3)


def greedy(model, prompt, size, rank=1):
    """The continuation by the most (or second most, ...) likely token: every ratio is at least one for rank 1."""
    ids = list(prompt)
    for _ in range(size):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].topk(rank).indices[-1].item())
    return ids[len(prompt) :]


def test_wpo_is_that_of_trl_but_for_the_clamp_that_trl_lacks(tiny_model, trl_trainer):
    import trl

    other, pairs, model = tiny_model("llama", seed=1), random_pairs(PAIRS), tiny_hf_model("llama")
    pairs[3] |= dict(chosen=greedy(model, pairs[3]["prompt"], 6), rejected=greedy(model, pairs[3]["prompt"], 1))
    pairs[3]["rejected"] *= 2  # not the first token of the chosen alone
    trainer = trl_trainer(trl.DPOTrainer, trl.DPOConfig, other, use_weighting=True, beta=0.3)
    policy, plain = tiny_policy(wpo, tiny_model("llama")), tiny_policy(dpo, tiny_model("llama"))
    split = split_of(pairs, tiny_policy(dpo, other))
    args, clamped = arguments(beta=0.3), 0
    for i, pair in enumerate(pairs):
        ours, sums = wpo.pair_losses(policy, np.array([i]), split, args)
        bare = dpo.pair_losses(plain, np.array([i]), split, args)[0].item()
        theirs = trl_dpo_loss(trainer, [pair]).item()
        weight = theirs / bare  # TRL's, without a bound
        assert ours.item() == pytest.approx(min(weight, 1) * bare, rel=1e-4)
        assert sums["weights"].item() == pytest.approx(min(weight, 1), rel=1e-4)
        clamped += weight > 1
    assert 0 < clamped < len(pairs)

    rest = pairs[:3]  # none is clamped: the same loss and gradient
    trainer.model.zero_grad()
    theirs = trl_dpo_loss(trainer, rest)
    theirs.backward()
    losses, _ = wpo.pair_losses(policy, np.arange(3), split, args)
    policy.zero_grad()
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-4)
    assert_same_gradients(policy, trainer)
