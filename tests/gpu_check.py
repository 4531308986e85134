"""The whole pipeline on this machine: python tests/gpu_check.py --size 0.5B

Makes a randomly initialised model of a real shape and random pairs, then runs prepare_data.py, cache_ref.py and
dpo.py as a user would (through torchrun if there are several GPUs), in bfloat16 on a GPU and float32 on a CPU,
in all three layouts, and checks what must hold on every device:

    the stored log-probs are those of the policy before its first step (the scripts stop if they are not);
    the layouts agree on log-probs and gradient norm;
    the host waits for the GPU nowhere between two micro-batches (torch.cuda.set_sync_debug_mode);
    a run continued from a checkpoint ends with the weights of the run that was not interrupted.

Prints a Markdown table of tokens/s, MFU and peak memory for each layout of dpo.py and for the other scripts, one of
seconds per step of compo.py for a head of Mistral's shape, and exits with status 1 if a check fails.
Sizes: tiny (2 layers, for CI), 0.5B, 1.5B, 3B, 8B.
"""
import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).parents[1]
SIZES = {  # hidden, MLP, layers, heads, key-value heads, vocabulary: shapes of Qwen2.5 0.5B to 7B and Llama-3.1 8B
    "tiny": (64, 128, 2, 4, 2, 1000), "0.5B": (896, 4864, 24, 14, 2, 151936), "1.5B": (1536, 8960, 28, 12, 2, 151936),
    "3B": (2048, 11008, 36, 16, 2, 151936), "7B": (3584, 18944, 28, 28, 4, 152064), "8B": (4096, 14336, 32, 32, 8, 128256)}


