"""Claim: tests/micro_dpo.py is DPO, and dpo.py is the same algorithm made efficient.

Both train the same tiny model on the same data folder for ten steps in float32, dpo.py in each of
its layouts. The losses, margins and gradient norms of the steps, the losses and accuracies on val/,
and the trained weights are equal to 1e-5. The two share no code: micro_dpo.py has a live reference
model, padded batches and the model's own forward pass, dpo.py has none of them.
"""

import json
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cache_ref
import dpo
from conftest import ROOT, random_pairs, run_as_program

SIZES = [(3, 4, 2), (1, 9, 7), (12, 1, 5), (6, 6, 1), (2, 3, 8), (5, 2, 2), (4, 7, 3), (9, 5, 6)]
# Three epochs and a step; the first step is the warm-up.
FLAGS = dict(batch_size=3, max_steps=10, learning_rate=1e-3, beta=0.3, seed=5)


def run_script(module, **flags):
    """main() of a script, in the process group that the tests share."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *words])
        alone = (0, 1, torch.device("cpu"), torch.float32)
        patch.setattr(module, "start_process_group", lambda dtype: alone)
        patch.setattr(module.dist, "destroy_process_group", lambda: None)
        patch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
        run_as_program(module)


@pytest.fixture(scope="module")
def world(tiny_model, tiny_data, process_group):
    """Model folder, and data folder with the cache of the reference."""
    model = tiny_model("llama")
    data = tiny_data(model, random_pairs(SIZES), random_pairs(SIZES[:5], seed=1))
    run_script(cache_ref, model=model, data=data)
    return dict(model=model, data=data)


@pytest.fixture(scope="module")
def micro(world, tmp_path_factory):
    """What micro_dpo.py printed, {(step, name): number}, and the weights that it saved."""
    out = tmp_path_factory.mktemp("micro")
    words = [word for name, value in (world | FLAGS).items() for word in (f"--{name}", str(value))]
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["micro_dpo.py", *words, "--out", str(out)])
        patch.setattr("builtins.print", printed.append)
        runpy.run_path(str(ROOT / "tests/micro_dpo.py"))
    numbers = {}
    for line in printed:
        step, *fields = re.split("  +", line)
        for field in fields:
            name, value = field.rsplit(" ", 1)
            numbers[int(step.removeprefix("step ")), name] = float(value)
    return numbers, load_file(out / "model.safetensors")


@pytest.fixture(scope="module", params=["packed", "concatenated", "separate"])
def efficient(request, world, tmp_path_factory):
    """The same of dpo.py, in one of its layouts and with several micro-batches in a step."""
    out = tmp_path_factory.mktemp("dpo")
    run_script(dpo, **world, **FLAGS, out=out, layout=request.param, max_tokens=40, log_every=1)
    names = {"loss": "loss", "rewards/margins": "margin", "grad_norm": "grad_norm", "lr": "lr",
             "eval/loss": "eval loss", "eval/rewards/accuracies": "eval accuracy"}
    numbers = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        line = json.loads(line)
        for name in names.keys() & line.keys():
            numbers[line["step"], names[name]] = line[name]
    return numbers, load_file(out / "final" / "model.safetensors")


def test_losses_margins_gradient_norms_and_accuracies_are_equal_in_every_step(micro, efficient):
    assert micro[0].keys() == efficient[0].keys() and len(micro[0]) == 10 * 4 + 2 * 2
    for key, value in micro[0].items():
        digits = 1e-3 if key[1] in ("eval accuracy", "lr") else 1e-5  # as many as are printed
        assert value == pytest.approx(efficient[0][key], rel=digits, abs=2e-6), key


def test_the_run_is_one_in_which_losses_and_gradients_move(micro):
    """Otherwise the test above would compare constants."""
    numbers = micro[0]
    assert numbers[1, "loss"] == 0.693147 and numbers[0, "eval accuracy"] == 0.5
    assert abs(numbers[10, "loss"] - 0.693147) > 0.01 and abs(numbers[10, "margin"]) > 0.01
    assert len({numbers[step, "grad_norm"] for step in range(1, 11)}) == 10


def test_the_trained_weights_are_equal(micro, efficient, world):
    start = load_file(Path(world["model"]) / "model.safetensors")
    assert micro[1].keys() == efficient[1].keys() == start.keys()
    for name, weight in micro[1].items():
        difference = (weight - efficient[1][name]).norm()
        assert difference < 1e-5 * weight.norm(), name
        assert difference < 5e-3 * (weight - start[name]).norm(), name  # and so are the updates


def test_it_is_short_enough_to_be_read_at_once():
    lines = (ROOT / "tests/micro_dpo.py").read_text().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 100
