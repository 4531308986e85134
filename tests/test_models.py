"""Claim: a model is what its folder says, and a run loses nothing.

- final/ is --model with other weights: the names, shapes and types of its tensors are those of the files of --model,
  and every other file is the same to the byte. So float32 biases stay float32 beside bfloat16 weights, a tied head is
  not stored twice, and tensors that training does not use (of a vision tower, of multi-token prediction) stay.
- Weights and config.json must agree, and what would make the numbers of a model depend on its company in the batch is
  refused with its cause: LongRoPE, positions and ids beyond a table, padding.
- A LoRA adapter, a run's folder, a path with a slash at its end and a path from elsewhere mean what a user means.
- --resume compares content; if final/ cannot be written, the last step is saved, and --resume only writes final/.
"""
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import (ROOT, SMALL, VOCAB, random_pairs, run_as_program, tiny_args, tiny_hf_model, tiny_tokenizer,
                      write_tiny_data)
from safetensors.torch import load_file, save_file

import cache_ref

PAIRS = random_pairs([(4, 3, 5), (3, 6, 2), (5, 1, 4), (2, 4, 4), (6, 2, 3), (3, 5, 3)])


@pytest.fixture
def program(process_group, monkeypatch, capfd):
    """program(script, **flags) -> what main() printed, in the process group of the tests; its SystemExit is raised."""
    def run(script, **flags):
        module = importlib.import_module(script)
        if script != "prepare_data":
            module.find_model.cache_clear()
        argv = [f"{script}.py"]
        for name, value in flags.items():
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", argv)
            if script != "prepare_data":
                patch.setattr(module, "start_process_group", lambda dtype: (0, 1, torch.device("cpu"), torch.float32))
                patch.setattr(module.dist, "destroy_process_group", lambda: None)
            run_as_program(module)
        return capfd.readouterr().out
    return run


def random_model(config):
    """With weights so large that attention and positions matter."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3 if "embed" in name else 1.5 / weight.shape[-1] ** 0.5)
    return model


def save(model, folder, dtype=torch.bfloat16):
    """A model's folder with a tokenizer, in bfloat16 but for the biases that released models have in float32."""
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def train(program, script, model, data, out, **flags):
    common = dict(batch_size=3, max_steps=2, eval_every=0, log_every=1, learning_rate=1e-2)
    return program(script, model=model, data=data, out=out, **common | flags)


@pytest.fixture
def world(tmp_path):
    """world(hf model, pairs) -> folders of a bfloat16 model and of data without a cache"""
    def make(model, pairs=PAIRS, dtype=torch.bfloat16):
        folder = save(model, tmp_path / "model", dtype)
        (tmp_path / "data").mkdir()
        return folder, write_tiny_data(tmp_path / "data", str(folder), pairs, pairs)
    return make


def refusal(call, *args, **kwargs):
    with pytest.raises(SystemExit) as caught:
        call(*args, **kwargs)
    line = str(caught.value)
    assert line.startswith("error: ") and "\n" not in line
    return line


