"""One pass of the reference model: log ref(y|x) of every distinct response, on disk.

It is the term log ref of DPO's eq. 7 (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), a
constant that the training scripts read, so that the reference is never in memory beside the policy.

    torchrun --nproc_per_node=8 cache_ref.py --model MODEL --data data/NAME    (or python)

Writes data/NAME/ref-<hash>/{train,val}-logps.npy, float32 (U,) in nats, for the U distinct
responses that prepare_data.py has numbered (chosen_id, rejected_id); the hash is of weights, tokens
and precision. A response of several pairs is computed once (the last of an odd number of a prompt
twice). What is not known yet is NaN, so a killed run continues there, with any number of processes.
meta.json appears when no NaN is left.

--noise_margin 3 (nats), as in ComPO (Chen et al. 2025, https://arxiv.org/abs/2505.05465): the pairs
that the reference can hardly tell apart, |log ref(y_w|x) - log ref(y_l|x)| <= 3, go to
data/NAME/noisy, the others to data/NAME/clean: data folders for every script, with their log-probs.

--sketch_dim K, for auxdpo.py: adds ref-<hash>/sketch-<hash>/train-sketch.npy (U, K): for each
response a TensorSketch (Pham and Pagh 2013) of g = grad log ref(y|x), so that <sketch(g),
sketch(g')> estimates <g, g'> without bias. For a linear layer with inputs x_t and output gradients
d_t at tokens t, g is sum_t d_t x_t^T. This matrix is never formed: sketch(g) is IFFT sum_t
FFT(CS_out(d_t)) FFT(CS_in(x_t)), where the count sketch CS adds the entries of a vector, with
random signs, into K buckets.

Read to line 429: settings, the pass, the files it fills, sketches, the split. Below the rule stand
helpers of dpo.py; you can fork this file without opening them. For words and shapes, see dpo.py.
"""
import contextlib, dataclasses, functools, hashlib, inspect, json, math, os, re, shutil, signal
import sys, time, types, uuid
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pyarrow.compute as pc
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.core_model_loading import revert_weight_conversion

@dataclasses.dataclass(frozen=True)
class Args:
    # input and output
    model: str  # Hugging Face folder or hub name of the reference
    data: str  # folder made by prepare_data.py
    trust_remote_code: bool = False  # run the Python files that come with some models
    noise_margin: float = 0.0  # nats, delta of ComPO: also write noisy/ and clean/; 0 = no
    # memory and speed
    layout: Literal["packed", "concatenated", "separate"] = "packed"  # how pairs enter the model
    max_tokens: int = 8192  # bound on the tokens of one forward pass of one rank
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 on a GPU, else float32
    zero: Literal["auto", "2", "3"] = "auto"  # 2 gathers weights once a step; auto: on one rank
    shard_group: int = 0  # ranks that share one copy of the weights, such as a node's; 0 = all
    # sketches for auxdpo.py
    sketch_dim: int = 0  # K, numbers that stand for the gradient of a response; 0 = no sketches
    sketch_dtype: Literal["float16", "float32"] = "float16"  # of the sketches on disk
    sketch_modules: str = ""  # regex of the parameters to sketch; empty = all that is trained
    lora_rank: int = 0  # as the training will have it, for the sketches; 0 = off
    train_modules: str = ""  # regex of parameter names, as the training will have it; empty = all
    seed: int = 0  # as the training will have it: with --lora_rank, of the initial adapters

def main():
    args = parse_args(Args)
    rank, world, device, dtype = start_process_group(args.dtype)
    if args.sketch_dim:  # every text must be a row of its own
        args = dataclasses.replace(args, layout="concatenated")
    with explain(f"--data {args.data} or --model {args.model} cannot be read"):
        splits = load_data(args)
        model, weights = read_model(args.model, args)  # without weights; with them, on rank 0
    content = content_hashes(weights, splits, dtype, args)
    choose_attention(model, args)
    choose_trained(model, weights, args)
    policy = Policy(model, token_logps).eval()
    shard(policy, device, dtype, args)
    place_weights(model, weights, device)
    check_forward(policy, splits["train"], dtype, args)
    def logps(pairs):
        with torch.no_grad():
            return policy(collate(pairs, args.layout)).T  # (n, 2)
    folder = Path(args.data, f"ref-{name_of(content)}")
    fill_folder(folder, splits, "logps", (), "float32", logps, content, args)
    if args.sketch_dim:
        gradients = functools.partial(sketches, policy, watch(model, args))
        train, key = dict(train=splits["train"]), sketch_key(args)
        fill_folder(folder / f"sketch-{name_of(key)}", train, "sketch", (args.sketch_dim,),
                    args.sketch_dtype, gradients, key, args)
    if args.noise_margin:
        split_by_margin(folder, splits, content, args)
    dist.destroy_process_group()

# -- files that are filled row by row, with a row for each distinct response
def name_of(key):
    """12 hex digits for a dict of hashes or settings."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]

def is_writer():
    """The first process of each node writes, so that nodes need no common file system."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0

def fill_folder(folder, splits, kind, shape, dtype, compute, key, args):
    """Fill folder/{split}-{kind}.npy (U, *shape), where compute(pairs) gives the (n, 2, *shape) of
    n pairs, and say in meta.json that they are complete."""
    folder.mkdir(exist_ok=True)
    for name, split in splits.items():
        path, texts = folder / f"{name}-{kind}.npy", distinct_texts(split, args)
        while fill_file(path, shape, dtype, texts, compute, args):
            pass  # look again: another job may have made the file anew meanwhile
    if is_writer() and not (folder / "meta.json").exists():
        write_meta(folder, key, args)
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"{folder} is complete")

