"""A step of DPO on this device: ours in many variants against TRL's DPOTrainer, in slices of at most eight minutes.

    python tests/bench/gpu.py --list
    python tests/bench/gpu.py --slice speed15b [--budget 400] [--out results/gpu]
    python tests/bench/gpu.py --slice speed15b --size tiny --out out/gpu    (any machine, less than a minute)
    python tests/bench/gpu.py --host    the CPU's own work: making micro-batches and starting kernels (any machine)

A contender (ours, TRL) is a process of its own, and the variants of a slice take turns in it. All of them see the same
pairs of random ids, whose lengths are those of UltraFeedback, of hh or 2,000 + 1,000 tokens; the model has random weights
and the shape of a Qwen2.5. Weights and AdamW are float32, the computation is bfloat16 on a GPU and float32 on a CPU.
TRL has precomputed log-probs of the reference, no dropout and fused AdamW; its forward, collator and loss are called
directly under autocast, so that its Trainer's own overhead is not counted, and cuDNN's attention, which plans each new
shape for 0.1 s, is off as in ours, but for the variants called cudnn. With LoRA its base is bfloat16.

A variant is written in words: a layout and --max_tokens of ours or the pairs of a micro-batch of TRL; full, selective:
activation checkpointing; compile; zero2, zero3; lora; single: one table in attention; scatter: its gradients as autograd
adds them up, not as Gather does; kernel, loop: no tables (unpadded.py);
head: the output head and its loss compiled too; auxdpo: a step of auxdpo.py with random sketches; hh, long: pairs of these
lengths, not of the slice's. The variant compo is compo.py on one pair with a head of Mistral's shape. Columns:

    s fresh      median of the steps on batches never seen before, whose shapes are new to the allocator and to compile
    s repeated   the faster of two steps on one of these batches again
    first s      the first step, with what is compiled or chosen in it
    peak GiB     allocated, after two steps to warm up
    MFU %        6 x (parameters in the blocks' matrices x tokens + those of the head x response tokens) / seconds /
                 peak; a prompt counts once, attention's products and what is computed twice not at all; LoRA: 4 x
    busy %       time in which a kernel ran, of the time of a repeated step; behind it, how often the host waited
A variant that is marked * below is profiled: the kernels' time by kind stands under the table.
"""
import argparse
import copy
import functools
import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/bench")]

import bench  # noqa: E402
import gpu_check  # noqa: E402
import unpadded  # noqa: E402

