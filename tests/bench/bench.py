"""One optimiser step of DPO, our three layouts against TRL's DPOTrainer: time, memory, and the distance to the matrix products.

    python tests/bench/bench.py [--work hh,dialogues,...] [--contenders packed,concatenated,separate,trl,trl 8] [--rounds 5] [--out results/bench]
    python tests/bench/bench.py --work hh --contenders "packed,packed selective,packed full,packed compile,trl 1 full,trl 8 full" --out results/bench_packed
    python tests/bench/bench.py --work dialogues,response-heavy --contenders packed --rounds 9 --old FOLDER --out results/bench_old
    python tests/bench/bench.py --work hh --profile

Each contender is a process of its own with the same model, the same pairs and the same global batch; they take turns, one step
each, so that a noisy machine is noisy to all. Times are medians over rounds of CPU seconds (wall time in the JSON), ratios are to
`packed`. TRL has precomputed log-probs of the reference, no dropout, fused AdamW, and comes twice: with the micro-batch size (pairs)
that is fastest in a trial, and with 8, its default; its forward, collator and loss are called directly, so its Trainer's own
overhead is not counted. Extra memory: the peak of a step above what is resident before it, which is weights and optimiser state.
Useful tokens count each prompt once. A call adds its workloads to those in --out. `bound`: 6 x (parameters of the blocks' matrices x
useful tokens + those of the head x response tokens) / the rate of a large matrix product, measured in each round, as a part of the
time of the step. Attention's own products are not in it. --old FOLDER adds the contender `old packed`: the layout packed of an
earlier state of this repository, whose checkout FOLDER is (git worktree add FOLDER 937b6ad, or another commit of its kind).
"""
import argparse
import gc
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
SHARED = ROOT.parent / "shared"