def distinct_texts(split, args):
    """Deal the U distinct responses into twos of one prompt, so that each is computed once -> their
    numbers (k, 2), their lengths (k, 3), and where the text of each response stands."""
    _, first = np.unique(split["responses"], return_index=True)  # (U,) in (rows, 2), flattened
    rows, sides = first // 2, first % 2  # (U,) a side of 0 means chosen, 1 rejected
    waiting, twos = {}, []
    for response, prompt in enumerate(np.array(split["pairs"]["prompt_id"])[rows]):
        if prompt in waiting:
            twos.append((waiting.pop(prompt), response))
        else:
            waiting[prompt] = response
    twos = np.array(twos, int).reshape(-1, 2)
    prompts, responses = split["lengths"][rows, 0], split["lengths"][rows, 1 + sides]  # (U,) tokens
    lengths = np.column_stack([prompts[twos[:, 0]], responses[twos]])
    too_long = pair_tokens(lengths, args.layout) > args.max_tokens
    # The last of an odd number, or of a two that is too long, is computed with the response that it
    # is compared with, once more.
    alone = [*twos[too_long].flatten(), *waiting.values()]
    twos = np.concatenate([twos[~too_long], split["responses"][rows[alone]]])
    lengths = np.column_stack([prompts[twos[:, 0]], responses[twos]])
    return types.SimpleNamespace(twos=twos, lengths=lengths, rows=rows, pairs=split["pairs"],
                                 sides=np.array(["chosen", "rejected"])[sides])

def text_pair(texts, two):
    """The pair of two responses, by their numbers, of one prompt."""
    pairs = [texts.pairs[int(texts.rows[response])] for response in two]
    chosen, rejected = [pair[texts.sides[response]] for pair, response in zip(pairs, two)]
    return pairs[0] | dict(chosen=chosen, rejected=rejected)

def write_meta(folder, key, args):
    """meta.json, which makes a folder complete: its key, and the hashes of the log-probs in it."""
    hashes = {}
    for path in folder.glob("*-logps.npy"):
        hashes[path.stem.removesuffix("-logps")] = hashlib.sha256(path.read_bytes()).hexdigest()
    record = dict(key=key, args=dataclasses.asdict(args), folder=os.path.realpath(args.model),
                  sha256=hashes, torch=torch.__version__, transformers=transformers.__version__)
    aside = folder / f"{uuid.uuid4().hex}.json"
    aside.write_text(json.dumps(record))
    aside.rename(folder / "meta.json")

def missing_rows(path, shape, dtype):
    """Numbers of the rows that are not in the file yet, on any node; makes a file of NaN."""
    missing = torch.zeros(shape[0], dtype=torch.int)
    if is_writer():
        if not is_whole(path, shape, dtype):
            new_file(path, shape, dtype)
        last = np.load(path, mmap_mode="r").reshape(shape[0], -1)[:, -1]  # it is written last
        missing = torch.from_numpy(np.isnan(last)).int()
    dist.all_reduce(missing, dist.ReduceOp.MAX)
    return np.flatnonzero(missing.numpy())

def is_whole(path, shape, dtype):
    """Is there a file of this shape and type, which is not cut off?"""
    try:
        file = np.load(path, mmap_mode="r")
        return file.shape == shape and file.dtype == dtype
    except (FileNotFoundError, ValueError, EOFError):
        return False

def new_file(path, shape, dtype):
    """An .npy file full of NaN, whole or not at all, in place of one that is not whole."""
    if path.exists():
        tqdm.write(f"{path} is damaged or of another type, and will be computed again")
        path.with_name("meta.json").unlink(missing_ok=True)  # it may have the old file's hash
    aside = path.with_name(f"{uuid.uuid4().hex}.npy")
    with explain(f"{path} cannot be written; mend this and run the same command again"):
        try:
            np.save(aside, np.full(shape, np.nan, dtype))
            aside.rename(path)
        finally:
            aside.unlink(missing_ok=True)

def fill_file(path, shape, dtype, texts, compute, args):
    """Compute with all ranks what is missing in the file of a node -> was anything missing?"""
    rank, world, total = dist.get_rank(), dist.get_world_size(), len(texts.rows)
    missing = missing_rows(path, (total, *shape), dtype)
    if len(missing) == 0:
        return False
    if rank == 0:
        print(f"{path}: {total - len(missing)} of {total} distinct responses are done; the "
              f"{len(texts.pairs)} pairs have {2 * len(texts.pairs)}")
    plan = []  # which responses share a forward pass is a function of the data alone
    for window in np.split(np.arange(len(texts.twos)), range(1024, len(texts.twos), 1024)):
        for part in micro_batches(window, texts.lengths, args, 1):
            if np.isin(texts.twos[part], missing).any():
                plan.append(texts.twos[part])
    bar = tqdm(total=sum(map(len, plan)), desc=path.name, unit=" pairs", disable=rank > 0)
    for i in range(0, len(plan), world):  # FSDP needs every rank: some do the last part once more
        twos = plan[min(i + rank, len(plan) - 1)]
        values = compute([text_pair(texts, two) for two in twos]).flatten(0, 1)  # (2 n, *shape)
        gathered = [None] * world
        dist.all_gather_object(gathered, (twos, values.float().cpu().numpy().astype(dtype)))
        for twos, values in gathered[:len(plan) - i]:
            if is_writer():
                write_rows(path, twos.flatten(), values, texts)
            bar.update(len(twos))
    return True

def write_rows(path, responses, values, texts):
    """Write the values of these responses where they belong in an .npy file, counted from its end,
    unless another job was faster: its values may differ by rounding, and meta.json may have their
    hash. By seek, not by mapped memory or a buffer: there two jobs would overwrite each other's
    rows. Stop if a value is not finite."""
    with open(path, "r+b", buffering=0) as file:
        for response, value in zip(responses, values):
            if not np.isfinite(value).all():
                pair = texts.pairs[int(texts.rows[response])]["id"]
                fail(f"{path}: the values of pair {pair} are not finite in {value.dtype}; take it "
                     "out of the data, or try float32 (--dtype, --sketch_dtype)")
            place = (int(response) - len(texts.rows)) * value.nbytes
            file.seek(place, os.SEEK_END)
            if np.isnan(np.frombuffer(file.read(value.nbytes), value.dtype)[-1]):
                file.seek(place, os.SEEK_END)
                file.write(value.tobytes())

