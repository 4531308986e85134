"""Claim: compo.py does what its paper (arXiv 2505.05465) says, in a fraction of the perturbations' numbers.

- The votes on a given z are those of the definition: the whole model of transformers, its head perturbed, two forward
  passes. For tied heads, head biases, scaled and soft-capped logits; also with the MLPs of the last layers.
- What they estimate: P(y = -1) = angle / 2 pi, E[y z] = -(a/|a| - b/|b|) / sqrt(2 pi); `exact` is that limit.
- `span` has the mean of `gaussian` and the variance of the numbers that it draws; `gaussian`, whose unseen noise is
  drawn once, has as much noise there as a loop has.
- One and three ranks, and any batch of perturbations, give the same update; a killed run continues to the bit.
- Gate, threshold, acceptance test, set oracle, export; the split into clean and noisy pairs.
"""
import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from statistics import NormalDist

import datasets
import numpy as np
import pytest
import torch
import transformers
from compo_check import exact_directions, load, slow_votes, whole_logps, whole_model
from conftest import ROOT, random_pairs
from safetensors.torch import load_file

import cache_ref
import compo
import dpo

SIZES = [(4, 5, 6), (3, 7, 2), (6, 2, 9), (2, 8, 8), (5, 1, 4)]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def world(tiny_model, tiny_data, process_group):
    """world(family, flags of compo.py) -> tail, parameters, split, args, model folder."""
    def make(family="llama", **flags):
        model = tiny_model(family)
        data = tiny_data(model, random_pairs(SIZES), random_pairs(SIZES[:2], seed=1))
        tail, parameters, splits, args, _ = load(model, data, **flags)
        return tail, parameters, splits["train"], args, model
    return make


def view_of_row(made, row=0):
    tail, parameters, split, args, _ = made
    a, b, angle, where = exact_directions(tail, parameters, split, [row], args)
    with torch.no_grad():
        return a[0], b[0], angle, compo.view_of(*where, tail, args)


def normals(weight, count, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.empty_like(weight).normal_(generator=random) for _ in range(count)]


def unit(x):
    return x / x.norm()


def test_the_oracle_is_minus_one_only_if_the_chosen_rises_and_the_rejected_falls():
    changes = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0], [0.0, -1.0], [1.0, 0.0]])
    assert compo.oracle(changes).tolist() == [-1, 1, 1, 1, 1, 1]


FAMILIES = ["llama", "llama-tied", "gemma2", "cohere", "granite", "phi", "gpt2", "qwen3"]