PAIRS = dict(ultrafeedback=64, hh=128, long=16)  # of a step
SLICES = {  # name: (size, lengths, variants of ours, of TRL)
    # The first two are for one lease, a call each, with nothing else on the card; tests/bench/gpu_check.py comes after them.
    "lease15b": ("1.5B", "ultrafeedback",
                 ["packed 16384 compile*", "packed 16384 hh compile*", "packed 16384*", "packed 16384 compile head*",
                  "packed 16384 scatter*", "packed 16384 single", "packed 16384 hh"], ["trl 4", "trl 32 hh"]),
    "rest15b": ("1.5B", "ultrafeedback", ["packed 16384 full", "packed 16384 full auxdpo", "compo", "packed 16384 kernel compile*",
                                          "packed 16384 selective compile"], []),
    "speed15b": ("1.5B", "ultrafeedback", ["packed 16384*", "packed 8192", "packed 32768", "packed 16384 zero3"],
                 ["trl 4", "trl 8*", "trl 16", "trl 16 full", "trl 8 cudnn"]),
    "hh15b": ("1.5B", "hh", ["packed 16384*", "packed 8192", "packed 32768"], ["trl 8", "trl 16", "trl 32", "trl 32 full"]),
    "long15b": ("1.5B", "long", ["packed 16384*", "packed 16384 full", "packed 32768 full"],
                ["trl 1", "trl 2", "trl 4", "trl 4 full"]),
    "memory15b": ("1.5B", "ultrafeedback", ["packed 16384", "packed 16384 selective", "packed 16384 full", "packed 32768 selective",
                                            "packed 32768 full", "packed 8192 zero3 full"], ["trl 8 full", "trl 32 full"]),
    "layouts15b": ("1.5B", "ultrafeedback", ["packed 16384*", "packed 16384 single", "packed 16384 kernel*",
                                             "packed 16384 kernel compile*", "concatenated 16384", "separate 16384"], []),
    "compile15b": ("1.5B", "ultrafeedback", ["packed 16384*", "packed 16384 compile*", "packed 16384 full compile",
                                             "packed 16384 zero3 compile", "packed 16384 compile head*"], []),
    "full3b": ("3B", "ultrafeedback", ["packed 16384 selective*", "packed 16384 full", "packed 32768 full"],
               ["trl 4 full", "trl 16 full"]),
    "lora7b": ("7B", "ultrafeedback", ["packed 16384 lora full*", "packed 8192 lora selective"],
               ["trl 8 lora full"]),
    "head": ("1.5B", "ultrafeedback", [], []),
}
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # of all contenders
SLOWEST = 140  # seconds after which a variant is given up
LARGE = dict(full3b=140e9, lora7b=140e9)  # bytes of a card that a slice needs
KINDS = {  # what a kernel is for, by its name; the first that fits
    "compiled": "^triton", "attention": "flash|fmha|sdpa|attention", "matrix products": "gemm|nvjet|cutlass|xmma|cublas|::(add)?mm",
    "softmax and loss": "softmax|nll|logsumexp", "optimiser": "adam|lpnorm",
    "copies": "copy|memcpy|memset|cat|index|gather|scatter|fill", "reductions": "reduce",
    "elementwise": "elementwise|vectorized|multi_tensor"}


# ---------------------------------------------------------------------- what is trained on
def lengths_of(work, count, rng):
    """Tokens (count, 3) of prompt, chosen and rejected."""
    if work == "ultrafeedback":  # means 180, 350 and 350; at most 2048 in a text
        medians, spread = np.array([110, 285, 285]), np.array([1.0, 0.65, 0.65])
        return np.clip(medians * np.exp(spread * rng.standard_normal((count, 3))), 4, 1024).astype(int)
    middle = np.array(dict(hh=(175, 57, 57), long=(2000, 1000, 1000))[work])
    return (middle * rng.uniform(2 / 3, 4 / 3, (count, 3))).astype(int)


