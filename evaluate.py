"""Compare models: do they prefer the better answers, what do they write, did they only get longer?

    python evaluate.py --models MODEL,out/dpo,out/simpo --data data/NAME --reference MODEL
    python evaluate.py --models MODEL,out/dpo --data data/NAME --samples 200 --reward my.py:reward
    python evaluate.py --models out/dpo,out/simpo --plot runs.png       (curves of runs, no --data)

A model is a Hugging Face folder, a hub name, a LoRA adapter, a run (out/dpo means out/dpo/final)
or a checkpoint of a run (out/dpo/step-000020). Log-probs come from the model's own forward pass,
so they are what any user of the model gets. Under torchrun the processes share the texts. For
multiple choice by letters and answers for an outside judge, see tests/bench/questions.py.

Each metric is a mean with its standard error. Pairs of one prompt depend on each other, so they
count as one observation. To add a metric, add its values to pair_metrics (one value per pair) or
to answer_metrics (one value per answer), and its heading to COLUMNS. The folder --out gets:

    table.md          what is printed: eight columns, or the metrics that --columns names
    evaluation.json   all metrics, the settings, the versions of the packages
    differences.md    the mean difference between every two models
    samples.jsonl     answers of the models; samples.md has those to three prompts side by side
    logps.npz         the log-probs of all pairs: a new question about them needs no model

Read to line 251: settings, what is measured, main. Then follow the functions that main calls, in
groups. Below the rule stand the helpers that all scripts share.

Shapes: n pairs (or answers); a second dimension of 2 means (chosen y_w, rejected y_l). Log-probs
are in nats, summed over the response.
"""
import contextlib, dataclasses, functools, hashlib, importlib.util, inspect, itertools, json, math
import operator, os, re, runpy, signal, sys, time
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

@dataclasses.dataclass(frozen=True)
class Args:
    # input and output
    models: str  # folders, hub names, runs or checkpoints, separated by commas; the first: baseline
    data: str = ""  # folder made by prepare_data.py; without it only --plot is made
    trust_remote_code: bool = False  # run the Python files that come with some models
    split: str = "val"  # part of the data; "train,val" means both, as for a benchmark
    limit: int = 0  # only the first so many pairs; 0 = all
    reference: str = ""  # model that changes are measured from
    out: str = "results"  # folder for everything that is written
    columns: str = ""  # metrics to print, such as "gain,kl", or "all"; the names stand in COLUMNS
    plot: str = ""  # image file (.png, .svg, .pdf) for the curves of runs and the models' results
    # samples
    samples: int = 0  # how many prompts of the split every model answers; 0 = none
    best_of: int = 0  # answers of --reference to each of these prompts, for its best of n; 0 = none
    max_new_tokens: int = 256  # an answer is cut off there
    temperature: float = 1.0  # of sampling; 0 = greedy
    reward: str = ""  # FILE.py:FUNCTION from (prompt, response), both text, to a number
    seed: int = 0  # of the choice of prompts and of sampling
    # memory and speed
    max_tokens: int = 8192  # bound on the tokens of one forward pass, or of one batch of samples
    spread: bool = False  # spread each model over the GPUs of a single process (needs accelerate)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 on a GPU, else float32

# ---- what is measured ----

# {metric: its heading}. Where the heading has a %, the table shows the value times 100. Without
# --columns it shows the first five that were measured. /token means divided by the length, /ref
# less the same of --reference; best and ties are the scores of RewardBench-2, see below.
COLUMNS = {
    "best": "best %", "ties": "ties %", "accuracy": "accuracy %", "reward": "reward",
    "win/length": "equal length %", "length": "tokens", "kl": "KL", "gain": "gain %",
    "accuracy/ref": "to ref %", "chosen/ref": "chosen", "rejected/ref": "rejected",
    "accuracy/token": "per token %", "margin": "margin", "margin/ref": "margin to ref",
    "win": "win %", "ended": "ended %", "accuracy/ref/token": "to ref per token %",
    "best/ref": "best to ref %", "ties/ref": "ties to ref %"}
BEST = "best of "  # the model "best of 4": the best of four answers of --reference

def pair_metrics(logps, lengths, questions, ref_logps=None, base_logps=None):
    """Metrics of each pair {name: (n,)}; logps (n, 2), lengths (n, 2) in tokens, ref_logps and
    base_logps (n, 2) of --reference and of the first of --models; for questions see beats_all."""
    metrics = {"accuracy": is_better(logps),  # (n,) log pi(y_w|x) > log pi(y_l|x)
               "accuracy/token": is_better(logps / lengths),  # (n,) the same for the mean per token
               "margin": logps[:, 0] - logps[:, 1],  # (n,) nats
               "best": beats_all(logps, questions)}  # (n,) NaN but for one pair of each question
    if base_logps is not None:
        metrics["gain"] = is_better(logps) - is_better(base_logps)  # (n,)
    if ref_logps is not None:
        change = logps - ref_logps  # (n, 2) log pi(y|x)/ref(y|x)
        metrics["accuracy/ref"] = is_better(change)  # (n,) the order that DPO trains
        metrics["accuracy/ref/token"] = is_better(change / lengths)  # (n,)
        metrics["margin/ref"] = change[:, 0] - change[:, 1]  # (n,) nats
        metrics["chosen/ref"] = change[:, 0]  # (n,) below 0 where the chosen one got less likely
        metrics["rejected/ref"] = change[:, 1]  # (n,)
        metrics["best/ref"] = beats_all(change, questions)  # (n,)
    return metrics

