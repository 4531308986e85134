"""Every script once on this machine: python tests/bench/gpu_check.py --size 0.5B    (under four minutes on one H100)

Makes a randomly initialised model of a real shape and random pairs, and then does what a user would (through torchrun if there are
several GPUs), in bfloat16 on a GPU and float32 on a CPU: prepare_data.py; cache_ref.py with sketches and the split by noise; all six
algorithms, dpo.py in its layouts, with both checkpointings, --compile, --zero 3 and LoRA; a run that is resumed; evaluate.py with
samples. Start-up is most of the time, so --jobs of them run at once, on one GPU as forks of a process that has imported the packages
(the first, prepare_data.py, starts as a user starts it). Checks what must hold on every device:

    no script stops: stored log-probs are those of the policy before its first step, and final/ gives those of the policy at the end;
    the runs of dpo.py on the same weights agree on log-probs and gradient norm;
    the host waits for the GPU nowhere between two micro-batches (torch.cuda.set_sync_debug_mode);
    a run continued from a checkpoint ends with the weights of the run that was not interrupted.

Prints a Markdown table of the runs (tokens/s and MFU if --jobs is 1; tests/bench/gpu.py measures more), one of seconds per step of
compo.py for a head of Mistral's shape, and exits with status 1 if a check fails, after all have run.
Sizes: tiny (2 layers, for CI), 0.5B, 1.5B, 3B, 7B, 8B.
"""
import argparse
import functools
import json
import math
import multiprocessing
import os
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SIZES = {  # hidden, MLP, layers, heads, key-value heads, vocabulary: shapes of Qwen2.5 0.5B to 7B and Llama-3.1 8B
    "tiny": (64, 128, 2, 4, 2, 1000), "0.5B": (896, 4864, 24, 14, 2, 151936), "1.5B": (1536, 8960, 28, 12, 2, 151936),
    "3B": (2048, 11008, 36, 16, 2, 151936), "7B": (3584, 18944, 28, 28, 4, 152064), "8B": (4096, 14336, 32, 32, 8, 128256)}
PEAKS = dict(A100=312, H100=989, H200=989, B200=2250, MI300X=1307, L40S=362)  # TFLOP/s, bfloat16, dense
FULL = ["--activation_checkpointing", "full"]
RUNS = {  # name: script, flags besides those that all trainings share
    "packed": ["dpo.py"], "concatenated": ["dpo.py", "--layout", "concatenated"], "separate": ["dpo.py", "--layout", "separate"],
    "full compiled": ["dpo.py", *FULL, "--compile"], "selective": ["dpo.py", "--activation_checkpointing", "selective"],
    "zero 3": ["dpo.py", "--zero", "3"], "LoRA": ["dpo.py", "--lora_rank", 8], "DPO-norm": ["dpo_norm.py"], "SimPO": ["simpo.py"],
    "WPO": ["wpo.py"], "AuxDPO": ["auxdpo.py"], "AuxDPO per pair full": ["auxdpo.py", "--delta", "per_pair", *FULL],
    "ComPO": ["compo.py", "--max_pairs", 3, "--perturbations", 100, "--gate", 0]}
NOISE = 30  # nats; every fourth pair has responses of the same length, and a random model hardly tells them apart


def make_model(folder, size):
    """A Llama of this shape with random weights, saved as bfloat16, and a tokenizer of 500 words -> numbers in the blocks and
    in the output head."""
    hidden, mlp, layers, heads, kv_heads, vocabulary = SIZES[size]
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=size not in ("7B", "8B"),
        max_position_embeddings=8192, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a GPU draws 8B normals in seconds
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(500))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>",
                                         eos_token="</s>").save_pretrained(folder)
    return sum(weight.numel() for weight in model.model.layers.parameters()), model.lm_head.weight.numel()


