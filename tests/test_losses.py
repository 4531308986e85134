"""Claim: the losses and edits that tests/losses/README.md shows can be pasted, and do what it says.

The lines are read from that page by tests/losses/fork.py, so there is no second copy of them. The
value and gradient of a loss are those of a loop over the formula in float64, with derivatives by
central differences, and, where TRL 1.16 has the loss, those of TRL on the same weights and tokens.
Its value at step 0 is the one in the page's table. Each edit is applied to dpo.py, whose main() then
takes two steps.
"""

import difflib
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cache_ref
import dpo
import dpo_norm
import prepare_data
from conftest import ROOT, assert_same_gradients, random_pairs, split_of, tiny_policy, trl_dpo_loss
from losses.fork import EDITS, LOSSES, NO_REFERENCE, PAGE, with_edit, with_loss
from test_micro_dpo import run_script
from test_siblings import trl_cpo_loss

ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
TABLE = {name: (float(value), float(beta), tested)
         for name, _, value, beta, _, tested in ROWS if name in LOSSES}


def load(source, folder, name):
    """Python source -> the module, from a file, as a script must find its own source."""
    path = Path(folder, f"{name}.py")
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """{loss: module}"""
    folder = tmp_path_factory.mktemp("losses")
    return {name: load(with_loss(name), folder, f"fork_{name}") for name in LOSSES}


# ---- the page


def test_the_page_has_eight_losses_of_at_most_four_lines_and_five_edits_of_at_most_six():
    assert LOSSES.keys() == TABLE.keys() == LOOPS.keys() and len(LOSSES) == 8
    assert max(block.count("\n") for block in LOSSES.values()) <= 4
    assert len(EDITS) == 5
    for diff in EDITS.values():
        assert len(re.findall(r"^[-+]", diff, re.M)) <= 6
    text = [line for line in PAGE.splitlines() if not line.startswith("|")]
    assert max(map(len, text)) <= 101  # a diff has its sign before 100 columns


def test_the_table_says_truly_which_losses_are_compared_with_trl():
    assert {name for name, cells in TABLE.items() if cells[2] == "TRL, loop"} == {*TRL, "orpo"}
    assert {name for name, cells in TABLE.items() if cells[2] == "loop"} == {"dpop", "rdpo"}