def make_batches(work, count, pairs, vocabulary, tiny):
    """-> list of `count` batches of pairs with random ids; tiny: of a sixteenth of the length."""
    rng, batches = np.random.default_rng(0), []
    for _ in range(count):
        lengths = lengths_of(work, pairs, rng)
        lengths = np.maximum(lengths // 16, 2) if tiny else lengths
        batch = []
        for row in lengths:
            ids = [rng.integers(3, vocabulary, size).tolist() for size in row]
            batch.append(dict(zip(("prompt", "chosen", "rejected"), ids)))
        batches.append(batch)
    return batches


# ---------------------------------------------------------------------- contenders: words -> step(rows)
def settings(words, folder, tiny, script):
    """Args of a script for a variant in words."""
    layout, tokens, *how = words
    recomputed = [word for word in how if word in ("selective", "full")]
    zero = [word[-1] for word in how if word.startswith("zero")]
    return script.Args(model=str(folder), data="", layout=layout, max_tokens=int(tokens) // (16 if tiny else 1),
                    activation_checkpointing=recomputed[0] if recomputed else "off", compile="compile" in how,
                    zero=zero[0] if zero else "auto", lora_rank=16 if "lora" in how else 0)


def ours(folder, pairs, tiny):
    """Reads the model once; a variant is a policy of its own, made as dpo.py makes it."""
    import datasets
    import auxdpo
    import dpo
    _, _, device, dtype = dpo.start_process_group("auto")
    model, weights = dpo.read_model(str(folder), dpo.Args(model=str(folder), data=""))
    lengths = np.array([[len(pair[side]) for side in ("prompt", "chosen", "rejected")] for pair in pairs])
    rows = datasets.Dataset.from_list([pair | dict(id=str(i)) for i, pair in enumerate(pairs)])
    split = dict(pairs=rows, lengths=lengths, ref_logps=np.zeros((len(pairs), 2), np.float32),
                 responses=np.arange(2 * len(pairs)).reshape(-1, 2))
    auxdpo.find_sketch = lambda _, args: np.random.default_rng(0).standard_normal((2 * len(pairs), args.sketch_dim), np.float32)
    tables, gathered, gather, head_pass = dpo.attention_tables, dpo.gathered_attention, dpo.Gather, dpo.head_pass

    def make(words):
        script = auxdpo if "auxdpo" in words else dpo
        args = settings(words, folder, tiny, script)
        dpo.head_pass = torch.compile(head_pass, dynamic=True) if "head" in words else head_pass
        dpo.gathered_attention = gathered
        dpo.Gather = types.SimpleNamespace(apply=scattered) if "scatter" in words else gather
        dpo.attention_tables = functools.partial(tables, shortest=0) if "single" in words else tables
        if "kernel" in words or "loop" in words:
            unpadded.use(dpo, "kernel" in words)
        if hasattr(weights, "peft_config"):  # of the variant before
            weights.delete_adapter("default")
        policy = script.build_policy(copy.deepcopy(model), weights, script.token_logps, device, dtype, args)
        if script is dpo:
            return bench.our_step(policy, split, args)
        train = dict(split)
        auxdpo.prepare_delta(dict(train=train, val=dict(pairs=[])), "", args)
        return auxdpo_step(policy, train, args)
    return make


def scattered(rows, index, cells):
    """What Gather gives, with the gradient of torch, which index_add makes."""
    return rows.index_select(0, index)


def auxdpo_step(policy, split, args):
    """our_step of bench.py for auxdpo.py."""
    import auxdpo
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-6, fused=True)

    def step(rows):
        parts = auxdpo.micro_batches(np.array(rows), split["lengths"], args, 1)
        margins, computed = auxdpo.first_pass(policy, parts, split, args)
        auxdpo.update_delta(np.array(rows), margins, split, args)
        for i, (part, logps) in enumerate(computed):
            policy.set_reshard_after_backward(policy.reshards or i == len(parts) - 1)
            losses, _ = auxdpo.pair_losses(policy, part, split, args, logps)
            (losses.sum() / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0).full_tensor().item()
        optimizer.step()
        optimizer.zero_grad()
    return step


def trl(folder, pairs, tiny):
    """A trainer serves all sizes of micro-batch; another one is made for other settings."""
    last = {}

    def make(words):
        _, size, *how = words
        if last.get("how") != how:
            last.clear()
            empty()
            last["step"] = bench.trl(folder, pairs, int(size), how)
            last["how"] = how
        return functools.partial(last["step"], size=int(size))
    return make