def answer_metrics(records, base):
    """Metrics of each answer {name: (n,)}; records are the answers of a model (see `answer`), base
    those of the first of --models to the same prompts."""
    metrics = {"length": values_of(records, "tokens"),  # (n,) tokens
               "ended": values_of(records, "ended")}  # (n,) 1 if the model came to an end by itself
    if "ref_logp" in records[0]:  # log pi(y|x)/ref(y|x), whose mean is KL(pi || ref)
        metrics["kl"] = values_of(records, "logp") - values_of(records, "ref_logp")  # (n,) nats
    if "reward" in records[0]:
        metrics["reward"] = values_of(records, "reward")  # (n,)
        rewards = np.stack([metrics["reward"], values_of(base, "reward")], 1)  # (n, 2)
        metrics["win"] = is_better(rewards)  # (n,) above the first model's on the same prompt
    return metrics

def is_better(values):
    """values (n, 2) -> (n,) 1 if the first is larger, 0 if the second is, 1/2 if they are equal."""
    return 0.5 + 0.5 * np.sign(values[:, 0] - values[:, 1])

def values_of(records, key):
    return np.array([record[key] for record in records], float)

def equal_length(wins, longer):
    """Win rate without the help of length: sigmoid(a) of the logistic regression of wins (n,), 0 to
    1, on a + b tanh(longer / its spread), longer (n,) in tokens -> rate, its standard error (None
    for one answer). It is AlpacaEval 2's idea without its terms for each prompt (Dubois et al.
    2024, https://arxiv.org/abs/2404.04475)."""
    spread = longer.std() or 1.0
    x = np.stack([np.ones(len(wins)), np.tanh(longer / spread)], 1)  # (n, 2)
    theta = np.zeros(2)  # a, b
    for _ in range(25):  # Newton's method; the ridge weighs as much as one answer in a thousand
        p = 1 / (1 + np.exp(-x @ theta))  # (n,)
        slope = x.T @ (wins - p) / len(x) - 1e-3 * theta  # (2,)
        bend = (x.T * (p * (1 - p))) @ x / len(x) + 1e-3 * np.eye(2)  # (2, 2)
        theta += np.linalg.solve(bend, slope)
    rate = 1 / (1 + np.exp(-theta[0]))
    steps = np.linalg.solve(bend, x.T * (wins - p)) / len(x)  # (2, n) how each answer moves theta
    error = float(rate * (1 - rate) * np.sqrt((steps[0] ** 2).sum()))
    return float(rate), error if len(wins) > 1 else None

def beats_all(values, questions):
    """Accuracy on questions with several wrong answers, each of which makes a pair. values (n, 2),
    questions (n,) the number of each pair's question or -1 -> (n,), a value per question: 1 if the
    right answer is above all wrong ones, 1 / (1 + k) if it is as high as the k best wrong ones.
    It stands at the first pair of the question, and the others are NaN, which means: no value."""
    found = np.full(len(values), np.nan)
    for question in set(questions.tolist()) - {-1}:
        rows = np.flatnonzero(questions == question)
        right, wrong = values[rows[0], 0], values[rows, 1]  # the right one is the same in all rows
        found[rows[0]] = 0.0 if wrong.max() > right else 1 / (1 + (wrong == right).sum())
    return found

def ties_score(values, names):
    """RewardBench-2's score of its subset Ties; values (n, 2), names [(kind, number)]. A question
    is there as "tied", with several right answers, and as "ref", with one. Its gap is the worst
    right answer's value less the best wrong one's; its spread is the range of the right ones.
    Malik et al. 2025, https://arxiv.org/abs/2506.01937; weights as in allenai/reward-bench."""
    gaps, spreads = dict(ref={}, tied={}), {}
    for kind, number in dict.fromkeys(names):
        rows = [row for row, name in enumerate(names) if name == (kind, number)]
        right, wrong = values[rows].T
        gaps[kind][number] = right.min() - wrong.max()
        if kind == "tied":
            spreads[number] = right.max() - right.min()
    score = 0.0
    for found in gaps.values():
        score += 0.3 * np.mean([gap > 0 for gap in found.values()] or [False])
    both = [number for number in spreads if number in gaps["ref"]]
    if both:
        tied = np.array([gaps["tied"][number] for number in both])
        smaller = np.minimum(tied, [gaps["ref"][number] for number in both])
        spread = np.array([spreads[number] for number in both])
        score += 0.2 * (tied > spread).mean() + 0.2 * (smaller > spread).mean()
        with np.errstate(divide="ignore", invalid="ignore"):  # a spread of 0
            score += 0.01 * np.nan_to_num(np.tanh(smaller / spread - 1)).mean()
    return float(score)

