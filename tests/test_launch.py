"""Claim: launch.sh starts each script with the right processes, nodes, threads and environment.

Most tests read the commands that DRY_RUN=1 prints, in a copy of the repository's top folder. A shell script
stands in for Python where a machine is needed that this one is not: with GPUs, or without any package."""
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import plan
import pytest
import torch
import transformers
from conftest import random_pairs
from losses.fork import LOSSES

ROOT = Path(__file__).parents[1]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
OURS = "PYTHON TORCH NPROC NNODES NODE_RANK MASTER OMP_NUM SLURM CUDA_VIS TORCHELASTIC RANK WORLD LOCAL DRY_RUN"
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(tuple(OURS.split()))}
FLAGS = ["--model", "some/model", "--data", "data/pairs"]


@pytest.fixture
def root(tmp_path):
    """A copy of launch.sh and what it reads, without .venv."""
    for path in [ROOT / "launch.sh", *ROOT.glob("requirements*.txt"), *ROOT.glob("*.py")]:
        shutil.copy(path, tmp_path)
    (tmp_path / "tests/demo").mkdir(parents=True)
    for name in ("demo/demo.sh", "recipes.txt"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    (tmp_path / "tests/bench").mkdir()
    shutil.copy(ROOT / "tests/bench/plan.py", tmp_path / "tests/bench")
    shutil.copytree(ROOT / "tests/losses", tmp_path / "tests/losses", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def launch(root, *args, rc=0, **env):
    """Output lines of ./launch.sh, without those that tell the time; `rc` is the exit status that it must have."""
    env = CLEAN | dict(PYTHON=sys.executable, DRY_RUN="1", NPROC="1") | env
    done = subprocess.run([root / "launch.sh", *map(str, args)], env=env, cwd="/", text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == rc, done.stdout
    return [line.strip() for line in done.stdout.splitlines() if not line.startswith("[launch")]


def scripts(lines):
    """The scripts that printed commands run."""
    return [re.search(r"\S+\.py", line)[0] for line in lines if ".py" in line]


def stub(path, text):
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return str(path)


def gpus(tmp_path, count):
    """A Python that finds so many GPUs."""
    rest = f'*) exec "{sys.executable}" "$@" ;; esac'
    return stub(tmp_path / "python_with_gpus", f'case "$*" in *device_count*) echo {count} ;; {rest}')


def torchrun(nproc, python=sys.executable, nnodes=1, meet="--standalone", threads=None):
    threads = threads or max(1, CORES // nproc)
    return (f"OMP_NUM_THREADS={threads} {python} -m torch.distributed.run --nnodes {nnodes} "
            f"--nproc_per_node {nproc} {meet} ")


# ---- processes

@pytest.mark.slow
def test_on_gpus_a_training_and_its_cache_get_the_max_tokens_that_the_plan_finds(root, tmp_path):
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=128, intermediate_size=352, num_hidden_layers=3,
                                      num_attention_heads=4, num_key_value_heads=2)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "small")
    words = ["dpo.py", "--model", tmp_path / "small", "--data", "data/pairs", "--dtype", "float32"]
    on_gpus = dict(PYTHON=gpus(tmp_path, 2), NPROC="", GPU_GIB="1")
    said, cache, train = launch(root, *words, **on_gpus)
    bound, = re.findall("^--max_tokens ([0-9]+): the largest of", said)
    parts = plan.plan(config, 2, tokens=int(bound), dtype=torch.float32)[0]
    more = plan.plan(config, 2, tokens=2 * int(bound), dtype=torch.float32)[0]
    assert sum(parts.values()) <= 0.9 * 2**30 < sum(more.values()) and 4096 <= int(bound) < 65536
    assert cache.endswith(f"--max_tokens {bound}") and train.endswith(f"--dtype float32 --max_tokens {bound}")
    assert launch(root, *words, "--max-tokens=0", **on_gpus)[-1].endswith(f"--max-tokens=0 --max_tokens {bound}")
    assert launch(root, *words, "--max-tokens=512", **on_gpus)[-1].endswith("--max-tokens=512")
    assert launch(root, *words, "--lora_rank", "8", **on_gpus | dict(GPU_GIB="0.01"))[-1].endswith(" --max_tokens 4096")
    said, train = launch(root, "simpo.py", "--model", "no/model", "--data", "x", **on_gpus)
    assert "keeps its default" in said and train.endswith("--data x")
    assert "max_tokens" not in launch(root, "compo.py", *words[1:], **on_gpus)[-1]  # it keeps no activations of the blocks

def test_without_a_gpu_a_script_is_one_plain_process_with_all_cores(root):
    assert launch(root, "cache_ref.py", "--model", "a b", NPROC="", CUDA_VISIBLE_DEVICES="") == [
        f"OMP_NUM_THREADS={CORES} {sys.executable} cache_ref.py --model a\\ b"]

def test_there_is_one_process_per_visible_gpu(root, tmp_path):
    python = gpus(tmp_path, 4)
    assert launch(root, "cache_ref.py", PYTHON=python, NPROC="") == [torchrun(4, python) + "cache_ref.py"]
    assert launch(root, "prepare_data.py", "-x", PYTHON=python, NPROC="")[0].endswith(f"{python} prepare_data.py -x")

def test_nproc_overrules_the_number_of_gpus(root, tmp_path):
    python = gpus(tmp_path, 4)
    assert launch(root, "cache_ref.py", PYTHON=python, NPROC="2") == [torchrun(2, python) + "cache_ref.py"]

@pytest.mark.slow
def test_each_process_gets_its_share_of_the_cores_and_at_least_one(root):
    assert launch(root, "cache_ref.py", NPROC=str(2 * CORES))[0].startswith("OMP_NUM_THREADS=1 ")
    assert launch(root, "cache_ref.py", OMP_NUM_THREADS="7")[0].startswith("OMP_NUM_THREADS=7 ")


# ---- the reference first

@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--model", "some/model", "--beta", "0.2", "--data=data/a=b", "--dtype", "float32", "--shard_group", "2"],
    ["--shard_group", "2", "--data=data/a=b", "--compile", "--dtype=float32", "--wandb", "model", "--model=some/model"]])