# ---------------------------------------------------------------------- what is trained on
def real_pairs(file, model, folder):
    """Token ids of a real dataset, through prepare_data.py."""
    import datasets
    command = [sys.executable, ROOT / "prepare_data.py", "--dataset", file, "--model", model, "--out", folder / "data"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    rows = datasets.load_from_disk(str(folder / "data/train"))
    pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    return [pair for pair in pairs if longest(pair) <= 1024]  # TRL's default max_length


def longest(pair):
    return len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"]))


def random_pairs(prompt, response, vocabulary, count=64):
    """Random ids; lengths vary by a third around the given ones."""
    rng = random.Random(0)

    def ids(mean):
        return [rng.randrange(3, vocabulary) for _ in range(rng.randint(max(1, 2 * mean // 3), 4 * mean // 3))]
    return [dict(prompt=ids(prompt), chosen=ids(response), rejected=ids(response)) for _ in range(count)]


def random_model(folder, vocabulary, hidden=512, layers=4):
    import torch
    import transformers
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=40_000, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder / "model"


WORKS = {  # name: (file or (prompt, response) tokens, model or vocabulary, global batch)
    "hh": ("raw/hh_harmless_test.jsonl.gz", "MiniMind2-Small", 16), "dialogues": ("raw/dpo_en_demo.json", "MiniMind2-Small", 8),
    "hh 32k": ("raw/hh_harmless_test.jsonl.gz", "stories15M", 16), "hh-like 128k": ((175, 57), 128_000, 8),
    "prompt-heavy": ((900, 60), 32_000, 8), "response-heavy": ((40, 450), 32_000, 8), "4k": ((2000, 1000), 32_000, 4),
    "16k": ((8000, 4000), 32_000, 1)}


def make_work(name, folder):
    what, model, _ = WORKS[name]
    if isinstance(what, str):
        model = SHARED / "models" / model
        pairs = real_pairs(SHARED / "data" / what, model, folder)
    else:
        pairs, model = random_pairs(*what, model), random_model(folder, model)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return model


# ---------------------------------------------------------------------- contenders: step(pairs) -> loss
def ours(layout, how, model_folder, pairs, max_tokens):
    """max_tokens holds for each layout, and is more if a pair needs it; how: nothing, compile, selective, full or loop."""
    import dpo
    if how == "loop":
        import unpadded
        unpadded.use(dpo, kernel=False)
    import numpy as np
    lengths = np.array([[len(pair[side]) for side in ("prompt", "chosen", "rejected")] for pair in pairs])
    max_tokens = max(max_tokens, dpo.pair_tokens(lengths, layout).max())
    args = dpo.Args(model=str(model_folder), data="", layout=layout, max_tokens=int(max_tokens), compile=how == "compile",
                    activation_checkpointing=how if how in ("selective", "full") else "off",
                    zero=how.removeprefix("zero") if how.startswith("zero") else "auto")
    _, _, device, dtype = dpo.start_process_group("float32")
    model, weights = dpo.read_model(args.model, args)
    policy = dpo.build_policy(model, weights, dpo.token_logps, device, dtype, args)
    split = dict(pairs=[pair | dict(id=str(i)) for i, pair in enumerate(pairs)], lengths=lengths,
                 ref_logps=np.zeros((len(pairs), 2), np.float32))
    take = our_step(policy, split, args)

    def step(rows):
        return dpo.mean_over_pairs(take(rows))["loss"]
    return step


def our_step(policy, split, args):
    """-> a function that takes an optimiser step on some rows, as main() of dpo.py does, and gives the sums of its metrics."""
    import dpo
    import numpy as np
    import torch
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-6, fused=True)

    def step(rows):
        sums = []
        parts = dpo.micro_batches(np.array(rows), split["lengths"], args, 1)
        for i, part in enumerate(parts):
            policy.set_reshard_after_backward(policy.reshards or i == len(parts) - 1)
            losses, metrics = dpo.pair_losses(policy, part, split, args)
            (losses.sum() / len(rows)).backward()
            sums.append(metrics)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0).full_tensor().item()
        optimizer.step()
        optimizer.zero_grad()
        return sums
    return step


def old(folder, model_folder, pairs, max_tokens):
    """The same in the layout packed by the dpo.py of another folder, as it was at commit 937b6ad."""
    sys.path.insert(0, str(folder))
    import dpo
    import numpy as np
    import torch
    assert Path(dpo.__file__).parent.samefile(folder)
    dpo.start_process_group("float32")
    args = types.SimpleNamespace(model=model_folder, layout="packed", beta=0.1, label_smoothing=0.0, sft_weight=0.0,
                                 router_aux_coef=0.0)
    model, weights, _ = dpo.build_model(args)
    policy = dpo.shard(dpo.Policy(model), weights, torch.float32, torch.device("cpu"))
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-6, fused=True)
    lengths = np.array([[len(pair[side]) for side in ("prompt", "chosen", "rejected")] for pair in pairs])
    max_tokens = max(max_tokens, dpo.pair_costs(lengths, "packed").max())
    split = dict(rows=[pair | dict(id=str(i)) for i, pair in enumerate(pairs)], lengths=lengths,
                 ref=np.zeros((len(pairs), 2), np.float32))

    def step(rows):
        totals = {}
        for part in dpo.micro_batches(np.array(rows), lengths, "packed", max_tokens, 1):
            losses = dpo.pair_losses(policy, part, split, totals, args)
            (losses.sum() / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        return dpo.mean_over_pairs(totals)["loss"]
    return step


def trl(model_folder, pairs, size, how):
    """how: words; full: gradient checkpointing; lora: adapters of rank 16 on a base in bfloat16; cudnn: torch may choose cuDNN's
    attention, which plans each new shape for 0.1 s, as it does by default. On a GPU bfloat16 by autocast."""
    import datasets
    import torch
    import transformers
    from trl import DPOConfig, DPOTrainer
    transformers.utils.logging.set_verbosity_error()
    torch.backends.cuda.enable_cudnn_sdp("cudnn" in how)
    cuda, lora = torch.cuda.is_available(), None
    if "lora" in how:
        from peft import LoraConfig
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    dtype = torch.bfloat16 if cuda and lora else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    from tokenizers import Tokenizer, models
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<unk>", pad_token="<unk>")
    config = DPOConfig(output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=not cuda, bf16=cuda, max_length=None,
                       gradient_checkpointing=False, disable_dropout=True, precompute_ref_log_probs=True, beta=0.1)
    rows = datasets.Dataset.from_list([dict(prompt="a", chosen="a a", rejected="a a a")] * 2)
    trainer = DPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.model.train()
    if "full" in how:
        trainer.model.gradient_checkpointing_enable(dict(use_reentrant=False))
    if "full" in how and lora:
        trainer.model.enable_input_require_grads()
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    optimizer, device = torch.optim.AdamW(parameters, 1e-6, fused=True), trainer.model.device

    def step(rows, size=size):
        total = 0.0
        for start in range(0, len(rows), size):
            part = [{f"{side}_ids": pairs[row][side] for side in ("prompt", "chosen", "rejected")}
                    | dict(ref_chosen_logps=0.0, ref_rejected_logps=0.0) for row in rows[start:start + size]]
            batch = {name: tensor.to(device) for name, tensor in trainer.data_collator(part).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                loss = trainer.compute_loss(trainer.model, batch)
            (loss * len(part) / len(rows)).backward()
            total += loss.detach() * len(part) / len(rows)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()
    return step


# ---------------------------------------------------------------------- a contender's process
def memory(name):
    """VmRSS or VmHWM of this process, bytes."""
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024


def contender(name, model_folder, folder, max_tokens, old_folder):
    import ctypes
    pairs = json.loads((Path(folder) / "pairs.json").read_text())
    way, *how = name.split()
    if way == "trl":
        step = trl(model_folder, pairs, int(how[0]), how[1:])
    elif way == "old":
        step = old(old_folder, model_folder, pairs, max_tokens)
    else:
        step = ours(way, "".join(how), model_folder, pairs, max_tokens)
    for line in sys.stdin:
        rows = json.loads(line)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, cpu, wall = memory("VmRSS"), time.process_time(), time.perf_counter()
        loss = step(rows)
        print(json.dumps(dict(loss=loss, cpu=time.process_time() - cpu, wall=time.perf_counter() - wall,
                              extra=memory("VmHWM") - before)), flush=True)


class Process:
    def __init__(self, name, model, folder, args):
        command = [sys.executable, __file__, "--contender", name, "--model", model, "--folder", folder, "--max_tokens", args.max_tokens]
        command += ["--old", args.old] if args.old else []
        self.log = tempfile.TemporaryFile("w+")
        self.child = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                                      text=True)

    def step(self, rows):
        self.child.stdin.write(json.dumps(rows) + "\n")
        self.child.stdin.flush()
        for line in self.child.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        sys.exit(f"error: a contender stopped: {self.log.read()[-1500:]}")

    def end(self):
        self.child.stdin.close()
        self.child.wait()


def matmul_rate(size=1024, rounds=20):
    """FLOPs per CPU second of a large product with the threads that the contenders have."""
    import torch
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    start = time.process_time()
    for _ in range(rounds):
        a @ b
    return 2 * size**3 * rounds / (time.process_time() - start)


def commit_of(folder):
    """The commit of a checkout; a + if files have changed since."""
    return subprocess.check_output(["git", "-C", folder, "describe", "--always", "--dirty=+", "--exclude=*"], text=True).strip()


def compete(work, args):
    import transformers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_work(work, folder)
        pairs = json.loads((folder / "pairs.json").read_text())
        rng, count = random.Random(0), min(args.pairs or WORKS[work][2], len(pairs))
        deal = lambda: rng.sample(range(len(pairs)), count)
        rows, best = deal(), {}
        vocabulary = transformers.AutoConfig.from_pretrained(model).vocab_size
        logits = lambda size: 2 * size * max(map(longest, pairs)) * vocabulary * 4  # bytes
        names = args.contenders.split(",") + ["old packed"] * bool(args.old)
        if "trl" in names:
            for size in (1, 2, 4):
                if size == 1 or size <= count and logits(size) < 2**30:
                    trial = Process(f"trl {size}", model, folder, args)
                    trial.step(rows[:1])
                    best[size] = min(trial.step(rows[:8])["cpu"] for _ in range(2))
                    trial.end()
            names[names.index("trl")] = f"trl {min(best, key=best.get)}"
        processes = {name: Process(name, model, folder, args) for name in names}
        first = {name: process.step(rows[:8]) for name, process in processes.items()}  # warm up, and agree
        losses = [result["loss"] for result in first.values()]
        assert max(losses) - min(losses) < 1e-3 * abs(losses[0]) + 1e-3, f"{work}: the losses differ: {first}"
        results, rates, prompts, responses = {name: [] for name in names}, [], 0, 0
        for _ in range(args.rounds):
            rows = deal()
            prompts += sum(len(pairs[row]["prompt"]) for row in rows) / args.rounds
            responses += sum(len(pairs[row][side]) for row in rows for side in ("chosen", "rejected")) / args.rounds
            rates.append(matmul_rate())
            for name, process in processes.items():
                results[name].append(process.step(rows))
        for process in processes.values():
            process.end()
        config = transformers.AutoConfig.from_pretrained(model)
        from plan import plan
        import torch
        head = config.hidden_size * config.vocab_size
        blocks = plan(config, tokens=64, dtype=torch.float32)[1]["matmul"] - head
        least = 6 * (blocks * (prompts + responses) + head * responses) / median(rates)  # CPU seconds
        how = (f"{work}: {args.rounds} rounds, {args.max_tokens} tokens per forward pass of ours or one pair, float32, "
               f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}, matrix product "
               f"{median(rates) / 1e9:.0f} GFLOP per CPU second")
        if args.old:
            how += f", old packed: commit {commit_of(args.old)}, packed: {commit_of(ROOT)}"
    return dict(how=how) | {
        name: dict(cpu=median(r["cpu"] for r in rounds), wall=median(r["wall"] for r in rounds),
                   extra=median(r["extra"] for r in rounds), pairs=count, useful=prompts + responses,
                   bound=least / median(r["cpu"] for r in rounds),
                   ratio=median(r["cpu"] / p["cpu"] for r, p in zip(rounds, results[names[0]])))
        for name, rounds in results.items()}


def profile(work, args):
    """Where a step of `packed` spends its time, as torch.profiler sees it."""
    import torch
    with tempfile.TemporaryDirectory() as name:
        model = make_work(work, Path(name))
        pairs = json.loads((Path(name) / "pairs.json").read_text())
        step, rows = ours("packed", "", model, pairs, args.max_tokens), range(min(args.pairs or WORKS[work][2], len(pairs)))
        step(rows)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            step(rows)
    averages = found.key_averages()
    whole = sum(each.self_cpu_time_total for each in averages)
    lines = [["operator", "calls", "share of the time"], ["---", "---:", "---:"]]
    for each in sorted(averages, key=lambda each: -each.self_cpu_time_total)[:15]:
        lines.append([f"`{each.key}`", str(each.count), f"{each.self_cpu_time_total / whole:.1%}"])
    text = "".join(f"| {' | '.join(row)} |\n" for row in lines)
    text += f"\n{work}: {len(rows)} pairs, float32, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    (args.out / f"profile-{work.replace(' ', '-')}.md").write_text(text)
    print(text)


def write_tables(found, out):
    """table.md with all of it, summary.md with the ratios to packed."""
    lines = [["work", "contender", "pairs / CPU s", "useful tokens / CPU s", "time to packed", "extra GiB", "memory to packed", "bound"],
             ["---"] * 2 + ["---:"] * 6]
    short = [["time, memory to packed", "concatenated", "TRL, fastest micro-batch", "TRL, 8 pairs"], ["---"] + ["---:"] * 3]
    for work in filter(found.get, WORKS):
        results = {name: r for name, r in found[work].items() if name != "how"}
        packed = results.get("packed", next(iter(results.values())))
        cell = {}
        for name, r in results.items():
            memory = r["extra"] / packed["extra"]
            lines.append([work, name, f"{r['pairs'] / r['cpu']:.2g}", f"{r['useful'] / r['cpu']:.0f}", f"{r['ratio']:.2f}",
                          f"{r['extra'] / 2**30:.2f}", f"{memory:.2f}", f"{100 * r['bound']:.0f} %"])
            cell[name] = f"{r['ratio']:.2f}, {memory:.2f}"
        best = [name for name in cell if re.fullmatch(r"trl \d+", name) and name != "trl 8"]
        short.append([work, cell.get("concatenated", ""), cell[best[0]] if best else "", cell.get("trl 8", "")])
    notes = [*(found[work]["how"] for work in filter(found.get, WORKS)), "trl N: N pairs per micro-batch"]
    table = lambda rows: "".join(f"| {' | '.join(row)} |\n" for row in rows)
    (out / "table.md").write_text(table(lines) + "\n" + "  \n".join(notes) + "\n")
    (out / "summary.md").write_text(table(short))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", default=",".join(name for name in WORKS if name != "16k"), help="of " + ", ".join(WORKS))
    parser.add_argument("--contenders", default="packed,concatenated,separate,trl,trl 8",
                        help="trl N: N pairs per micro-batch, 8 by default of TRL; trl: the fastest in a trial")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=0, help="global batch; 0 = that of the workload")
    parser.add_argument("--max_tokens", type=int, default=1024, help="of a forward pass of ours; more if a pair needs it")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    parser.add_argument("--profile", action="store_true", help="instead: the operators of a step of packed")
    parser.add_argument("--old", help="folder of a checkout of commit 937b6ad: adds the contender 'old packed'")
    for name in ("contender", "model", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.contender:
        return contender(args.contender, args.model, args.folder, args.max_tokens, args.old)
    if args.old and not Path(args.old, "dpo.py").is_file():
        sys.exit(f"error: --old {args.old} is no checkout of this repository: git worktree add {args.old} 937b6ad")
    for name in args.contenders.split(","):
        if not re.fullmatch(r"(packed|concatenated|separate)( selective| full| compile| zero3| loop)?|trl( [1-9]\d*( full)?)?", name):
            sys.exit(f"error: --contenders {name!r} is none: packed, concatenated, separate (selective, full, compile, zero3, loop), trl, trl N (full)")
    args.out.mkdir(parents=True, exist_ok=True)
    known = args.out / "bench.json"
    found = json.loads(known.read_text()) if known.exists() else {}  # of other workloads, maybe of other calls
    for work in map(str.strip, args.work.split(",")):
        if work not in WORKS:
            sys.exit(f"error: --work {work} is none of {', '.join(WORKS)}")
        if isinstance(WORKS[work][0], str) and not SHARED.exists():
            continue
        if args.profile:
            profile(work, args)
            continue
        found[work] = compete(work, args)
        known.write_text(json.dumps(found, indent=1))
        write_tables(found, args.out)
        print((args.out / "table.md").read_text(), flush=True)


if __name__ == "__main__":
    main()