def best_of_n(rewards):
    """The best of n = 1, 2, 4, ... of N answers to each prompt, rewards (prompts, N), as the mean
    over all choices of n -> list of (n, KL, mean reward, its error). The KL to the model itself is
    at most log n - (n - 1) / n (Beirami et al. 2024, https://arxiv.org/abs/2401.01879)."""
    rewards = np.sort(rewards, 1)
    count = rewards.shape[1]
    found = []
    for n in [2**power for power in range(count.bit_length())]:
        # Answer i, counted from the worst, is the best of n if the others are of the i below it.
        chance = [math.comb(i, n - 1) / math.comb(count, n) for i in range(count)]
        found.append((n, math.log(n) - (n - 1) / n, *mean_and_error(rewards @ np.array(chance))))
    return found

def main():
    args = parse_args(Args)
    names = model_names(args)
    data = load_pairs(args, names) if args.data else None
    rank, world, device, dtype = start_process_group(args.dtype)
    out = Path(args.out)
    writing = f"cannot write --out {out} or --plot {args.plot}"
    with explain(writing):
        for folder in (out, Path(args.plot).parent):
            folder.mkdir(parents=True, exist_ok=True)
        if args.plot and rank == 0:  # if this fails, then now; the end draws all of it
            draw(args.plot, names, [])
    if not data:
        return dist.destroy_process_group()

    # One model at a time. The reference comes last, as it scores what the others have answered.
    order = [name for name in names if name != args.reference]
    if args.reference:
        order.append(args.reference)
    logps, seconds = {}, {}  # {model: (n, 2)}, {model: seconds}
    answers = {name: [] for name in names if args.samples}  # {model: records, see `answer`}
    for name in order:
        began = time.time()
        with explain(f"{name} lacks memory or positions: lower --max_tokens "
                     f"{args.max_tokens}, use --spread, or take shorter texts",
                     (torch.OutOfMemoryError, IndexError)):
            model, tokenizer = load_model(name, args, dtype, device)
            logps[name] = score_pairs(model, tokenizer, data, name, args)
            if args.samples:
                answer_prompts(model, tokenizer, data, answers, name, args)
        del model
        seconds[name] = time.time() - began
        if rank == 0:
            with contextlib.suppress(OSError):  # the end tells of a full disk
                write_raw(out, names, data, logps, answers)
    if rank > 0:  # rank 0 goes on alone: it may call --reward for longer than the others can wait
        return dist.destroy_process_group()
    rewards = reward_everything(data, answers, tokenizer, args) if args.reward else None  # (n, 2)

    results, values = summarise(names, data, logps, answers, rewards, args)
    threads = f"{torch.get_num_threads()} CPU threads"
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else threads
    precision = str(dtype).removeprefix("torch.")
    record = dict(args=dataclasses.asdict(args), ranks=world, hardware=hardware, dtype=precision,
                  torch=torch.__version__, transformers=transformers.__version__,
                  seconds=seconds, results=results)
    note = (f"\n{args.data}/{args.split}: mean ± standard error, log-probs in nats; "
            f"{len(data['asked'])} samples per model at temperature {args.temperature:g}; "
            f"{world} x {hardware}, {precision}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}, {sum(seconds.values()):.0f} s\n")
    table = result_table(results, args.columns) + note
    print(samples_table(names, answers) + table, end="")  # first: a full disk does not lose it
    with explain(writing):
        (out / "table.md").write_text(table)
        write_raw(out, names, data, logps, answers)
        (out / "samples.md").write_text(samples_table(names, answers))
        if len(names) > 1:
            (out / "differences.md").write_text(difference_table(names, values, data) + note)
        if args.plot:
            draw(args.plot, names, results)
        (out / "evaluation.json").write_text(json.dumps(record, indent=1))
    print(f"{out}/evaluation.json has all numbers")
    dist.destroy_process_group()

# ---- what main calls ----

# -- settings, and the pairs of a data folder
def model_names(args):
    """--models as a list without repeats. Ends the program if the settings do not fit together."""
    names = [name.strip().rstrip("/") for name in args.models.split(",")]
    names = list(dict.fromkeys(name for name in names if name))
    if not names or not (args.data or args.plot):
        fail("nothing to do: give --models A,B with --data data/NAME or --plot FILE.png")
    if args.columns not in ("", "all") and not {*args.columns.split(",")} <= COLUMNS.keys():
        fail(f"--columns {args.columns} are not all metrics; there are: {' '.join(COLUMNS)}")
    if args.reward and not args.data:
        fail(f"--reward {args.reward} judges pairs and samples: add --data data/NAME [--samples N]")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        fail("--plot needs a package: pip install matplotlib")
    if args.plot and not runs_among(names) and not (args.data and args.reference):
        fail(f"--plot {args.plot} draws the log.jsonl of runs, and {args.models} has none; or it "
             "draws changes from a --reference on --data")
    if args.best_of and not (args.samples and args.reference and args.reward):
        fail(f"--best_of {args.best_of} needs --samples, --reference and --reward")
    if args.spread and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("--spread wants a single process: start it by python, not by torchrun")
    if args.data:
        for name in filter(None, [*names, args.reference]):
            check_model(name)
    if args.reward:
        load_reward(args)
    return names