# ---------------------------------------------------------------------- measuring
def empty():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed(step, rows):
    """Wall seconds of a step, to the end of its last kernel."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    wait()
    start = time.perf_counter()
    step(rows)
    wait()
    return time.perf_counter() - start


def busy(events):
    """Seconds in which at least one of these events of a trace, with ts and dur in microseconds, ran."""
    total = end = 0.0
    for event in sorted(events, key=lambda event: event["ts"]):
        start, stop = max(event["ts"], end), event["ts"] + event["dur"]
        total += max(0.0, stop - start)
        end = max(end, stop)
    return total / 1e6


def trace(call):
    """-> (events of kernels, or without a GPU of operators; how often the host waited for the device), by torch.profiler."""
    cuda, kinds = torch.cuda.is_available(), torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if cuda else kinds.CPU]) as found:
        call()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        found.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    wanted = ("kernel", "gpu_memcpy", "gpu_memset") if cuda else ("cpu_op",)
    waits = [event for event in events if re.match("cu(da)?(Stream|Device|Event|Ctx)Synchronize", event.get("name", ""))]
    return [event for event in events if event.get("cat") in wanted], len(waits)


def by_kind(events):
    """{kind of kernel: share of the sum of their times}, largest first."""
    sums = {}
    for event in events:
        name = event["name"].lower()
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")
        sums[kind] = sums.get(kind, 0.0) + event["dur"]
    whole = sum(sums.values())
    return {kind: sums[kind] / whole for kind in sorted(sums, key=sums.get, reverse=True)}


def longest_kernels(events, count=12):
    """[(name, share of the sum of all times, calls)] of the kernels that take longest."""
    sums, calls = Counter(), Counter()
    for event in events:
        sums[event["name"]] += event["dur"]
        calls[event["name"]] += 1
    return [(name, time / sums.total(), calls[name]) for name, time in sums.most_common(count)]


def measure(step, batches):
    """Steps on the batches (arrays of rows) -> {column: value}; the last batch comes again at the end."""
    import dpo
    from torch._dynamo.utils import counters
    counters.clear()
    first = timed(step, batches[0])
    timed(step, batches[1])
    graphs = counters["stats"]["unique_graphs"]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    fresh = [timed(step, rows) for rows in batches[2:]]
    again = [timed(step, batches[-1]) for _ in range(2)]
    later = counters["stats"]["unique_graphs"] - graphs
    return dict(first=first, fresh=fresh, repeated=min(again), peak=dpo.peak_memory(), graphs=graphs, later=later)


def others():
    """How many other processes compute on this machine's GPUs; our own is one of them."""
    if not torch.cuda.is_available():
        return 0
    found = subprocess.run(["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"], capture_output=True, text=True).stdout
    return max(len(found.split()) - 1, 0)


def profile(step, rows, seconds):
    """What ran in a step that takes so many seconds without the profiler."""
    _, own = trace(int)  # the profiler waits too
    events, waits = trace(functools.partial(step, rows))
    return dict(busy=busy(events) / seconds, waits=waits - own, kinds=by_kind(events), longest=longest_kernels(events))


def work_of(variant, default):
    """Whose lengths the pairs of a variant have."""
    return next((word for word in variant.rstrip("*").split() if word in PAIRS), default)


def contender(args):
    """The process of a contender: a line of JSON for each variant. An error ends a variant, not those after it."""
    size, work, *both = slice_of(args)
    tiny, folder, variants = size == "tiny", Path(args.folder) / size, both[args.contender == "trl"]
    pairs, rows = [], {}
    for name in dict.fromkeys(work_of(variant, work) for variant in variants):
        batches = make_batches(name, 2 + args.rounds, 8 if tiny else PAIRS[name], gpu_check.SIZES[size][5], tiny)
        rows[name] = len(pairs) + np.arange(sum(map(len, batches))).reshape(len(batches), -1)
        pairs += sum(batches, [])
    if not folder.exists():
        gpu_check.make_model(folder, size)
        empty()
    make = (ours if args.contender == "ours" else trl)(folder, pairs, tiny)
    for variant in variants:
        result, step, batches = {}, None, rows[work_of(variant, work)]
        signal.signal(signal.SIGALRM, too_slow)
        signal.alarm(SLOWEST)
        try:
            if time.time() > args.until:
                raise TimeoutError("not reached")
            if variant == "compo":
                shape = (2000, 256, 40, 200) if tiny else (32000, 4096, 400, 1800)
                result = dict(shape=shape, estimators=gpu_check.step_times(*shape))
            else:
                step = make(variant.rstrip("*").split())
                result |= measure(step, batches)
            result["others"] = others()
            if variant.endswith("*"):
                result |= profile(step, batches[-1], result["repeated"])
        except torch.OutOfMemoryError:
            result["trouble"] = "out of memory"
        except Exception as error:
            result["trouble"] = f"{error}".strip().split("\n")[0][:100] or type(error).__name__
        signal.alarm(0)
        print("JSON " + json.dumps(dict(variant=variant.rstrip("*")) | result), flush=True)
        step = None
        empty()
        torch._dynamo.reset()