def test_the_command_of_the_page_prints_a_script_that_differs_from_dpo_in_the_loss_only():
    command = [sys.executable, str(ROOT / "tests/losses/fork.py"), "dpop"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    old = (ROOT / "dpo.py").read_text().splitlines()
    changed = [line for line in difflib.ndiff(old, printed.splitlines()) if line[0] in "-+"]
    assert [line[2:] for line in changed if line[0] == "+"] == LOSSES["dpop"].splitlines()
    removed = [line[2:] for line in changed if line[0] == "-"]
    assert len(removed) == 2 and all(line.startswith("    losses = ") for line in removed)


def test_the_recipe_of_smollm3_has_the_numbers_of_the_page_and_its_fork_takes_them(forks, monkeypatch):
    recipe = (ROOT / "tests/recipes.txt").read_text().split("recipe  smollm3\n")[1].split("\n\n")[0].replace("\\\n", "")
    prepare, train, steps = (re.findall(rf"^{key} +(.*)", recipe, re.M)[0].split() for key in ("prepare", "train", "steps"))
    prepare = [word for word in prepare if word != "prepare"]  # begins the second line too
    both = ["--model", "MODEL", "--data", "data/smollm3"]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--dataset", "D", "--out", "data/smollm3", *both[:2], *prepare])
    data = prepare_data.parse_args(prepare_data.Args)
    monkeypatch.setattr(sys, "argv", [*train, *steps, *both])
    args = forks["apo_zero"].parse_args(forks["apo_zero"].Args)
    assert args.max_tokens >= 2 * data.max_length == 2 * 24576 and args.schedule == "cosine"
    text = " ".join(PAGE.split("### apo_zero")[1].split("\n### ")[0].split())
    assert "β 0.05, one epoch at 1e-6, 32 pairs per step, gradients clipped at a norm of 0.2, at most 24,576 tokens" in text
    assert (args.beta, args.epochs, args.learning_rate, args.batch_size, args.max_grad_norm) == (0.05, 1, 1e-6, 32, 0.2)


# ---- losses: a loop over the formulas

LOGPS = [[-10.0, -3.5, -50.0, -7.5, -1.0], [-12.0, -3.0, -20.0, -7.0, -2.0]]  # chosen, rejected
REFERENCE = [[-11.0, -3.0, -40.0, -7.0, -1.5], [-11.0, -3.5, -41.0, -7.5, -2.6]]
LENGTHS = [[4, 1, 20, 3, 1], [5, 2, 9, 3, 2]]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def ipo(r_w, r_l, n_w, n_l, beta, epsilon):
    return (r_w / n_w - r_l / n_l - 1 / (2 * beta)) ** 2


def dpop(r_w, r_l, n_w, n_l, beta, epsilon):
    return -math.log(sigmoid(beta * (r_w - r_l - 5 * max(0, -r_w))))


def apo_zero(r_w, r_l, n_w, n_l, beta, epsilon):
    return 1 - sigmoid(beta * r_w) + sigmoid(beta * r_l)


def apo_down(r_w, r_l, n_w, n_l, beta, epsilon):
    return sigmoid(beta * r_w) + 1 - sigmoid(beta * (r_w - r_l))


def robust(r_w, r_l, n_w, n_l, beta, epsilon):
    right, wrong = math.log(sigmoid(beta * (r_w - r_l))), math.log(sigmoid(beta * (r_l - r_w)))
    return (-(1 - epsilon) * right + epsilon * wrong) / (1 - 2 * epsilon)


def hinge(r_w, r_l, n_w, n_l, beta, epsilon):
    return max(0, 1 - beta * (r_w - r_l))


def rdpo(r_w, r_l, n_w, n_l, beta, epsilon):
    return -math.log(sigmoid(beta * (r_w - r_l) + 0.01 * (n_w - n_l)))


def orpo(s_w, s_l, n_w, n_l, beta, epsilon):
    """Odds and their ratio, not log-odds, as in the paper."""
    p_w, p_l = math.exp(s_w / n_w), math.exp(s_l / n_l)
    odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    return -s_w / n_w - beta * math.log(sigmoid(math.log(odds_ratio)))


LOOPS = dict(ipo=ipo, dpop=dpop, apo_zero=apo_zero, apo_down=apo_down, robust=robust, hinge=hinge,
             rdpo=rdpo, orpo=orpo)


def arguments(**changes):
    defaults = dict(beta=0.1, label_smoothing=0.2, gamma_beta_ratio=0.25, sft_weight=0.0)
    return types.SimpleNamespace(**defaults | dict(layout="packed") | changes)


def losses_of(fork, name, logps, reference, lengths, args):
    """Losses (n,) of a fork, which takes a reference or not."""
    reference = [] if name in NO_REFERENCE else [torch.tensor(reference, dtype=torch.float64)]
    lengths = torch.tensor(lengths, dtype=torch.float64)
    return fork.preference_loss(logps, *reference, lengths, args)[0]


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_a_loop_over_the_formula(name, beta, forks):
    logps = torch.tensor(LOGPS, dtype=torch.float64, requires_grad=True)
    losses = losses_of(forks[name], name, logps, REFERENCE, LENGTHS, arguments(beta=beta))
    losses.sum().backward()
    for i in range(5):
        w, l = LOGPS[0][i], LOGPS[1][i]
        if name not in NO_REFERENCE:
            w, l = w - REFERENCE[0][i], l - REFERENCE[1][i]
        others = LENGTHS[0][i], LENGTHS[1][i], beta, 0.2
        loss, h = LOOPS[name], 1e-5
        assert losses[i].item() == pytest.approx(loss(w, l, *others), rel=1e-11)
        slopes = [(loss(w + h, l, *others) - loss(w - h, l, *others)) / (2 * h),
                  (loss(w, l + h, *others) - loss(w, l - h, *others)) / (2 * h)]
        assert logps.grad[:, i].tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_at_step_0_the_loss_has_the_value_of_the_table(name, forks):
    """Two responses of three tokens, -1 nat per token, and the policy is the reference."""
    logps = torch.full((2, 1), -3.0, dtype=torch.float64)
    args = arguments(beta=TABLE[name][1])
    loss = losses_of(forks[name], name, logps, [[-3.0], [-3.0]], [[3], [3]], args)
    assert f"{loss.item():.4f}" == f"{TABLE[name][0]:.4f}"


def test_a_longer_chosen_response_pulls_less_in_r_dpo_and_a_shorter_one_more(forks):
    logps = torch.full((2, 3), -30.0, dtype=torch.float64, requires_grad=True)
    lengths = [[130, 30, 30], [30, 30, 130]]
    losses = losses_of(forks["rdpo"], "rdpo", logps, [[-30.0] * 3] * 2, lengths, arguments())
    losses.sum().backward()
    longer, equal, shorter = (-logps.grad[0]).tolist()
    assert 0 < longer < equal < shorter


def test_robust_dpo_with_labels_that_are_wrong_as_often_as_it_says_is_dpo_on_the_right_ones(forks):
    """Its defining property: a fifth of the labels is flipped, and the mean is as if none were."""
    logps, swapped = torch.tensor(LOGPS), torch.tensor(LOGPS).flip(0)
    args = arguments(label_smoothing=0.2, beta=0.7)
    right = losses_of(forks["robust"], "robust", logps, REFERENCE, LENGTHS, args)
    wrong = losses_of(forks["robust"], "robust", swapped, REFERENCE[::-1], LENGTHS[::-1], args)
    args = arguments(label_smoothing=0.0, beta=0.7)
    plain = losses_of(dpo, "dpo", logps, REFERENCE, LENGTHS, args)
    torch.testing.assert_close(0.8 * right + 0.2 * wrong, plain, rtol=1e-12, atol=0)


# ---- losses: TRL

PAIRS = [(3, 4, 2), (1, 9, 7), (12, 1, 5), (6, 6, 1)]
TRL = dict(ipo={}, apo_zero={}, apo_down={}, robust=dict(label_smoothing=0.2), hinge={})


@pytest.fixture(scope="module")
def policy(tiny_model, process_group):
    return tiny_policy(dpo, tiny_model("llama"))


@pytest.mark.parametrize("name", TRL)
def test_loss_and_gradient_are_those_of_trl_on_the_same_weights_and_tokens(
    name, forks, policy, tiny_model, trl_trainer
):
    import trl

    other, pairs = tiny_model("llama", seed=1), random_pairs(PAIRS)
    flags = dict(loss_type=name, beta=0.7) | TRL[name]
    trainer = trl_trainer(trl.DPOTrainer, trl.DPOConfig, other, **flags)
    theirs = trl_dpo_loss(trainer, pairs)
    theirs.backward()
    split = split_of(pairs, tiny_policy(dpo, other))
    policy.zero_grad()
    losses, _ = forks[name].pair_losses(policy, np.arange(4), split, arguments(beta=0.7))
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    assert losses.std() > 0.01  # the reference is another model, so this is not step 0
    assert_same_gradients(policy, trainer)


def orpo_and_trl(sizes, fork, policy, trl_trainer):
    """Our loss and TRL's of random pairs; policy and trainer hold the gradients."""
    module = pytest.importorskip("trl.experimental.orpo")
    trainer = trl_trainer(module.ORPOTrainer, module.ORPOConfig, beta=0.1)
    pairs = random_pairs(sizes)
    theirs = trl_cpo_loss(trainer, pairs)
    theirs.backward()
    policy.zero_grad()
    losses, _ = fork.pair_losses(policy, np.arange(len(pairs)), split_of(pairs), arguments())
    losses.mean().backward()
    return losses.mean().item(), theirs.item(), trainer


def test_orpo_is_that_of_trl_for_prompts_of_one_token_and_chosen_responses_of_one_length(
    forks, policy, trl_trainer
):
    sizes = [(1, 6, 2), (1, 6, 9), (1, 6, 6)]
    ours, theirs, trainer = orpo_and_trl(sizes, forks["orpo"], policy, trl_trainer)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert_same_gradients(policy, trainer)


def test_otherwise_trl_has_the_cross_entropy_of_the_prompt_in_orpo_too(forks, policy, trl_trainer):
    ours, theirs, trainer = orpo_and_trl(PAIRS, forks["orpo"], policy, trl_trainer)
    assert abs(ours - theirs) > 0.01
    metrics = {name: values[-1] for name, values in trainer._stored_metrics["train"].items()}
    odds = ours + metrics["logps/chosen"]  # our loss without its first term, the mean of -a_w
    assert odds == pytest.approx(theirs - metrics["nll_loss"], rel=1e-4)


# ---- edits: two steps of main()

SIZES = [(3, 4, 2), (1, 4, 7), (12, 4, 5), (6, 4, 1), (2, 4, 8), (5, 4, 2)]  # chosen: 4 tokens
FLAGS = dict(batch_size=6, max_steps=2, log_every=1, learning_rate=1e-3, warmup=0)


@pytest.fixture(scope="module")
def world(tiny_model, tiny_data, process_group):
    model = tiny_model("llama")
    data = tiny_data(model, random_pairs(SIZES), random_pairs(SIZES, seed=1))
    run_script(cache_ref, model=model, data=data)
    return dict(model=model, data=data)


@pytest.fixture
def train(world, tmp_path):
    """train(script, **flags) -> lines of log.jsonl, weights before and after two steps"""
    def run(script, **flags):
        out = tmp_path / script.__name__
        run_script(script, **FLAGS | world | dict(out=out) | flags)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        files = Path(world["model"]) / "model.safetensors", out / "final" / "model.safetensors"
        return lines, *map(load_file, files)
    return run


@pytest.fixture
def edited(tmp_path):
    """edited(name) -> dpo.py with an edit of the page, as a module"""
    return lambda name: load(with_edit(name), tmp_path, "edited")


def numbers(lines, *without):
    """The lines of a log without what depends on the clock."""
    without = {"tokens/s", "memory/GiB", *without}
    return [{name: value for name, value in line.items() if name not in without} for line in lines]


def test_sgd_with_momentum_moves_the_weights_along_the_clipped_gradient(edited, train):
    """Both gradients are clipped to norm 1 and nearly the same: the rate times 1 + (0.9 + 1)."""
    lines, before, after = train(edited("Another optimiser"), schedule="constant")
    assert min(line["grad_norm"] for line in lines if "grad_norm" in line) > 1
    moved = math.sqrt(sum((after[name] - before[name]).square().sum().item() for name in before))
    assert moved == pytest.approx(2.9e-3, rel=0.05)


def test_sgd_with_momentum_resumes_to_the_bit(edited, train, tmp_path):
    """The run is cut back to its first checkpoint, and continued."""
    script = edited("Another optimiser")
    _, _, whole = train(script, save_every=1)
    shutil.rmtree(tmp_path / "edited/step-000002")
    _, _, resumed = train(script, save_every=1, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_loss_per_token_is_that_of_dpo_norm(edited, train):
    ours, _, weights = train(edited("A loss per token"), beta=5.0)
    theirs, _, same = train(dpo_norm, beta=5.0)
    assert numbers(ours) == numbers(theirs)
    assert all(torch.equal(weights[name], same[name]) for name in same)


def test_the_new_metric_is_in_every_line_of_the_log(edited, train):
    """All chosen responses have 4 tokens, so it is the reward divided by 4 beta."""
    lines, _, _ = train(edited("One more metric in the log"), beta=0.1)
    kinds = set()
    for line in lines:
        kind = "eval/" if "eval/loss" in line else ""
        wanted = line[kind + "rewards/chosen"] / 0.4
        assert line[kind + "drift/chosen"] == pytest.approx(wanted, rel=1e-5, abs=1e-7)
        kinds.add(kind)
    assert kinds == {"", "eval/"} and abs(lines[-1]["eval/drift/chosen"]) > 1e-4
    plain, _, _ = train(dpo, beta=0.1)
    assert numbers(lines, "drift/chosen", "eval/drift/chosen") == numbers(plain)  # nothing else


def test_frozen_layers_stay_and_train_modules_does_the_same_without_an_edit(edited, train):
    _, before, after = train(edited("Freeze layers"))
    for name, weight in before.items():
        frozen = name.startswith(("model.embed_tokens.", "model.layers.0."))
        assert torch.equal(weight, after[name]) == frozen, name
    _, _, same = train(dpo, train_modules=r"layers\.1\.|^model\.norm|lm_head")
    assert all(torch.equal(after[name], same[name]) for name in same)


def test_the_new_schedule_stays_at_the_peak_and_falls_in_the_last_fifth(edited, train):
    script = edited("Another schedule")
    args = types.SimpleNamespace(schedule="wsd", warmup=0.1, learning_rate=1.0)
    rates = [script.learning_rate(step, 10, args) for step in range(10)]
    assert rates == pytest.approx([1 / 2] + [1] * 7 + [1, 5 / 9], rel=0.12)
    lines, _, _ = train(script, schedule="wsd")
    assert [line["lr"] for line in lines if "lr" in line] == [1e-3, 1e-3]