def test_cache_ref_runs_first_with_the_flags_that_it_shares(root, flags):
    first, second = launch(root, "dpo.py", *flags)
    assert second.endswith("dpo.py " + " ".join(flags))
    own = first.split("cache_ref.py ")[1].replace("=", " ", 1).split()
    assert set(" ".join(own).replace("=", " ").split()) == {
        "--model", "some/model", "--data", "data/a", "b", "--dtype", "float32", "--shard_group", "2"}

@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--model", "out/one/final", "--data", "data/a", "--reference", "some/base"],
    ["--reference=some/base", "--model=out/one/final", "--data", "data/a"]])
def test_another_reference_is_what_cache_ref_reads(root, flags):
    first, second = launch(root, "dpo.py", *flags)
    own = first.split("cache_ref.py ")[1].split()
    assert own[-2:] == ["--model", "some/base"]  # of two --model the last one counts
    assert "--reference" not in first and second.endswith("dpo.py " + " ".join(flags))

def test_flags_with_dashes_and_empty_or_negative_values_are_passed_on_as_they_are(root):
    """The scripts take --max-tokens for --max_tokens."""
    flags = [*FLAGS, "--max-tokens", "400", "--train-modules=a=b", "--sketch_modules", "", "--seed", "-1"]
    first, second = launch(root, "auxdpo.py", *flags, "--resume", "--keep", "3", "--reference", "")
    assert first.split("cache_ref.py ")[1] == (
        "--sketch_dim 4096 --model some/model --data data/pairs --max-tokens 400 --train-modules=a=b "
        "--sketch_modules '' --seed -1")
    assert second.endswith("--resume --keep 3 --reference ''")

@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--geometry", "ridge"], ["--geometry=ridge"]])
def test_a_ridge_has_no_sketches_made(root, flags):
    first, second = launch(root, "auxdpo.py", "--model", "m", "--data", "d", *flags)
    assert first.endswith("cache_ref.py --model m --data d") and second.endswith(" ".join(flags))

@pytest.mark.slow
def test_a_script_that_needs_sketches_has_them_made_with_its_own_default_unless_told_otherwise(root):
    flags = ["--model", "m", "--data", "d", "--train_modules", "norm"]
    first, second = launch(root, "auxdpo.py", *flags)
    assert first.endswith("cache_ref.py --sketch_dim 4096 " + " ".join(flags)) and second.endswith(" ".join(flags))
    first, _ = launch(root, "auxdpo.py", *flags, "--sketch_dim", "64")
    assert first.endswith("--sketch_dim 64")  # the last one counts

@pytest.mark.slow
def test_scripts_without_a_reference_and_incomplete_commands_run_no_cache_ref(root):
    (root / "free.py").write_text("print(1)")
    for args in (["free.py", *FLAGS], ["dpo.py", "--model", "m"], ["dpo.py", "--help"], ["dpo.py"]):
        assert len(launch(root, *args)) == 1

@pytest.mark.slow
def test_cache_ref_is_left_out_only_while_neither_model_nor_data_is_touched(root):
    def commands(*flags, model="m", **env):
        return len(launch(root, "dpo.py", "--model", model, "--data", "d", "--dtype", "float32", *flags, **env))

    for folder in ("m", "other", "d/train", "d/val"):
        (root / folder).mkdir(parents=True)
    for path in ("m/model.safetensors", "d/meta.json", "d/train/data.arrow"):
        (root / path).write_text("old")
    assert commands() == 2  # no cache
    (root / "d/ref-0123").mkdir()
    time.sleep(0.02)  # the clock of file times ticks every few milliseconds
    (root / "d/ref-0123/meta.json").write_text(json.dumps(dict(key=dict(dtype="float32"), args=dict(model="m", dtype="auto"))))
    assert commands() == 1
    assert commands(model="other") == 2  # a cache of another model
    assert commands("--reference", "m", model="other") == 1  # which is the one that is wanted here
    assert commands("--reference", "other") == 2
    assert commands(NNODES="2", MASTER_ADDR="n0") == 2  # nodes might see different files
    (root / "it's a link").symlink_to(root / "d")
    assert commands("--data", "it's a link") == 1
    assert len(launch(root, "dpo.py", "--model=m", "--data=d", "--dtype=bfloat16")) == 2
    time.sleep(0.02)
    shutil.copy2(root / "m/model.safetensors", root / "m/model.bin")  # a new file with an old date
    assert commands() == 2


# ---- published recipes

