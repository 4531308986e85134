"""Claim: compo.py does what its paper (arXiv 2505.05465) says, and draws only what the oracle can see.

- The votes on a given z are those of the definition: the whole model of transformers, its head perturbed, two forward
  passes. For tied heads, head biases, scaled and soft-capped logits; also where a difference of log-probs in float32
  would be rounding.
- What they estimate: P(y = -1) = angle / 2 pi, E[y z] = -(a/|a| - b/|b|) / sqrt(2 pi); `exact` is that limit.
- `span` has the mean of `gaussian` and the variance of the numbers that it draws; `gaussian`, whose unseen noise is
  drawn once, has as much noise there as a loop has.
- Perturbation i depends on seed, step and i alone, so one and three ranks give the same update; a killed run continues
  to the bit.
- Gate, threshold, acceptance test, set oracle, export; the split into clean and noisy pairs.
"""
import dataclasses
import functools
import json
import math
import shutil
import signal
import time
import types
import weakref
from pathlib import Path
from statistics import NormalDist

import datasets
import numpy as np
import pytest
import torch
import transformers
from compo_check import (
    ESTIMATORS, cosine_table, cosines, draw, expected_cosine, gradients, load, slow_votes, theory_line,
    whole_logps, whole_model)
from conftest import Program, random_pairs, run_main, run_ranks
from safetensors.torch import load_file

import cache_ref
import compo
import dpo

SIZES = [(4, 5, 6), (3, 7, 2), (6, 2, 9), (2, 8, 8), (5, 1, 4)]


@pytest.fixture(scope="module")
def world(tiny_model, tiny_data, process_group):
    """world(family, flags of compo.py) -> head, batches, args, pairs, model folder."""
    def make(family="llama", **flags):
        model = tiny_model(family)
        data = tiny_data(model, random_pairs(SIZES), random_pairs(SIZES[:2], seed=1))
        head, batches, args, pairs = load(model, data, **flags)
        return types.SimpleNamespace(head=head, batches=batches, args=args, pairs=pairs, model=model)
    return make


def normals(weight, count, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.empty_like(weight).normal_(generator=random) for _ in range(count)]


def unit(x):
    return x / x.norm()


def test_the_oracle_is_minus_one_only_if_the_chosen_rises_and_the_rejected_falls():
    changes = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0], [0.0, -1.0], [1.0, 0.0]])
    assert compo.oracle(changes).tolist() == [-1, 1, 1, 1, 1, 1]


FAMILIES = ["llama", "llama-tied", "gemma2", "cohere", "granite", "phi", "gpt2", "qwen3"]