def load_pairs(args, names):
    """The pairs of --split as a dict, whose fields are explained where it is made."""
    remake = f"run: prepare_data.py --model {names[0]} --out {args.data} --dataset ..."
    with explain(f"--data {args.data}, --split {args.split}: cannot be read; {remake}"):
        vocab_hash = json.loads(Path(args.data, "meta.json").read_text())["vocab_hash"]
        folders = [f"{args.data}/{split}" for split in args.split.split(",")]
        rows = datasets.concatenate_datasets([datasets.load_from_disk(path) for path in folders])
        assert len(rows), "it has no pairs"
        if args.limit:
            rows = rows.select(range(min(args.limit, len(rows))))
        ids, prompts = rows["id"][:], rows["prompt"][:]
        chosen, rejected = rows["chosen"][:], rows["rejected"][:]
    words = [str(prompt) for prompt in prompts]
    _, first, clusters = np.unique(words, return_index=True, return_inverse=True)
    asked = np.random.default_rng(args.seed).permutation(np.sort(first))[:args.samples].tolist()
    subsets = rows["subset"][:] if "subset" in rows.column_names else [""] * len(rows)
    ties = [re.search(r"(ref|tied):(\d+)(-\d+)?$", name) for name in ids]
    return dict(
        ids=ids,
        texts=list(zip(prompts, chosen)) + list(zip(prompts, rejected)),  # token ids
        lengths=np.array([list(map(len, chosen)), list(map(len, rejected))]).T,  # (n, 2) tokens
        subsets=np.array(subsets),  # (n,) "" where a pair has none
        clusters=clusters,  # (n,) a number for each distinct prompt
        questions=number_questions(prompts, chosen, ties),  # (n,) or -1
        ties=[tie.group(1, 2) if tie else None for tie in ties],  # see ties_score
        prompts=prompts,
        asked=sorted(asked, key=ids.__getitem__),  # rows whose prompts are answered
        end=chosen[0][-1],  # the token that ends a turn
        vocab_hash=vocab_hash,  # of the tokenizer that made the data
        remake=remake)

def number_questions(prompts, chosen, ties):
    """(n,) the number of the multiple-choice question that a pair is a part of, or -1. A question
    is several pairs with the same prompt and chosen response. If most pairs are in none, the others
    only happen to share a side, and there are no questions. Pairs of Ties are left out."""
    words = [str(pair) for pair in zip(prompts, chosen)]
    _, numbers, counts = np.unique(words, return_inverse=True, return_counts=True)
    plain = np.array([tie is None for tie in ties])
    parts = plain & (counts[numbers] > 1)
    if 2 * parts.sum() <= plain.sum():
        parts[:] = False
    return np.where(parts, numbers, -1)

# -- models
def check_model(name):
    """End the program now, not after an hour, if a name stands for no model."""
    if Path(name, "args.json").is_file() and not Path(name, "final").is_dir():
        fail(f"{name} is a run without final/: let it finish (--resume), or take another model")
    folder, *adapters = find_model(name)
    if not Path(folder, "config.json").is_file() and not Path(folder, ".metadata").is_file():
        fail(f"{name} is no model, run or checkpoint: {folder} has no config.json")
    if adapters and not importlib.util.find_spec("peft"):
        fail(f"{name} is a LoRA adapter, which needs a package: pip install peft")

def load_model(name, args, dtype, device):
    """-> model in eval mode, its tokenizer. A checkpoint has no config, so the model that its run
    began with is loaded, and gets the checkpoint's weights."""
    transformers.utils.logging.disable_progress_bar()
    with explain(f"{name} of --models or --reference is no causal language model"):
        source, is_checkpoint = name, Path(name, ".metadata").is_file()
        if is_checkpoint:
            source = json.loads(Path(name).with_name("args.json").read_text())["args"]["model"]
        folder, *adapters = find_model(source)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map="auto" if args.spread else None,
            trust_remote_code=args.trust_remote_code, output_loading_info=True)
        assert not info["missing_keys"], f"it lacks {', '.join(info['missing_keys'])}"
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        for adapter in adapters:
            from peft import PeftModel
            model = PeftModel.from_pretrained(model, adapter)
            info = model.load_adapter(adapter, "default")  # again, as this says what does not fit
            wrong = tied & {f"{module}.weight" for module in model.targeted_module_names}
            wrong |= {*info.missing_keys, *info.unexpected_keys}
            assert not wrong, f"{adapter} does not fit {folder} in {sorted(wrong)[:3]}"
            model = model.merge_and_unload()
            folder = adapter if (adapter / "tokenizer_config.json").exists() else folder
        if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):  # Gemma-2
            model.set_attn_implementation("eager")  # before transformers 5.23, SDPA had no cap
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=args.trust_remote_code)
    if is_checkpoint:
        state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
        with explain(f"{name} is no checkpoint of all of {source}; take its run's final/"):
            dcp.load(dict(model=state), checkpoint_id=name, no_dist=True)  # in place
    return (model if args.spread else model.to(device)).eval(), tokenizer

