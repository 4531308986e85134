"""Claims: `launch.sh plan` counts parameters exactly, and predicts what autograd keeps of a packed forward pass of dpo.py, and the
bytes of weights, gradients and optimiser, within 20 %, from a configuration alone."""
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, random_pairs, tiny_policy

import dpo
import gpu_check
import plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=128, intermediate_size=352, num_hidden_layers=3,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def test_predicted_bytes_are_those_of_a_step(folder, process_group):
    policy = tiny_policy(dpo, folder)
    model, batch = policy.model, dpo.collate(random_pairs([(60, 60, 60)] * 4), "packed")
    tokens = batch[0]["inputs"]["input_ids"].shape[1]
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and tensor.untyped_storage().size():
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy(batch)
    shapes = {p.shape for p in model.parameters()} | {p.shape[::-1] for p in model.parameters()}  # gathered weights
    measured = sum(t.untyped_storage().nbytes() for t in storages.values() if t.dtype == torch.float32 and t.shape not in shapes)
    config = transformers.AutoConfig.from_pretrained(folder)
    parts, about = plan.plan(config, tokens=tokens, dtype=torch.float32)
    assert about["parameters"] == sum(p.numel() for p in policy.parameters()) and about["blocks"] == 3
    assert about["matmul"] == about["parameters"] - 97 * 128
    assert parts["activations"] == pytest.approx(measured, rel=0.2)
    assert parts["states"] == 16 * about["parameters"]
    assert plan.plan(config, ranks=8, group=4)[0]["states"] == 4 * about["parameters"]
    whole, blocks = [plan.plan(config, ranks=8, dtype=torch.float32, zero=zero)[0]["gathered"] for zero in ("2", "3")]
    assert parts["gathered"] == whole > blocks  # one rank keeps all weights of a step, unless it is told not to
    kept = plan.plan(config, tokens=tokens, checkpointing="full", dtype=torch.float32)[0]["activations"]
    assert kept == pytest.approx(parts["activations"] / 3 + 3 * tokens * 128 * 4)
    some = plan.plan(config, tokens=tokens, checkpointing="selective", dtype=torch.float32)[0]["activations"]
    products = (2 * 128 + 2 * 64 + 128 + 2 * 352) + 1.5 * 128  # numbers per token: q, o; k, v; down; gate, up; attention
    assert some == pytest.approx(kept + 3 * tokens * products * 4, rel=0.02)
    more = plan.plan(config, tokens=2 * tokens, dtype=torch.float32)[0]["activations"]
    assert more == pytest.approx(2 * parts["activations"], rel=0.01)
    np.testing.assert_array_less(plan.plan(config, tokens=tokens)[0]["activations"], parts["activations"])  # bfloat16


@pytest.mark.parametrize("size, checkpointing, measured", [("1.5B", "off", 71.0), ("1.5B", "full", 29.8), ("3B", "selective", 88.7)])
def test_the_prediction_is_within_a_twentieth_of_what_an_h200_allocated(size, checkpointing, measured):
    """GiB, 16,384 tokens per forward pass: results/gpu/lease15b.md and full3b.md."""
    hidden, mlp, layers, heads, kv_heads, vocabulary = gpu_check.SIZES[size]
    config = transformers.LlamaConfig(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, vocab_size=vocabulary,
                                      num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True)
    parts, _ = plan.plan(config, tokens=16384, checkpointing=checkpointing)
    assert sum(parts.values()) / 2**30 == pytest.approx(measured, rel=0.05)


def test_the_largest_bound_that_fits_is_that_of_the_parts_added_by_hand(folder):
    """Of one rank in float32, --zero 2, no checkpointing. States and gathered weights do not depend on the tokens; activations are
    proportional to them; the head has all logits of up to 2^26 / 97 = 691,842 tokens, in float32 and twice more."""
    config = transformers.AutoConfig.from_pretrained(folder)
    block = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 352 + 2 * 128  # q, o; k, v; MLP; two norms
    parameters = 3 * block + 2 * 97 * 128 + 128
    fixed = 16 * parameters + 4 * parameters + (4 + 4) * block
    activations = plan.plan(config, 1, tokens=64, dtype=torch.float32)[0]["activations"] / 64  # bytes of a token
    head = 97 * 12
    at = {tokens: (fixed + tokens * (activations + head)) / 2**30 for tokens in plan.BOUNDS}
    assert list(at) == [4096, 8192, 16384, 32768, 65536]

    def fits(gib):
        return plan.largest_that_fits(gib, config, 1, 0, torch.float32, "off", False, "auto")
    assert fits(1.001 * at[16384]) == 16384 and fits(0.999 * at[16384]) == 8192
    assert fits(1.001 * at[65536]) == 65536 and fits(1000) == 65536
    assert fits(1.001 * at[4096]) == 4096 and fits(0.999 * at[4096]) == 0
    assert plan.largest_that_fits(at[16384], config, 1, 0, torch.float32, "full", False, "auto") > 16384