@pytest.mark.slow
@pytest.mark.parametrize("radius", [1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_votes_and_changes_are_those_of_the_whole_model_for_the_same_perturbations(family, radius, world):
    """The whole model computes in float64, as its differences of log-probs would be rounding in float32."""
    w = world(family, radius=radius)
    model, pair = whole_model(w.model, torch.float64), w.pairs[0]
    model.set_attn_implementation("eager")
    weight, noise = model.get_output_embeddings().weight, normals(w.head.weight, 60)
    start, before = weight.clone(), whole_logps(model, pair)
    changes, span = compo.changes_by(w.head, w.batches[0], w.args)
    ours = changes(torch.stack([z @ span.T for z in noise]))
    truth = []
    for z in noise:
        weight.copy_(start + radius * z.double())
        truth.append(whole_logps(model, pair) - before)
    truth = torch.stack(truth).float()
    assert (ours - truth).norm() < 1e-4 * truth.norm()
    sure = (truth.abs() > 1e-3 * truth.abs().mean()).all(1)
    assert sure.sum() > 55 and torch.equal(compo.oracle(ours)[sure], compo.oracle(truth)[sure])
    assert set(compo.oracle(truth).tolist()) == {-1.0, 1.0}


@torch.no_grad()
def test_the_loop_of_the_definition_sums_to_the_same_direction(world):
    """The truth that compo_check.py times: y and u of the same z, by two forward passes each and by compo.py."""
    w = world("llama", radius=0.01)
    noise = normals(w.head.weight, 40)
    votes, u = slow_votes(whole_model(w.model), w.pairs[0], noise, 0.01)
    changes, span = compo.changes_by(w.head, w.batches[0], w.args)
    assert torch.equal(votes, compo.oracle(changes(torch.stack([z @ span.T for z in noise]))))
    torch.testing.assert_close(u, sum(y * z for y, z in zip(votes, noise)))
    assert w.head.weight.shape == u.shape


@torch.no_grad()
def test_q_is_orthonormal_and_holds_all_that_enters_the_head_once(world):
    """The first token of both responses is predicted from the same place, so the rank is below the number of tokens."""
    w = world("llama")
    for batch in w.batches:
        span = compo.changes_by(w.head, batch, w.args)[1]
        torch.testing.assert_close(span @ span.T, torch.eye(len(span)), rtol=0, atol=1e-5)
        torch.testing.assert_close(batch.hidden @ span.T @ span, batch.hidden, rtol=0, atol=1e-4)
        assert len(span) == len(batch.targets) - 1


@torch.no_grad()
def test_a_perturbation_depends_on_seed_step_and_its_number_alone(world, monkeypatch):
    """u is the sum over perturbations that a loop here draws, and the ranks' shares add up to it."""
    w = world("llama", perturbations=31, estimator="span", radius=0.01, seed=5)
    head, batch, step, constant = w.head, w.batches[0], 7, 0.3
    changes, span = compo.changes_by(head, batch, w.args)
    wanted, successes = 0, 0
    for index in range(31):
        G = compo.normal((97, len(span)), "cpu", 5, step, index)
        y = compo.oracle(changes(G[None])).item()
        wanted, successes = wanted + (y - constant) * G @ span, successes + (y == -1)
    u, p = compo.estimate(head, batch, constant, step, w.args)
    torch.testing.assert_close(u, wanted, rtol=1e-4, atol=1e-4)
    assert p == successes / 31 and 0 < successes < 31
    shares = []
    monkeypatch.setattr(compo.dist, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(compo.dist, "get_rank", lambda: rank)
        shares.append(compo.estimate(head, batch, constant, step, w.args))
    torch.testing.assert_close(sum(share for share, _ in shares), u, rtol=1e-4, atol=1e-4)
    assert sum(share for _, share in shares) == pytest.approx(p)
    for other in ((6, step, 0), (5, 8, 0), (5, step, 1)):
        assert (compo.normal((97, 9), "cpu", *other) - compo.normal((97, 9), "cpu", 5, step, 0)).norm() > 30


@pytest.mark.slow
@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("estimator", ["gaussian", "span"])
@torch.no_grad()
def test_votes_estimate_the_angle_and_the_difference_of_the_unit_gradients(estimator, baseline, world):
    m = 40_000
    w = world("llama", radius=1e-5, perturbations=m, estimator=estimator)
    for row in range(3):
        a, b, angle = gradients(w.head, w.batches[row])
        constant = 1 - angle / math.pi if baseline else 0.0
        u, p = compo.estimate(w.head, w.batches[row], constant, row, w.args)
        share = angle / (2 * math.pi)
        assert abs(p - share) < 4 * math.sqrt(share * (1 - share) / m)
        wanted = -(unit(a) - unit(b)) / math.sqrt(2 * math.pi)
        error = u / m - wanted
        rank = len(compo.changes_by(w.head, w.batches[row], w.args)[1])
        numbers = w.head.weight.numel() if estimator == "gaussian" else len(w.head.weight) * rank
        noise = (numbers * (1 - constant**2) - wanted.square().sum().item()) / m  # of (y - c) z, less its mean
        assert error.square().sum().item() == pytest.approx(noise, rel=6 * math.sqrt(2 / numbers))
        assert abs((error * unit(wanted)).sum()) < 4 / math.sqrt(m)


def test_the_cosine_that_theory_expects_has_the_values_of_a_calculation_by_hand():
    """Orthogonal gradients: |E[y z]| = sqrt(2) / sqrt(2 pi) = 0.5642, and p = 1/4, so E[y] = 1/2."""
    assert expected_cosine(100, math.pi / 2, 10_000) == pytest.approx(5.642 / math.sqrt(5.642**2 + 10_000), rel=1e-3)
    with_baseline = expected_cosine(100, math.pi / 2, 10_000, 0.5)
    assert with_baseline == pytest.approx(5.642 / math.sqrt(5.642**2 + 7_500), rel=1e-3)
    assert expected_cosine(10**12, math.pi / 2, 10_000) == pytest.approx(1, abs=1e-6)
    assert expected_cosine(1800, math.radians(42), 28_311_552) == pytest.approx(0.00228, rel=2e-3)  # SmolLM2's head


@pytest.fixture(scope="module")
def measured(tiny_model, tiny_data, process_group):
    model = tiny_model("llama")
    data = tiny_data(model, random_pairs(SIZES), random_pairs(SIZES[:2], seed=1))
    return cosines(model, data, [200, 3000], len(SIZES))


@pytest.mark.parametrize("m", [200, 3000])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_measured_cosine_lies_on_the_line_of_the_theory(estimator, m, measured):
    """A cosine scatters by about 1 / sqrt(numbers), and there are five of them."""
    cosine, expected, numbers, p, share = measured[estimator, m].T
    error = 1 / math.sqrt(len(SIZES) * numbers.min())
    assert abs(cosine.mean() - expected.mean()) < 4 * error < 0.5 * expected.mean()
    assert abs(p.mean() - share.mean()) < 4 * 0.5 / math.sqrt(len(SIZES) * m)


def test_the_table_and_the_figure_of_cosines_are_made(measured, tmp_path):
    lines = cosine_table("tiny", measured, [200, 3000])
    rows = [line for line in lines if line.startswith("| `")]
    for estimator, row in zip(ESTIMATORS, rows):
        assert row.startswith(f"| `{estimator}` |") and f"{100 * measured[estimator, 3000][:, 0].mean():.2f} ±" in row
    assert len(rows) == 3
    for estimator in ESTIMATORS:
        for m in (200, 3000):
            assert theory_line(estimator, measured[estimator, 200], [m])[0] == pytest.approx(
                measured[estimator, m][:, 1].mean())
    draw(tmp_path / "figure.png", measured, [200, 3000], "tiny")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@torch.no_grad()
def test_span_has_the_mean_of_gaussian_and_its_variance_times_rank_over_width(world):
    w = world("llama", radius=1e-4, perturbations=200)
    span, (V, h) = compo.changes_by(w.head, w.batches[0], w.args)[1], w.head.weight.shape
    runs = {}
    for name in ("gaussian", "span"):
        args = dataclasses.replace(w.args, estimator=name)
        runs[name] = torch.stack([compo.estimate(w.head, w.batches[0], 0.0, step, args)[0] for step in range(150)])
    variance = {name: u.var(0).sum().item() for name, u in runs.items()}
    rank = len(span)
    assert rank == 10 and variance["span"] / variance["gaussian"] == pytest.approx(rank / h, rel=0.02)
    assert variance["gaussian"] == pytest.approx(200 * V * h, rel=0.01)
    difference = runs["gaussian"].mean(0) - runs["span"].mean(0)
    assert difference.square().sum().item() == pytest.approx(200 * V * (h - rank) / 150, rel=0.05)
    assert ((difference @ span.T).abs() < 1e-2).all()  # the same votes: what the oracle sees is the same


@torch.no_grad()
def test_the_noise_that_gaussian_draws_once_is_that_of_a_loop(world):
    """Outside of Q: a sum of y z over m drawn z has variance m, and with a constant m E[(y - c)^2]."""
    w = world("llama", radius=1e-2, perturbations=300)
    weight, noise = w.head.weight, normals(w.head.weight, 300)
    votes, u = slow_votes(whole_model(w.model), w.pairs[0], noise, 1e-2)
    span = compo.changes_by(w.head, w.batches[0], w.args)[1]
    numbers = weight.numel() - len(weight) * len(span)
    for constant in (0.0, 0.6):
        ours, p = compo.estimate(w.head, w.batches[0], constant, 0, w.args)
        loop, share = u - constant * sum(noise), (votes < 0).double().mean().item()
        for x, part in ((loop, share), (ours, p)):
            unseen = x - x @ span.T @ span
            wanted = numbers * 300 * (part * (1 + constant)**2 + (1 - part) * (1 - constant)**2)
            assert unseen.square().sum().item() == pytest.approx(wanted, rel=6 * math.sqrt(2 / numbers))


@pytest.mark.parametrize("layout", ["packed", "concatenated", "separate"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "cohere", "gpt2", "phi"])
def test_log_probs_and_gradients_are_those_of_the_whole_model(family, layout, world):
    w = world(family, layout=layout)
    model = whole_model(w.model)
    model.set_attn_implementation("eager")
    before = whole_logps(model, w.pairs[1])
    with torch.no_grad():
        torch.testing.assert_close(compo.mean_logps(w.head, w.batches[1]), before.detach(), rtol=1e-4, atol=1e-4)
    for ours, logp in zip(gradients(w.head, w.batches[1]), before):
        truth, = torch.autograd.grad(logp, model.get_output_embeddings().weight, retain_graph=True)
        assert (ours - truth).norm() < 1e-5 * truth.norm()


def test_the_share_of_entries_kept_follows_the_normal_distribution():
    args = compo.Args(model="", data="", keep_fraction=0.0)
    for threshold, d in ((2.2e-4, 4000 * 4096), (1e-3, 700_000)):
        g = unit(torch.randn(d, generator=torch.Generator().manual_seed(1)).double()).float()
        kept = compo.sparse(g, dataclasses.replace(args, entry_threshold=threshold))
        wanted = 2 * NormalDist().cdf(-threshold * math.sqrt(d))
        assert kept == pytest.approx(wanted, abs=5 * math.sqrt(wanted / d)) and kept == (g != 0).double().mean()
        assert g[g != 0].abs().min() >= threshold and g.double().norm() < 1
    published = {131_072_000: (2.2e-4, 0.0118), 525_336_576: (8e-5, 0.067)}  # METHODS 6.3
    for d, (threshold, share) in published.items():
        assert 2 * NormalDist().cdf(-threshold * math.sqrt(d)) == pytest.approx(share, rel=0.01)


def test_keep_fraction_keeps_the_largest_entries_as_they_are():
    g = torch.tensor([3.0, -0.1, 0.2, -4.0, 0.3])
    args = compo.Args(model="", data="", keep_fraction=0.4)
    assert compo.sparse(g, args) == 0.4
    assert g.tolist() == [3.0, 0.0, 0.0, -4.0, 0.0]


def test_a_unit_matrix_has_length_one_even_if_it_is_large():
    """torch's norm of all its entries at once is off on a CPU, and so is a dot product."""
    x = torch.randn(60_000, 500, generator=torch.Generator().manual_seed(0))
    assert compo.unit(x).double().square().sum().item() == pytest.approx(1, abs=1e-6)
    assert compo.unit(torch.zeros(3, 2)).tolist() == [[0, 0]] * 3


# ---- main()


class Run:
    """compo.py on a tiny model; its log, and its head before and after."""

    def __init__(self, model, data, out, **flags):
        self.out, self.model = Path(out), model
        words = [f"--{name}={value}" if value is not True else f"--{name}" for name, value in flags.items()]
        run_main(compo, f"--model={model}", f"--data={data}", f"--out={out}", *words)
        self.lines = [json.loads(line) for line in (self.out / "log.jsonl").read_text().splitlines()]
        self.steps = [line for line in self.lines if "p" in line]
        self.export = {key: value for line in self.lines for key, value in line.items() if key.startswith("export")}

    def head(self, folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.get_output_embeddings().weight.detach()

    moved = property(lambda self: self.head(self.out / "final") - self.head(self.model))


@pytest.fixture(scope="module")
def pairs(tiny_model, tiny_data, process_group):
    """pairs(family) -> model folder, data folder: the same ones each time."""
    @functools.cache
    def make(family="llama"):
        model = tiny_model(family)
        return model, tiny_data(model, random_pairs(SIZES), random_pairs(SIZES[:3], seed=1))
    return make


def test_a_step_is_gamma_p_g_and_improves_both_sides_as_predicted(pairs, tmp_path):
    model, data = pairs()
    run = Run(model, data, tmp_path, estimator="exact", gate=0, max_pairs=1, keep_fraction=1, step_size=1e-3)
    head, batches, _, _ = load(model, data)
    a, b, angle = gradients(head, batches[0])
    wanted = 1e-3 * angle / (2 * math.pi) * unit(unit(a) - unit(b))
    assert (run.moved - wanted).norm() < 5e-3 * wanted.norm()  # of weights in float32
    step, = run.steps
    assert (step["accepted"], step["kept"]) == (1, 1) and step["cosine"] == pytest.approx(1, abs=1e-5)
    assert step["angle"] == pytest.approx(math.degrees(angle), rel=1e-5)
    assert step["p"] == pytest.approx(angle / 2 / math.pi)
    for side, gradient, sign in (("chosen", a, 1), ("rejected", b, -1)):
        predicted = step[f"predicted/{side}"]
        assert predicted == pytest.approx((gradient * wanted).sum().item(), rel=1e-3) and sign * predicted > 0
        assert step[f"realised/{side}"] == pytest.approx(predicted, rel=0.05)


def test_the_gate_skips_a_pair_whose_share_of_votes_is_not_above_it(pairs, tmp_path):
    free = Run(*pairs(), tmp_path / "free", gate=0, eval_every=0, perturbations=200)
    shares = sorted(step["p"] for step in free.steps)
    gate = shares[2]  # not above itself
    run = Run(*pairs(), tmp_path / "run", gate=gate, eval_every=0, perturbations=200)
    assert len(run.steps) == 5 and run.steps[0]["p"] == free.steps[0]["p"]
    for step in run.steps:
        assert step["accepted"] == (step["p"] > gate)
        assert step["accepted"] or step["realised/chosen"] == step["realised/rejected"] == 0
    none = Run(*pairs(), tmp_path / "none", gate=0.999, eval_every=0, perturbations=200)
    assert none.moved.abs().max() == 0 and none.steps[-1]["accepted_steps"] == 0
    assert 0 < run.steps[-1]["accepted_steps"] < 5


def test_the_acceptance_test_refuses_a_step_that_harms_and_leaves_the_head_as_it_was(pairs, tmp_path):
    flags = dict(perturbations=300, estimator="span", gate=0, eval_every=0, keep_fraction=1, max_pairs=1)
    far = Run(*pairs(), tmp_path / "far", accept_step=1e4, **flags)
    assert [step["accepted"] for step in far.steps] == [0] and far.moved.abs().max() == 0
    near = Run(*pairs(), tmp_path / "near", accept_step=1e-4, **flags)
    free = Run(*pairs(), tmp_path / "free", **flags)
    assert [step["accepted"] for step in near.steps] == [1] and torch.equal(near.moved, free.moved)
    assert near.moved.norm() > 0


def ids_of(batch):
    return [pair["id"] for pair in batch.pairs]


def test_several_pairs_per_step_are_compared_by_their_means(world, pairs, tmp_path):
    two, one = world("llama", pairs_per_step=2), world("llama")
    assert [ids_of(batch) for batch in two.batches] == [["pair-0", "pair-1"], ["pair-2", "pair-3"], ["pair-4"]]
    with torch.no_grad():
        both = compo.mean_logps(two.head, two.batches[0])
        alone = torch.stack([compo.mean_logps(one.head, batch) for batch in one.batches[:2]])
    torch.testing.assert_close(both, alone.mean(0))
    assert two.batches[0].sides.sum(1).tolist() == [6.0, 4.0]  # (5 + 7) / 2 and (6 + 2) / 2 tokens
    run = Run(*pairs(), tmp_path / "two", pairs_per_step=2, gate=0, perturbations=50, eval_every=0, epochs=2)
    assert [line["epoch"] for line in run.steps] == [1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2]  # 2 + 2 + 1 pairs
    run = Run(*pairs(), tmp_path / "all", pairs_per_step=99, estimator="exact", eval_every=0)
    assert len(run.steps) == 1


def test_the_first_pairs_are_used_in_their_order(pairs, tmp_path, monkeypatch):
    seen, update = [], compo.update
    monkeypatch.setattr(compo, "update", lambda head, batch, *args: seen.extend(ids_of(batch)) or update(head, batch, *args))
    Run(*pairs(), tmp_path, estimator="exact", max_pairs=2, epochs=2, eval_every=0)
    assert seen == ["pair-0", "pair-1"] * 2


@pytest.mark.parametrize("family", ["llama-tied", "cohere", "phi", "gemma2"])
def test_what_is_read_back_from_final_has_the_changes_that_were_reported(family, pairs, tmp_path):
    model, data = pairs(family)
    run = Run(model, data, tmp_path, estimator="exact", gate=0, keep_fraction=1, step_size=0.05)
    final = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert final.dtype == torch.float32 and not final.config.tie_word_embeddings
    before, val = whole_model(model), datasets.load_from_disk(f"{data}/val")
    for name, weight in before.named_parameters():
        same = torch.equal(weight, dict(final.named_parameters())[name])
        assert same != (weight is before.get_output_embeddings().weight), name  # only the head has moved
    for each in (before, final):
        each.set_attn_implementation("eager")

    @torch.no_grad()
    def changes():
        return torch.stack([whole_logps(final, pair) - whole_logps(before, pair) for pair in val]).mean(0).tolist()
    names = [f"rewards/{side}" for side in ("chosen", "rejected")]
    full = changes()
    last = [line for line in run.lines if "eval/logps/chosen" in line][-1]
    assert [last[f"eval/{name}"] for name in names] == pytest.approx(full, rel=1e-3, abs=1e-4)
    head = final.get_output_embeddings().weight
    head.data = head.data.bfloat16().float()
    rounded = [run.export[f"export/bfloat16/{name}"] for name in names]
    assert rounded == pytest.approx(changes(), rel=1e-3, abs=1e-4) and rounded != pytest.approx(full, rel=1e-4)


def test_a_bfloat16_model_keeps_its_trunk_and_is_read_back_with_the_float32_head(pairs, tmp_path):
    """Read as it is, without dtype=, as users do: a head rounded to bfloat16 would have lost nearly all of the step."""
    model, data = pairs("llama-tied")
    half = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "half")
    run = Run(tmp_path / "half", data, tmp_path / "run", estimator="exact", gate=0, keep_fraction=1, step_size=1e-4)
    stored, old = load_file(tmp_path / "run/final/model.safetensors"), load_file(tmp_path / "half/model.safetensors")
    assert stored.pop("lm_head.weight").dtype == torch.float32
    assert stored.keys() == old.keys() and all(torch.equal(stored[name], old[name]) for name in old)  # bfloat16 too
    final = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/final")
    moved = final.get_output_embeddings().weight - run.head(tmp_path / "half")
    assert final.dtype == torch.float32 and (moved != 0).double().mean() > 0.5 and moved.norm() < 1e-3
    rounded = final.get_output_embeddings().weight.bfloat16().float() - run.head(tmp_path / "half")
    assert (rounded != 0).double().mean() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("eval_every", [0, 100])
def test_a_final_that_is_not_what_was_trained_is_said_and_the_last_step_stays(eval_every, pairs, tmp_path, monkeypatch):
    """It is read back: here the head was lost on the way, while the checkpoint has it."""
    save, flags = compo.save_head, dict(estimator="exact", gate=0, keep_fraction=1, step_size=5.0, eval_every=eval_every)

    def save_another(head, args):
        with torch.no_grad():
            kept, head.weight[:] = head.weight.clone(), head.weight.flip(0)
        save(head, args)
        with torch.no_grad():
            head.weight.copy_(kept)
    monkeypatch.setattr(compo, "save_head", save_another)
    with pytest.raises(SystemExit, match="final gives other log-probs than the head that was trained"):
        Run(*pairs("llama-tied"), tmp_path, **flags)
    assert list(tmp_path.glob("step-*"))
    monkeypatch.setattr(compo, "save_head", save)
    Run(*pairs("llama-tied"), tmp_path, resume=True, **flags)
    assert not list(tmp_path.glob("step-*")) and (tmp_path / "final/model.safetensors").exists()


def test_final_has_the_files_of_the_model_and_a_config_that_fits_the_head(pairs, tmp_path, monkeypatch):
    """Every file but config.json is the same to the byte; a config of text within one of more kinds is changed too."""
    model, data = pairs("llama-tied")
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"temperature": 0.5}')  # transformers would refuse it
    (tmp_path / "model/preprocessor_config.json").write_text("{}")
    copy = compo.copy_model_files

    def copy_with_nested_config(folder, args):
        copy(folder, args)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] = dict(tie_word_embeddings=True, torch_dtype="bfloat16")
        (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(compo, "copy_model_files", copy_with_nested_config)
    monkeypatch.setattr(compo, "check_head", lambda *_: None)  # Llama's config has no such part
    Run(tmp_path / "model", data, tmp_path / "run", estimator="exact", max_pairs=1, eval_every=0)
    assert not (tmp_path / "run/final.tmp").exists()
    for path in (tmp_path / "model").iterdir():
        ours = tmp_path / "run/final" / path.name
        if path.suffix != ".safetensors" and path.name != "config.json":
            assert ours.read_bytes() == path.read_bytes(), path.name
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (Path(model), tmp_path / "run/final"))
    changed = dict(tie_word_embeddings=False, dtype="float32", torch_dtype="float32")
    assert new.pop("text_config") == changed and new == old | changed and old["tie_word_embeddings"]


def test_the_trunk_is_freed_before_the_first_step(pairs, tmp_path, monkeypatch):
    alive, run_trunk, open_log = [], compo.run_trunk, compo.open_log

    def watch(policy, *args):
        alive.extend(weakref.ref(parameter) for parameter in policy.parameters())
        return run_trunk(policy, *args)

    def check(args):
        assert alive and not [ref for ref in alive if ref() is not None]
        return open_log(args)
    monkeypatch.setattr(compo, "run_trunk", watch)
    monkeypatch.setattr(compo, "open_log", check)
    Run(*pairs(), tmp_path, estimator="exact", max_pairs=1, eval_every=0)


def test_evaluation_begins_at_no_displacement_with_ties(pairs, tmp_path):
    first = Run(*pairs(), tmp_path, estimator="exact", max_pairs=1).lines[0]
    assert first["eval/rewards/accuracies"] == 0.5
    assert first["eval/rewards/chosen"] == first["eval/rewards/rejected"] == 0
    assert first["eval/lengths/chosen"] == 14 / 3 and first["eval/lengths/rejected"] == 17 / 3


def test_a_run_ends_with_a_block_of_lines_for_grep(pairs, tmp_path, capsys):
    run = Run(*pairs(), tmp_path, estimator="exact", gate=0)
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert lines["steps"] == lines["accepted_steps"] == "5" and lines["final"] == f"{tmp_path}/final"
    last = [line for line in run.lines if "eval/logps/chosen" in line][-1]
    assert float(lines["eval/rewards/margins"]) == last["eval/rewards/margins"] > 0
    assert float(lines["seconds"]) == pytest.approx(sum(line["seconds"] for line in run.steps))
    assert float(lines["memory/GiB"]) > 0


# ---- several processes


def words_of(world, out, *flags):
    model, data = world
    return ["compo.py", "--model", model, "--data", data, "--out", out, "--perturbations", 150, "--gate", 0, "--epochs", 12,
            "--eval_every", 20, "--step_size", 2, *flags]


def finished(*args):
    process = Program(*words_of(*args))
    output = process.wait()
    assert process.returncode == 0, output[-3000:]


@pytest.fixture(scope="module")
def alone(pairs, tmp_path_factory):
    """60 steps, undisturbed."""
    out = tmp_path_factory.mktemp("alone")
    finished(pairs("llama-tied"), out)
    return out


def log(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bits(pairs, alone, tmp_path):
    for kill in range(4):
        before = set(tmp_path.glob("step-*"))
        process = Program(*words_of(pairs("llama-tied"), tmp_path, "--save_every", 1, "--resume"))
        while process.poll() is None and set(tmp_path.glob("step-*")) <= before:
            time.sleep(0.005)
        time.sleep(0.05 * kill)
        assert process.poll() is None, process.wait()[-3000:]  # it ended before it was killed
        process.send_signal(signal.SIGTERM if kill == 3 else signal.SIGKILL)
        output = process.wait()
        assert kill < 3 or "--resume" in output and "Traceback" not in output
    assert len(list(tmp_path.glob("step-*"))) == 2 and not (tmp_path / "final").exists()
    finished(pairs("llama-tied"), tmp_path, "--save_every", "1", "--resume")
    one, other = (load_file(out / "final/model.safetensors") for out in (alone, tmp_path))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert log(alone) == log(tmp_path) and len(log(alone)) == 60 + 4 + 1


@pytest.mark.slow
@pytest.mark.torchrun
def test_three_ranks_give_the_update_of_one(pairs, alone, tmp_path):
    run_ranks(3, *words_of(pairs("llama-tied"), tmp_path))
    one, other = (load_file(out / "final/model.safetensors") for out in (alone, tmp_path))
    start = load_file(Path(pairs("llama-tied")[0]) / "model.safetensors")["model.embed_tokens.weight"]
    moved = one["lm_head.weight"] - start
    assert (one["lm_head.weight"] - other["lm_head.weight"]).norm() < 1e-4 * moved.norm()
    for left, right in zip(log(alone), log(tmp_path)):
        assert left.get("p") == right.get("p") and left == pytest.approx(right, rel=1e-3, abs=1e-3)


# ---- clean and noisy


@pytest.fixture(scope="module")
def split(tiny_model, tiny_data, process_group):
    """Data with a cache, split at a margin that some pairs are below -> model, data."""
    rng = np.random.default_rng(0)
    model = tiny_model("llama")
    parts = [random_pairs(rng.integers(1, 12, (count, 3)).tolist(), seed=count) for count in (40, 12)]
    for i, pair in enumerate(sum(parts, [])):
        pair.update(id=f"pair-{i}", weight=i / 8)
    return model, Path(tiny_data(model, *parts, weight="float32"))


def responses_of(rows):
    return np.stack([rows["chosen_id"], rows["rejected_id"]], 1)


def without_numbers(row):
    return {name: value for name, value in row.items() if name not in ("prompt_id", "chosen_id", "rejected_id")}


def test_noise_margin_splits_by_the_reference_and_keeps_each_pair_once(split, capsys):
    model, data = split

    def cache(folder, *flags):
        run_main(cache_ref, "--model", model, "--data", folder, *flags)
        return capsys.readouterr().out
    output = cache(data, "--noise_margin", 8)
    reference, = data.glob("ref-*")
    for name, total in dict(train=40, val=12).items():
        whole, found = datasets.load_from_disk(str(data / name)), {}
        logps = np.load(reference / f"{name}-logps.npy")[responses_of(whole)]
        for kind in ("clean", "noisy"):
            rows = datasets.load_from_disk(str(data / kind / name))
            own, = (data / kind).glob("ref-*")
            part = np.load(own / f"{name}-logps.npy")
            assert len(part) == len(np.unique(responses_of(rows)))  # numbered from 0 again
            part = part[responses_of(rows)]
            small = np.abs(part[:, 0] - part[:, 1]) <= 8
            assert small.all() if kind == "noisy" else not small.any()
            assert rows.column_names == whole.column_names and f"'{name}': {len(rows)}" in output
            found |= {row["id"]: (without_numbers(row), values.tolist()) for row, values in zip(rows, part)}
        expected = {row["id"]: (without_numbers(row), values.tolist()) for row, values in zip(whole, logps)}
        assert found == expected and len(found) == total
    files = {path: path.stat().st_mtime_ns for path in data.rglob("*.npy")}
    cache(data / "noisy")  # its log-probs came along
    cache(data, "--noise_margin", 8)  # the split is there
    assert files == {path: path.stat().st_mtime_ns for path in data.rglob("*.npy")}
    with pytest.raises(SystemExit, match="^error: .*noise_margin': 8.0.*noise_margin': 7.0.*delete it"):
        cache(data, "--noise_margin", 7)
    run_main(dpo, "--model", model, "--data", data / "clean", "--out", data / "out", "--batch_size", 4, "--max_steps", 1)
    assert "final: " in capsys.readouterr().out  # usable by another script
    run_main(compo, "--model", data / "out/final", "--data", data / "noisy", "--out", data / "two", "--max_pairs", 1)
    assert "final: " in capsys.readouterr().out


def test_a_split_without_pairs_on_one_side_is_refused(tiny_model, tiny_data, process_group):
    model = tiny_model("llama")
    data = tiny_data(model, random_pairs(SIZES), random_pairs(SIZES[:2], seed=1))
    with pytest.raises(SystemExit, match="^error: --noise_margin 1000000.0 leaves no clean pairs in train, of 5"):
        run_main(cache_ref, "--model", model, "--data", data, "--noise_margin", 1e6)