# -- log-probs and answers of texts, which the processes share
def deal(lengths, model, name, args):
    """Put texts of these lengths into padded batches of at most --max_tokens, longest text first ->
    the batches of this process with a progress bar, [(number of the batch, numbers of texts)]."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    alone = rope.get("rope_type") in ("dynamic", "longrope")  # it follows the longest of a batch
    batches, longest = [], 0
    for k in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if alone or not batches or (len(batches[-1]) + 1) * longest > args.max_tokens:
            batches.append([])
            longest = lengths[k]
        batches[-1].append(k)
    ours = list(enumerate(batches))[dist.get_rank()::dist.get_world_size()]
    return tqdm(ours, desc=name, unit=" batches", disable=dist.get_rank() > 0)

@torch.no_grad()
def score(model, texts, name, args):
    """log pi(response | prompt) of a list of (prompt, response) in token ids -> (texts,) float64.
    Equal texts are computed once. Padding on the right needs no mask, as attention is causal."""
    distinct = sorted({(tuple(prompt), tuple(response)) for prompt, response in texts})
    lengths = [len(prompt) + len(response) for prompt, response in distinct]
    sums = torch.zeros(len(distinct), dtype=torch.float64)
    for _, batch in deal(lengths, model, name, args):
        tokens = [torch.tensor(distinct[k][0] + distinct[k][1]) for k in batch]
        ids = pad_sequence(tokens, batch_first=True).to(model.device)  # (texts, width)
        first = min(len(distinct[k][0]) for k in batch) - 1  # logits before it are not needed
        if model._supports_logits_to_keep():
            logits = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
        else:
            logits = model(ids, use_cache=False).logits[:, first:]
        for row, k in enumerate(batch):
            start, end = len(distinct[k][0]), lengths[k]  # of the response
            scored = logits[row, start - 1 - first:end - 1 - first].float()
            losses = F.cross_entropy(scored, ids[row, start:end], reduction="none")
            sums[k] = -losses.double().sum()
    dist.all_reduce(sums)  # a text is 0 on all processes but one
    known = dict(zip(distinct, sums.tolist()))
    return np.array([known[tuple(prompt), tuple(response)] for prompt, response in texts])

def score_pairs(model, tokenizer, data, name, args):
    """-> log-probs of the pairs (n, 2)."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    if hashlib.sha256(vocabulary).hexdigest()[:16] != data["vocab_hash"]:
        fail(f"--data {args.data} holds the tokens of another model than {name}; {data['remake']}")
    logps = score(model, data["texts"], name, args).reshape(2, -1).T
    broken = np.flatnonzero(~np.isfinite(logps).all(1))
    if len(broken):
        fail(f"{name}: the log-prob of pair {data['ids'][broken[0]]} is not finite ({len(broken)} "
             "pairs in all); try --dtype float32, or drop the model from --models")
    return logps

def generate(model, prompts, ends, name, args):
    """Answers to prompts, both token ids, up to and with the first token of `ends`. They do not
    depend on the number of processes. Prompts are padded on the left."""
    model.generation_config = transformers.GenerationConfig(  # instead of the model's own
        max_new_tokens=args.max_new_tokens, eos_token_id=sorted(ends), pad_token_id=min(ends))
    if args.temperature > 0:
        model.generation_config.update(do_sample=True, temperature=args.temperature, top_k=0)
    answers = {}
    for number, batch in deal([len(x) + args.max_new_tokens for x in prompts], model, name, args):
        tokens = [torch.tensor(prompts[k]) for k in batch]
        real = [torch.ones_like(text) for text in tokens]
        ids = pad_sequence(tokens, True, min(ends), "left").to(model.device)
        mask = pad_sequence(real, True, 0, "left").to(model.device)
        torch.manual_seed(args.seed + number)
        output = model.generate(input_ids=ids, attention_mask=mask)
        for k, text in zip(batch, output[:, ids.shape[1]:].tolist()):
            stops = [place for place, token in enumerate(text) if token in ends]
            answers[k] = text[:stops[0] + 1] if stops else text
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, answers)
    for part in parts:
        answers |= part
    return [answers[k] for k in range(len(prompts))]

def answer(model, tokenizer, prompts, end, name, args):
    """Answers to prompts (token ids) as records, dict(model, prompt, response: texts, ids: token
    ids of both, tokens: of the response, ended). `end` ends a turn, as do the model's own ends."""
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, end} - {None}
    records = []
    for prompt, response in zip(prompts, generate(model, prompts, ends, name, args)):
        own = dict(model=name, tokens=len(response), ended=response[-1] in ends)
        records.append(as_text(tokenizer, prompt, response) | own)
    return records

def as_text(tokenizer, prompt, response):
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, response)]
    return dict(prompt=texts[0], response=texts[1], ids=(prompt, response))

def answer_prompts(model, tokenizer, data, answers, name, args):
    """Puts the records of the model's answers into `answers`, if it is one of --models. If it is
    the reference, it also scores the answers of all models, and makes those for --best_of."""
    has_kl = args.reference and args.temperature == 1  # else the answers are not drawn from pi
    if name in answers:
        answers[name] = sample(model, tokenizer, data, 1, name, args)
        if has_kl:
            add_logps("logp", model, answers[name], name, args)
    if name == args.reference and has_kl:
        for other, records in answers.items():  # in the batches of above: equal models have KL 0
            add_logps("ref_logp", model, records, other, args)
    if name == args.reference and args.best_of:
        answers[BEST] = sample(model, tokenizer, data, args.best_of, BEST, args)