RECIPES = {  # METHODS: learning rate, schedule, tokens of a pair, beta, gamma / beta; and the script
    "tulu3-8b": ("dpo_norm", 5e-7, "linear", 2048, 5.0, None),
    "olmo2-1b": ("dpo_norm", 2.5e-6, "linear", 2048, 5.0, None),
    "olmo2-7b": ("dpo_norm", 1e-6, "linear", 2048, 5.0, None),
    "olmo2-13b": ("dpo_norm", 8e-7, "linear", 2048, 5.0, None),
    "olmo2-32b": ("dpo_norm", 2e-6, "linear", 2048, 5.0, None),
    "olmo3-7b-instruct": ("dpo_norm", 1e-6, "linear", 16384, 5.0, None),
    "smollm3": ("apo_zero", 1e-6, "cosine", 24576, 0.05, None),
    "zephyr-7b": ("dpo", 5e-7, "cosine", 1024, 0.01, None),
    "simpo-mistral-7b": ("simpo", 3e-7, "cosine", 1024, 2.0, 0.8),
    "simpo-llama3-8b": ("simpo", 1e-6, "cosine", 2048, 2.5, 0.55),
    "simpo-gemma2-9b": ("simpo", 8e-7, "cosine", 2048, 10.0, 0.5),
    "wpo-mistral-7b": ("wpo", 5e-7, "cosine", 1024, 0.01, None),
    "auxdpo-mmlu-pro": ("auxdpo", 5e-7, "linear", 1024, 0.1, None),  # no rate and schedule are published
    "auxdpo-rewardbench2": ("auxdpo", 5e-7, "linear", 1024, 0.1, None),
    "auxdpo-ultrafeedback": ("auxdpo", 5e-7, "linear", 1024, 0.1, None),
    "compo-mistral-7b": ("dpo+compo", 5e-7, "cosine", 1536, 0.01, None),  # rate and beta of the first stage: as zephyr
    "compo-llama3-8b": ("dpo+compo", 5e-7, "cosine", 1536, 0.01, None),
    "simpo-compo-mistral-7b": ("simpo+compo", 3e-7, "cosine", 1536, 2.0, 0.8),
    "dpo-compo-mistral-7b": ("dpo+compo", 5e-7, "cosine", 1536, 0.01, None),
    "dpo-compo-qwen3-4b": ("dpo+compo", 5e-7, "cosine", 1536, 0.01, None),
    "dpo-compo-gemma3-4b": ("dpo+compo", 5e-7, "cosine", 1536, 0.01, None),
}
COMPO = {  # METHODS 6: r, m, lambda_g (lambda and gamma are the defaults); pairs of the first stage
    "compo-mistral-7b": (5e-4, 1600, 2.2e-4, "clean"),
    "compo-llama3-8b": (7.5e-4, 1800, 8e-5, "clean"),
    "simpo-compo-mistral-7b": (5e-4, 1600, 2.2e-4, "clean"),
    "dpo-compo-mistral-7b": (5e-4, 3300, 2.2e-4, ""),  # all of them
    "dpo-compo-qwen3-4b": (8e-4, 1800, 8.5e-5, ""),
    "dpo-compo-gemma3-4b": (4.5e-4, 1800, 7.5e-5, ""),
}

ULTRA = "ultrafeedback_binarized"
SOURCES = {  # METHODS: model, data
    "tulu3-8b": ("Llama-3.1-Tulu-3-8B-SFT", "llama-3.1-tulu-3-8b-preference-mixture"),
    "olmo2-1b": ("OLMo-2-0425-1B-SFT", "olmo-2-0425-1b-preference-mix"),
    "olmo2-7b": ("OLMo-2-1124-7B-SFT", "olmo-2-1124-7b-preference-mix"),
    "olmo2-13b": ("OLMo-2-1124-13B-SFT", "olmo-2-1124-13b-preference-mix"),
    "olmo2-32b": ("OLMo-2-0325-32B-SFT", "olmo-2-0325-32b-preference-mix"),
    "olmo3-7b-instruct": ("Olmo-3-7B-Instruct-SFT", "Dolci-Instruct-DPO"),
    "smollm3": ("smollm3-sft", "smoltalk2"),
    "zephyr-7b": ("zephyr-7b-sft-full", ULTRA),
    "simpo-mistral-7b": ("zephyr-7b-sft-full", ULTRA),
    "simpo-llama3-8b": ("Meta-Llama-3-8B-Instruct", "llama3-ultrafeedback"),
    "simpo-gemma2-9b": ("gemma-2-9b-it", "gemma2-ultrafeedback-armorm"),
    "wpo-mistral-7b": ("mistral-7b-sft-beta", ULTRA),
    "auxdpo-mmlu-pro": ("Llama-3.2-1B", "MMLU-Pro"),
    "auxdpo-rewardbench2": ("Llama-3.2-1B", "reward-bench-2"),
    "auxdpo-ultrafeedback": ("Llama-3.2-1B", ULTRA),
    "compo-mistral-7b": ("Mistral-7B-Instruct-v0.2", ULTRA),
    "compo-llama3-8b": ("Meta-Llama-3-8B-Instruct", ULTRA),
    "simpo-compo-mistral-7b": ("Mistral-7B-Instruct-v0.2", ULTRA),
    "dpo-compo-mistral-7b": ("Mistral-7B-Instruct-v0.2", ULTRA),
    "dpo-compo-qwen3-4b": ("Qwen3-4B-Base", ULTRA),
    "dpo-compo-gemma3-4b": ("gemma-3-4b-it", ULTRA),
}

def parsed(command, monkeypatch):
    """The arguments that the real script makes of a printed command."""
    words = shlex.split(command)
    name = words[words.index("./launch.sh") + 1].removesuffix(".py")
    script = importlib.import_module({"apo_zero": "dpo"}.get(name, name))  # a fork with the settings of dpo.py
    monkeypatch.setattr(sys, "argv", words[words.index("./launch.sh") + 1:])
    return script, script.parse_args(script.Args)

def test_recipes_are_listed_and_an_unknown_one_is_one_line_with_their_names(root):
    for args in ([], ["--help"], ["--run"]):
        assert [line.split()[0] for line in launch(root, "recipe", *args)] == list(RECIPES)
    line, = launch(root, "recipe", "zefyr", rc=1)
    assert line.startswith("error: ") and all(word in line for word in ("zefyr", *RECIPES))
    line, = launch(root, "recipe", "zephyr-7b", "--go", rc=1)
    assert "--go" in line and "--run" in line