def too_slow(*_):
    raise TimeoutError(f"took more than {SLOWEST} s")


# ---------------------------------------------------------------------- the head alone
def head_times(size, tokens):
    """Rows of a table: seconds of the output head, forward and backward, on so many response tokens. Of each chunk but the last the
    logits are made twice, as in Policy of dpo.py; chunks of 2^26 numbers are what it has."""
    import dpo
    hidden_size, vocabulary = gpu_check.SIZES[size][0], gpu_check.SIZES[size][5]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    head = torch.nn.Linear(hidden_size, vocabulary, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(tokens, hidden_size, device=device, dtype=dtype, requires_grad=True)
    targets, config = torch.randint(vocabulary, (tokens,), device=device), transformers.LlamaConfig()
    rows = []
    for compiled in False, True:
        head_pass = torch.compile(dpo.head_pass, dynamic=True) if compiled else dpo.head_pass
        for power in (24, 25, 26, 27):
            chunk = -(-2**power // vocabulary)

            def step(_):
                *parts, last = zip(hidden.split(chunk), targets.split(chunk))
                scores = [dpo.checkpoint(head_pass, *part, head, config, dpo.token_logps, use_reentrant=False) for part in parts]
                torch.cat([*scores, head_pass(*last, head, config, dpo.token_logps)]).sum().backward()
            timed(step, None)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = median(timed(step, None) for _ in range(3))
            bound = 8 * tokens * hidden_size * vocabulary
            rows.append([f"{'compiled' if compiled else 'eager'}, chunks of 2^{power}", f"{seconds:.4f}",
                         f"{bound / seconds / 1e12:.1f}", f"{dpo.peak_memory():.2f}"])
    return rows


def head_slice(args):
    """The output head at this vocabulary."""
    size = slice_of(args)[0]
    tokens = 64 if size == "tiny" else 8192
    hidden_size, vocabulary = gpu_check.SIZES[size][0], gpu_check.SIZES[size][5]
    text = f"Output head {vocabulary} x {hidden_size}, {tokens} response tokens\n\n"
    print("JSON " + json.dumps(text + table([["variant", "seconds", "TFLOP/s", "peak GiB"], *head_times(size, tokens)])), flush=True)


# ---------------------------------------------------------------------- a slice: processes, table
def slice_of(args):
    """(size, lengths, variants of ours, of TRL) of a slice, maybe in another size and with fewer variants."""
    size, work, *both = SLICES[args.slice]
    if args.only:
        only = [name.strip() for name in args.only.split(",")]
        both = [[name for name in names if name.rstrip("*") in only] for names in both]
    return args.size or size, work, *both


def flops(size, lengths, lora=False):
    """Useful FLOPs of a step on pairs of these lengths (n, 3)."""
    hidden, mlp, layers, heads, kv_heads, vocabulary = gpu_check.SIZES[size]
    blocks = layers * (2 * hidden**2 + 2 * hidden * hidden * kv_heads // heads + 3 * hidden * mlp)
    return (4 if lora else 6) * (blocks * int(lengths.sum()) + hidden * vocabulary * int(lengths[:, 1:].sum()))


def estimate(name, rounds=3):
    """Seconds of a slice on an H100: a step runs at 30 % of the peak, at 10 % with TRL; a process starts in 25 s. Making a model
    takes 1.5 s per billion parameters, reading it 5 s, placing it 2 s; compiling 45 s, profiling 10 s."""
    size, work, *both = SLICES[name]
    if not any(both):
        return 90
    billions = float(size[:-1])
    seconds = 1.5 * billions
    for variants, speed in zip(both, (0.3, 0.1)):
        seconds += (25 + 5 * billions) * bool(variants)
        for variant in variants:
            work = work_of(variant, work)
            lengths = lengths_of(work, PAIRS[work], np.random.default_rng(0))
            slower = 1.3 if "full" in variant or "selective" in variant else 1
            step = slower * flops(size, lengths, "lora" in variant) / 989e12 / speed
            seconds += 5 + 2 * billions + 45 * ("compile" in variant) + 10 * ("*" in variant) + (rounds + 4) * step
    return seconds


def start(name, args, folder, until):
    """Run the process of a contender; yields what it reports. What it says on stderr is shown if it fails."""
    command = [sys.executable, __file__, "--contender", name, "--slice", args.slice, "--folder", folder, "--until", until,
               "--rounds", args.rounds, "--size", args.size, "--only", args.only]
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True,
                                 env=ENVIRONMENT)
        for line in child.stdout:
            if line.startswith("JSON "):
                yield json.loads(line[5:])
        if child.wait():
            log.seek(0)
            yield dict(variant=name, trouble="stopped: " + " ".join(log.read().split())[-300:])


def table(rows):
    """Markdown; all columns but the first to the right."""
    rows = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def report(results, args):
    """Text of a slice: the table, ours against TRL's best, the kernels by kind, and with what all this was measured."""
    size, default, *_ = slice_of(args)
    tiny, peak, text, lengths = size == "tiny", gpu_check.peak_flops(), "", {}
    rows = [["variant", "pairs/s", "s fresh", "s repeated", "first s", "peak GiB", "MFU %", "busy %"]]
    for r in results:
        if "fresh" not in r:
            if "trouble" in r:
                rows.append([r["variant"], r["trouble"]] + [""] * 6)
            continue
        r["work"] = work = work_of(r["variant"], default)
        batches = make_batches(work, 2 + args.rounds, 8 if tiny else PAIRS[work], 100, tiny)[2:]
        lengths[work] = np.array([[len(pair[side]) for side in ("prompt", "chosen", "rejected")] for batch in batches for pair in batch])
        r["rate"] = len(lengths[work]) / sum(r["fresh"])
        share = flops(size, lengths[work], "lora" in r["variant"]) / sum(r["fresh"]) / peak if peak else None
        rows.append([r["variant"], f"{r['rate']:.2f}", f"{median(r['fresh']):.3f}", f"{r['repeated']:.3f}", f"{r['first']:.1f}",
                     f"{r['peak']:.1f}", f"{100 * share:.1f}" if share else "",
                     f"{100 * r['busy']:.0f} ({r['waits']})" if "busy" in r else ""])
    for work in lengths:
        same = [r for r in results if r.get("work") == work and "auxdpo" not in r["variant"]]
        good = [[r for r in same if r["variant"].startswith("trl") == is_trl] for is_trl in (False, True)]
        if all(good):
            best, other = [max(each, key=lambda r: r["rate"]) for each in good]
            text += (f"\n{work}: the fastest of ours, {best['variant']}, makes {best['rate'] / other['rate']:.2f} times the pairs/s of "
                     f"TRL's fastest, {other['variant']}, with {best['peak'] / other['peak']:.2f} of its memory.\n")
    for r in results:
        if "kinds" in r:
            kinds = ", ".join(f"{kind} {100 * part:.0f} %" for kind, part in r["kinds"].items())
            text += f"\nKernels of {r['variant']}: {kinds}.\n\n"
            for name, part, calls in r["longest"]:
                text += f"- {100 * part:.1f} %, {calls} times: `{name[:120]}`\n"
        if r.get("others"):
            text += f"\n{r['others']} other processes were on the card with {r['variant']}: its times are too long.\n"
        if r.get("graphs"):
            text += f"\n{r['variant']} compiled {r['graphs']} graphs in the first two steps, {r['later']} later.\n"
        if "estimators" in r:
            seconds = ", ".join(f"{name} {each:.3f}" for name, each in r["estimators"])
            text += ("\ncompo.py, head {} x {}, {} response tokens, {} perturbations, seconds per pair: ".format(*r["shape"])
                     + f"{seconds}.\n")
    for work, sizes in lengths.items():
        mean = sizes.mean(0)
        text += (f"\n{size}, {work}: {len(sizes) // args.rounds} pairs per step, on average {mean[0]:.0f} + {mean[1]:.0f} + {mean[2]:.0f} "
                 f"tokens, {args.rounds} fresh batches.\n")
    return table(rows) + text


def host_times(work, folder, tokens=16384, steps=10):
    """CPU milliseconds per step in which the host chooses the micro-batches of a step, reads their pairs and makes the tensors;
    `first`: all of it up to the first micro-batch, for which a GPU must wait. The others are made while the GPU works."""
    import datasets
    import dpo
    pairs = sum(make_batches(work, steps, PAIRS[work], 151_936, False), [])
    datasets.Dataset.from_list(pairs).save_to_disk(folder)
    rows = datasets.load_from_disk(folder)
    lengths = np.array([[len(pair[side]) for side in ("prompt", "chosen", "rejected")] for pair in pairs])
    args = types.SimpleNamespace(batch_size=PAIRS[work], seed=0, layout="packed", max_tokens=tokens)
    spent = dict(choose=0.0, read=0.0, tensors=0.0, first=0.0)
    for step in range(steps):
        began = time.process_time()
        parts = dpo.micro_batches(dpo.batch_rows(step, len(rows), args), lengths, args, 1)
        spent["choose"] += time.process_time() - began
        for i, part in enumerate(parts):
            start = time.process_time()
            batch = [rows[int(row)] for row in part]
            spent["read"] += time.process_time() - start
            start = time.process_time()
            dpo.collate(batch, "packed")
            spent["tensors"] += time.process_time() - start
            if i == 0:
                spent["first"] += time.process_time() - began
    return {name: 1000 * seconds / steps for name, seconds in spent.items()}


def launch_times(folder, how, layers=28, steps=5):
    """CPU milliseconds of a step of four micro-batches in a model of so many layers that is so narrow (32), on texts so short, that
    hardly anything is computed: what remains is the host's time to start a step's kernels, by threads that work at once or not."""
    import dpo
    if not folder.exists():
        config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
                                          num_key_value_heads=2, vocab_size=512)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 12, (32, 3))
    pairs = [dict(zip(("prompt", "chosen", "rejected"), (rng.integers(3, 500, size).tolist() for size in row))) for row in lengths]
    args = dpo.Args(model=str(folder), data="", max_tokens=int(lengths.sum() / 4 + 30), compile=how == "compile",
                    activation_checkpointing=how if how in ("selective", "full") else "off", zero="3" if how == "zero3" else "2")
    if not torch.distributed.is_initialized():
        dpo.start_process_group("bfloat16")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, weights = dpo.read_model(args.model, args)
    policy = dpo.build_policy(model, weights, dpo.token_logps, device, torch.bfloat16, args)
    split = dict(pairs=pairs, lengths=lengths, ref_logps=np.zeros((len(pairs), 2), np.float32))
    assert len(dpo.micro_batches(np.arange(len(pairs)), lengths, args, 1)) == 4
    step, spent = bench.our_step(policy, split, args), []
    for _ in range(3 + steps):
        start = time.process_time()
        step(np.arange(len(pairs)))
        spent.append(1000 * (time.process_time() - start))
    torch._dynamo.reset()
    return median(spent[3:])


