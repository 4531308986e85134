"""Claim: with --compile and the compiler that users have (inductor, on the CPU), a training compiles in its first step and never again:
neither for the shapes of batches never seen before, nor for another number of micro-batches, nor after an evaluation; with and without
checkpointing, with --zero 2 and 3, for any number of layers. Its losses are those without --compile."""
import shutil

import numpy as np
import pytest
import torch
from conftest import random_pairs

import bench
import dpo

STEPS = 6


def training(folder, how, compiled, zero):
    """(losses of STEPS steps, graphs compiled after each) of a tiny training that evaluates before it and in its middle."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    rng = np.random.default_rng(0)
    pairs = random_pairs(rng.integers(3, 30, (8 * STEPS, 3)).tolist())
    lengths = np.array([[len(pair[side]) for side in ("prompt", "chosen", "rejected")] for pair in pairs])
    split = dict(pairs=pairs, lengths=lengths, ref_logps=np.zeros((len(pairs), 2), np.float32))
    args = dpo.Args(model=folder, data="", activation_checkpointing=how, compile=compiled, zero=zero, max_tokens=150)
    policy = dpo.build_policy(*dpo.read_model(folder, args), dpo.token_logps, torch.device("cpu"), torch.float32, args)
    step, losses, graphs = bench.our_step(policy, split, args), [], []
    val = {name: value[:9] for name, value in split.items()}
    for i in range(STEPS):
        if i in (0, 3):
            dpo.evaluate(policy, val, args)
        losses.append(dpo.mean_over_pairs(step(range(8 * i, 8 * i + 8)))["loss"])
        graphs.append(counters["stats"]["unique_graphs"])
    assert len({len(dpo.micro_batches(np.arange(8 * i, 8 * i + 8), lengths, args, 1)) for i in range(STEPS)}) > 1
    return losses, graphs


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
@pytest.mark.parametrize("how, zero, layers", [("off", "2", 2), ("full", "2", 3), ("off", "3", 12)])
def test_nothing_is_compiled_after_the_first_step(tiny_model, process_group, how, zero, layers):
    folder = tiny_model("llama", num_hidden_layers=layers)
    losses, graphs = training(folder, how, True, zero)
    assert 0 < graphs[0] <= 8 and graphs == graphs[:1] * STEPS  # around attention, with gradients and without
    assert losses == pytest.approx(training(folder, how, False, zero)[0], rel=1e-4)