# -- sketches
def sketch_key(args):
    """The settings that make sketches what they are; each such dict has a folder of its own."""
    names = ("sketch_dim", "sketch_modules", "train_modules", "lora_rank")
    seed = args.seed if args.lora_rank else 0  # of the initial adapters
    return {name: getattr(args, name) for name in names} | dict(seed=seed)

def sketches(policy, state, pairs):
    """-> float32 (n, 2, K), the sketched gradients of log pi of both responses of n pairs."""
    batch = collate(pairs, "concatenated")[0]  # every text is a row of its own
    inputs = batch["inputs"]
    rows, width = inputs["input_ids"].shape
    inputs["position_ids"] = inputs["position_ids"].expand(rows, -1)  # GPT-2 has them embedded
    prompts = to_device([len(pair["prompt"]) for pair in pairs] * 2)  # (rows,)
    sizes = prompts + to_device(batch["sizes"])  # (rows,) tokens of each text
    device = sizes.device
    real = torch.arange(width, device=device) < sizes[:, None]  # (rows, width)
    state.cells = real.flatten().nonzero()[:, 0]  # places of the tokens that are not padding
    state.rows = state.cells // width  # (tokens,) the row of each
    state.response_rows = batch["source"] // width  # (M,) the row of each token that is predicted
    state.shape = rows, width
    state.sums = torch.zeros(rows, state.dim, device=device)
    state.spectrum = torch.zeros(rows, state.dim // 2 + 1, dtype=torch.complex64, device=device)
    policy([batch]).sum().backward()
    sums = state.sums + torch.fft.irfft(state.spectrum, n=state.dim)
    return sums.view(2, len(pairs), -1).transpose(0, 1)

def watch(model, args):
    """Freeze all weights, and let every backward pass sketch the gradients of those that would be
    trained and that --sketch_modules matches -> what its hooks share."""
    names = {}  # {weight: its name in the model}; a tied weight has one
    with explain(f"--sketch_modules {args.sketch_modules} is no regular expression"):
        for name, weight in model.named_parameters():
            if weight.requires_grad and re.search(args.sketch_modules, name):
                names[weight] = name
    if not names:
        fail(f"--sketch_modules {args.sketch_modules} matches no parameter that is trained")
    model.requires_grad_(False)
    state = types.SimpleNamespace(dim=args.sketch_dim, active=True,
                                  head=model.get_output_embeddings())
    for module in model.modules():
        weights = dict(module.named_parameters(recurse=False))
        own = {leaf: names[weight] for leaf, weight in weights.items() if weight in names}
        if not own:
            continue
        kind = type(module).__name__.removeprefix("FSDP")  # which shard makes of it
        if kind in ("Linear", "Embedding", "Conv1D") or hasattr(module, "embed_scale"):
            add = add_product
        elif "Norm" in kind:
            add = add_norm
        else:
            fail(f"--sketch_dim knows linear layers, embeddings and norms, not {kind}: leave its "
                 f"{own} out with --sketch_modules")
        hook = functools.partial(remember, state, own, add)
        module.register_forward_hook(hook, with_kwargs=True)
    return state

def remember(state, own, add, module, inputs, kwargs, output):
    """Forward hook of a layer; own is {name in it: name in the model} of the weights that count.
    Its backward hook `add` gets x, the input of the layer, and d, the gradient of its output."""
    if state.active and torch.is_grad_enabled():
        tensors = [each for each in (*inputs, *kwargs.values()) if torch.is_tensor(each)]
        if len(tensors) > 1:
            fail(f"--sketch_dim knows layers of one tensor: leave {own}, which are given "
                 f"{len(tensors)}, out with --sketch_modules")
        if not output.requires_grad:  # the backward pass ends at the first layer that counts
            output = output.requires_grad_().clone()  # a copy, as CTRL changes it in place
        output.register_hook(functools.partial(add, state, own, module, tensors[0].detach()))
    return output

def add_product(state, own, module, x, d):
    """Backward hook of a linear layer or an embedding, whose x are token ids."""
    if module is state.head:  # x is a slice of hidden (M, h), whose offset says which rows it has
        first = x.storage_offset() // x.shape[-1]
        row = state.response_rows[first:first + len(x)]
    else:
        x = x.flatten(0, -2) if x.is_floating_point() else x.flatten()
        d = d.flatten(0, -2)
        if not len(x) == len(d) == math.prod(state.shape):
            fail(f"--sketch_dim cannot tell the texts of {own} apart: leave it out with "
                 "--sketch_modules")
        x, d, row = x[state.cells], d[state.cells], state.rows
    for some_x, some_d, rows in zip(x.split(1024), d.split(1024), row.split(1024)):
        if "bias" in own:
            state.sums.index_add_(0, rows, count_sketch(some_d, state, own["bias"], 0))
        if "weight" in own:
            spectrum = product_spectrum(state, own["weight"], module, some_x, some_d)
            state.spectrum.index_add_(0, rows, spectrum)

def product_spectrum(state, name, module, x, d):
    """FFT (t, K // 2 + 1) of the sketches of d_t x_t^T; x (t, in) or token ids (t,), d (t, out)."""
    if isinstance(module, torch.nn.Embedding):  # an id is the place of the only 1 in a vector
        size, scale = module.num_embeddings, getattr(module, "embed_scale", 1)  # Gemma
        signs, buckets = hash_table(name, 0, size, state.dim, d.device)
        left = d.new_zeros(len(d), state.dim, dtype=torch.float32)
        trained = x != module.padding_idx  # torch gives this id no gradient
        left[torch.arange(len(d)), buckets[x]] = signs[x] * trained
        right = count_sketch(scale * d, state, name, 1)
    else:
        sides = (x, d) if type(module).__name__ == "Conv1D" else (d, x)  # GPT-2: (in, out)
        left = count_sketch(sides[0], state, name, 0)
        right = count_sketch(sides[1], state, name, 1)
    return torch.fft.rfft(left) * torch.fft.rfft(right)

def add_norm(state, own, module, x, d):
    """Backward hook: the gradient of a norm for each row of x and d is small and can be formed."""
    weights = {leaf: getattr(module, leaf).detach().float() for leaf in own}
    if len(x) == math.prod(state.shape):  # OPT does away with the rows here
        x, d = x.unflatten(0, state.shape), d.unflatten(0, state.shape)

    def gradient(x, d):  # of one row
        def forward(weights):
            return torch.func.functional_call(module, weights, (x,))
        _, backward = torch.func.vjp(forward, weights)
        return backward(d)[0]

    state.active = False  # this forward pass is not to be watched
    gradients = torch.func.vmap(gradient)(x.float(), d.float())
    state.active = True
    for leaf, values in gradients.items():
        state.sums += count_sketch(values.flatten(1), state, own[leaf], 0)

def count_sketch(values, state, name, axis):
    """values (t, size) -> (t, K): in each bucket the signed sum of its entries."""
    signs, buckets = hash_table(name, axis, values.shape[1], state.dim, values.device)
    sums = torch.zeros(len(values), state.dim, device=values.device)
    return sums.scatter_add_(1, buckets.expand(len(values), -1), values * signs)

@functools.cache
def hash_table(name, axis, size, dim, device):
    """Random signs and buckets for an axis of a weight `name`; all buckets are equally full."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {axis}".encode()).digest()[:7], "big")
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (size,), generator=random) * 2.0 - 1
    buckets = torch.randperm(math.ceil(size / dim) * dim, generator=random)[:size] % dim
    return signs.to(device), buckets.to(device)

# -- noisy and clean pairs
def split_by_margin(folder, splits, content, args):
    """data/noisy, the pairs with |log ref(y_w|x) - log ref(y_l|x)| of at most noise_margin, and
    data/clean, the others, each with its part of the cache `folder`."""
    for kind in ("noisy", "clean"):
        rows = {}
        for name in splits:
            logps = np.load(folder / f"{name}-logps.npy")[splits[name]["responses"]]  # (rows, 2)
            noisy = np.abs(logps[:, 0] - logps[:, 1]) <= args.noise_margin
            rows[name] = np.flatnonzero(noisy if kind == "noisy" else ~noisy)
            if len(rows[name]) == 0:
                fail(f"--noise_margin {args.noise_margin} leaves no {kind} pairs in {name}, of "
                     f"{len(noisy)}; choose another, or prepare a larger --val_fraction")
        for turn in range(dist.get_world_size()):  # as the nodes may share their file system
            if turn == dist.get_rank() and is_writer():
                write_part(kind, rows, folder, splits, content, args)
            dist.barrier()

def write_part(kind, rows, folder, splits, content, args):
    """data/{kind}: these rows of each split and of its log-probs; written aside, then renamed."""
    data, aside = Path(args.data, kind), Path(args.data, f"{kind}.tmp")
    origin = dict(reference=folder.name, noise_margin=args.noise_margin)
    meta = json.loads(Path(args.data, "meta.json").read_text()) | dict(origin=origin)
    if data.exists():
        made = json.loads((data / "meta.json").read_text()).get("origin")
        if made != origin:
            fail(f"{data} is the split {made}, not {origin}; delete it")
        return
    shutil.rmtree(aside, ignore_errors=True)
    key, kept = dict(content), {}
    for name, split in splits.items():
        part, kept[name] = select_pairs(split, rows[name])
        part.save_to_disk(str(aside / name))
        part = datasets.load_from_disk(str(aside / name))
        key[name] = rows_hash(part, split["lengths"][rows[name]])
    own = aside / f"ref-{name_of(key)}"
    own.mkdir()
    for name in splits:
        np.save(own / f"{name}-logps.npy", np.load(folder / f"{name}-logps.npy")[kept[name]])
    write_meta(own, key, args)
    meta["counts"] = {name: len(rows[name]) for name in splits}
    (aside / "meta.json").write_text(json.dumps(meta, indent=1))
    aside.rename(data)
    print(f"{data}: {meta['counts']} pairs")

def select_pairs(split, rows):
    """The pairs in these rows, whose prompts and responses are numbered from 0 again, and the old
    numbers of the responses (U,)."""
    kept, responses = np.unique(split["responses"][rows], return_inverse=True)
    part = split["pairs"].select(rows)
    _, prompts = np.unique(part["prompt_id"], return_inverse=True)
    numbers = np.column_stack([prompts, responses.reshape(-1, 2)])
    for name, column in zip(("prompt_id", "chosen_id", "rejected_id"), numbers.T):
        part = part.remove_columns(name).add_column(name, column)
    return part, kept

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

def to_device(array):
    """Array or tensor -> tensor on the device of the model. The CPU does not wait for the copy."""
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().cuda(non_blocking=True) if torch.cuda.is_available() else tensor

# -- data, stored log-probs, micro-batches
def load_data(args):
    """{split: dict(pairs=dataset, lengths=(rows, 3) tokens of prompt, chosen, rejected,
    responses=(rows, 2) numbers of the chosen and the rejected one, hash=of all this)}"""
    with explain(f"{args.data}/meta.json cannot be read: run prepare_data.py"):
        meta = json.loads(Path(args.data, "meta.json").read_text())
    folder, trust = find_model(args.model)[0], dict(trust_remote_code=args.trust_remote_code)
    if not (folder / "config.json").exists():
        fail(f"--model {args.model} is neither a model nor a run with final/: no config.json")
    config = transformers.AutoConfig.from_pretrained(folder, **trust).get_text_config()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    if hashlib.sha256(vocabulary).hexdigest()[:16] != meta["vocab_hash"]:
        fail(f"--data {args.data} has other tokens than --model {args.model}: run prepare_data.py")
    splits = {}
    for name in ("train", "val"):
        pairs = datasets.load_from_disk(f"{args.data}/{name}")
        sides = [pairs.data[side] for side in ("prompt", "chosen", "rejected")]
        lengths = np.stack([pc.list_value_length(side).to_numpy() for side in sides], 1).astype(int)
        tokens = pair_tokens(lengths, args.layout)
        if tokens.max() > args.max_tokens:
            pair = pairs[int(tokens.argmax())]["id"]
            fail(f"pair {pair} of {args.data}/{name} has {tokens.max()} tokens, over --max_tokens "
                 f"{args.max_tokens}: raise it, or prepare the data with a smaller --max_length")
        largest = max(pc.max(pc.list_flatten(side)).as_py() for side in sides)
        if largest >= config.vocab_size:
            fail(f"{args.data}/{name} has the token id {largest}, but --model {args.model} has "
                 f"{config.vocab_size} embeddings: leave out the texts with that token")
        longest, limit = pair_tokens(lengths, "separate").max(), most_positions(config)
        if longest > limit:
            fail(f"a text of {args.data}/{name} has {longest} tokens, --model {args.model} has "
                 f"{limit} positions: prepare the data with a smaller --max_length")
        responses = [pairs.data[side].to_numpy() for side in ("chosen_id", "rejected_id")]
        splits[name] = dict(pairs=pairs, lengths=lengths, responses=np.stack(responses, 1),
                            hash=rows_hash(pairs, lengths))
    return splits

def most_positions(config):
    """How many tokens a text may have by GPT-2's table, or by ropes that a longer text changes."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "table")
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    limit = rope.get("original_max_position_embeddings", limit)
    return limit if limit > 0 and kind in ("table", "dynamic", "longrope") else math.inf

def rows_hash(pairs, lengths):
    """-> 16 hex digits that change with anything that log-probs and losses take from the pairs."""
    digest = hashlib.sha256(lengths.tobytes())
    for side in ("prompt", "chosen", "rejected"):
        digest.update(pc.list_flatten(pairs.data[side]).to_numpy())
    for name in ("chosen_id", "rejected_id", "weight"):
        if name in pairs.column_names:  # weight may be missing
            digest.update(pairs.data[name].to_numpy())
    return digest.hexdigest()[:16]

def content_hashes(weights, splits, dtype, args):
    """All that log-probs depend on: config, weights (a sample of each tensor), rows, precision."""
    digest = hashlib.sha256((find_model(args.model)[0] / "config.json").read_bytes())
    if dist.get_rank() == 0:
        for name, tensor in sorted(weights.state_dict().items()):
            if not tensor.sum().isfinite():
                fail(f"--model {args.model}: not all weights in {name} are finite")
            sample = tensor.flatten()[::max(1, tensor.numel() // 4096)].float()
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    digest = [digest.hexdigest()[:16]]
    dist.broadcast_object_list(digest, 0)
    return dict(weights=digest[0], dtype=str(dtype).removeprefix("torch."),
                train=splits["train"]["hash"], val=splits["val"]["hash"])

def pair_tokens(lengths, layout):
    """Tokens (rows,) that one forward pass spends on each pair alone; lengths (rows, 3)."""
    if layout == "packed":
        return lengths.sum(1)
    longest = lengths[:, 0] + lengths[:, 1:].max(1)
    return 2 * longest if layout == "concatenated" else longest

def fill(order, tokens, layout, limit):
    """Put pairs into parts, longest pair first, as many in each as `limit` tokens allow."""
    parts, used, longest = [], math.inf, 0
    for i in order:
        more = tokens[i] if layout == "packed" else longest  # padded to the first of its part
        if used + more > limit:
            parts.append([])
            used, more, longest = 0, tokens[i], tokens[i]
        parts[-1].append(i)
        used += more
    return parts

def micro_batches(rows, lengths, args, world):
    """Deal the pairs in `rows` into micro-batches -> list of arrays of rows, some maybe empty.
    Their number is a multiple of the ranks, `world`: under FSDP all ranks must run equally often.
    Pairs of similar length go together (less padding), and the fullest is small (no rank waits)."""
    tokens = pair_tokens(lengths[rows], args.layout)
    order = np.argsort(-pair_tokens(lengths[rows], "separate"), kind="stable")  # longest first
    count = math.ceil(len(fill(order, tokens, args.layout, args.max_tokens)) / world) * world
    # Of 256 limits, take the lowest with which that many suffice.
    for limit in np.geomspace(max(tokens.max(), tokens.sum() / count), args.max_tokens, 256):
        parts = fill(order, tokens, args.layout, limit)
        if len(parts) <= count:
            break
    parts += [[]] * (count - len(parts))
    return [rows[np.array(part, int)] for part in parts]

def free_weights(policy):
    """Give the gathered weights back after forward passes that no backward pass follows."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

def collate(pairs, layout):
    """Tensors of a micro-batch -> a list, one dict per forward pass (two if layout is separate).
    inputs        for the model: input_ids (1, L) packed or (texts, T) padded; position_ids, the
                  places of tokens in their own texts; packed only: texts, the attention_tables
    targets (M,)  all response tokens, those of all chosen responses first; sizes, their lengths
    source (M,)   where, in the flattened input_ids, the token before each target stands"""
    chosen = [(pair["prompt"], pair["chosen"]) for pair in pairs]
    rejected = [(pair["prompt"], pair["rejected"]) for pair in pairs]
    if layout == "packed":
        return [pack(chosen, rejected)]
    if layout == "separate":
        return [pad(chosen), pad(rejected)]
    return [pad(chosen + rejected)]

def pad(texts):
    """A row per (prompt, response), filled up with zeros on the right; for `places`, see pack."""
    tokens = [torch.tensor(prompt + response) for prompt, response in texts]
    ids = pad_sequence(tokens, batch_first=True)  # (texts, T)
    width = ids.shape[1]
    places = [row * width + torch.arange(len(text)) for row, text in enumerate(tokens)]
    inputs = dict(input_ids=to_device(ids), position_ids=to_device(torch.arange(width)[None]))
    return dict(inputs=inputs, **predictions(places, texts))

def pack(chosen, rejected):
    """One row without padding, with each prompt once. Two pairs, prompts p and P:

        place           0 1 2 3 4 5 6 7 8 9 10 11 12 13
        input_ids       p p c c c P C C C r  r  R  R  R
        position_ids    0 1 2 3 4 0 1 2 3 2  3  1  2  3

    Only attention must know that the row holds four texts: those of the first pair have the places
    0 1 2 3 4 and 0 1 9 10."""
    ids, positions, places = [], [], []
    for prompt, response in chosen:
        positions += range(len(prompt + response))
        places.append(len(ids) + torch.arange(len(prompt + response)))
        ids += prompt + response
    for i, (prompt, response) in enumerate(rejected):
        positions += range(len(prompt), len(prompt + response))
        new = len(ids) + torch.arange(len(response))
        places.append(torch.cat([places[i][:len(prompt)], new]))
        ids += response
    # Without a mask of ones, transformers would search the row for texts, and wait for the GPU.
    inputs = dict(input_ids=to_device(np.array([ids])), texts=attention_tables(places, len(ids)),
                  position_ids=to_device(np.array([positions])),
                  attention_mask=to_device(torch.ones(1, len(ids))))
    return dict(inputs=inputs, **predictions(places, chosen + rejected))

def predictions(places, texts):
    """Where the tokens that predict the responses stand, and what they should predict."""
    responses = [response for prompt, response in texts]
    source = [place[-len(response) - 1:-1] for place, response in zip(places, responses)]
    return dict(source=to_device(torch.cat(source)), targets=to_device(np.concatenate(responses)),
                sizes=[len(response) for response in responses])

def attention_tables(places, size, shortest=0.5 if torch.cuda.is_available() else 0.8):
    """What gathered_attention needs: the `places` of each text in a packed row of `size` tokens, in
    tables of texts of similar length, padded with 0. The row drawn in pack has one table:

        0  1  2  3  4    tokens (C,): the token in each of the C cells, counted over all tables
        5  6  7  8  0    cells (2, L): the cells in which each token stands, -1 = none
        0  1  9 10  0    takers (1, C): the token that takes the result of each cell, -1 = none
        5 11 12 13  0

    A prompt stands in two texts, with the same result, so its tokens have two cells. Here cells is
    10 11 2 3 4 15 6 7 8 12 13 16 17 18, 0 1 -1 -1 -1 5 -1 -1 -1 -1 -1 -1 -1 -1"""
    groups = []
    for place in sorted(places, key=len, reverse=True):
        # A GPU may pad to twice the length, as there each table costs time (results/README.md).
        if not groups or len(place) < shortest * len(groups[-1][0]):
            groups.append([])
        groups[-1].append(place)
    tables = [pad_sequence(group, batch_first=True) for group in groups]  # (k, T) for k texts
    count, cells = 0, torch.full((2, size), -1)
    for table, group in zip(tables, groups):
        for place in group:
            cells[1, place] = cells[0, place]  # -1, or where a prompt stood first
            cells[0, place] = count + torch.arange(len(place))
            count += table.shape[1]
    takers = torch.full((1, count), -1)
    takers[0, cells[0]] = torch.arange(size)
    return types.SimpleNamespace(  # torch.compile would look into a dict, and compile anew
        shapes=[table.shape for table in tables], cells=to_device(cells), takers=to_device(takers),
        tokens=to_device(torch.cat([table.flatten() for table in tables])))

# -- forward pass and attention
def token_logps(logits, targets):
    """float32 logits (t, V), targets (t,) -> log pi(target) (t,)."""
    return -F.cross_entropy(logits, targets, reduction="none")

def head_pass(hidden, targets, head, config, score):
    """Scores of hidden (t, h), targets (t,), with the scaling and soft-capping of some models."""
    logits = head(hidden.to(head.weight.dtype)).float()  # (t, V) Mamba's hidden is float32
    scale = getattr(config, "logit_scale", None) or 1  # Cohere
    scale = scale / (getattr(config, "logits_scaling", None) or 1)  # Granite
    if scale != 1:
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma-2
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return score(logits, targets)

class Policy(torch.nn.Module):
    """A causal LM whose forward gives log pi(y|x). The output head is computed within it, as FSDP
    has the head's weights whole only in the forward pass of its root module."""
    def __init__(self, model, score):
        super().__init__()
        self.model, self.score = model, score
    def forward(self, batches):
        """Dicts of collate -> log pi(y|x) (2, n), sums over each response of score(logits (t, V),
        targets (t,)). A score that has k numbers for each token, (k, t), makes it (2, n, k)."""
        sums, head = [], self.model.get_output_embeddings()
        config = self.model.config.get_text_config()
        size = math.ceil(2**26 / config.vocab_size)  # tokens with 256 MiB of logits
        for batch in batches:
            output = self.model.base_model(**batch["inputs"], use_cache=False)
            hidden = output.last_hidden_state.flatten(0, 1)
            hidden = hidden.index_select(0, batch["source"])  # (M, h) what predicts responses
            # Logits exist for one chunk of tokens at a time. The backward pass makes them again,
            # except for the last chunk, with which it begins.
            *chunks, last = zip(hidden.split(size), batch["targets"].split(size))
            scores = [checkpoint(head_pass, *chunk, head, config, self.score, use_reentrant=False)
                      for chunk in chunks]
            scores.append(head_pass(*last, head, config, self.score))
            sums += [part.sum(-1) for part in torch.cat(scores, -1).split(batch["sizes"], -1)]
        return torch.stack(sums).unflatten(0, (2, -1)).clone()  # FSDP warns about views

def window_as_mask(local_size=None, **kwargs):
    """What models get in place of a mask, and give to attention: the size of a sliding window."""
    return local_size

class Gather(torch.autograd.Function):
    """rows (a, ...), index (b,) -> rows[index]. The gradient is gathered too: `uses` (k, a) tells
    where in index each row stands, or -1. torch's own adds by atomic operations, slow on a GPU."""
    @staticmethod
    def forward(ctx, rows, index, uses):
        ctx.save_for_backward(uses)
        return rows.index_select(0, index)
    @staticmethod
    def backward(ctx, grad):
        grad = torch.cat([grad, torch.zeros_like(grad[:1])])  # -1 takes this zero
        return grad[ctx.saved_tensors[0]].sum(0), None, None

@torch.compiler.disable  # compiled, it would be another graph for each number of tables
def gathered_attention(module, query, key, value, attention_mask, texts=None, **kwargs):
    """Every layer calls this with query (b, H, L, d), key and value (maybe fewer heads), and wants
    (b, L, H, d). Packed, b is 1: gather the texts into tables, attend, put the results back."""
    if kwargs.get("sliding_window") is None:  # then window_as_mask may have sent it
        kwargs["sliding_window"] = attention_mask
    if texts is None:
        return causal_attention(module, query, key, value, **kwargs), None
    outputs, sizes = [], [shape.numel() for shape in texts.shapes]
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # each (L, H, d)
    gathered = [Gather.apply(x, texts.tokens, texts.cells).split(sizes) for x in rows]
    for shape, *table in zip(texts.shapes, *gathered):
        table = [x.unflatten(0, shape).transpose(1, 2) for x in table]  # each (k, H, T, d)
        output = causal_attention(module, *table, **kwargs)  # (k, T, H, d)
        outputs.append(output.flatten(0, 1))
    return Gather.apply(torch.cat(outputs), texts.cells[0], texts.takers)[None], None

def causal_attention(module, query, key, value, sliding_window=None, **kwargs):
    """query (b, H, T, d), key, value (b, H or fewer, T, d) -> (b, T, H, d). Padding comes last, so
    that causality alone keeps it out."""
    length = query.shape[2]
    window = sliding_window or length
    # Soft-caps (Gemma-2) and sinks (gpt-oss) are not in torch's kernels but in the model's file.
    special = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    mask = None
    if special or window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device)
        mask = mask.tril().triu(1 - window)  # (T, T) the query (row) sees the key (column)
    if special:
        file = sys.modules[type(module).__module__]
        bias = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)[None, None]
        return file.eager_attention_forward(module, query, key, value, bias, **kwargs)[0]
    grouped = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None,
                                            scale=kwargs.get("scaling"), enable_gqa=grouped)
    return output.transpose(1, 2)

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