def tensors(folder):
    return {name: tensor for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


def edit_tensors(folder, change):
    """Rewrite the weights of a folder after change(tensors)."""
    file = Path(folder, "model.safetensors")
    found = load_file(file)
    change(found)
    save_file(found, file, metadata=dict(format="pt"))


# ---- final/


def assert_final_is_the_model(final, model, moved):
    old, new = tensors(model), tensors(final)
    assert old.keys() == new.keys()
    assert [name for name in old if (old[name].dtype, old[name].shape) != (new[name].dtype, new[name].shape)] == []
    assert {name for name in old if not torch.equal(old[name], new[name])} >= moved
    for path in Path(model).iterdir():
        if path.suffix != ".safetensors":
            assert (final / path.name).read_bytes() == path.read_bytes(), path.name


def mixture():
    config = transformers.Glm4MoeConfig(**SMALL | dict(
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1,
        first_k_dense_replace=1, num_nextn_predict_layers=0))
    return random_model(config)


def test_a_float32_router_bias_stays_float32_beside_bfloat16_weights(world, program, tmp_path):
    model, data = world(mixture())
    bias, = [name for name in tensors(model) if name.endswith("e_score_correction_bias")]
    value = torch.tensor([0.1234567, -0.7654321, 0.3333333, 0.0])  # bfloat16 would round it

    def change(found):
        found[bias] = value
    edit_tensors(model, change)
    train(program, "simpo", model, data, tmp_path / "out")
    assert_final_is_the_model(tmp_path / "out/final", model, {"model.embed_tokens.weight"})
    assert torch.equal(tensors(tmp_path / "out/final")[bias], value)


def test_a_tied_head_is_not_stored_twice_and_one_that_is_there_twice_stays_so(world, program, tmp_path):
    model, data = world(tiny_hf_model("llama-tied"))
    train(program, "simpo", model, data, tmp_path / "once")
    assert_final_is_the_model(tmp_path / "once/final", model, {"model.embed_tokens.weight"})
    edit_tensors(model, lambda found: found.update({"lm_head.weight": found["model.embed_tokens.weight"].clone()}))
    train(program, "simpo", model, data, tmp_path / "twice")
    final = tensors(tmp_path / "twice/final")
    assert torch.equal(final["lm_head.weight"], final["model.embed_tokens.weight"])
    assert_final_is_the_model(tmp_path / "twice/final", model, {"lm_head.weight"})
    edit_tensors(model, lambda found: found.update({name: each.float() for name, each in found.items()}))
    train(program, "simpo", model, data, tmp_path / "float32")  # the two are one tensor until they are written
    assert_final_is_the_model(tmp_path / "float32/final", model, {"lm_head.weight"})


def test_weights_in_parts_come_back_in_the_same_parts(world, program, tmp_path):
    model, data = world(tiny_hf_model("llama"))
    (model / "model.safetensors").unlink()
    tiny_hf_model("llama").to(torch.bfloat16).save_pretrained(model, max_shard_size="10KB")
    parts = sorted(path.name for path in model.glob("*.safetensors"))
    train(program, "simpo", model, data, tmp_path / "out")
    assert len(parts) > 1 and parts == sorted(path.name for path in (tmp_path / "out/final").glob("*.safetensors"))
    assert_final_is_the_model(tmp_path / "out/final", model, {"lm_head.weight"})
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/final")


def with_images(folder):
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = SMALL | dict(tie_word_embeddings=True, sliding_window=8, query_pre_attn_scalar=5)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | dict(image_size=16, patch_size=4), mm_tokens_per_image=4,
        image_token_index=VOCAB)
    return random_model(config)


def test_a_model_that_reads_images_keeps_its_tower_and_resumes(world, program, tmp_path):
    model, data = world(with_images(tmp_path))
    flags = dict(max_steps=4, batch_size=3)
    train(program, "simpo", model, data, tmp_path / "whole", **flags)
    assert_final_is_the_model(tmp_path / "whole/final", model, {"model.language_model.embed_tokens.weight"}
                              & tensors(model).keys())
    tower = [name for name in tensors(model) if "vision" in name or "multi_modal" in name]
    final = tensors(tmp_path / "whole/final")
    assert tower and all(torch.equal(final[name], tensors(model)[name]) for name in tower)
    train(program, "simpo", model, data, tmp_path / "parts", save_every=2, **flags)
    shutil.rmtree(tmp_path / "parts/final")
    shutil.rmtree(tmp_path / "parts/step-000004")
    train(program, "simpo", model, data, tmp_path / "parts", save_every=2, resume=True, **flags)
    parts = tensors(tmp_path / "parts/final")
    assert all(torch.equal(final[name], parts[name]) for name in final)


def test_names_of_older_files_come_back(world, program, tmp_path):
    """As google/gemma-3-4b-it has them: another order of prefixes than the modules of transformers."""
    model, data = world(with_images(tmp_path))
    found = {}
    for name, tensor in tensors(model).items():
        name = name.removeprefix("model.")
        if name.startswith("language_model."):
            name = name.replace("language_model.", "language_model.model.", 1)
        found[name.replace("language_model.model.model.", "language_model.model.")] = tensor
    save_file(found, model / "model.safetensors", metadata=dict(format="pt"))
    assert {"vision_tower", "multi_modal_projector", "language_model"} == {name.split(".")[0] for name in found}
    train(program, "simpo", model, data, tmp_path / "out")
    assert_final_is_the_model(tmp_path / "out/final", model, {"language_model.model.embed_tokens.weight"})