def test_launch_sh_and_its_recipes_fit_on_a_screen():
    for name in ("launch.sh", "tests/recipes.txt"):
        assert max(map(len, (ROOT / name).read_text().splitlines())) <= 100
    assert len((ROOT / "launch.sh").read_text().splitlines()) <= 220

def test_every_line_of_the_recipes_has_a_key_that_their_head_explains():
    head, *blocks = (ROOT / "tests/recipes.txt").read_text().split("\n\n")
    keys = re.findall(r"^# (\w+)  +", head, re.M)
    assert len(blocks) == len(RECIPES) and all(line.startswith("#") for line in head.splitlines())
    for block in blocks:
        assert [line.split()[0] for line in block.splitlines()] in (
            [key for key in keys if key not in ("first", "clean", "compo")],
            [key for key in keys if key not in ("first", "clean")], [key for key in keys if key not in ("first", "train")],
            ["recipe", *["first"] * 3, "model", "data", *["prepare"] * 2, "train", "steps"])  # smollm3

def commands(root, name):
    """The commands that a recipe prints, one line each."""
    text = "\n".join(launch(root, "recipe", name))
    lines = text.replace("\\\n", " ").replace("||\n", "|| ").splitlines()
    return [" ".join(line.split()) for line in lines]

@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_prints_commands_that_the_scripts_take_with_the_published_numbers(root, name, monkeypatch):
    script, rate, schedule, length, beta, ratio = RECIPES[name]
    prepare, *middle, train = commands(root, name)[2 if name == "smollm3" else 0:]  # after the model and the fork
    first = script.split("+")[0]
    pairs = COMPO[name][-1] if name in COMPO else ""
    out = f"out/{name}"
    if name in COMPO:
        out += f"-{pairs or 'train'}"
        assert len(middle) == 2 and middle[1].startswith(f"[ -d {out}/final ] || ")
        train = middle[1]
    else:
        assert not middle
    assert max(map(len, launch(root, "recipe", name))) <= 100
    module, data = parsed(prepare, monkeypatch)
    assert prepare.startswith(f"[ -d {data.out} ] || ./launch.sh prepare_data.py ")  # done once, if preempted
    assert data.max_length == length and data.score_header == (first in ("simpo", "wpo"))
    assert data.split == ("train_prefs" if "ultrafeedback_binarized" in data.dataset else
                          "llama_3.1_tulu_3_8b_preference_mixture_no_think" if name == "smollm3" else
                          "train" if script != "auxdpo" else "test")
    module, args = parsed(train, monkeypatch)
    assert f"./launch.sh {first}.py" in train and Path(args.data) == Path(data.out, pairs) and args.model == data.model
    assert (data.model.split("/")[1], data.dataset.split("/")[1]) == SOURCES[name]
    assert args.max_tokens >= 2 * length  # the longest pair that is kept fits
    assert args.activation_checkpointing == "full" and "--beta" in train  # published, so said
    assert script == "auxdpo" or "--schedule" in train
    assert (data.val_fraction, args.batch_size) == (
        (0.2, 4) if script == "auxdpo" else (0.05, 128) if name in COMPO else (0.01, 32 if name == "smollm3" else 128))
    assert args.max_grad_norm == (0.2 if name == "smollm3" else 1)
    assert (args.learning_rate, args.schedule, args.beta) == (rate, schedule, beta)
    assert (args.epochs, args.warmup, getattr(args, "label_smoothing", 0)) == (1, 0.1, 0)
    assert getattr(args, "gamma_beta_ratio", None) == ratio
    assert args.resume and args.save_every and args.out == out

@pytest.mark.parametrize("name", COMPO)
def test_a_recipe_in_stages_splits_the_data_and_ends_with_compo_on_the_noisy_pairs(root, name, monkeypatch):
    radius, perturbations, threshold, pairs = COMPO[name]
    _, split, _, last = commands(root, name)
    assert split.startswith(f"[ -d data/{name}/clean ] || ./launch.sh cache_ref.py ")
    _, args = parsed(split, monkeypatch)
    assert (args.data, args.noise_margin) == (f"data/{name}", 3)
    module, args = parsed(last, monkeypatch)
    assert module.__name__ == "compo" and args.estimator == "gaussian"
    assert (args.radius, args.perturbations, args.entry_threshold) == (radius, perturbations, threshold)
    assert (args.gate, args.step_size, args.max_pairs, args.pairs_per_step) == (0.2, 0.035, 100, 1)
    assert args.model == f"out/{name}-{pairs or 'train'}/final" and args.data == f"data/{name}/noisy"
    assert args.resume and args.save_every and args.out == f"out/{name}"

@pytest.mark.slow
def test_a_recipe_runs_the_commands_that_it_prints(root):
    lines = launch(root, "recipe", "wpo-mistral-7b", "--run")
    assert scripts(lines) == ["prepare_data.py", "cache_ref.py", "wpo.py"]
    lines = launch(root, "recipe", "simpo-llama3-8b", "--run", NPROC="8")
    assert lines[0].split(" --")[0].endswith("prepare_data.py") and " simpo.py " in lines[1] and len(lines) == 2
    (root / "data/simpo-llama3-8b").mkdir(parents=True)
    assert launch(root, "recipe", "simpo-llama3-8b", "--run", NPROC="8") == lines[1:]
    line, = launch(root, "recipe", "simpo-llama3-8b", "--run", "--learning_rate", "1 e-7", NPROC="8")
    assert line == lines[1] + " --learning_rate 1\\ e-7"  # the last one counts