PEAKS = dict(A100=312, H100=989, H200=989, B200=2250, MI300X=1307, L40S=362)  # TFLOP/s, bfloat16, dense


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
    """Random words: half of `tokens` in the prompt, a quarter to a half in each response."""
    rng = random.Random(0)

    def text(low, high):
        return " ".join(f"w{rng.randrange(500)}" for _ in range(rng.randint(low, high)))
    with open(path, "w") as file:
        for _ in range(count):
            row = dict(prompt=text(tokens // 4, tokens // 2) + " ", chosen=text(tokens // 4, tokens // 2),
                       rejected=text(tokens // 4, tokens // 2))
            file.write(json.dumps(row) + "\n")


def run(script, *flags):
    """Run a script of ours, through torchrun if there are several GPUs; its output on failure."""
    gpus = torch.cuda.device_count()
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    launch = [] if script == "prepare_data.py" else launch
    start = time.time()
    command = [sys.executable, *launch, str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"{script} {' '.join(map(str, flags))}: {time.time() - start:.0f} s", flush=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}\nerror: {script} ended with status {done.returncode}")


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
    sys.path.insert(0, str(ROOT))
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
    sys.path.insert(0, str(ROOT))
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
    batch = SimpleNamespace(ids=["pair"], hidden=hidden.cpu(), targets=targets, sides=sides)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rows = []
    for estimator in ("gaussian", "span", "exact"):
        args = compo.Args(model="", data="", perturbations=perturbations, estimator=estimator)
        head, seconds = torch.nn.Linear(width, vocabulary, bias=False, device=device), []
        head.weight.data.copy_(weight)
        head.config = SimpleNamespace()
        head.register_buffer("moved", torch.zeros(3, device=device))
        for step in range(3):
            synchronize()
            start = time.time()
            with torch.no_grad():
                compo.update(head, batch, step, args)
            synchronize()
            seconds.append(time.time() - start)
        rows.append((estimator, sorted(seconds)[1]))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.5B" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--folder", type=Path, default=Path("out/gpu_check"), help="made anew, then removed")
    parser.add_argument("--tokens", type=int, default=0, help="of the longest prompt + response [2048, tiny: 64]")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--extra", default="", help="flags for every run of dpo.py, e.g. '--compile'")
    parser.add_argument("--also", default="dpo_norm.py,simpo.py,wpo.py,auxdpo.py,full,full compiled,auxdpo full",
                        help="timed too, packed: other scripts; full: activation checkpointing")
    args = parser.parse_args()
    tokens = args.tokens or (64 if args.size == "tiny" else 2048)
    cuda, folder, batch = torch.cuda.is_available(), args.folder, 8 if args.size == "tiny" else 32
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    blocks, head = make_model(folder / "model", args.size)
    torch.cuda.empty_cache()  # what this process does not use is for the scripts
    make_pairs(folder / "pairs.jsonl", batch * args.steps + 40, tokens)
    model, data = folder / "model", folder / "data"
    run("prepare_data.py", "--dataset", folder / "pairs.jsonl", "--model", model, "--out", data, "--plain",
        "--val_fraction", 0.05)
    common = ["--model", model, "--data", data, "--max_tokens", 16 * tokens]
    sketch = ["--sketch_dim", 64 if args.size == "tiny" else 4096]
    run("cache_ref.py", *common)
    if "auxdpo" in args.also:
        run("cache_ref.py", *common, *sketch)
    flags = [*common, "--batch_size", batch, "--max_steps", args.steps, "--learning_rate", 1e-5, "--log_every", 1,
             "--eval_every", 1000, *args.extra.split()]
    rows, first = [], {}
    variants = {  # what is hard on FSDP: several graphs at a time, and checkpoints within compiled blocks
        "full": ("dpo.py", "--activation_checkpointing", "full"),
        "full compiled": ("dpo.py", "--activation_checkpointing", "full", "--compile"),
        "auxdpo full": ("auxdpo.py", "--activation_checkpointing", "full", "--max_tokens", 4 * tokens)}
    also = {name: variants.get(name, (name,)) for name in filter(None, args.also.split(","))}
    for layout in ("packed", "concatenated", "separate", *also):
        if layout in also:
            script, *more = also[layout]
            run(script, *flags, "--out", folder / layout, *(sketch if script == "auxdpo.py" else []), *more)
        else:
            run("dpo.py", *flags, "--layout", layout, "--out", folder / layout)
        log = lines(folder / layout)
        if layout not in also:
            first[layout] = log[0] | log[1]  # evaluation at step 0, first step
        steady = [line for line in log[3:] if "tokens/s" in line]
        speed = sum(line["tokens/s"] for line in steady) / len(steady)
        known = [mfu(line, blocks, head) for line in steady]
        rows.append((layout, speed, None if None in known else sum(known) / len(known), steady[-1]["memory/GiB"]))
    bound, failures = 1e-2 if cuda else 1e-5, []
    for layout, line in first.items():
        for name in ("eval/logps/chosen", "eval/logps/rejected", "grad_norm"):
            error = abs(line[name] / first["packed"][name] - 1)
            print(f"{layout} against packed, {name}: {error:.1e} relative")
            if not error < bound * (10 if name == "grad_norm" else 1):
                failures.append(f"{layout} differs from packed in {name}: {line[name]}")

    saving = [*flags, "--out", folder / "resumed", "--save_every", args.steps // 2]
    run("dpo.py", *saving)
    whole = load_file(folder / "resumed/final/model.safetensors") if args.size != "8B" else {}
    shutil.rmtree(folder / "resumed/final")
    shutil.rmtree(folder / f"resumed/step-{args.steps // 2 * 2:06d}", ignore_errors=True)
    run("dpo.py", *saving, "--resume")
    again = load_file(folder / "resumed/final/model.safetensors") if args.size != "8B" else {}
    difference = max([(whole[key].float() - again[key].float()).abs().max().item() for key in whole], default=0)
    print(f"resumed against uninterrupted: largest difference of a weight {difference:.1e}")
    if difference > (1e-3 if cuda else 0):
        failures.append(f"a resumed run differs by {difference}")

    device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if cuda else "CPU"
    print(f"\n{(blocks + head) / 1e9:.2f}B parameters in matrices, {device}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}, {'bfloat16' if cuda else 'float32'}, {tokens}-token rows {args.extra}\n")
    print("| layout, or script | tokens/s | MFU % | peak GiB |\n|---|---|---|---|")
    for layout, speed, share, memory in rows:
        print(f"| {layout} | {speed:,.0f} | {'' if share is None else f'{share:.1f}'} | {memory:.1f} |")
    if args.size != "8B":  # all of it on one GPU
        check_in_process(model, data, 16 * tokens)
    shutil.rmtree(folder)
    shape = (32000, 4096, 400, 1800) if cuda else (2000, 256, 40, 200)
    print("\nHead {} x {}, {} response tokens, {} perturbations\n".format(*shape))
    print("| estimator | seconds per step of one pair |\n|---|---|")
    for estimator, seconds in step_times(*shape):
        print(f"| {estimator} | {seconds:.3f} |")
    if cuda:
        print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if failures:
        raise SystemExit("error: " + "; ".join(failures))
    print("\nall checks passed")


if __name__ == "__main__":
    main()