def sample(model, tokenizer, data, copies, name, args):
    """So many answers to each prompt that is asked -> records, with the id of the prompt's pair."""
    rows = np.repeat(data["asked"], copies).tolist()
    prompts = [data["prompts"][row] for row in rows]
    records = answer(model, tokenizer, prompts, data["end"], name, args)
    for row, record in zip(rows, records):
        record["id"] = data["ids"][row]
    return records

def add_logps(key, model, records, name, args):
    """Adds the model's log-prob of each answer to its record, as `key`."""
    logps = score(model, [record["ids"] for record in records], name, args)
    for record, logp in zip(records, logps.tolist()):
        record[key] = logp

# -- rewards
def load_reward(args):
    """The function that --reward FILE.py:FUNCTION names, from (prompt, response) to a number."""
    path, _, name = args.reward.rpartition(":")
    with explain(f"--reward {args.reward} is no FILE.py:FUNCTION"):
        function = runpy.run_path(path)[name]
        assert callable(function), f"{name} is no function"
    return function

def reward_everything(data, answers, tokenizer, args):
    """Adds the reward to each record of `answers` -> rewards of the pairs (n, 2)."""
    records = []
    for name, (prompt, response) in zip(data["ids"] * 2, data["texts"]):
        records.append(as_text(tokenizer, prompt, response) | dict(id=name, model="--data"))
    count = len(records)
    for others in answers.values():
        records += others
    function = load_reward(args)
    for record in records:
        with explain(f"--reward {args.reward} has to return a number, but failed on pair "
                     f"{record['id']} and the answer of {record['model']}; {args.out} has what "
                     "was measured before"):
            record["reward"] = float(function(record["prompt"], record["response"]))
            assert math.isfinite(record["reward"]), "the number is not finite"
    return np.array([record["reward"] for record in records[:count]]).reshape(2, -1).T

# -- from values to results
def summarise(names, data, logps, answers, rewards, args):
    """-> all results, see result_rows, and the values that they are means of, {model: {metric:
    (n,) of pairs or answers}}."""
    results, values = [], {}
    ref = logps.get(args.reference)
    for name in names:
        base = logps[names[0]] if name != names[0] else None
        values[name] = pair_metrics(logps[name], data["lengths"], data["questions"], ref, base)
        rows = result_rows(name, values[name], data["subsets"], data["clusters"])
        for result in rows:
            result["metrics"] |= ties_metrics(logps[name], ref, result["subset"], data)
        if name in answers:
            found = answer_metrics(answers[name], answers[names[0]])  # in the row of all pairs
            rows[0]["metrics"] |= {key: mean_and_error(value) for key, value in found.items()}
            if "win" in found:
                longer = found["length"] - values_of(answers[names[0]], "tokens")
                rows[0]["metrics"]["win/length"] = equal_length(found["win"], longer)
            values[name] |= found
        results += rows
    if rewards is not None:
        found = pair_metrics(rewards, data["lengths"], data["questions"])
        found = {key: found[key] for key in ("accuracy", "margin")}
        results += result_rows(args.reward, found, data["subsets"], data["clusters"])
    if BEST in answers:
        table = values_of(answers[BEST], "reward").reshape(len(data["asked"]), -1)
        for n, kl, *reward in best_of_n(table):
            metrics = dict(reward=reward, kl=(kl, None))
            results.append(dict(model=f"{BEST}{n}", subset="", pairs=0, metrics=metrics))
    return results, values

def result_rows(model, values, subsets, clusters):
    """Means of values {metric: (n,)} over all rows, which is the subset "", and over each subset
    (n,) -> list of dict(model, subset, pairs, metrics={name: (mean, standard error)})."""
    results = []
    for subset in ["", *sorted(set(subsets) - {""})]:
        rows = in_subset(subset, subsets)
        metrics = {}
        for name, value in values.items():
            known = rows[~np.isnan(value[rows])]
            if len(known):
                metrics[name] = mean_and_error(value[known], clusters[known])
        results.append(dict(model=model, subset=subset, pairs=len(rows), metrics=metrics))
    return results

def ties_metrics(logps, ref_logps, subset, data):
    """ties and ties/ref, which are no means of values, of those pairs that belong to Ties."""
    rows = [row for row in in_subset(subset, data["subsets"]) if data["ties"][row]]
    if not rows:
        return {}
    names = [data["ties"][row] for row in rows]
    metrics = {"ties": (ties_score(logps[rows], names), None)}
    if ref_logps is not None:
        metrics["ties/ref"] = (ties_score((logps - ref_logps)[rows], names), None)
    return metrics

def in_subset(subset, subsets):
    return np.flatnonzero((subsets == subset) | (subset == ""))

def mean_and_error(values, clusters=None):
    """(mean, its standard error) of values (n,); those of one cluster (n,) may depend on each
    other. Without clusters all are independent. Of one cluster, the error is not known: None."""
    values = np.asarray(values, float)
    off = values - values.mean()
    if clusters is not None:
        off = np.bincount(np.unique(clusters, return_inverse=True)[1], off)  # sum of each cluster
    count = len(off)
    error = (count / (count - 1) * (off**2).sum()) ** 0.5 / len(values) if count > 1 else None
    return float(values.mean()), error