def host_report(args):
    """Print the tables of host_times and launch_times, and write them to out/host.md."""
    torch.set_num_threads(1)
    lines = ["| lengths | pairs | choose, ms | read, ms | tensors, ms | until the first, ms |", "|---|---:|---:|---:|---:|---:|"]
    for work in PAIRS:
        with tempfile.TemporaryDirectory() as folder:
            times = [host_times(work, f"{folder}/{i}") for i in range(3)]
        cells = [f"{median(each[name] for each in times):.1f}" for name in times[0]]
        lines.append(f"| {work} | {PAIRS[work]} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n\nCPU time per step, --max_tokens 16384, packed; the median of three times ten steps.\n\n"
    with tempfile.TemporaryDirectory() as folder:
        times = {how: launch_times(Path(folder, "model"), how) for how in ("eager", "compile", "selective", "full", "zero3")}
    text += table([["starting the kernels", *times], ["CPU ms", *(f"{each:.0f}" for each in times.values())]])
    text += "\nA step of four micro-batches in 28 layers of width 32, packed, bfloat16: little but the host's own work."
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "host.md").write_text(f"{text}\n{versions()}. `python tests/bench/gpu.py --host`\n")
    print(text)


def versions():
    from importlib.metadata import version
    cuda = torch.cuda.is_available()
    card = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB" if cuda else "CPU"
    trl = f", TRL {version('trl')}" if importlib.util.find_spec("trl") else ""
    return f"{card}, {'bfloat16' if cuda else 'float32'}, torch {torch.__version__}, transformers {transformers.__version__}{trl}"