@pytest.mark.parametrize("radius", [1e-3, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_votes_and_changes_are_those_of_the_whole_model_for_the_same_perturbations(family, radius, world):
    made = world(family, radius=radius, rare=0.0)
    model, pair, (_, _, _, view) = whole_model(made[4], torch.float64), made[2]["rows"][0], view_of_row(made)
    model.set_attn_implementation("eager")
    weight, noise = model.get_output_embeddings().weight, normals(made[1][0], 60)
    start, before = weight.clone(), whole_logps(model, pair)
    ours = compo.changes(torch.stack([compo.narrow(z, view) for z in noise]), view)
    truth = []
    for z in noise:
        weight.copy_(start + radius * z.double())
        truth.append(whole_logps(model, pair) - before)
    truth = torch.stack(truth).float()
    assert (ours - truth).norm() < 1e-3 * truth.norm()  # the whole model's sums in float32 would be the worse ones
    sure = (truth.abs() > 1e-3 * truth.abs().mean()).all(1)
    assert sure.sum() > 55 and torch.equal(compo.oracle(ours)[sure], compo.oracle(truth)[sure])
    assert set(compo.oracle(truth).tolist()) == {-1.0, 1.0}


@torch.no_grad()
def test_the_loop_of_the_definition_sums_to_the_same_direction(world):
    """The truth that compo_check.py times: y and u of the same z, by two forward passes each and by the view."""
    made = world("llama", radius=0.01, rare=0.0)
    weight, view, noise = made[1][0], view_of_row(made)[3], normals(made[1][0], 40)
    votes, u = slow_votes(whole_model(made[4]), made[2]["rows"][0], noise, 0.01)
    assert torch.equal(votes, compo.oracle(compo.changes(torch.stack([compo.narrow(z, view) for z in noise]), view)))
    torch.testing.assert_close(u, sum(y * z for y, z in zip(votes, noise)))
    assert weight.shape == u.shape


@torch.no_grad()
def test_tokens_that_are_never_likely_are_bundled_without_bias(world):
    """At half the vocabulary bundled and a large radius, the changes keep their mean and nearly their values."""
    made = world("llama", radius=0.05, rare=0.01)
    noise, rough = normals(made[1][0], 400), view_of_row(made)[3]
    fine = view_of_row((*made[:3], dataclasses.replace(made[3], rare=0.0), made[4]))[3]
    assert 10 < len(rough.probs) < 80 and len(rough.bundles) <= 11 and len(fine.bundles) == 0
    changes = [compo.changes(torch.stack([compo.narrow(z, view) for z in noise]), view) for view in (fine, rough)]
    error = changes[1] - changes[0]
    assert error.norm() < 0.05 * changes[0].norm()
    assert (error.mean(0).abs() < 4 * error.std(0) / 20).all()
    rough.drift = 0 * rough.drift  # without its expectation the second order is missing
    missing = compo.changes(torch.stack([compo.narrow(z, rough) for z in noise]), rough) - changes[0]
    assert (missing.mean(0).abs() > 10 * missing.std(0) / 20).all()


@torch.no_grad()
def test_the_view_is_orthonormal_and_widen_undoes_narrow(world):
    view = view_of_row(world("llama", rare=0.01))[3]
    part = torch.randn(len(view.probs) + len(view.bundles), len(view.span))
    torch.testing.assert_close(compo.narrow(compo.widen(part, view) @ view.span, view), part, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(view.span @ view.span.T, torch.eye(len(view.span)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("estimator", ["gaussian", "span"])
@torch.no_grad()
def test_votes_estimate_the_angle_and_the_difference_of_the_unit_gradients(estimator, baseline, world):
    m, made = 40_000, world("llama", radius=1e-5, perturbations=40_000, estimator=estimator, rare=1e-3)
    weight = made[1][0]
    for row in range(3):
        a, b, angle, view = view_of_row(made, row)
        constant = 1 - angle / math.pi if baseline else 0.0
        (u,), p = compo.estimate(weight, view, constant, row, made[3])
        share = angle / (2 * math.pi)
        assert abs(p - share) < 4 * math.sqrt(share * (1 - share) / m)
        wanted = -(unit(a) - unit(b)) / math.sqrt(2 * math.pi)
        error = u / m - wanted
        numbers = weight.numel() if estimator == "gaussian" else (len(view.probs) + len(view.bundles)) * len(view.span)
        noise = (numbers * (1 - constant**2) - wanted.square().sum().item()) / m  # of (y - c) z, less its mean
        assert error.square().sum().item() == pytest.approx(noise, rel=6 * math.sqrt(2 / numbers))
        assert abs((error * unit(wanted)).sum()) < 4 / math.sqrt(m)


@torch.no_grad()
def test_span_has_the_mean_of_gaussian_and_its_variance_times_rank_over_width(world):
    made = world("llama", radius=1e-4, perturbations=200, rare=0.0)
    weight, view = made[1][0], view_of_row(made)[3]
    runs = {name: torch.stack([compo.estimate(weight, view, 0.0, step, dataclasses.replace(made[3], estimator=name))[0][0]
                               for step in range(150)]) for name in ("gaussian", "span")}
    variance = {name: u.var(0).sum().item() for name, u in runs.items()}
    rank, (V, h) = len(view.span), weight.shape
    assert rank == 10 and variance["span"] / variance["gaussian"] == pytest.approx(rank / h, rel=0.02)
    assert variance["gaussian"] == pytest.approx(200 * V * h, rel=0.01)
    difference = runs["gaussian"].mean(0) - runs["span"].mean(0)  # the same votes: what the oracle sees is the same
    assert difference.square().sum().item() == pytest.approx(200 * V * (h - rank) / 150, rel=0.05)
    assert (compo.narrow(difference, view).abs() < 1e-2).all()


@torch.no_grad()
def test_the_noise_that_gaussian_draws_once_is_that_of_a_loop(world):
    """Outside what the oracle sees: a sum of y z over m drawn z has variance m, and with a constant m E[(y - c)^2]."""
    made = world("llama", radius=1e-2, perturbations=300, rare=1e-3)
    weight, model, pair = made[1][0], whole_model(made[4]), made[2]["rows"][0]
    view = view_of_row(made)[3]
    votes, u = slow_votes(model, pair, noise := normals(weight, 300), 1e-2)
    for constant in (0.0, 0.6):
        loop = u - constant * sum(noise)
        (ours,), p = compo.estimate(weight, view, constant, 0, made[3])
        unseen = [x - compo.widen(compo.narrow(x, view), view) @ view.span for x in (loop, ours)]
        numbers = weight.numel() - (len(view.probs) + len(view.bundles)) * len(view.span)
        for x, y in zip(unseen, (votes, None)):
            share = p if y is None else (y < 0).double().mean().item()
            wanted = numbers * 300 * (share * (1 + constant)**2 + (1 - share) * (1 - constant)**2)
            assert x.square().sum().item() == pytest.approx(wanted, rel=6 * math.sqrt(2 / numbers))


@pytest.mark.parametrize("chunk", [1, 64, 5000])
@torch.no_grad()
def test_any_batch_of_perturbations_gives_the_same_direction(chunk, world):
    made = world("llama", perturbations=101)
    view = view_of_row(made)[3]
    (one,), p = compo.estimate(made[1][0], view, 0.3, 7, made[3])
    (other,), q = compo.estimate(made[1][0], view, 0.3, 7, made[3], chunk)
    assert p == q
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    (another,), _ = compo.estimate(made[1][0], view, 0.3, 8, made[3], chunk)
    assert (another - one).norm() > one.norm()  # another step has other noise


@pytest.mark.parametrize("layout", ["packed", "concatenated", "separate"])
@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "cohere", "gpt2"])
def test_exact_is_the_gradient_of_the_whole_model(family, layers, layout, world):
    made = world(family, last_layers=layers, layout=layout, estimator="exact")
    tail, parameters, split, args, folder = made
    model, names = whole_model(folder), {id(p): name for name, p in tail.named_parameters()}
    model.set_attn_implementation("eager")
    whole = dict(model.named_parameters())
    assert len(parameters) == 1 if not layers else len(parameters) > layers
    a, b, _, _ = exact_directions(tail, parameters, split, [1], args)
    before = whole_logps(model, split["rows"][1])
    for ours, logp in zip((a, b), before):
        truth = torch.autograd.grad(logp, [whole[names[id(p)]] for p in parameters], retain_graph=True)
        for x, y in zip(ours, truth):
            assert (x - y).norm() < 1e-5 * max(y.norm(), 1e-2 * max(each.norm() for each in truth))


@torch.no_grad()
def test_the_last_layers_are_perturbed_as_by_the_definition(world):
    tail, parameters, split, args, folder = world("llama", last_layers=1, radius=1e-2, perturbations=30)
    (u, p), start = compo.estimate_whole(
        parameters, lambda: compo.mean_logps(tail, split, [0], args)[0], 0.25, 3, args), [p.clone() for p in parameters]
    model, names = whole_model(folder), {id(p): name for name, p in tail.named_parameters()}
    weights = [dict(model.named_parameters())[names[id(p)]] for p in parameters]
    assert [p.shape for p in parameters] == [(48, 32), (48, 32), (32, 48), (97, 32)] and all(map(torch.equal, weights, start))
    old, before, better, sums = start, whole_logps(model, split["rows"][0]), 0, [torch.zeros_like(p) for p in parameters]
    for index in range(30):
        source = compo.generator("cpu", args.seed, 3, index)
        noise = [torch.empty_like(w).normal_(generator=source) for w in old]
        for w, start, z in zip(weights, old, noise):
            w.copy_(start + 1e-2 * z)
        after = whole_logps(model, split["rows"][0])
        y = -1 if after[0] > before[0] and after[1] < before[1] else 1
        better += y < 0
        sums = [total + (y - 0.25) * z for total, z in zip(sums, noise)]
    assert p == better / 30 and 0 < better < 30
    for x, y in zip(u, sums):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_the_share_of_entries_kept_follows_the_normal_distribution(process_group):
    args = compo.Args(model="", data="", keep_fraction=0.0)
    for threshold, shape in ((2.2e-4, (4000, 4096)), (1e-3, (1000, 700))):
        d = math.prod(shape)
        u = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 37.0]
        kept = compo.sparse(u, dataclasses.replace(args, entry_threshold=threshold))
        wanted = 2 * NormalDist().cdf(-threshold * math.sqrt(d))
        assert kept == pytest.approx(wanted, abs=5 * math.sqrt(wanted / d)) and kept == (u[0] != 0).double().mean()
        assert u[0][u[0] != 0].abs().min() >= threshold and u[0].norm() < 1
    published = {131_072_000: (2.2e-4, 0.0118), 525_336_576: (8e-5, 0.067)}  # METHODS 6.3
    for d, (threshold, share) in published.items():
        assert 2 * NormalDist().cdf(-threshold * math.sqrt(d)) == pytest.approx(share, rel=0.01)


def test_keep_fraction_keeps_the_largest_entries_as_they_are(process_group):
    u = [torch.tensor([3.0, -0.1, 0.2]), torch.tensor([[-4.0, 0.3]])]
    args = compo.Args(model="", data="", keep_fraction=0.4)
    assert compo.sparse(u, args) == 0.4
    norm = math.sqrt(9 + 0.01 + 0.04 + 16 + 0.09)
    torch.testing.assert_close(u[0], torch.tensor([3.0, 0.0, 0.0]) / norm)
    torch.testing.assert_close(u[1], torch.tensor([[-4.0, 0.0]]) / norm)


# ---- main()


def run_main(script, *words):
    """main() of a script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
        patch.setattr(script, "start_process_group", lambda dtype: (0, 1, torch.device("cpu"), torch.float32))
        patch.setattr(script.dist, "destroy_process_group", lambda: None)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            script.main()
        finally:
            signal.signal(signal.SIGTERM, handler)


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
    return functools.cache(lambda family="llama": (model := tiny_model(family), tiny_data(
        model, random_pairs(SIZES), random_pairs(SIZES[:3], seed=1))))


def test_a_step_is_gamma_p_g_and_improves_both_sides_as_predicted(pairs, tmp_path):
    model, data = pairs()
    run = Run(model, data, tmp_path, estimator="exact", gate=0, max_pairs=1, keep_fraction=1, step_size=1e-3)
    tail, parameters, splits, args, _ = load(model, data)
    a, b, angle, _ = exact_directions(tail, parameters, splits["train"], [0], args)
    wanted = 1e-3 * angle / (2 * math.pi) * unit(unit(a[0]) - unit(b[0]))
    assert (run.moved - wanted).norm() < 5e-3 * wanted.norm()  # of weights in float32
    step, = run.steps
    assert (step["accepted"], step["kept"]) == (1, 1) and step["cosine"] == pytest.approx(1, abs=1e-5)
    assert step["angle"] == pytest.approx(math.degrees(angle), rel=1e-5) and step["p"] == pytest.approx(angle / 2 / math.pi)
    assert step["predicted/chosen"] == pytest.approx((a[0] * wanted).sum().item(), rel=1e-3) and step["predicted/chosen"] > 0
    assert step["predicted/rejected"] == pytest.approx((b[0] * wanted).sum().item(), rel=1e-3) and step["predicted/rejected"] < 0
    for side in ("chosen", "rejected"):
        assert step[f"realised/{side}"] == pytest.approx(step[f"predicted/{side}"], rel=0.05)
        assert step[f"displacement/{side}"] == step[f"realised/{side}"]


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
    assert none.moved.abs().max() == 0 and none.steps[-1]["accepted_steps"] == 0 and 0 < run.steps[-1]["accepted_steps"] < 5


def test_the_acceptance_test_refuses_a_step_that_harms_and_leaves_the_head_as_it_was(pairs, tmp_path):
    flags = dict(perturbations=300, estimator="span", gate=0, eval_every=0, keep_fraction=1, max_pairs=1)
    far = Run(*pairs(), tmp_path / "far", accept_step=1e4, **flags)
    assert [step["accepted"] for step in far.steps] == [0] and far.moved.abs().max() == 0
    near = Run(*pairs(), tmp_path / "near", accept_step=1e-4, **flags)
    free = Run(*pairs(), tmp_path / "free", **flags)
    assert [step["accepted"] for step in near.steps] == [1] and torch.equal(near.moved, free.moved)
    assert near.moved.norm() > 0


def test_several_pairs_per_step_are_compared_by_their_means(world, pairs, tmp_path):
    tail, _, split, args, _ = world("llama")
    with torch.no_grad():
        both, *_, weights = compo.mean_logps(tail, split, [0, 1], args)
        alone = torch.stack([compo.mean_logps(tail, split, [row], args)[0] for row in (0, 1)])
    torch.testing.assert_close(both, alone.mean(0))
    assert weights.sum(1).tolist() == [6.0, 4.0]  # (5 + 7) / 2 and (6 + 2) / 2 tokens
    run = Run(*pairs(), tmp_path, pairs_per_step=2, gate=0, perturbations=50, eval_every=0, epochs=2)
    assert [line["epoch"] for line in run.steps] == [1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2]  # 2 + 2 + 1 pairs


@pytest.mark.parametrize("family", ["llama-tied", "cohere", "phi", "gemma2"])
def test_what_is_read_back_from_final_has_the_changes_that_were_reported(family, pairs, tmp_path):
    model, data = pairs(family)
    run = Run(model, data, tmp_path, estimator="exact", gate=0, keep_fraction=1, step_size=0.05)
    final = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert final.dtype == torch.float32 and not final.config.tie_word_embeddings
    before, val = whole_model(model), datasets.load_from_disk(f"{data}/val")
    assert torch.equal(final.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert not torch.equal(final.get_output_embeddings().weight, before.get_output_embeddings().weight)
    for each in (before, final):
        each.set_attn_implementation("eager")

    @torch.no_grad()
    def changes():
        return torch.stack([whole_logps(final, pair) - whole_logps(before, pair) for pair in val]).mean(0).tolist()
    names = [f"rewards/{side}" for side in ("chosen", "rejected")]
    full = changes()
    assert [run.export[f"export/float32/{name}"] for name in names] == pytest.approx(full, rel=1e-3, abs=1e-4)
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
    stored = load_file(tmp_path / "run/final/model.safetensors")
    assert stored.pop("lm_head.weight").dtype == torch.float32 and {x.dtype for x in stored.values()} == {torch.bfloat16}
    final = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/final")
    moved = final.get_output_embeddings().weight - run.head(tmp_path / "half")
    assert final.dtype == torch.float32 and (moved != 0).double().mean() > 0.5 and moved.norm() < 1e-3
    rounded = final.get_output_embeddings().weight.bfloat16().float() - run.head(tmp_path / "half")
    assert (rounded != 0).double().mean() < 0.1


def test_the_trunk_is_freed_before_the_first_step(pairs, tmp_path, monkeypatch):
    alive, cache_entries, open_run = [], compo.cache_entries, compo.open_run

    def watch(policy, *args):
        alive.extend(weakref.ref(p) for p in policy.parameters())
        return cache_entries(policy, *args)

    def check(args):
        assert alive and not [ref for ref in alive if ref() is not None]
        return open_run(args)
    monkeypatch.setattr(compo, "cache_entries", watch)
    monkeypatch.setattr(compo, "open_run", check)
    Run(*pairs(), tmp_path, estimator="exact", max_pairs=1, eval_every=0)


def test_evaluation_begins_at_no_displacement_with_ties(pairs, tmp_path):
    first = Run(*pairs(), tmp_path, estimator="exact", max_pairs=1).lines[0]
    assert first["eval/rewards/accuracies"] == 0.5 and first["eval/rewards/chosen"] == first["eval/rewards/rejected"] == 0


def test_last_layers_train_and_are_saved(pairs, tmp_path):
    model, data = pairs("llama-tied")
    run = Run(model, data, tmp_path, last_layers=1, gate=0, perturbations=40, step_size=0.5)
    old, new = (dict(whole_model(folder).named_parameters()) for folder in (model, tmp_path / "final"))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"lm_head.weight", *(f"model.layers.1.mlp.{name}_proj.{kind}" for name in ("gate", "up", "down")
                                         for kind in ("weight", "bias"))}
    assert len(run.steps) == 5


# ---- several processes


def started(world, out, *flags, ranks=0):
    model, data = world
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [sys.executable, *launch, str(ROOT / "compo.py"), "--model", model, "--data", data, "--out", str(out),
               "--perturbations", "150", "--gate", "0", "--epochs", "12", "--eval_every", "20", "--step_size", "2", *flags]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(*args, **flags):
    process = started(*args, **flags)
    output = process.communicate(timeout=300)[0]
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
        process = started(pairs("llama-tied"), tmp_path, "--save_every", "1", "--resume")
        while process.poll() is None and set(tmp_path.glob("step-*")) <= before:
            time.sleep(0.005)
        time.sleep(0.05 * kill)
        assert process.poll() is None, process.communicate()[0][-3000:]  # it ended before it was killed
        process.send_signal(signal.SIGTERM if kill == 3 else signal.SIGKILL)
        output = process.communicate()[0]
        assert kill < 3 or "--resume" in output and "Traceback" not in output
    assert len(list(tmp_path.glob("step-*"))) == 2 and not (tmp_path / "final").exists()
    finished(pairs("llama-tied"), tmp_path, "--save_every", "1", "--resume")
    one, other = (load_file(out / "final/model.safetensors") for out in (alone, tmp_path))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert log(alone) == log(tmp_path) and len(log(alone)) == 60 + 4 + 2


@pytest.mark.slow
@pytest.mark.torchrun
def test_three_ranks_give_the_update_of_one(pairs, alone, tmp_path):
    finished(pairs("llama-tied"), tmp_path, ranks=3)
    one, other = (load_file(out / "final/model.safetensors") for out in (alone, tmp_path))
    moved = one["lm_head.weight"] - load_file(Path(pairs("llama-tied")[0]) / "model.safetensors")["model.embed_tokens.weight"]
    assert (one["lm_head.weight"] - other["lm_head.weight"]).norm() < 1e-4 * moved.norm()
    for left, right in zip(log(alone), log(tmp_path)):
        assert left.get("p") == right.get("p") and left == pytest.approx(right, rel=1e-3, abs=1e-3)


# ---- clean and noisy


@pytest.fixture(scope="module")
def split(tiny_model, tiny_data, process_group, tmp_path_factory):
    """Data with a cache, split at a margin that some pairs are below -> model, data, margin."""
    rng = np.random.default_rng(0)
    model = tiny_model("llama")
    parts = [random_pairs(rng.integers(1, 12, (count, 3)).tolist(), seed=count) for count in (40, 12)]
    for i, pair in enumerate(sum(parts, [])):
        pair.update(id=f"pair-{i}", weight=i / 8)
    data = tiny_data(model, *parts, weight="float32")
    return model, Path(data)


def test_noise_margin_splits_by_the_reference_and_keeps_each_pair_once(split, capsys):
    model, data = split

    def cache(folder, *flags):
        run_main(cache_ref, "--model", model, "--data", folder, *flags)
        return capsys.readouterr().out
    output = cache(data, "--noise_margin", 8)
    reference, = data.glob("ref-*")
    for name, total in dict(train=40, val=12).items():
        logps, found = np.load(reference / f"{name}-logps.npy"), {}
        whole = datasets.load_from_disk(str(data / name))
        for kind in ("clean", "noisy"):
            rows = datasets.load_from_disk(str(data / kind / name))
            own, = (data / kind).glob("ref-*")
            part = np.load(own / f"{name}-logps.npy")
            small = np.abs(part[:, 0] - part[:, 1]) <= 8
            assert small.all() if kind == "noisy" else not small.any()
            assert rows.column_names == whole.column_names and f"{len(rows)} of {total} in {name}" in output
            found |= {row["id"]: (row, values.tolist()) for row, values in zip(rows, part)}
        assert found == {row["id"]: (row, values.tolist()) for row, values in zip(whole, logps)} and len(found) == total
    histogram = [int(line.partition("nats")[2].split()[0]) for line in output.splitlines() if line.startswith("|margin|")]
    assert sum(histogram) == 52 and sum(histogram[:3]) == sum(
        len(datasets.load_from_disk(str(data / "noisy" / name))) for name in ("train", "val"))
    assert "are already done" not in cache(data / "noisy")  # its log-probs came along
    assert "noisy: " in cache(data, "--noise_margin", 8)  # again: it is there
    with pytest.raises(SystemExit, match="^error: .*noise_margin': 8.0.*noise_margin': 7.0.*delete it"):
        cache(data, "--noise_margin", 7)
    run_main(dpo, "--model", model, "--data", data / "clean", "--out", data / "out", "--batch_size", 4, "--max_steps", 1)
    assert "= ln 2" in capsys.readouterr().out  # usable by another script


def test_a_split_without_pairs_on_one_side_is_refused_with_the_counts(tiny_model, tiny_data, process_group):
    model = tiny_model("llama")
    data = tiny_data(model, random_pairs(SIZES), random_pairs(SIZES[:2], seed=1))
    counts = "clean pairs are 0 of 5 in train, 0 of 2 in val"
    with pytest.raises(SystemExit, match=f"^error: --noise_margin 1000000.0: {counts}"):
        run_main(cache_ref, "--model", model, "--data", data, "--noise_margin", 1e6)