# -- files and tables
def write_raw(out, names, data, logps, answers):
    """samples.jsonl and logps.npz of the models so far, so that an error later loses little."""
    with open(out / "samples.jsonl", "w") as file:
        for name in names:
            for record in answers.get(name, []):
                line = {key: value for key, value in record.items() if key != "ids"}
                file.write(json.dumps(line) + "\n")
    lengths = np.column_stack([[len(prompt) for prompt in data["prompts"]], data["lengths"]])
    np.savez(out / "logps.npz", models=list(logps), logps=np.float32(list(logps.values())),
             ids=data["ids"], lengths=lengths)

def show(numbers, metric):
    """(mean, error or None) -> "12.3 ± 0.4", in the unit of the metric's heading."""
    factor, digits = (100, 1) if "%" in COLUMNS[metric] else (1, 2)
    return " ± ".join(f"{factor * x:.{digits}f}" for x in numbers if x is not None)

def markdown(cells):
    """Rows of words, the first of them headings -> a Markdown table that is aligned as it stands:
    the first two columns on the left, numbers on the right."""
    columns = []
    for number, words in enumerate(zip(*cells)):
        width = max(2, *map(len, words))  # the rule of numbers, "-:", takes two
        words = [word.ljust(width) if number < 2 else word.rjust(width) for word in words]
        rule = "-" * width if number < 2 else "-" * (width - 1) + ":"
        columns.append([words[0], rule, *words[1:]])
    return "".join(f"| {' | '.join(row)} |\n" for row in zip(*columns))

def result_table(results, columns):
    """results, see result_rows, and --columns -> Markdown."""
    metrics = [name for name in COLUMNS if any(name in row["metrics"] for row in results)]
    if columns != "all":
        metrics = columns.split(",") if columns else metrics[:5]
    cells = [["model", "subset", "n", *(COLUMNS[name] for name in metrics)]]
    for row in results:
        numbers = [show(row["metrics"].get(name, ()), name) for name in metrics]
        cells.append([row["model"], row["subset"] or "all", str(row["pairs"] or ""), *numbers])
    return markdown(cells)

def difference_table(names, values, data):
    """values {model: {metric: (n,)}} -> Markdown: for every two models the mean difference and its
    standard error, over the same pairs or prompts; * where it exceeds two standard errors."""
    metrics = ("accuracy", "accuracy/ref", "margin/ref", "reward")
    metrics = [metric for metric in metrics if metric in values[names[0]]]
    cells = [["model", "against", *(COLUMNS[metric] for metric in metrics)]]
    for one, two in itertools.combinations(names, 2):
        cells.append([two, one])
        for metric in metrics:
            clusters = None if metric == "reward" else data["clusters"]
            mean, error = mean_and_error(values[two][metric] - values[one][metric], clusters)
            star = "*" if error is not None and abs(mean) > 2 * error else ""
            cells[-1].append(f"{show((mean, error), metric)} {star}")
    return markdown(cells)

def samples_table(names, answers):
    """Markdown: the first three prompts, and below each the answers of all models, a line each."""
    text = ""
    for i in range(3):
        cells = [["model", "answer", "reward"]]
        for name in names:
            for record in answers.get(name, [])[i:i + 1]:
                words = " ".join(record["response"].split()).replace("|", "\\|")
                reward = f"{record['reward']:.2f}" if "reward" in record else ""
                cells.append([name, words[:300], reward])
                prompt = " ".join(record["prompt"].split())
        if len(cells) > 1:
            text += f"> {prompt}\n\n{markdown(cells)}\n"
    return text

# -- plots
PANELS = [  # metrics of x and y, their labels; eval/... are those of log.jsonl
    ("step", "eval/loss", "optimiser step", "loss on val/"),
    ("step", "eval/rewards/accuracies", "optimiser step", "accuracy on val/"),
    ("step", "eval/rewards/margins", "optimiser step", "reward margin on val/"),
    ("step", "eval/logps/chosen", "optimiser step", "log-prob of chosen on val/, nats"),
    ("chosen/ref", "rejected/ref", "chosen: change of log-prob, nats", "rejected: change, nats"),
    ("length", "reward", "tokens of an answer", "reward"),
    ("kl", "reward", "KL to the reference, nats", "reward")]

def curve_of(name):
    """-> (curve, place on it). Checkpoints of a run make one curve, and so do the best of n."""
    if name.startswith(BEST):
        return f"{BEST}n", int(name.removeprefix(BEST))
    if Path(name).name.startswith("step-"):
        return str(Path(name).parent), int(Path(name).name.removeprefix("step-"))
    return name.removesuffix("/final"), math.inf

def runs_among(names):
    return [name for name in names if Path(name, "log.jsonl").is_file()]

def read_log(run):
    """log.jsonl -> list of dicts; the last line may be cut off."""
    lines = Path(run, "log.jsonl").read_text().splitlines()
    with explain(f"{run}/log.jsonl has a line that is not JSON; take the line out"):
        return [json.loads(line) for line in lines if line.endswith("}")]

