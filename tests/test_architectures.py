"""Claim: for the twelve architectures of results/architectures.md, activation checkpointing changes nothing but memory,
and final/ is the folder of --model with other weights.

- Loss and gradient of dpo.py, of one batch of five unequal pairs, are those of --activation_checkpointing off with
  selective and with full: the loss to 1e-5, the gradient of each parameter to 1e-4 of its norm.
- Before any training, save_final gives back the files of a bfloat16 checkpoint: names, shapes, types and bits of all
  tensors, float32 router biases and tensors that transformers does not read among them, and the bytes of config.json.

The models are those of tests/bench/architectures.py, which takes them the whole way through the scripts.
"""

import functools
import types

import numpy as np
import pytest
import torch

import dpo
from architectures import ARCHITECTURES, FIVE, changed, make_model, same_config, tensors_of, unlike
from conftest import split_of, tiny_args, tiny_policy
from test_layouts import GRADIENT, LOGPS, differences, gradients

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of(architecture) -> the folder of a tiny random model in bfloat16."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp("architecture")
        make_model(name, folder)
        return folder

    return make


@pytest.fixture(scope="module")
def loss_of(folder_of):
    """loss_of(architecture, checkpointing) -> losses (5,) of the batch, {parameter: gradient}."""

    @functools.cache
    def compute(name, how):
        policy = tiny_policy(dpo, str(folder_of(name)), checkpointing=how)
        split = split_of(FIVE, policy)
        noise = np.random.default_rng(0).normal(0, 5, split["ref_logps"].shape)
        split["ref_logps"] += noise.astype(np.float32)  # so that the pairs have unequal losses
        args = types.SimpleNamespace(layout="packed", beta=0.1, label_smoothing=0.1, sft_weight=0.1)
        losses, _ = dpo.pair_losses(policy, np.arange(5), split, args)
        losses.sum().backward()
        return losses.detach(), gradients(policy)

    return compute


@pytest.fixture
def saved(folder_of, tmp_path):
    """saved(architecture) -> the folder of the model, and the final/ that is made of it untrained."""

    def save(name):
        folder = folder_of(name)
        args = tiny_args(str(folder), out=str(tmp_path))
        policy = tiny_policy(dpo, str(folder))
        dpo.copy_model_files(tmp_path / "final.tmp", args)
        dpo.save_final(policy, args)
        return folder, tmp_path / "final"

    return save


@pytest.mark.slow
@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activation_checkpointing_changes_no_loss_and_no_gradient(loss_of, name, how):
    losses, parameters = differences(loss_of(name, how), loss_of(name, "off"))
    assert losses < LOGPS and max(parameters.values()) < GRADIENT


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradient_reaches_every_weight_that_text_can_train(loss_of, name):
    losses, parameters = loss_of(name, "off")
    still = {key for key, gradient in parameters.items() if gradient.norm() == 0}
    assert losses.std() > 0.05  # the comparison above is of five losses, not of log 2
    assert not {key for key in still if "vision" not in key and "multi_modal" not in key}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_untrained_final_has_the_tensors_of_the_model_and_its_config(saved, name):
    model, final = saved(name)
    assert tensors_of(model) and unlike(model, final) == [] and changed(model, final) == []
    assert same_config(model, final)


def test_the_router_biases_are_float32_in_the_model_and_in_final(saved):
    for tensors in map(tensors_of, saved("DeepSeek-V3")):
        (bias,) = [value for key, value in tensors.items() if key.endswith("correction_bias")]
        assert bias.dtype == torch.float32 and not torch.equal(bias, bias.bfloat16().float())