def test_names_without_the_prefix_of_the_model_come_back(world, program, tmp_path):
    """As gpt2 and bloom have them on the hub, with masks that transformers does not read."""
    model, data = world(tiny_hf_model("gpt2"))
    found = {name.removeprefix("transformer."): tensor for name, tensor in tensors(model).items()}
    found["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(found, model / "model.safetensors", metadata=dict(format="pt"))
    train(program, "simpo", model, data, tmp_path / "out")
    assert_final_is_the_model(tmp_path / "out/final", model, {"wte.weight", "h.1.mlp.c_fc.weight"})


def test_parts_beside_a_whole_file_are_not_read(world, program, tmp_path):
    """transformers takes the whole file; the parts may be what an earlier training left."""
    model, data = world(tiny_hf_model("llama"))
    old = tmp_path / "old"
    tiny_hf_model("llama", seed=1).to(torch.bfloat16).save_pretrained(old, max_shard_size="10KB")
    for path in old.glob("model-*"):
        shutil.copy(path, model)
    train(program, "simpo", model, data, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out/final").glob("*.safetensors")] == ["model.safetensors"]
    whole, final = load_file(model / "model.safetensors"), tensors(tmp_path / "out/final")
    assert all(torch.allclose(whole[name].float(), final[name].float(), atol=0.1) for name in whole)
    assert not torch.equal(whole["lm_head.weight"], final["lm_head.weight"])


@pytest.mark.parametrize("parts", [False, True])
def test_float32_embeddings_beside_bfloat16_blocks_are_no_fault_of_final(world, program, tmp_path, parts):
    model, data = world(tiny_hf_model("llama"), dtype=torch.float32)

    def change(found):
        for name in found:
            found[name] = found[name] if "embed" in name or "lm_head" in name else found[name].bfloat16()
    edit_tensors(model, change)
    if parts:  # the first has the embeddings only
        found = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        first = {name: found.pop(name) for name in sorted(found) if "embed" in name}
        save_file(first, model / "model-00001-of-00002.safetensors", metadata=dict(format="pt"))
        save_file(found, model / "model-00002-of-00002.safetensors", metadata=dict(format="pt"))
        index = dict.fromkeys(first, "model-00001-of-00002.safetensors") | dict.fromkeys(found, "model-00002-of-00002.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
    train(program, "simpo", model, data, tmp_path / "out")
    assert_final_is_the_model(tmp_path / "out/final", model, {"lm_head.weight", "model.layers.0.mlp.up_proj.weight"})


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_generation_config_that_transformers_refuses_is_not_judged(world, program, tmp_path, lora_rank):
    model, data = world(tiny_hf_model("llama"))
    refused = json.dumps(dict(early_stopping="perhaps", do_sample=False, num_return_sequences=3))
    (model / "generation_config.json").write_text(refused)
    with pytest.raises(ValueError):
        transformers.AutoModelForCausalLM.from_pretrained(model)
    train(program, "simpo", model, data, tmp_path / "out", lora_rank=lora_rank)
    if not lora_rank:
        assert (tmp_path / "out/final/generation_config.json").read_text() == refused


def test_tensors_that_transformers_leaves_out_by_name_are_kept(world, program, tmp_path):
    model, data = world(mixture())
    extra = "model.layers.92.eh_proj.weight"  # as GLM-4.5 has for multi-token prediction
    edit_tensors(model, lambda found: found.update({extra: torch.ones(3, dtype=torch.int32)}))
    train(program, "simpo", model, data, tmp_path / "out")
    assert_final_is_the_model(tmp_path / "out/final", model, {"lm_head.weight"})
    assert tensors(tmp_path / "out/final")[extra].dtype == torch.int32


def test_final_that_is_not_what_was_trained_is_a_line_and_the_last_step_is_kept(world, program, tmp_path, monkeypatch):
    import simpo

    model, data = world(tiny_hf_model("llama"))
    weight_files = simpo.weight_files

    def wrong(*args):
        for found, path in weight_files(*args):
            found["model.norm.weight"] = found["model.norm.weight"] * 2
            yield found, path
    monkeypatch.setattr(simpo, "weight_files", wrong)
    line = refusal(train, program, "simpo", model, data, tmp_path / "out")
    assert "other log-probs" in line and (tmp_path / "out/step-000002").exists()


def test_what_bfloat16_loses_of_a_short_training_is_no_fault_of_final(world, program, tmp_path, monkeypatch):
    """final/ is compared with the policy in the precision of its files: they agree far better than the policy before."""
    import simpo

    model, data = world(tiny_hf_model("llama"))
    found = []
    monkeypatch.setattr(simpo, "check_same", lambda logps, truth, *_: found.extend([logps, truth]))
    train(program, "simpo", model, data, tmp_path / "out", max_steps=9, learning_rate=1e-4)
    rounded, truth = found[-2:]  # check_forward comes first
    assert np.abs(rounded.numpy() - truth).max() < 1e-4
    assert tensors(tmp_path / "out/final")["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("script", ["simpo", "compo"])
def test_if_final_cannot_be_written_the_last_step_is_saved_and_resume_only_saves(
        world, program, tmp_path, monkeypatch, script):
    module = importlib.import_module(script)
    model, data = world(tiny_hf_model("llama"))
    flags = {} if script == "simpo" else dict(perturbations=8, max_pairs=2, eval_every=0)
    start = train if script == "simpo" else (lambda program, script, model, data, out, **more: program(
        script, model=model, data=data, out=out, **more))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(module.safetensors.torch, "save_file", full)
        line = refusal(start, program, script, model, data, tmp_path / "out", **flags)
        assert "No space left" in line and "--resume" in line
    saved, = (tmp_path / "out").glob("step-*")
    with monkeypatch.context() as patch:
        patch.setattr(module, "pair_losses" if script == "simpo" else "update", full)  # no step is made again
        start(program, script, model, data, tmp_path / "out", resume=True, **flags)
    assert (tmp_path / "out/final/model.safetensors").exists() and not saved.exists()


# ---- weights, config and data that do not fit


def wrong_head(found):
    found["lm_head.weight"] = found["model.embed_tokens.weight"] * 2


def one_layer_more(found):
    for name in [name for name in found if ".layers.1." in name]:
        found[name.replace(".layers.1.", ".layers.2.")] = found[name].clone()


def one_layer_less(found):
    for name in [name for name in found if ".layers.1." in name]:
        del found[name]


def nan(found):
    found["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")


def eight_bits(found):
    """Which final/ would have to keep, and with it nothing that was trained."""
    found["model.norm.weight"] = found["model.norm.weight"].to(torch.float8_e4m3fn)


def other_shape(found):
    found["model.layers.0.mlp.up_proj.weight"] = torch.ones(32, 48)


@pytest.mark.parametrize("family, change, words", [
    ("llama-tied", wrong_head, ["config", "head"]),
    ("llama", one_layer_more, ["config", "layers.2"]),
    ("llama", one_layer_less, ["config", "layers.1"]),
    ("llama", nan, ["not all weights in", "layers.0.mlp.up_proj.weight", "finite"]),
    ("llama", eight_bits, ["model.norm.weight", "float8"]),
    ("llama", other_shape, ["config", "layers.0.mlp.up_proj.weight", "[32, 48]", "[48, 32]"]),
])
def test_weights_that_do_not_fit_the_config_or_are_not_finite_are_named(world, program, family, change, words):
    model, data = world(tiny_hf_model(family))
    edit_tensors(model, change)
    line = refusal(program, "cache_ref", model=model, data=data)
    assert [word for word in words if word not in line] == [], line


def test_a_reason_that_stands_on_the_second_line_of_an_error_is_told(world, program):
    model, data = world(tiny_hf_model("llama"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | dict(num_attention_heads=3)))
    assert "not a multiple of the number of attention heads (3)" in refusal(program, "cache_ref", model=model, data=data)


def test_a_quantised_model_is_named_so(world, program):
    model, data = world(tiny_hf_model("llama"))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = dict(quant_method="fp8")
    (model / "config.json").write_text(json.dumps(config))
    assert "quantised" in refusal(program, "cache_ref", model=model, data=data)


def test_an_adapter_beside_a_whole_model_is_refused(world, program):
    model, data = world(tiny_hf_model("llama"))
    (model / "adapter_config.json").write_text(json.dumps(dict(base_model_name_or_path=str(model))))
    assert "LoRA adapter" in refusal(program, "cache_ref", model=model, data=data)


def test_another_config_needs_another_cache(world, program, tmp_path):
    model, data = world(tiny_hf_model("llama"))
    program("cache_ref", model=model, data=data)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 123.0
    (model / "config.json").write_text(json.dumps(config))
    assert "0 caches" in refusal(train, program, "dpo", model, data, tmp_path / "out")


@pytest.mark.parametrize("script", ["cache_ref", "simpo", "compo"])
def test_token_ids_beyond_the_embedding_are_refused(world, program, tmp_path, script):
    """Even where the pair that has them is neither the longest nor a short one."""
    pairs = [*PAIRS[:2], PAIRS[2] | dict(rejected=[3, VOCAB, 4, 5]), *PAIRS[3:]]
    model, data = world(tiny_hf_model("llama"), pairs)
    line = refusal(program, script, model=model, data=data, **({} if script == "cache_ref" else dict(out=tmp_path / "o")))
    assert f"token id {VOCAB}" in line and f"{VOCAB} embeddings" in line


LONG = random_pairs([(4, 3, 5), (30, 9, 12), (5, 1, 4)])


def longrope():
    factors = dict(short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[4.0, 5.0, 6.0, 7.0])
    return dict(original_max_position_embeddings=32, max_position_embeddings=128,
                rope_parameters=factors | dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=32))


@pytest.mark.parametrize("family, settings, limit", [
    ("Phi3Config", longrope(), 32),
    ("LlamaConfig", dict(max_position_embeddings=32, rope_parameters=dict(
        rope_type="dynamic", factor=4.0, rope_theta=1e4)), 32),
    ("GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, max_position_embeddings=32), 32),
    ("OPTConfig", dict(ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32), 32),
])
@pytest.mark.parametrize("script", ["cache_ref", "simpo"])
def test_texts_longer_than_the_model_was_made_for_are_refused_with_the_cause(
        world, program, tmp_path, script, family, settings, limit):
    """LongRoPE turns every text of a batch by the factors of the longest one; GPT-2 has no positions beyond its table."""
    config = getattr(transformers, family)(**SMALL | settings)
    model, data = world(random_model(config), LONG, torch.float32)
    out = {} if script == "cache_ref" else dict(out=tmp_path / "out")
    line = refusal(program, script, model=model, data=data, **out)
    assert "42 tokens" in line and f"{limit} positions" in line and "--max_length" in line


@pytest.mark.parametrize("family, settings", [
    ("Phi3Config", longrope()), ("GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, max_position_embeddings=32))])
@pytest.mark.parametrize("script", ["cache_ref", "simpo", "compo", "dpo"])
def test_one_long_text_in_val_is_enough(world, program, tmp_path, script, family, settings):
    """dpo.py with the cache of another model, which takes longer texts."""
    model, data = world(random_model(getattr(transformers, family)(**SMALL | settings)), PAIRS, torch.float32)
    for name in ("train", "val"):
        shutil.rmtree(Path(data, name))
    write_tiny_data(data, str(model), PAIRS, LONG)
    flags = {} if script == "cache_ref" else dict(out=tmp_path / "out")
    if script == "dpo":
        other = save(tiny_hf_model("llama"), tmp_path / "other", torch.float32)
        program("cache_ref", model=other, data=data)
        flags["reference"] = other
    line = refusal(program, script, model=model, data=data, **flags)
    assert "has 42 tokens" in line and "32 positions" in line and "--max_length" in line


def test_evaluate_gives_what_the_model_gives_one_text_at_a_time(world, program, tmp_path):
    """LongRoPE follows the longest text of a batch, so that each is a batch of its own there; GPT-2 ends in a line."""
    model, data = world(random_model(transformers.Phi3Config(**SMALL | longrope())), PAIRS, torch.float32)
    for name in ("train", "val"):
        shutil.rmtree(Path(data, name))
    write_tiny_data(data, str(model), PAIRS, LONG)
    program("evaluate", models=model, data=data, out=tmp_path / "table")
    found = json.loads((tmp_path / "table/evaluation.json").read_text())["results"][0]["metrics"]["margin"][0]
    own = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    logps = cache_ref.own_logps(own, list(datasets.load_from_disk(f"{data}/val")))
    assert found == pytest.approx((logps[0] - logps[1]).mean(), abs=1e-4)
    small = dict(n_embd=32, n_layer=2, n_head=4, max_position_embeddings=32)
    gpt2 = save(random_model(transformers.GPT2Config(**SMALL | small)), tmp_path / "gpt2", torch.float32)
    assert "positions" in refusal(program, "evaluate", models=gpt2, data=data, out=tmp_path / "table")


def test_plain_ropes_may_be_longer_than_the_model_was_made_for(world, program):
    model, data = world(tiny_hf_model("llama", max_position_embeddings=32), LONG, torch.float32)
    assert "is complete" in program("cache_ref", model=model, data=data)


def test_dynamic_ropes_are_right_below_their_limit(world, program):
    model, data = world(random_model(transformers.Phi3Config(**SMALL | longrope())), PAIRS, torch.float32)
    assert "is complete" in program("cache_ref", model=model, data=data)


# ---- what people give as a model


@pytest.fixture
def adapter(world, program, tmp_path):
    """A model, its data, and a run that trained a LoRA adapter of it."""
    model, data = world(tiny_hf_model("llama"), dtype=torch.float32)
    train(program, "simpo", model, data, tmp_path / "lora", lora_rank=4)
    return model, data, tmp_path / "lora"


def test_an_adapter_is_merged_wherever_a_model_is_given(adapter, program, tmp_path):
    from peft import PeftModel

    model, data, run = adapter
    whole = transformers.AutoModelForCausalLM.from_pretrained(model)
    merged = PeftModel.from_pretrained(whole, run / "final").merge_and_unload()
    program("cache_ref", model=run / "final", data=data)
    stored, = Path(data).glob("ref-*/train-logps.npy")
    import cache_ref
    assert np.load(stored).reshape(-1, 2).T == pytest.approx(cache_ref.own_logps(merged, PAIRS), abs=1e-4)
    train(program, "dpo", run, data, tmp_path / "out")
    final = tensors(tmp_path / "out/final")
    assert final.keys() == tensors(model).keys() and not (tmp_path / "out/final/adapter_config.json").exists()
    moved = [name for name in final if not torch.allclose(final[name], merged.state_dict()[name], atol=0.1)]
    assert moved == []
    said = program("evaluate", models=f"{run}/, {tmp_path}/out/", data=data, out=tmp_path / "table")
    assert "lora" in said and "out" in said
    line = refusal(train, program, "dpo", run, data, tmp_path / "more", lora_rank=2)
    assert "adapter" in line and "--lora_rank" in line


def other_names(found):
    return {name.replace("model.layers", "model.language_model.layers"): each for name, each in found.items()}


def one_layer_only(found):
    return {name: each for name, each in found.items() if ".layers.0." in name}


def a_third_layer(found):
    return found | {name.replace(".layers.1.", ".layers.2."): each.clone() for name, each in found.items()}


@pytest.mark.parametrize("change", [other_names, one_layer_only, a_third_layer])
def test_an_adapter_that_does_not_fit_its_base_is_refused(adapter, program, tmp_path, change):
    """peft takes what fits, and says nothing or warns of the rest."""
    model, data, run = adapter
    file = run / "final/adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata=dict(format="pt"))
    line = refusal(train, program, "simpo", run, data, tmp_path / "out")
    assert "do not agree on" in line and "lora_A" in line and "/lora" in line
    assert "does not fit" in refusal(program, "evaluate", models=run, data=data, out=tmp_path / "table")


def save_adapter(base, folder, seed=0, **settings):
    """A folder as peft writes it, with random adapters -> the model that it is, in peft's words."""
    import peft

    torch.manual_seed(seed)
    whole = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(whole, peft.LoraConfig(init_lora_weights=False, **settings))
    model.save_pretrained(folder)
    return model.eval()


def test_an_adapter_of_an_adapter_is_merged_after_it(world, program, tmp_path):
    """As of a second round of LoRA. The first was left out, without a word."""
    model, data = world(tiny_hf_model("llama"), dtype=torch.float32)
    first = save_adapter(model, tmp_path / "first", target_modules=["q_proj", "up_proj"])
    first.merge_and_unload().save_pretrained(tmp_path / "merged")
    second = save_adapter(tmp_path / "merged", tmp_path / "second", seed=1, target_modules=["v_proj"])
    file = tmp_path / "second/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(base_model_name_or_path="../first")))
    program("cache_ref", model=tmp_path / "second", data=data)
    stored, = Path(data).glob("ref-*/train-logps.npy")
    truth = cache_ref.own_logps(second, PAIRS)
    assert np.load(stored).reshape(-1, 2).T == pytest.approx(truth, abs=1e-4)
    tiny_tokenizer().save_pretrained(tmp_path / "second")
    program("evaluate", models=tmp_path / "second", data=data, out=tmp_path / "table")
    assert np.load(tmp_path / "table/logps.npz")["logps"][0].T == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize("script, changed", [
    ("cache_ref", dict(target_modules=["embed_tokens"])), ("cache_ref", dict(target_modules=["lm_head"])),
    ("cache_ref", dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    ("evaluate", dict(target_modules=["embed_tokens"]))])
def test_an_adapter_that_changes_one_of_two_tied_tables_is_refused(world, program, tmp_path, script, changed):
    """Merged, it would change both: 3 to 9 nats per response."""
    model, data = world(tiny_hf_model("qwen3"), dtype=torch.float32)
    save_adapter(model, tmp_path / "adapter", **changed)
    models = dict(models=tmp_path / "adapter", out=tmp_path / "table") if script == "evaluate" else dict(model=tmp_path / "adapter")
    line = refusal(program, script, data=data, **models)
    assert "embed_tokens" in line or "lm_head" in line


@pytest.mark.parametrize("base", ["absolute", "relative to the adapter"])
def test_an_adapter_finds_its_base_from_anywhere(adapter, program, tmp_path, monkeypatch, base):
    model, data, run = adapter
    file = run / "final/adapter_config.json"
    config = json.loads(file.read_text())
    assert Path(config["base_model_name_or_path"]).is_absolute()
    if base != "absolute":
        config["base_model_name_or_path"] = "../../model"
        file.write_text(json.dumps(config))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("rows.jsonl").write_text("\n".join(json.dumps(dict(prompt=f"w{i} ", chosen="w4 w5", rejected="w6"))
                                           for i in range(3, 90)))
    (run / "final/tokenizer_config.json").unlink()  # as peft alone saves an adapter
    said = program("prepare_data", dataset="rows.jsonl", model="../lora", out="mine/", num_proc=1)
    assert "87 in" in said and Path("mine/meta.json").exists()
    assert "is complete" in program("cache_ref", model="../lora", data=data)


def test_a_runs_folder_means_its_final_and_a_slash_at_the_end_nothing(world, program, tmp_path):
    model, data = world(tiny_hf_model("llama"))
    train(program, "simpo", model, data, f"{tmp_path}/first/")
    program("cache_ref", model=f"{tmp_path}/first/", data=f"{data}/")
    train(program, "dpo", tmp_path / "first/final", data, tmp_path / "second")
    train(program, "dpo", f"{model}/", data, tmp_path / "third", reference=f"{tmp_path}/first")
    train(program, "dpo", model, data, tmp_path / "fourth", reference=f"{tmp_path}/first/final")
    assert all((tmp_path / name / "final").is_dir() for name in ("second", "third", "fourth"))


def test_a_run_is_not_written_into_the_folder_of_its_model(world, program):
    """Which would then mean the final/ in it."""
    model, data = world(tiny_hf_model("llama"))
    assert "holds a run or a model" in refusal(train, program, "simpo", model, data, model)
    assert not (model / "final").exists()


def test_the_reference_is_the_same_folder_by_any_path(world, program, tmp_path, monkeypatch):
    """Its cache is found by the name that cache_ref.py was given, or by the folder which that was."""
    model, data = world(tiny_hf_model("llama"))
    monkeypatch.chdir(tmp_path)
    program("cache_ref", model="model", data=data)
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    train(program, "dpo", model, data, tmp_path / "out", reference="../model/", save_every=1)
    train(program, "dpo", model, data, tmp_path / "out", reference=model, save_every=1, resume=True)
    assert "0 caches" in refusal(train, program, "dpo", model, data, tmp_path / "two", reference=tmp_path)
    other = save(tiny_hf_model("llama", seed=1), tmp_path / "other")
    program("cache_ref", model=other, data=data)
    line = refusal(train, program, "dpo", model, data, tmp_path / "out", reference=other, save_every=1, resume=True)
    assert "reference ref-" in line


MAMBA = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)


@pytest.mark.parametrize("config", [
    transformers.MambaConfig(**MAMBA, state_size=4, time_step_rank=4),
    transformers.Mamba2Config(**MAMBA, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=16),
    transformers.FalconMambaConfig(**MAMBA, state_size=4, time_step_rank=4, intermediate_size=64),
])
def test_mamba_trains_in_bfloat16_and_says_that_lora_does_not_fit(world, program, tmp_path, config):
    model, data = world(random_model(config))
    flags = dict(layout="separate", dtype="bfloat16")
    train(program, "simpo", model, data, tmp_path / "out", **flags)
    assert_final_is_the_model(tmp_path / "out/final", model, set())
    line = refusal(train, program, "simpo", model, data, tmp_path / "lora", lora_rank=2, **flags)
    assert "--lora_rank" in line and "Mamba" in line


def test_lora_leaves_out_routers_that_are_no_plain_linear_layers(world, program, tmp_path):
    model, data = world(random_model(transformers.PhimoeConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2)), dtype=torch.float32)
    train(program, "simpo", model, data, tmp_path / "out", lora_rank=2)
    assert not [name for name in tensors(tmp_path / "out/final") if "router" in name]


def test_checkpointing_of_a_model_whose_blocks_nobody_knows_is_refused(world, program, tmp_path, monkeypatch):
    model, data = world(tiny_hf_model("llama"))
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_no_split_modules", None)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_no_split_modules", None, raising=False)
    line = refusal(train, program, "simpo", model, data, tmp_path / "out", activation_checkpointing="full")
    assert "--activation_checkpointing full" in line and "blocks" in line


def test_code_of_others_runs_only_if_asked_and_nobody_is_prompted(world, program, monkeypatch):
    model, data = world(tiny_hf_model("llama"))
    config = json.loads((model / "config.json").read_text())
    config |= dict(model_type="mine", auto_map=dict(AutoConfig="mine.Config", AutoModelForCausalLM="mine.Model"))
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text(
        "import transformers\n"
        "class Config(transformers.LlamaConfig):\n    model_type = 'mine'\n"
        "class Model(transformers.LlamaForCausalLM):\n    config_class = Config\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("prompted"))
    assert "code" in refusal(program, "cache_ref", model=model, data=data)
    assert "is complete" in program("cache_ref", model=model, data=data, trust_remote_code=True)


@pytest.mark.slow
def test_a_wrong_name_without_a_network_is_a_line_within_seconds(world, program, monkeypatch):
    _, data = world(tiny_hf_model("llama"))
    environment = os.environ | dict(HF_HUB_OFFLINE="0", HTTPS_PROXY="http://127.0.0.1:9", OMP_NUM_THREADS="1")
    began = time.time()
    command = [sys.executable, str(ROOT / "dpo.py"), "--model", "no/such", "--data", data]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: ") and "no/such" in done.stderr
    assert "Traceback" not in done.stderr and time.time() - began < 20  # most of it is the import of torch


# ---- resume and ranks


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, dict(activation_checkpointing="full"), dict(lora_rank=2)])
def test_weights_that_are_kept_whole_for_a_step_are_never_old_ones(world, program, tmp_path, flags):
    """--zero 2 with several micro-batches, and an evaluation and a checkpoint after every step: the bits of --zero 3."""
    model, data = world(tiny_hf_model("llama"), dtype=torch.float32)
    flags = flags | dict(max_tokens=16, eval_every=1, save_every=1, max_steps=4)
    found = []
    for zero in ("2", "3"):
        train(program, "simpo", model, data, tmp_path / zero, zero=zero, **flags)
        lines = [json.loads(line) for line in (tmp_path / zero / "log.jsonl").read_text().splitlines()]
        found.append((tensors(tmp_path / zero / "final"), [line["eval/loss"] for line in lines if "eval/loss" in line]))
    assert found[0][1] == found[1][1] and len(set(found[0][1])) == 5
    assert all(torch.equal(tensor, found[1][0][name]) for name, tensor in found[0][0].items())


def test_resume_refuses_other_rows_and_other_weights_under_the_same_name(world, program, tmp_path):
    model, data = world(tiny_hf_model("llama"))
    train(program, "simpo", model, data, tmp_path / "out", save_every=1)
    swapped = [pair | dict(chosen=pair["chosen"][::-1]) for pair in PAIRS]  # of the same lengths
    for name in ("train", "val"):
        shutil.rmtree(Path(data, name))
    write_tiny_data(data, str(model), swapped, PAIRS)
    assert "train" in refusal(train, program, "simpo", model, data, tmp_path / "out", save_every=1, resume=True)
    for name in ("train", "val"):
        shutil.rmtree(Path(data, name))
    write_tiny_data(data, str(model), PAIRS, PAIRS)
    train(program, "simpo", model, data, tmp_path / "out", save_every=1, resume=True)  # the first rows are taken again
    edit_tensors(model, lambda found: found["model.norm.weight"].mul_(2))
    assert "weights" in refusal(train, program, "simpo", model, data, tmp_path / "out", save_every=1, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["weights on rank 0", "rank 1 alone"])
def test_a_rank_that_fails_ends_all_with_one_line(world, tmp_path, broken):
    model, data = world(tiny_hf_model("llama"))
    script = tmp_path / "simpo.py"
    source = (ROOT / "simpo.py").read_text()
    if broken == "rank 1 alone":
        source = source.replace("    sums, seconds = [], 0.0", "    if rank == 1:\n        fail('rank 1 has had enough')\n    sums, seconds = [], 0.0", 1)
    else:
        edit_tensors(model, nan)
    script.write_text(source)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", str(script)]
    done = subprocess.run([*command, "--model", model, "--data", data, "--out", tmp_path / "out"],
                          env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=120)
    ours = done.stderr.partition("torch.distributed.elastic.multiprocessing.errors")[0]
    assert done.returncode == 1 and done.stderr.count("error: ") == 1, done.stderr[-3000:]
    assert "[rank" not in done.stderr and "Traceback" not in ours.partition("ChildFailedError")[0].partition("W1")[0]


@pytest.mark.slow
def test_a_rank_without_its_companions_is_one_line(world, tmp_path):
    model, data = world(tiny_hf_model("llama"))
    command = [sys.executable, str(ROOT / "dpo.py"), "--model", model, "--data", data]
    done = subprocess.run(command, env=os.environ | dict(RANK="0", OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "torchrun" in done.stderr and "Traceback" not in done.stderr


def test_what_final_is_compared_with_attends_by_the_models_own_code(tiny_model, process_group):
    """Before transformers 5.23, SDPA was Gemma-2's default and left out its soft-cap; llama's default is SDPA in every version."""
    weights = cache_ref.read_model(tiny_model("llama"), tiny_args(tiny_model("llama")))[1]
    assert weights.config._attn_implementation == "eager"