def read_model(name, args):
    """-> the model `name` without weights (on the meta device), and on rank 0 a second one with
    them, in which LoRA adapters are merged."""
    transformers.utils.logging.disable_progress_bar()
    auto, (folder, *adapters) = transformers.AutoModelForCausalLM, find_model(name)
    trust = dict(trust_remote_code=args.trust_remote_code)
    config = transformers.AutoConfig.from_pretrained(folder, **trust)
    if getattr(config, "quantization_config", None):
        fail(f"--model {name} is quantised; train the dense model that it was made from")
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.float32, **trust)
    if dist.get_rank() > 0:
        return model, None
    # The folder's generation_config is not judged. Before transformers 5.23, SDPA lacked soft-caps.
    weights, info = auto.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
        generation_config=transformers.GenerationConfig(), attn_implementation="eager", **trust)
    wrong = info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    model._weight_conversions = weights._weight_conversions  # which weight_files undoes
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    for adapter in adapters:
        from peft import PeftModel
        weights = PeftModel.from_pretrained(weights, adapter)
        info = weights.load_adapter(adapter, "default")  # once more, for what it returns
        wrong |= {*info.missing_keys, *info.unexpected_keys}
        wrong |= tied & {f"{module}.weight" for module in weights.targeted_module_names}
        weights = weights.merge_and_unload()
    wrong |= dict(model.named_parameters()).keys() ^ dict(weights.named_parameters()).keys()
    if wrong:  # such as a second output head, or one that is tied and that an adapter has changed
        fail(f"--model {name}: config and weights do not agree on {sorted(map(str, wrong))[:3]}")
    list(weight_files(model, model.state_dict(), folder))  # if this fails, then now, not at the end
    return model, weights

