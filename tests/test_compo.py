"""Claim: compo.py does what its paper (arXiv 2505.05465) says, in a fraction of the perturbations' numbers.

- The votes on a given z are those of the definition: the whole model of transformers, its head perturbed, two forward
  passes. For tied heads, head biases, scaled and soft-capped logits.
- What they estimate: P(y = -1) = angle / 2 pi, E[y z] = -(a/|a| - b/|b|) / sqrt(2 pi); `exact` is that limit.
- `span` has the mean of `gaussian` and the variance of the numbers that it draws; `gaussian`, whose unseen noise is
  drawn once, has as much noise there as a loop has.
- One and three ranks give the same update; a killed run continues to the bit.
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
from compo_check import batch_of, exact_directions, load, slow_votes, whole_logps, whole_model
from conftest import ROOT, random_pairs
from safetensors.torch import load_file

import cache_ref
import compo
import dpo

SIZES = [(4, 5, 6), (3, 7, 2), (6, 2, 9), (2, 8, 8), (5, 1, 4)]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def world(tiny_model, tiny_data, process_group):
    """world(family, flags of compo.py) -> head, policy, training pairs, args, model folder."""
    def make(family="llama", **flags):
        model = tiny_model(family)
        data = tiny_data(model, random_pairs(SIZES), random_pairs(SIZES[:2], seed=1))
        return *load(model, data, **flags), model
    return make


def seen(made, row=0):
    """What the oracle sees of a pair: the batch, the function from G to changes, Q (k, h)."""
    head, policy, pairs, args, _ = made
    batch = batch_of(policy, pairs, [row], args)
    with torch.no_grad():
        return batch, *compo.changes_by(head, batch, args)


def normals(weight, count, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.empty_like(weight).normal_(generator=random) for _ in range(count)]


def unit(x):
    return x / x.norm()


def test_the_oracle_is_minus_one_only_if_the_chosen_rises_and_the_rejected_falls():
    changes = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0], [0.0, -1.0], [1.0, 0.0]])
    assert [compo.oracle(each).item() for each in changes] == [-1, 1, 1, 1, 1, 1]


FAMILIES = ["llama", "llama-tied", "gemma2", "cohere", "granite", "phi", "gpt2", "qwen3"]


@pytest.mark.parametrize("radius", [1e-3, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_votes_and_changes_are_those_of_the_whole_model_for_the_same_perturbations(family, radius, world):
    made = world(family, radius=radius)
    model, pair, (_, changes, span) = whole_model(made[4], torch.float64), made[2][0], seen(made)
    model.set_attn_implementation("eager")
    weight, noise = model.get_output_embeddings().weight, normals(made[0].weight, 60)
    start, before = weight.clone(), whole_logps(model, pair)
    ours = torch.stack([changes(z @ span.T) for z in noise])
    truth = []
    for z in noise:
        weight.copy_(start + radius * z.double())
        truth.append(whole_logps(model, pair) - before)
    truth = torch.stack(truth).float()
    assert (ours - truth).norm() < 1e-3 * truth.norm()  # the whole model's sums in float32 would be the worse ones
    sure = (truth.abs() > 1e-3 * truth.abs().mean()).all(1)
    votes, wanted = (torch.stack([compo.oracle(each) for each in values]) for values in (ours, truth))
    assert sure.sum() > 55 and torch.equal(votes[sure], wanted[sure])
    assert set(wanted.tolist()) == {-1.0, 1.0}


@torch.no_grad()
def test_the_loop_of_the_definition_sums_to_the_same_direction(world):
    """The truth that compo_check.py times: y and u of the same z, by two forward passes each and by the view."""
    made = world("llama", radius=0.01)
    (_, changes, span), noise = seen(made), normals(made[0].weight, 40)
    votes, u = slow_votes(whole_model(made[4]), made[2][0], noise, 0.01)
    assert votes.tolist() == [compo.oracle(changes(z @ span.T)).item() for z in noise]
    torch.testing.assert_close(u, sum(y * z for y, z in zip(votes, noise)))


@torch.no_grad()
def test_the_rows_of_q_are_orthonormal_and_span_what_enters_the_head(world):
    batch, _, span = seen(world("llama"))
    torch.testing.assert_close(span @ span.T, torch.eye(len(span)), rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.hidden @ span.T @ span, batch.hidden, rtol=1e-4, atol=1e-4)
    assert len(span) < len(batch.hidden)  # both responses begin at the same token of the prompt


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("estimator", ["gaussian", "span"])
@torch.no_grad()
def test_votes_estimate_the_angle_and_the_difference_of_the_unit_gradients(estimator, baseline, world):
    m, made = 8_000, world("llama", radius=1e-5, perturbations=8_000, estimator=estimator)
    head = made[0]
    for row in range(2):
        batch, _, span = seen(made, row)
        a, b, angle = exact_directions(head, batch)
        constant = 1 - angle / math.pi if baseline else 0.0
        u, p = compo.estimate(head, batch, constant, row, made[3])
        share = angle / (2 * math.pi)
        assert abs(p - share) < 4 * math.sqrt(share * (1 - share) / m)
        wanted = -(unit(a) - unit(b)) / math.sqrt(2 * math.pi)
        error = u / m - wanted
        numbers = head.weight.numel() if estimator == "gaussian" else len(head.weight) * len(span)
        noise = (numbers * (1 - constant**2) - wanted.square().sum().item()) / m  # of (y - c) z, less its mean
        assert error.square().sum().item() == pytest.approx(noise, rel=6 * math.sqrt(2 / numbers))
        assert abs((error * unit(wanted)).sum()) < 4 / math.sqrt(m)


@torch.no_grad()
def test_span_has_the_mean_of_gaussian_and_its_variance_times_rank_over_width(world):
    made = world("llama", radius=1e-4, perturbations=200)
    head, (batch, _, span) = made[0], seen(made)
    runs = {}
    for name in ("gaussian", "span"):
        args = dataclasses.replace(made[3], estimator=name)
        runs[name] = torch.stack([compo.estimate(head, batch, 0.0, step, args)[0].view_as(head.weight) for step in range(60)])
    variance = {name: u.var(0).sum().item() for name, u in runs.items()}
    rank, (V, h) = len(span), head.weight.shape
    assert rank == 10 and variance["span"] / variance["gaussian"] == pytest.approx(rank / h, rel=0.02)
    assert variance["gaussian"] == pytest.approx(200 * V * h, rel=0.01)
    difference = runs["gaussian"].mean(0) - runs["span"].mean(0)  # the same votes: what the oracle sees is the same
    assert difference.square().sum().item() == pytest.approx(200 * V * (h - rank) / 60, rel=0.1)
    assert ((difference @ span.T).abs() < 1e-2).all()


@torch.no_grad()
def test_the_noise_that_gaussian_draws_once_is_that_of_a_loop(world):
    """Outside what the oracle sees: a sum of y z over m drawn z has variance m, and with a constant m E[(y - c)^2]."""
    made = world("llama", radius=1e-2, perturbations=300)
    head, model, pair = made[0], whole_model(made[4]), made[2][0]
    batch, _, span = seen(made)
    noise = normals(head.weight, 300)
    votes, u = slow_votes(model, pair, noise, 1e-2)
    for constant in (0.0, 0.6):
        loop = u - constant * sum(noise)
        ours, p = compo.estimate(head, batch, constant, 0, made[3])
        unseen = [x - x @ span.T @ span for x in (loop, ours.view_as(loop))]
        numbers = head.weight.numel() - len(head.weight) * len(span)
        for x, y in zip(unseen, (votes, None)):
            share = p if y is None else (y < 0).double().mean().item()
            wanted = numbers * 300 * (share * (1 + constant)**2 + (1 - share) * (1 - constant)**2)
            assert x.square().sum().item() == pytest.approx(wanted, rel=6 * math.sqrt(2 / numbers))


@torch.no_grad()
def test_every_step_has_noise_of_its_own_and_the_same_each_time(world):
    made = world("llama", perturbations=101)
    batch = seen(made)[0]
    one, again, another = (compo.estimate(made[0], batch, 0.3, step, made[3])[0] for step in (7, 7, 8))
    assert torch.equal(one, again) and (another - one).norm() > one.norm()


@pytest.mark.parametrize("layout", ["packed", "concatenated", "separate"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "cohere", "gpt2"])
def test_exact_is_the_gradient_of_the_whole_model(family, layout, world):
    made = world(family, layout=layout)
    model = whole_model(made[4])
    model.set_attn_implementation("eager")
    weight = model.get_output_embeddings().weight
    for ours, logp in zip(exact_directions(made[0], seen(made, 1)[0]), whole_logps(model, made[2][1])):
        truth, = torch.autograd.grad(logp, weight, retain_graph=True)
        assert (ours.view_as(truth) - truth).norm() < 1e-5 * truth.norm()


def test_the_share_of_entries_kept_follows_the_normal_distribution(process_group):
    args = compo.Args(model="", data="", keep_fraction=0.0)
    for threshold, shape in ((2.2e-4, (4000, 4096)), (1e-3, (1000, 700))):
        d = math.prod(shape)
        u = compo.unit(torch.randn(d, generator=torch.Generator().manual_seed(1)) * 37.0)
        kept = compo.sparse(u, dataclasses.replace(args, entry_threshold=threshold))
        wanted = 2 * NormalDist().cdf(-threshold * math.sqrt(d))
        assert kept == pytest.approx(wanted, abs=5 * math.sqrt(wanted / d)) and kept == (u != 0).double().mean()
        assert u[u != 0].abs().min() >= threshold and u.norm() < 1
    published = {131_072_000: (2.2e-4, 0.0118), 525_336_576: (8e-5, 0.067)}  # METHODS 6.3
    for d, (threshold, share) in published.items():
        assert 2 * NormalDist().cdf(-threshold * math.sqrt(d)) == pytest.approx(share, rel=0.01)


def test_keep_fraction_keeps_the_largest_entries_as_they_are(process_group):
    g = compo.unit(torch.tensor([3.0, -0.1, 0.2, -4.0, 0.3]))
    args = compo.Args(model="", data="", keep_fraction=0.4)
    assert compo.sparse(g, args) == 0.4
    norm = math.sqrt(9 + 0.01 + 0.04 + 16 + 0.09)
    torch.testing.assert_close(g, torch.tensor([3.0, 0.0, 0.0, -4.0, 0.0]) / norm)


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
    head, policy, train, args = load(model, data)
    a, b, angle = exact_directions(head, batch_of(policy, train, [0], args))
    wanted = (1e-3 * angle / (2 * math.pi) * unit(unit(a) - unit(b))).view_as(head.weight)
    assert (run.moved - wanted).norm() < 5e-3 * wanted.norm()  # of weights in float32
    step, = run.steps
    assert (step["accepted"], step["kept"]) == (1, 1) and step["cosine"] == pytest.approx(1, abs=1e-5)
    assert step["angle"] == pytest.approx(math.degrees(angle), rel=1e-5) and step["p"] == pytest.approx(angle / 2 / math.pi)
    assert step["predicted/chosen"] == pytest.approx((a @ wanted.flatten()).item(), rel=1e-3) and step["predicted/chosen"] > 0
    assert step["predicted/rejected"] == pytest.approx((b @ wanted.flatten()).item(), rel=1e-3) and step["predicted/rejected"] < 0
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
    head, policy, train, args, _ = world("llama")
    batch = batch_of(policy, train, [0, 1], args)
    with torch.no_grad():
        both = compo.mean_logps(head, batch)
        alone = torch.stack([compo.mean_logps(head, batch_of(policy, train, [row], args)) for row in (0, 1)])
    torch.testing.assert_close(both, alone.mean(0))
    assert batch.sides.sum(1).tolist() == [6.0, 4.0]  # (5 + 7) / 2 and (6 + 2) / 2 tokens
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
    alive, run_trunk, open_log = [], compo.run_trunk, compo.open_log

    def watch(policy, *args):
        alive.extend(weakref.ref(p) for p in policy.parameters())
        return run_trunk(policy, *args)

    def check(args):
        assert alive and not [ref for ref in alive if ref() is not None]
        return open_log(args)
    monkeypatch.setattr(compo, "run_trunk", watch)
    monkeypatch.setattr(compo, "open_log", check)
    Run(*pairs(), tmp_path, estimator="exact", max_pairs=1, eval_every=0)


def test_evaluation_begins_at_no_displacement_with_ties(pairs, tmp_path):
    first = Run(*pairs(), tmp_path, estimator="exact", max_pairs=1).lines[0]
    assert first["eval/rewards/accuracies"] == 0.5 and first["eval/rewards/chosen"] == first["eval/rewards/rejected"] == 0


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
            assert rows.column_names == whole.column_names and f"'{name}': {len(rows)}" in output
            found |= {row["id"]: (row, values.tolist()) for row, values in zip(rows, part)}
        assert found == {row["id"]: (row, values.tolist()) for row, values in zip(whole, logps)} and len(found) == total
    assert "pairs are done" not in cache(data / "noisy")  # its log-probs came along
    cache(data, "--noise_margin", 8)  # again: it is there
    with pytest.raises(SystemExit, match="^error: .*noise_margin': 8.0.*noise_margin': 7.0.*delete it"):
        cache(data, "--noise_margin", 7)
    run_main(dpo, "--model", model, "--data", data / "clean", "--out", data / "out", "--batch_size", 4, "--max_steps", 1)
    assert (data / "out/final/config.json").exists()  # usable by another script


def test_a_split_without_pairs_on_one_side_is_refused_with_the_counts(tiny_model, tiny_data, process_group):
    model = tiny_model("llama")
    data = tiny_data(model, random_pairs(SIZES), random_pairs(SIZES[:2], seed=1))
    with pytest.raises(SystemExit, match="^error: --noise_margin 1000000.0 leaves no clean pairs in train, of 5"):
        run_main(cache_ref, "--model", model, "--data", data, "--noise_margin", 1e6)