@pytest.mark.slow
def test_the_command_prints_gib_and_flops_and_names_what_is_no_model(folder, tmp_path):
    command = [sys.executable, ROOT / "tests/bench/plan.py"]
    done = subprocess.run([*command, folder, "--ranks", "2", "--batch_size", "10", "--pair_tokens", "100"], capture_output=True, text=True)
    assert "in all" in done.stdout and "GiB per rank" in done.stdout, done.stderr
    config = transformers.AutoConfig.from_pretrained(folder)
    flops = 6 * plan.plan(config)[1]["matmul"] * 1000 / 2
    assert f"{flops:.3g} FLOPs per rank" in done.stdout and "fits" not in done.stdout
    done = subprocess.run([*command, folder, "--ranks", "1", "--fit", "1000"], capture_output=True, text=True)
    assert "--max_tokens 65536 is the largest that fits 1000 GiB" in done.stdout and "in all" in done.stdout, done.stderr
    done = subprocess.run([*command, folder, "--ranks", "1", "--fit", "0.001"], capture_output=True, text=True)
    assert "no --max_tokens fits 0.001 GiB" in done.stdout and done.returncode == 0, done.stderr
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}")


@pytest.mark.parametrize("flags, word", [
    (["--ranks", "0"], "--ranks 0 must"), (["--ranks", "-2"], "--ranks -2"), (["--max_tokens", "0"], "--max_tokens 0"),
    (["--teraflops", "0"], "--teraflops 0"), (["--fit", "-3"], "--fit -3"), (["--fit", "nan"], "--fit nan"),
    (["--lora_rank", "-1"], "--lora_rank -1"), (["--ranks", "8", "--shard_group", "3"], "--shard_group 3 does not divide --ranks 8"),
    (["--ranks", "2", "--shard_group", "8"], "--shard_group 8"), (["--ranks", "two"], "two"), (["--rnks", "2"], "--rnks")])
def test_a_wrong_flag_of_the_command_is_one_line(monkeypatch, folder, flags, word):
    monkeypatch.setattr(sys, "argv", ["plan.py", folder, *flags])
    with pytest.raises(SystemExit) as raised:
        plan.main()
    assert str(raised.value).startswith("error: ") and word in str(raised.value) and "\n" not in str(raised.value)


def test_a_wrong_flag_of_a_training_is_left_to_the_training(folder, capsys):
    assert plan.training_flag(1, ["--model", folder, "--dtype", "float8"]) == ""
    said, = capsys.readouterr().err.splitlines()
    assert "keeps its default" in said and "float8" in said


SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=301)

@pytest.mark.parametrize("kind, more", [
    ("qwen2", dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=1, tie_word_embeddings=True)),
    ("mixtral", dict(num_key_value_heads=2, num_local_experts=4)), ("gemma2", dict(num_key_value_heads=2, head_dim=16)),
    ("gpt_neox", {}), ("gpt2", dict(n_embd=64, n_layer=2, n_head=4)),
    ("deepseek_v3", dict(num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
                         moe_intermediate_size=32, first_k_dense_replace=1))])
def test_parameters_of_other_architectures_are_those_of_the_model(kind, more):
    """Experts, tied and sliding ones; DeepSeek's values are narrower than its queries."""
    config = transformers.AutoConfig.for_model(kind, **(SIZES if kind != "gpt2" else dict(vocab_size=301)) | more)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    parts, about = plan.plan(config, tokens=64)
    assert about["parameters"] == sum(weight.numel() for weight in model.parameters()) and about["blocks"] == 2
    assert parts["activations"] > 64 * 2 * 64 * 2  # at least the input of each block


def test_a_run_is_planned_as_its_final_model(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "final").symlink_to(folder)
    for model in (folder, tmp_path):
        monkeypatch.setattr(sys, "argv", ["plan.py", str(model)])
        plan.main()
    one, other = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if "billion parameters" in line]
    assert one == other