@pytest.mark.slow
def test_the_recipe_of_a_loss_that_no_script_has_makes_the_fork_and_fetches_its_revision_first(root):
    model, fork, *_ = commands(root, "smollm3")
    assert model == "hf download HuggingFaceTB/SmolLM3-3B-checkpoints --revision it-SFT --local-dir out/smollm3-sft"
    assert fork == "[ -e apo_zero.py ] || python3 tests/losses/fork.py apo_zero > apo_zero.py"
    first, *lines = launch(root, "recipe", "smollm3", "--run")
    assert first == model and scripts(lines) == ["prepare_data.py", "cache_ref.py", "apo_zero.py"]
    assert "1 - torch.sigmoid(rewards[0])  # (n,) eq. 7" in (root / "apo_zero.py").read_text()

def test_several_nodes_do_not_prepare_the_data_of_a_recipe_at_once(root):
    nodes = dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="n0", NPROC="8")
    line, = launch(root, "recipe", "zephyr-7b", "--run", rc=1, **nodes)
    assert line.startswith("error: ") and "on one node" in line and "prepare_data.py" in line
    (root / "data/zephyr-7b").mkdir(parents=True)
    assert scripts(launch(root, "recipe", "zephyr-7b", "--run", **nodes)) == ["cache_ref.py", "dpo.py"]


# ---- nodes

def test_several_nodes_with_ranks_meet_at_the_first_and_the_cache_at_the_next_port(root):
    first, second = launch(root, "dpo.py", *FLAGS, NNODES="2", NODE_RANK="1", MASTER_ADDR="n0", NPROC="8")
    assert first.startswith(torchrun(8, nnodes=2, meet="--node_rank 1 --master_addr n0 --master_port 29501"))
    assert second == torchrun(8, nnodes=2, meet="--node_rank 1 --master_addr n0 --master_port 29500") + (
        "dpo.py --model some/model --data data/pairs")

def test_nodes_without_ranks_number_themselves(root):
    line, = launch(root, "cache_ref.py", NNODES="3", MASTER_ADDR="n0", MASTER_PORT="4000")
    meet = "--rdzv_backend c10d --rdzv_id 0 --rdzv_endpoint n0:4000"
    assert line == torchrun(1, nnodes=3, meet=meet) + "cache_ref.py"

@pytest.mark.parametrize("wrong", [
    dict(NNODES="two"), dict(NNODES="0"), dict(NNODES="-1"), dict(NNODES="1:4"), dict(NODE_RANK="2"), dict(NODE_RANK="-1"),
    dict(NODE_RANK="first"), dict(NODE_RANK="01"), dict(MASTER_PORT="tcp"), dict(MASTER_PORT="65535"), dict(NPROC="0"),
    dict(NPROC="-1"), dict(NPROC="all"), dict(NPROC="5"), dict(RESTARTS="-1"), dict(RESTARTS="often")], ids=str)
def test_a_number_that_torchrun_would_wait_for_or_stumble_over_is_one_line(root, tmp_path, wrong):
    env = dict(NNODES="2", MASTER_ADDR="n0", NODE_RANK="0", PYTHON=gpus(tmp_path, 4)) | wrong
    line, = launch(root, "cache_ref.py", rc=1, **env)
    (name, value), = wrong.items()
    assert line.startswith(f"error: {name}={value} must be a whole number from ")

def test_a_rank_without_a_number_of_nodes_is_no_run_of_its_own(root):
    """Each node would write to the same --out."""
    assert launch(root, "cache_ref.py", rc=1, NODE_RANK="1", MASTER_ADDR="n0")[0].startswith("error: NODE_RANK=1 ")

@pytest.mark.slow
def test_help_and_preparation_need_no_other_node(root):
    for words in (["dpo.py", "--help"], ["prepare_data.py", "-x"]):
        line, = launch(root, *words, NNODES="2", NODE_RANK="1", NPROC="8")
        assert line.endswith(f"{sys.executable} {' '.join(words)}")