def weight_files(model, state, folder):
    """Yields for each file of weights {name: tensor} and its path. Where `state` has a tensor, it
    stands in place of the old one, under the name and in the type that it has in the file."""
    tied = {name: state[name] for name in model.all_tied_weights_keys if name in state}
    tied = revert_weight_conversion(model, tied)  # which most files leave out
    state = revert_weight_conversion(model, state)
    whole = folder / "model.safetensors"  # if it is there, transformers does not look for parts
    parts = [] if whole.exists() else list(folder.glob("model*-of-*.safetensors"))
    for path in parts or [whole]:
        tensors = safetensors.torch.load_file(path)  # each is read from the disk when it is used
        for name, old in tensors.items():
            own = name if name in state else f"{model.base_model_prefix}.{name}"  # as in gpt2
            if own in state:
                assert state[own].shape == old.shape and old.itemsize > 1, f"{name} is {old.dtype}"
                tensors[name] = state.pop(own).to(old.dtype, copy=True).contiguous()
        yield tensors, path
    missing = state.keys() - tied.keys()
    assert not missing, f"no model*.safetensors of it has {sorted(missing)[:3]}"

def choose_attention(model, args):
    """Use our attention if the model mixes tokens by attention only."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    plain = kinds <= {"full_attention", "sliding_attention"} and not model._is_stateful
    if plain and model._supports_attention_backend:
        transformers.AttentionInterface.register("gathered", gathered_attention)
        transformers.AttentionMaskInterface.register("gathered", window_as_mask)
        model.set_attn_implementation("gathered")
    elif args.layout == "packed":
        fail(f"--layout packed needs plain attention, but {config.model_type} mixes tokens in "
             "other ways too; use --layout concatenated or --layout separate")

def choose_trained(model, weights, args):
    """Train LoRA adapters if --lora_rank says so, and only what --train_modules matches. Towers
    for images get no gradient from text, and stay as they are."""
    if args.lora_rank:
        if find_model(args.model)[1:]:
            fail(f"--lora_rank cannot add to --model {args.model}, an adapter: merge it first")
        from peft import LoraConfig
        routers = [name for name, _ in model.named_modules() if name.endswith("router")]  # Phi-MoE
        lora = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank,
                          target_modules="all-linear", exclude_modules=routers or None)
        with explain(f"--lora_rank does not fit --model {args.model}"):
            model.add_adapter(lora)
        if weights is not None:  # rank 0, where the adapters get their random start
            torch.manual_seed(args.seed)
            weights.add_adapter(lora)
    text = {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}
    with explain(f"--train_modules {args.train_modules} is no regular expression"):
        for name, parameter in model.named_parameters():
            if parameter not in text or not re.search(args.train_modules, name):
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        fail(f"--train_modules {args.train_modules} matches no parameter, such as {name}")

def blocks_of(model):
    """The transformer's blocks, which are sharded, recomputed and compiled one by one."""
    return [module for module in model.modules()
            if type(module).__name__.removeprefix("FSDP") in (model._no_split_modules or [])]