def draw(path, names, results):
    """PANELS, as far as there are values: logs of the runs among the models, and results. A curve
    has a colour, a marker and a kind of line, so that black and white is enough."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    points = []  # (curve, place on it, {metric: value})
    for run in runs_among(names):
        points += [(run, line["step"], line) for line in read_log(run)]
    for row in results:
        if not row["subset"]:
            means = {metric: value[0] for metric, value in row["metrics"].items()}
            points.append((*curve_of(row["model"]), means))
    points.sort(key=operator.itemgetter(1))
    curves = list(dict.fromkeys(point[0] for point in points))
    panels = [panel for panel in PANELS if any({*panel[:2]} <= point[2].keys() for point in points)]
    rows = math.ceil(max(1, len(panels)) / 2)
    figure = pyplot.figure(figsize=(10, 3.5 * rows), layout="constrained")
    for number, (x, y, xlabel, ylabel) in enumerate(panels, 1):
        ax = figure.add_subplot(rows, 2, number, xlabel=xlabel, ylabel=ylabel)
        for k, curve in enumerate(curves):
            places = [(point[2][x], point[2][y]) for point in points
                      if point[0] == curve and {x, y} <= point[2].keys()]
            if places:
                ax.plot(*zip(*places), label=curve, color=f"C{k % 10}", markersize=4,
                        marker="osD^vP*X<>"[k % 10], linestyle=("-", "--", ":", "-.")[k % 4])
        ax.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)
    print(f"{path} shows {', '.join(curves)}")

# ---- helpers, the same in every script (tests/test_copies.py): edit them in dpo.py first ----

# -- command line, errors, processes
def parse_args(cls):
    """Command line -> dataclass `cls`; --help shows its source. Its comments are read: a number
    is above 0, or maybe 0 if "0 =" or the default says so; a share or fraction is at most 1."""
    source = inspect.getsource(cls)
    parser = transformers.HfArgumentParser(cls, allow_abbrev=False)
    parser.format_help = lambda: source
    parser.error = lambda message: fail(f"{message}; see --help")
    values = vars(parser.parse_args())
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)", source, re.MULTILINE))
    for name, value in values.items():
        if type(value) is str:
            values[name] = value.rstrip("/") or value  # model/ and model are one name
        comment = comments.get(name, "")
        least = 0 if getattr(cls, name, None) == 0 or "0 =" in comment else sys.float_info.min
        most = 1 if re.match("share|fraction|probability", comment) else sys.float_info.max
        if type(value) in (int, float) and not least <= value <= most:
            limit = "at most 1" if most == 1 else "finite"
            fail(f"--{name} {value} must be {'above' if least else 'at least'} 0 and {limit}")
    return cls(**values)

def fail(message):
    """End the program with one line on stderr and exit status 1."""
    if int(os.environ.get("RANK", 0)) > 0:  # mostly rank 0 fails too; then torchrun ends this one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    raise SystemExit("error: " + " ".join(message.split()))

@contextlib.contextmanager
def explain(trouble, kinds=(Exception, dcp.CheckpointException)):  # dcp's is no Exception
    """An error in the `with` block ends the program with one line: `trouble`, and the reason."""
    try:
        yield
    except kinds as error:
        reason = re.sub(r"(?s).*Traceback.*\n", "", str(error).strip())  # dcp adds a traceback
        fail(f"{trouble} ({type(error).__name__}: {reason[:300]})")

def start_process_group(dtype):
    """Join torchrun's process group, or make one alone -> rank, world size, device, dtype."""
    # Each micro-batch has another shape. On a GPU these break the memory into pieces (138 GiB were
    # reserved at a peak of 65) unless its segments can grow, and cuDNN plans each for 0.1 s.
    if not any("ALLOC_CONF" in name for name in os.environ):  # set by the user, by any of its names
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_flush_denormal(True)  # on a CPU, denormal numbers can be many times slower
    cuda = torch.cuda.is_available()  # true for ROCm as well, where "nccl" is RCCL
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    with explain("the ranks do not find each other: start them by torchrun, or use python"):
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    if "RANK" in os.environ:  # torchrun's
        sys.excepthook = late_traceback
    if dtype == "auto":
        dtype = "bfloat16" if cuda else "float32"
    return dist.get_rank(), dist.get_world_size(), device, getattr(torch, dtype)

def late_traceback(*error):
    """Wait first: if another rank failed, and this one only lost it, torchrun ends this one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(5)
    sys.__excepthook__(*error)

# -- model
MODEL_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")

@functools.cache
def find_model(name):
    """A name -> the folder of the model, then those of the LoRA adapters on it. A run's folder
    means its final/, and what is no folder is downloaded from the hub."""
    folder = Path(name, "final") if Path(name, "final").is_dir() else Path(name)
    if not folder.is_dir():
        wanted = [f"*{kind}" for kind in MODEL_FILES] + ["model*.safetensors", "adapter_model*"]
        with explain(f"{name} (--model or its base) is no folder, and the hub has none"):
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns="*/*"))
    adapter = folder / "adapter_config.json"
    if not adapter.exists():
        return [folder]
    if any(folder.glob("model*.safetensors")):
        fail(f"{folder} holds a model and a LoRA adapter: take one of them out")
    base = json.loads(adapter.read_text())["base_model_name_or_path"]
    base = folder / base if (folder / base).is_dir() else base  # its path may begin here
    return [*find_model(str(base)), folder]

if __name__ == "__main__":
    with explain("mend the cause and run the same command again",
                 (OSError, dcp.CheckpointException, ModuleNotFoundError)):
        main()