def test_without_scontrol_as_in_a_container_the_first_node_must_be_named(root, tmp_path):
    for name in ("bash", "dirname", "realpath", "sed", "grep", "nproc", "xargs", "echo"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    slurm = dict(SLURM_NNODES="2", SLURM_NODEID="1", SLURM_JOB_NODELIST="n[7-8]", SLURM_JOB_ID="99", PATH=f"{tmp_path}/bin")
    line, = launch(root, "cache_ref.py", rc=1, **slurm)
    assert line == "error: NNODES=2 needs MASTER_ADDR, the name of the first node"
    assert "--master_addr n7 " in launch(root, "cache_ref.py", **slurm, MASTER_ADDR="n7")[0]

def test_on_one_node_too_several_tasks_are_refused_unless_each_is_a_run_of_its_own(root):
    slurm = dict(SLURM_NNODES="1", SLURM_NODEID="0", SLURM_LOCALID="1", SLURM_JOB_NODELIST="n7")
    line, = launch(root, "cache_ref.py", rc=1, **slurm)
    assert line.startswith("error: ") and "--ntasks-per-node=1" in line and "NNODES=1" in line
    assert launch(root, "cache_ref.py", NNODES="1", **slurm)[0].endswith(f"{sys.executable} cache_ref.py")

@pytest.mark.slow
def test_slurm_tells_the_nodes(root, tmp_path):
    stub(tmp_path / "scontrol", '[ "$*" = "show hostnames n[7-8]" ] && printf "n7\\nn8\\n"')
    slurm = dict(SLURM_NNODES="2", SLURM_NODEID="1", SLURM_JOB_NODELIST="n[7-8]", SLURM_JOB_ID="99",
                 SLURM_LOCALID="0", PATH=f"{tmp_path}:{os.environ['PATH']}")
    line, = launch(root, "cache_ref.py", NPROC="8", **slurm)
    meet = "--node_rank 1 --master_addr n7 --master_port 29500"
    assert line == torchrun(8, nnodes=2, meet=meet) + "cache_ref.py"
    line, = launch(root, "prepare_data.py", **slurm)
    assert "torch.distributed" not in line
    assert "--ntasks-per-node=1" in launch(root, "cache_ref.py", rc=1, **slurm | dict(SLURM_LOCALID="1"))[0]
    line, = launch(root, "cache_ref.py", **slurm | dict(SLURM_NNODES="1", SLURM_NODEID="0"))
    assert "torch.distributed" not in line

@pytest.mark.slow
def test_restarts_are_those_of_torchrun(root):
    line, = launch(root, "cache_ref.py", NPROC="4", RESTARTS="3")
    assert "--nproc_per_node 4 --standalone --max_restarts 3 cache_ref.py" in line
    assert "--max_restarts" not in launch(root, "cache_ref.py", NPROC="4")[0]
    line, = launch(root, "cache_ref.py", NPROC="1", RESTARTS="3")  # one process too is started again only by torchrun
    assert "--nproc_per_node 1 --standalone --max_restarts 3 cache_ref.py" in line
    assert "torch.distributed" not in launch(root, "cache_ref.py", RESTARTS="0")[0]
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in (ROOT / "launch.sh").read_text()

def test_flags_make_another_demo_in_folders_of_its_own(root):
    text = "\n".join(launch(root, "demo", "--noise_share", "0.8", "--seed", "2"))
    assert "demo_world.py --out data/demo_world-noise-share-0.8-seed-2 --noise_share 0.8 --seed 2" in text
    assert text.count("--seed 2 --learning_rate") == 6 and "--out out/demo-noise-share-0.8-seed-2 --columns all" in text
    assert "rm -rf data/demo_world-noise-share-0.8-seed-2 out/demo-noise-share-0.8-seed-2" in text

def test_a_fork_of_a_script_is_trained_in_the_same_world_and_shown_beside_the_others(root):
    (root / "mine.py").write_text((ROOT / "simpo.py").read_text())
    (root / "data/demo_world/pairs").mkdir(parents=True)
    (root / "data/demo_world/pairs/meta.json").touch()
    text = launch(root, "demo", "--only", "mine.py")
    assert scripts(line for line in text if "OMP" in line) == [
        "mine.py", "evaluate.py", "evaluate.py", "tests/demo/demo_summary.py"]
    train, = [line for line in text if " mine.py --model" in line]
    assert "--learning_rate 3e-4" in train and "--out out/demo/mine" in train and "rm -rf data" not in "".join(text)
    for name in ("dpo", "compo/final", "mine"):
        assert f"out/demo/{name}" in [line for line in text if "--columns all" in line][0]
    assert "no script yours.py" in " ".join(launch(root, "demo", "--only", "yours.py", rc=1))

ALGORITHMS = ["dpo.py", "dpo_norm.py", "simpo.py", "wpo.py", "auxdpo.py", "dpo.py", "compo.py"]
WORLD, SHOWN = ["tests/demo/demo_world.py", "prepare_data.py", "cache_ref.py"], ["evaluate.py"] * 2 + ["tests/demo/demo_summary.py"]

def test_also_adds_losses_to_the_demo_whose_other_commands_stay_as_they_are(root):
    plain, more = [[line for line in launch(root, "demo", *flags) if line.startswith("OMP") and ".py" in line]
                   for flags in ([], ["--also", "ipo,orpo"])]
    assert scripts(plain) == WORLD + ALGORITHMS + SHOWN
    assert scripts(more) == WORLD + ALGORITHMS + ["out/demo/ipo.py", "out/demo/orpo.py"] + SHOWN
    added = [line for line in more if "/ipo.py" in line or "/orpo.py" in line]
    assert [line for line in more if line not in added and "evaluate.py" not in line] == (
        [line for line in plain if "evaluate.py" not in line])
    ipo, orpo = added
    assert ipo.replace("/ipo", "/dpo").replace("out/demo/dpo.py", "dpo.py") in plain  # only the loss differs
    assert "--learning_rate 3e-4" in orpo and orpo.endswith("--beta 0.1")
    for old, new in zip(plain[-3:-1], more[-3:-1]):
        assert new == old.replace("compo/final", r"compo/final\,out/demo/ipo\,out/demo/orpo")

@pytest.mark.slow
def test_the_steps_of_a_demo_are_counted(root):
    (root / "mine.py").write_text((ROOT / "dpo.py").read_text())
    for made in (False, True):
        for flags, trained in [([], 7), (["--also", "ipo,dpop"], 9), (["--only", "mine.py"], 1),
                               (["--only", "mine.py", "--also", "robust"], 2), (["--also", "robust", "--only", "mine.py"], 2)]:
            total = trained + 2 + (0 if made and "--only" in flags else 3)
            steps = [line.split(":")[0] for line in launch(root, "demo", *flags) if re.match(r"\d+ of \d+: ", line)]
            assert steps == [f"{i + 1} of {total}" for i in range(total)]
        (root / "data/demo_world/pairs").mkdir(parents=True, exist_ok=True)
        (root / "data/demo_world/pairs/meta.json").touch()

def test_a_loss_that_is_not_there_is_one_line_with_the_names_of_those_that_are(root):
    for flags in (["--also", "ipo,dpopp"], ["--also", "dpopp", "--seed", "1"]):
        line, = launch(root, "demo", *flags, rc=1)
        assert line.startswith("error: there is no loss dpopp; ") and all(name in line for name in LOSSES)
    assert "--also" in launch(root, "demo", "--also", rc=1)[0]

@pytest.mark.parametrize("flags", [["--seed", "1", "--only", "simpo.py"], ["--only=simpo.py", "--seed", "1"]])
def test_only_may_stand_after_other_flags_and_have_an_equals_sign(root, flags):
    assert launch(root, "demo", *flags) == launch(root, "demo", "--only", "simpo.py", "--seed", "1")

def test_plan_gives_its_flags_on(root):
    assert launch(root, "plan", "MODEL", "--ranks", "2")[-1].endswith("tests/bench/plan.py MODEL --ranks 2")

def test_what_is_wrong_is_said_in_one_line(root):
    for args, word, env in [(["dqo.py"], "dpo.py", {}), (["dmeo"], "demo", {}), (["cache_ref.py"], "PYTHON=", dict(PYTHON="no-python")),
                            (["cache_ref.py"], "MASTER_ADDR", dict(NNODES="2"))]:
        line, = launch(root, *args, rc=1, **env)
        assert line.startswith("error: ") and word in line

def test_usage_names_every_command_and_variable(root):
    text = "\n".join(launch(root))
    assert launch(root, "-h") == launch(root) and "set -e" not in text
    for word in "demo test plan install SCRIPT.py PYTHON TORCH NPROC RESTARTS DRY_RUN NNODES MASTER_ADDR NODE_RANK srun".split():
        assert word in text

@pytest.mark.slow
def test_launch_sh_is_found_through_a_link_and_a_relative_path(root, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/prefer").symlink_to(root / "launch.sh")
    env = CLEAN | dict(PYTHON=sys.executable, DRY_RUN="1", NPROC="1")
    for command in (["bin/prefer"], ["bash", "bin/prefer"], [f"../{root.name}/launch.sh"]):
        for words, expected in [(["-h"], "launch.sh demo"), (["cache_ref.py"], "cache_ref.py")]:
            done = subprocess.run([*command, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
            assert expected in done.stdout and not done.stderr

@pytest.mark.slow
@pytest.mark.parametrize("value, printed", [("1", True), ("true", True), ("yes", True), ("0", False), ("", False)])
def test_dry_run_is_off_only_if_it_is_0_or_empty(root, value, printed):
    (root / "simple.py").write_text("print('it runs')")
    line, = launch(root, "simple.py", DRY_RUN=value)
    assert line == ("it runs" if not printed else f"OMP_NUM_THREADS={CORES} {sys.executable} simple.py")


# ---- environment

BARE = """echo "$*" | head -n 1 >>"$LOG"
here=$(cd "$(dirname "$0")" && pwd)
case "$*" in
  *packaging*) [ -e "$here/packages" ] ;;
  *-m\\ venv*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *-m\\ pip*) touch "$here/packages"; [ "$PIP_WORKS" = 1 ] ;;
  *version_info*) [ "$OLD" != 1 ] ;;
esac
"""

def test_a_bare_python_gets_an_environment_once_and_a_broken_installation_is_completed(root, tmp_path):
    log, base = tmp_path / "log", tmp_path / "bare"
    base.mkdir()
    (root / "simple.py").write_text("")
    env = dict(PYTHON=stub(base / "python3", BARE), DRY_RUN="", LOG=str(log))

    def installed(rc=0, **more):
        """What pip was asked to install, if it was started, and the output."""
        log.write_text("")
        output = launch(root, "simple.py", rc=rc, **env, **more)
        calls = [line for line in log.read_text().splitlines() if "-m pip" in line]
        return [line.split("pip-version-check ")[1] for line in calls], output

    pip, output = installed(rc=1, PIP_WORKS="0")
    assert pip == ["-r requirements.txt"] and output[-1].startswith("error: the installation broke off")
    pip, _ = installed(PIP_WORKS="1", TORCH="torch==2.13.0")
    assert pip == ["torch==2.13.0 -r requirements.txt"]
    pip, _ = installed()
    assert pip == []

def test_an_old_python_is_refused_and_nothing_is_installed_on_many_nodes_at_once(root, tmp_path):
    env = dict(PYTHON=stub(tmp_path / "python3", BARE), LOG="/dev/null", PIP_WORKS="1")
    assert "3.10" in launch(root, "cache_ref.py", rc=1, OLD="1", **env)[-1]
    assert "install" in launch(root, "cache_ref.py", rc=1, NNODES="2", MASTER_ADDR="n0", **env)[-1]

def test_install_prints_the_commands_for_tests_and_demo(root, tmp_path):
    env = dict(PYTHON=stub(tmp_path / "python3", BARE), LOG="/dev/null")
    lines = launch(root, "install", **env)
    assert lines[2].endswith("-r requirements.txt -r requirements-dev.txt")

def test_the_demo_trains_with_every_algorithm_that_is_there(root):
    text = "\n".join(launch(root, "demo"))
    for path in ROOT.glob("*.py"):
        assert f" {path.name} " in text
    assert text.index("demo_world.py") < text.index("prepare_data.py") < text.index("cache_ref.py") < (
        text.index(" dpo.py")) < text.index("evaluate.py")


# ---- for real

@pytest.mark.slow
def test_a_recipe_in_stages_begins_where_it_was_left(root):
    name = "compo-mistral-7b"
    command = ["recipe", name, "--run", "--seed", "3"]
    assert scripts(launch(root, *command)) == ["prepare_data.py", "cache_ref.py", "cache_ref.py", "dpo.py", "compo.py"]
    (root / f"data/{name}/clean").mkdir(parents=True)
    assert scripts(launch(root, *command)) == ["cache_ref.py", "dpo.py", "compo.py"]
    (root / f"out/{name}-clean/final").mkdir(parents=True)
    line, = launch(root, *command)
    assert " compo.py " in line and line.endswith(" --seed 3")

@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_first_stage_of_a_recipe_and_the_next_does_not_begin(root, number):
    """Ctrl-C and a closed terminal too: the stage is a process group of its own, which gets neither from the terminal."""
    (root / "data/compo-mistral-7b/clean").mkdir(parents=True)
    (root / "dpo.py").write_text("import os, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(os.write(1, b'saved\\n') - 6))\n"
                                 "os.write(1, b'ready\\n')\ntime.sleep(60)\n")
    env = CLEAN | dict(PYTHON=sys.executable, NPROC="1")
    process = subprocess.Popen([root / "launch.sh", "recipe", "compo-mistral-7b", "--run"], env=env, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == 143 and rest == b"saved\n"

def test_a_term_signal_ends_a_demo_and_the_process_that_it_waits_for(root):
    (root / "tests/demo/demo_world.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([root / "launch.sh", "demo"], env=CLEAN | dict(PYTHON=sys.executable), stderr=subprocess.DEVNULL)
    log, end = root / "out/demo/demo.log", time.time() + 60
    while not (log.exists() and log.read_text().strip()) and time.time() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)

@pytest.mark.slow
@pytest.mark.parametrize("words", [["wait.py"], ["plan", "MODEL"], ["recipe", "zephyr-7b", "--run"]], ids=["a script", "plan", "a recipe"])
def test_signals_and_exit_status_pass_through(root, words):
    for name in ("wait.py", "dpo.py", "tests/bench/plan.py"):
        (root / name).write_text("import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
                                 "print('ready', flush=True)\ntime.sleep(60)\n")
    (root / "data/zephyr-7b").mkdir(parents=True)
    env = CLEAN | dict(PYTHON=sys.executable, NPROC="1")
    process = subprocess.Popen([root / "launch.sh", *words], env=env, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 7

@pytest.mark.slow
def test_a_term_signal_ends_cache_ref_and_nothing_runs_after_it(root):
    (root / "cache_ref.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n"
                                       "class Args:\n    model: str\n    data: str\n")
    (root / "train.py").write_text("print('load_reference(')")
    env = CLEAN | dict(PYTHON=sys.executable, NPROC="1")
    process = subprocess.Popen([root / "launch.sh", "train.py", *FLAGS], env=env, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=20)  # returns when nobody holds the pipe any more
    assert process.returncode == 143 and rest == b""

@pytest.mark.slow
def test_a_wrong_flag_is_one_line_before_anything_runs(root):
    line, = launch(root, "dpo.py", *FLAGS, "--learning_rte", "1", rc=1, DRY_RUN="", NPROC="2")
    assert line.startswith("error: ") and "--learning_rte" in line

@pytest.mark.slow
def test_a_policy_is_trained_against_another_reference_whose_cache_is_made_once(root, tiny_model, tiny_data):
    policy, reference = tiny_model("llama", seed=1), tiny_model("llama")
    data = tiny_data(policy, random_pairs([(3, 4, 5)] * 6), random_pairs([(3, 4, 5)] * 2, seed=1))
    flags = ["--model", policy, "--reference", reference, "--data", data, "--out", str(root / "out"), "--log_every", "1"]
    first, second = launch(root, "dpo.py", *flags)
    output = launch(root, "dpo.py", *flags, DRY_RUN="")
    folder, = Path(data).glob("ref-*")
    assert f"{folder} is complete" in output and f"final: {root}/out/final" in output
    step_0 = json.loads((root / "out/log.jsonl").read_text().splitlines()[0])
    assert abs(step_0["eval/rewards/chosen"]) > 0.1  # of the policy itself it would be 0
    assert launch(root, "dpo.py", *flags) == [second]

@pytest.mark.slow
@pytest.mark.torchrun
def test_two_processes_really_run(root):
    (root / "tiny.py").write_text(
        "import os, torch, torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "x = torch.ones(1)\ndist.all_reduce(x)\n"
        "line = f'{dist.get_rank()} {int(x)} {os.environ[\"OMP_NUM_THREADS\"]}\\n'\n"
        "os.write(1, line.encode())  # whole: print may mix with the other process\ndist.destroy_process_group()\n")
    lines = launch(root, "tiny.py", DRY_RUN="", NPROC="2")
    assert {f"{rank} 2 {max(1, CORES // 2)}" for rank in (0, 1)} <= set(lines)

@pytest.mark.slow
def test_fast_tests_come_first_and_the_exit_status_is_pytests(root):
    (root / "requirements-dev.txt").write_text("pytest")
    (root / "tests").mkdir(exist_ok=True)
    shutil.copy(ROOT / "tests/conftest.py", root / "tests")
    (root / "tests/test_it.py").write_text(
        "import pytest\n@pytest.mark.slow\ndef test_one(): pass\ndef test_two(): pass\ndef test_bad(): assert 0\n")
    lines = launch(root, "test", "-v", "-W", "ignore", "-k", "one or two", DRY_RUN="")
    order = [line.split("::")[1].split()[0] for line in lines if "::" in line]
    assert order == ["test_two", "test_one"] and "2 passed" in lines[-1]
    assert "1 failed" in launch(root, "test", "-W", "ignore", DRY_RUN="", rc=1)[-1]
    launch(root, "test", "-k", "nothing", DRY_RUN="", rc=5)