def shard(policy, device, dtype, args):
    """FSDP2: every block is gathered when it is needed, and the rest with the root. --zero 3 gives
    the gathered weights back at once, 2 keeps them until the step ends: no copies in between."""
    world = dist.get_world_size()
    policy.reshards = args.zero == "3" or (args.zero == "auto" and world > 1)
    group = args.shard_group or world
    if world % group:
        fail(f"--shard_group {group} does not divide the {world} ranks")
    mesh = dist.init_device_mesh(device.type, (world // group, group),
                                 mesh_dim_names=("copies", "shards"))
    if group == world:
        mesh = mesh["shards"]
    rules = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32),
                 reshard_after_forward=policy.reshards)
    for block in reversed(blocks_of(policy.model)):  # a block within a block must come first
        fully_shard(block, **rules)
    # On its own, an untied embedding's gradient is reduced after the head's, not together with it:
    # the peak is 1.58 GiB instead of 1.87, with 128k words. Its backward pass needs no weights.
    table = policy.model.get_input_embeddings()
    if table.weight is not policy.model.get_output_embeddings().weight:
        fully_shard(table, **rules)
        table.set_unshard_in_backward(False)
    fully_shard(policy, **rules)

def place_weights(model, weights, device):
    """Send the weights from rank 0 to where they belong, one tensor after another."""
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():  # rotary frequencies and the like
        if weights is not None:
            buffer.copy_(weights.get_buffer(name))
        dist.broadcast(buffer, 0)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = {} if weights is None else weights.state_dict()
    set_model_state_dict(model, state, options=options)