def run_slice(args, folder, until):
    """Measure a slice and write out/<slice>.md, anew after each variant so that a killed call leaves what it has."""
    _, _, our_variants, trl_variants = slice_of(args)
    need = 0 if args.size else LARGE.get(args.slice, 0)
    if need and (not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < need):
        return print(f"{args.slice} is left out: it needs a card of {need / 1e9:.0f} GB", flush=True)
    if trl_variants and not importlib.util.find_spec("trl"):
        print("TRL is not installed: it is left out", flush=True)
        trl_variants = []
    path = args.out / f"{args.slice}.md"
    command = f"`python tests/bench/gpu.py --slice {args.slice}{' --size ' + args.size if args.size else ''}`"
    if args.slice == "head" and time.time() < until:
        for result in start("head", args, folder, until):
            path.write_text(f"{result if isinstance(result, str) else result['trouble']}\n{versions()}. {command}\n")
            print(path.read_text(), flush=True)
    results = []
    for name, variants in ("ours", our_variants), ("trl", trl_variants):
        reports = [dict(variant=variant.rstrip("*"), trouble="not reached") for variant in variants]
        if variants and time.time() < until:
            reports = start(name, args, folder, until)
        for result in reports:
            results.append(result)
            print(f"{args.slice}: {result['variant']} {result.get('trouble', '')}", flush=True)
            path.write_text(f"{report(results, args)}\n{versions()}. {command}\n")
    if results:
        print(path.read_text(), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--list", action="store_true", help="the slices, and how long they should take on an H100")
    parser.add_argument("--host", action="store_true", help="only the time in which the CPU makes micro-batches, and starts kernels")
    parser.add_argument("--slice", default="", help="one, or several separated by commas")
    parser.add_argument("--size", default="", choices=["", *gpu_check.SIZES], help="of the model, in place of the slice's")
    parser.add_argument("--only", default="", help="only these variants of the slice, separated by commas")
    parser.add_argument("--rounds", type=int, default=3, help="fresh batches that are timed")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no variant is begun")
    parser.add_argument("--out", type=Path, default=ROOT / "results/gpu")
    for name in ("contender", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        for name, (size, work, *both) in SLICES.items():
            print(f"{name:11} {estimate(name):4.0f} s  {size} {work}: {', '.join(sum(both, [])).replace('*', '')}")
        return
    if args.host:
        return host_report(args)
    if args.contender:
        return head_slice(args) if args.contender == "head" else contender(args)
    names, until = args.slice.split(","), time.time() + args.budget
    unknown = [name for name in names if name not in SLICES]
    if unknown:
        sys.exit(f"error: --slice {unknown[0]} is none of {', '.join(SLICES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for args.slice in names:
            run_slice(args, folder, until)


if __name__ == "__main__":
    main()