def make_pairs(path, count, tokens):
    """Random words: a quarter to a half of `tokens` in the prompt and in each response."""
    rng = random.Random(0)

    def length():
        return rng.randint(tokens // 4, tokens // 2)

    def text(words):
        return " ".join(f"w{rng.randrange(500)}" for _ in range(words))
    with open(path, "w") as file:
        for i in range(count):
            chosen = length()
            rejected = chosen if i % 4 == 0 else length()
            file.write(json.dumps(dict(prompt=text(length()) + " ", chosen=text(chosen), rejected=text(rejected))) + "\n")


SERVER = multiprocessing.get_context("forkserver")  # a process without CUDA, which can be forked
PACKAGES = ["datasets", "torch._dynamo", "torch.distributed.checkpoint", "transformers.core_model_loading",
            "transformers.models.llama.modeling_llama", "transformers.generation"]  # none of them looks for a GPU
SERVER.set_forkserver_preload(PACKAGES)


@functools.cache
def forks_work():
    """Does a fork reach the device? If not, every script is started as a user starts it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    process = SERVER.Process(target=torch.zeros, args=(1,), kwargs=dict(device=device))
    process.start()
    process.join()
    return process.exitcode == 0


def forked(script, words, log, environment):
    """In a fork: what `python SCRIPT WORDS` does; both outputs go to the file log."""
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    sys.argv = [script, *words]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def run(script, *flags):
    """Run a script of ours, through torchrun if there are several GPUs -> what it said if it failed, else None."""
    gpus, start, words = torch.cuda.device_count(), time.time(), [str(flag) for flag in flags]
    with tempfile.NamedTemporaryFile("r") as log:
        if gpus > 1 or script == "prepare_data.py" or not forks_work():  # this script has processes of its own
            launch = [] if script == "prepare_data.py" else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
            status = subprocess.run([sys.executable, *launch, str(ROOT / script), *words], stdout=open(log.name, "w"),
                                    stderr=subprocess.STDOUT).returncode
        else:
            process = SERVER.Process(target=forked, args=(script, words, log.name, {}))
            process.start()
            process.join()
            status = process.exitcode
        print(f"{script} {' '.join(words)}: {time.time() - start:.0f} s", flush=True)
        if status:
            said = log.read()
            print(said[-3000:], flush=True)
            return f"{script} ended with status {status}: {said.strip().splitlines()[-1][-200:]}"


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def peak_flops():
    """FLOP/s that a device of this machine could make in bfloat16; None if it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((tera * 1e12 for gpu, tera in PEAKS.items() if gpu in name), None)


def mfu(line, blocks, head):
    """Model FLOPs of a line of the log / peak FLOPs of the GPUs (arXiv 2204.02311), in per cent; None if the peak is not known.
    The head sees response tokens only; attention's own products and what is computed twice are not counted."""
    peak = peak_flops()
    if peak is None:
        return None
    responses = line["pairs"] * (line["lengths/chosen"] + line["lengths/rejected"])
    work, seconds = 6 * (blocks * line["tokens"] + head * responses), line["tokens"] / line["tokens/s"]
    return 100 * work / seconds / torch.cuda.device_count() / peak


def check_in_process(model, data, max_tokens):
    """A micro-batch forward and backward in this process; PyTorch raises at a call that waits for the GPU."""
    import dpo
    args = dpo.Args(model=str(model), data=str(data), max_tokens=max_tokens)
    _, _, device, dtype = dpo.start_process_group("auto")
    splits = dpo.load_data(args)
    empty, weights = dpo.read_model(args.model, args)
    dpo.load_reference(dpo.content_hashes(weights, splits, dtype, args), splits, args)
    policy = dpo.build_policy(empty, weights, dpo.token_logps, device, dtype, args)
    cuda = device.type == "cuda"
    for mode in ("default", "default", "error", "error"):  # the first calls allocate, compile and load kernels
        if cuda:
            torch.cuda.set_sync_debug_mode(mode)
        losses, _ = dpo.pair_losses(policy, np.array([0, 1]), splits["train"], args)
        losses.sum().backward()
    if cuda:
        torch.cuda.set_sync_debug_mode("default")
    print(f"no wait for the device between micro-batches: {'yes' if cuda else 'a CPU, nothing to see'}")
    dist.destroy_process_group()


def step_times(vocabulary, width, tokens, perturbations):
    """Seconds of a step of compo.py on one pair, on one device, as rows of a table. Logits are spread like a language model's:
    standard deviation 3, and the targets among the likely tokens."""
    import compo
    if not dist.is_initialized():
        compo.start_process_group("float32")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, generator=random)
    weight = torch.randn(vocabulary, width, device=device, generator=random) * 3 / math.sqrt(width)
    targets = (hidden @ weight.T).topk(20)[1][torch.arange(tokens), torch.arange(tokens) % 20]
    sides = torch.zeros(2, tokens, device=device)  # the first half of the tokens is the chosen response
    sides[0, :tokens // 2] = sides[1, tokens // 2:] = 1
    batch = SimpleNamespace(hidden=hidden.cpu(), targets=targets, sides=sides)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rows = []
    for estimator in ("gaussian", "span", "exact"):
        args = compo.Args(model="", data="", perturbations=perturbations, estimator=estimator)
        head, seconds = torch.nn.Linear(width, vocabulary, bias=False, device=device), []
        head.weight.data.copy_(weight)
        head.config = SimpleNamespace()
        head.register_buffer("accepted_steps", torch.tensor(0))
        for step in range(3):
            synchronize()
            start = time.time()
            with torch.no_grad():
                compo.update(head, batch, step, args)
            synchronize()
            seconds.append(time.time() - start)
        rows.append((estimator, sorted(seconds)[1]))
    return rows


def jobs_that_fit(model, max_tokens):
    """How many trainings the GPU holds at once, at most four, by the formula of tests/bench/plan.py and a fifth more; one on a CPU."""
    if not torch.cuda.is_available():
        return 1
    import plan
    parts, _ = plan.plan(transformers.AutoConfig.from_pretrained(model), torch.cuda.device_count(), tokens=max_tokens)
    free = torch.cuda.mem_get_info()[0]
    return int(min(4, max(1, free // (1.2 * sum(parts.values()) + 2**30))))


def train_all(names, folder, flags, noisy, sketch, jobs):
    """{name: what went wrong, or None} of the trainings, several at a time. The one that is resumed later begins first."""
    def one(name):
        script, *more = RUNS[name]
        shared = noisy if script == "compo.py" else flags
        if name == "packed":
            more = [*more, "--save_every", flags[flags.index("--max_steps") + 1] // 2]
        return run(script, *shared, *(sketch if script == "auxdpo.py" else []), *more, "--out", folder / name)
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(names, pool.map(one, names)))


def differences(folder, names, cuda):
    """Failures: runs of dpo.py that train the same weights must agree before their first step and in its gradient."""
    failures, bound = [], 1e-2 if cuda else 1e-5
    first = {name: lines(folder / name)[0] | lines(folder / name)[1] for name in names}
    for name, line in first.items():
        for metric in ("eval/logps/chosen", "eval/logps/rejected", "grad_norm"):
            error = abs(line[metric] / first["packed"][metric] - 1)
            print(f"{name} against packed, {metric}: {error:.1e} relative")
            if not error < bound * (10 if metric == "grad_norm" else 1):
                failures.append(f"{name} differs from packed in {metric}: {line[metric]}")
    return failures


def resume(folder, flags, steps, cuda):
    """Failures of the run `packed`, taken back to its first checkpoint and continued."""
    out, path = folder / "packed", folder / "packed/final/model.safetensors"
    whole = load_file(path) if path.exists() else {}
    shutil.rmtree(out / "final")
    shutil.rmtree(out / f"step-{steps // 2 * 2:06d}")
    failure = run("dpo.py", *flags, "--save_every", steps // 2, "--out", out, "--resume")
    if failure:
        return [f"resumed: {failure}"]
    again = load_file(path) if whole else {}  # 8B is in several files
    difference = max([(whole[key].float() - again[key].float()).abs().max().item() for key in whole], default=0)
    print(f"resumed against uninterrupted: largest difference of a weight {difference:.1e}")
    return [f"a resumed run differs by {difference}"] if difference > (1e-3 if cuda else 0) else []


def print_runs(folder, names, jobs, blocks, head):
    print("| run | tokens/s | MFU % | peak GiB |\n|---|---|---|---|")
    for name in names:
        log = lines(folder / name)
        steady = [line for line in log[3:] if "tokens/s" in line] if jobs == 1 else []
        speed = sum(line["tokens/s"] for line in steady) / max(len(steady), 1)
        known = [mfu(line, blocks, head) for line in steady]
        share = "" if not known or None in known else f"{sum(known) / len(known):.1f}"
        memory = max(line.get("memory/GiB", 0) for line in log)
        print(f"| {name} | {f'{speed:,.0f}' if speed else ''} | {share} | {f'{memory:.1f}' if memory else ''} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.5B" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--folder", type=Path, default=Path("out/gpu_check"), help="made anew, then removed")
    parser.add_argument("--tokens", type=int, default=0, help="of the longest prompt + response [1024, tiny: 64]")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=0, help="trainings at a time [what fits the GPU, at most 4; 1 on a CPU]")
    parser.add_argument("--extra", default="", help="flags for every training but ComPO's, e.g. '--shard_group 2'")
    parser.add_argument("--no_times", action="store_true", help="leave out the times of compo.py's step")
    parser.add_argument("--only", default=",".join(RUNS), help="these trainings, and packed")
    args = parser.parse_args()
    tokens = args.tokens or (64 if args.size == "tiny" else 1024)
    cuda, folder, batch, began = torch.cuda.is_available(), args.folder, 8 if args.size == "tiny" else 16, time.time()
    names = [name for name in RUNS if name in ("packed", *args.only.split(","))]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    blocks, head = make_model(folder / "model", args.size)
    torch.cuda.empty_cache()  # what this process does not use is for the scripts
    make_pairs(folder / "pairs.jsonl", 4 * batch * args.steps // 3 + 40, tokens)
    model, data = folder / "model", folder / "data"
    common = ["--model", model, "--data", data, "--max_tokens", 8 * tokens]
    sketch = ["--sketch_dim", 64 if args.size == "tiny" else 4096]
    failure = run("prepare_data.py", "--dataset", folder / "pairs.jsonl", "--model", model, "--out", data, "--plain",
                  "--val_fraction", 0.1) or run("cache_ref.py", *common, *sketch, "--noise_margin", NOISE)
    if failure:
        raise SystemExit(f"error: {failure}")
    flags = [*common, "--batch_size", batch, "--max_steps", args.steps, "--learning_rate", 1e-5, "--log_every", 1,
             "--eval_every", 1000, *args.extra.split()]
    noisy = ["--model", model, "--data", data / "noisy", "--max_tokens", 8 * tokens]
    jobs = args.jobs or jobs_that_fit(model, 8 * tokens)
    ended = train_all(names, folder, flags, noisy, sketch, jobs)
    failures = [f"{name}: {what}" for name, what in ended.items() if what]
    good = [name for name in names if not ended[name]]
    if "packed" not in good:
        raise SystemExit("error: " + "; ".join(failures))

    same = [name for name in good if RUNS[name][0] == "dpo.py" and name != "LoRA"]
    failures += differences(folder, same, cuda)
    compared = ",".join(str(folder / name) for name in good if name in ("SimPO", "LoRA"))
    reward = folder / "reward.py"
    reward.write_text("def words(prompt, response):\n    return len(response.split())\n")
    evaluating = ["--models", f"{model},{compared}".rstrip(","), "--reference", model, "--data", data, "--out", folder / "results",
                  "--samples", 4, "--best_of", 2, "--reward", f"{reward}:words", "--max_new_tokens", 16, "--max_tokens", 8 * tokens]
    with ThreadPoolExecutor(min(jobs, 2)) as pool:
        table = pool.submit(run, "evaluate.py", *evaluating)
        failures += resume(folder, flags, args.steps, cuda)
        failures += filter(None, [table.result()])

    device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if cuda else "CPU"
    print(f"\n{(blocks + head) / 1e9:.2f}B parameters in matrices, {device}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}, {'bfloat16' if cuda else 'float32'}, {tokens}-token texts, {jobs} at a time {args.extra}\n")
    print_runs(folder, good, jobs, blocks, head)
    if args.size not in ("7B", "8B"):  # all of it on one GPU
        try:
            check_in_process(model, data, 8 * tokens)
        except RuntimeError as error:
            torch.cuda.set_sync_debug_mode("default")
            failures.append(f"between micro-batches: {error}")
    shutil.rmtree(folder)
    if not args.no_times:
        shape = (32000, 4096, 400, 1800) if cuda else (2000, 256, 40, 200)
        print("\nHead {} x {}, {} response tokens, {} perturbations\n".format(*shape))
        print("| estimator | seconds per step of one pair |\n|---|---|")
        for estimator, seconds in step_times(*shape):
            print(f"| {estimator} | {seconds:.3f} |")
    if cuda:
        print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    print(f"{time.time() - began:.0f} s in all")
    if failures:
        raise SystemExit("error: " + "; ".join(failures))
    print("\nall checks passed")


if __name__ == "__main__":
    main()