@torch.no_grad()
def check_forward(policy, split, dtype, args):
    """Stop unless our log-probs are those of the model's own forward pass, for the longest pair
    together with two short ones, as then every layout has padding."""
    config = policy.model.config.get_text_config()
    texts = split["lengths"][:, 0] + split["lengths"][:, 1:].max(1)  # (rows,) the longer one
    rows = texts.argsort()[[-1, 0, 1 if len(texts) > 2 else 0]]
    pairs = [split["pairs"][int(row)] for row in rows]
    cause = "try another --layout or --dtype, or adapt Policy and head_pass to it"
    with explain(f"--layout {args.layout} does not fit --model {args.model}: {cause}"):
        logps = policy(collate(pairs, args.layout))
        # Before transformers 5.23, Gemma-2's cap was ignored by SDPA.
        sdpa = policy.model._supports_sdpa and not hasattr(config, "attn_logit_softcapping")
        policy.model.set_attn_implementation("sdpa" if sdpa else "eager")
        policy.unshard()
        truth = own_logps(policy.model, pairs)
        free_weights(policy)
        choose_attention(policy.model, args)  # ours again
    check_same(logps, truth, split["lengths"][rows], dtype, f"in --layout {args.layout} the "
               f"log-probs are not those of the forward pass of --model {args.model}: {cause}")

def check_same(logps, truth, lengths, dtype, trouble):
    """Stop if log-probs (2, n) or (2, n, k) are not the true ones (2, n), but for rounding."""
    logps = logps.reshape(*truth.shape, -1)[..., 0].cpu().numpy()
    errors = np.abs(logps - truth) / (lengths[:, 1:].T + 10)  # (2, n) nats per token; 10: slack
    if not errors.max() < (1e-4 if dtype == torch.float32 else 0.05):
        fail(f"{trouble} (they differ by {errors.max():.2g} nats per token)")

# -- the run's folder: log, checkpoints, final model
@torch.no_grad()
def own_logps(model, pairs):
    """log pi(y|x) (2, n) by the model's own forward pass, one text at a time."""
    sums = []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            ids = torch.tensor([pair["prompt"] + pair[side]], device=model.device)
            logits = model(ids, use_cache=False).logits[0, len(pair["prompt"]) - 1:-1].float()
            sums.append(token_logps(logits, ids[0, len(pair["prompt"]):]).sum().item())
    return np.array(sums).reshape(2, -1)

if __name__ == "__main__":
    with explain("what is computed is kept: mend the cause and run the same command again",
                 (OSError, dcp.CheckpointException, ModuleNotFoundError)):
        main()
