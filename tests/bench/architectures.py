"""Twelve architectures go the whole way by the command line scripts, and end as what they began.

    python tests/bench/architectures.py [--only Gemma] [--out results/architectures.md]    (four minutes on one core)

Each is a tiny random model, saved as the released ones are: in bfloat16, in several files, under the names of the hub.
The router biases of DeepSeek-V3 and GLM-4.5 are float32, and there is a tensor of their layer for several tokens at
once, which transformers does not read. Then prepare_data.py, cache_ref.py, dpo.py and auxdpo.py make a final/ of it,
which is compared with the folder of the model, read by transformers and given to evaluate.py. dpo.py runs a second
time, is killed, and continues in a new process.

It prints a table and writes it into --out; the exit status is 1 if a row fails. To save the seconds that imports take,
each script runs in a fork of this process; the dpo.py that is killed and the one that resumes are commands of their
own.
"""
import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import datasets
import huggingface_hub
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

import auxdpo, cache_ref, dpo, evaluate, prepare_data  # noqa: here, so that forks have them
from conftest import FAMILIES, MOE, ROOT, SMALL, VOCAB, WINDOW
from conftest import random_pairs, run_as_program, tiny_policy, tiny_tokenizer
from test_layouts import GEMMA_3N

ROUTER = MOE | dict(
    n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1
)
LATENT = dict(  # DeepSeek's attention
    num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
    v_head_dim=8,
)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
              image_size=16, patch_size=4, vision_use_head=False)

# architecture: (Config class, what it changes in conftest's SMALL)
ARCHITECTURES = {
    "Llama": FAMILIES["llama"],
    "Qwen2": ("Qwen2Config", dict(tie_word_embeddings=True)),
    "Qwen3": FAMILIES["qwen3"],
    "Gemma 2": FAMILIES["gemma2"],
    "Gemma 3, with vision": ("Gemma3Config", FAMILIES["gemma3"][1]),
    "Gemma 3n, text": ("Gemma3nTextConfig", GEMMA_3N),
    "Phi-3": ("Phi3Config", dict(sliding_window=WINDOW)),
    "OLMo-2": ("Olmo2Config", {}),
    "SmolLM3": ("SmolLM3Config", dict(tie_word_embeddings=True, no_rope_layers=[1, 0])),
    "gpt-oss": FAMILIES["gpt-oss"],
    "DeepSeek-V3": ("DeepseekV3Config", ROUTER | LATENT),
    "GLM-4.5": ("Glm4MoeConfig", ROUTER),
}
UNREAD = {"DeepSeek-V3": "model.layers.61.eh_proj.weight", "GLM-4.5": "model.layers.46.eh_proj.weight"}
LAYOUTS = ["packed", "concatenated", "separate"]
FIVE = random_pairs([(1, 1, 4), (7, 9, 1), (23, 5, 17), (2, 30, 2), (12, 3, 11)], seed=3)
SKETCHED = r"self_attn\.\w+_proj|mlp\.(gate|up|down)_proj|embed_tokens|norm|lm_head"  # no experts
FROZEN = r"vision_tower|multi_modal|eh_proj|e_score_correction_bias"  # not trained on text
STEPS = 6
SAME = 2e-3  # nats: what float32 may differ by, in the log-prob of a response of up to 30 tokens
FORK = multiprocessing.get_context("fork")


# ---- the models ----

def config_of(name):
    """The config of a tiny model: 2 layers (Gemma 3n: 4) of size 32, and 97 words."""
    kind, changes = ARCHITECTURES[name]
    settings = SMALL | changes
    if kind == "DeepseekV3Config":  # which computes it
        del settings["head_dim"]
    if kind != "Gemma3Config":
        return getattr(transformers, kind)(**settings)
    text = transformers.Gemma3TextConfig(**settings).to_dict()
    return transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4,
                                     image_token_index=VOCAB)  # no token of the text


def make_model(name, folder):
    """Write a random model and its tokenizer into `folder`, as a release would have them."""
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32)
    for parameter, weight in model.named_parameters():
        if weight.dim() > 1:  # so large that attention, windows and caps show in the log-probs
            std = 0.3 if "embed" in parameter else 1.5 / weight.shape[-1] ** 0.5
            torch.nn.init.normal_(weight, std=std)
        else:
            weight.data += 0.2 * torch.randn_like(weight)
    model.to(torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):  # of a size that decides between experts
            module.e_score_correction_bias = 0.1 * torch.randn(4)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = as_released(name, load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    huggingface_hub.save_torch_state_dict(tensors, folder, max_shard_size="20KB")
    check_types(folder)


def as_released(name, tensors):
    """Tensors as transformers 5 saves them -> as the files of the hub hold them."""
    if name in UNREAD:
        tensors[UNREAD[name]] = torch.randn(32, 64).bfloat16()
    return {key.replace("vision_tower.", "vision_tower.vision_model."): value
            for key, value in tensors.items()}


def check_types(folder):
    """Stop unless the file has the types of a release: all bfloat16, but for the router's bias."""
    for name, tensor in tensors_of(folder).items():
        biased = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if biased else torch.bfloat16), name
        assert not biased or (tensor != tensor.bfloat16()).any(), name  # bfloat16 would round it


def tensors_of(folder):
    """{name: tensor} of all files of weights in a folder."""
    tensors = {}
    for path in Path(folder).glob("model*.safetensors"):
        tensors |= load_file(path)
    return tensors


# ---- what is compared ----

def unlike(model, final):
    """Names whose tensor is not in both folders with one shape and one type."""
    old = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors_of(model).items()}
    new = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors_of(final).items()}
    return sorted(name for name in old | new if old.get(name) != new.get(name))


def changed(model, final):
    """Names, which both folders have, whose tensors differ in any bit."""
    old, new = bits_of(model), bits_of(final)
    return sorted(name for name in old.keys() & new.keys() if not torch.equal(old[name], new[name]))


def bits_of(folder):
    return {name: value.flatten().view(torch.uint8) for name, value in tensors_of(folder).items()}


def trained(folder):
    """Names of the tensors that text trains."""
    return sorted(name for name in tensors_of(folder) if not re.search(FROZEN, name))


def same_files(one, other):
    return not unlike(one, other) and not changed(one, other)


def same_config(model, final):
    return Path(model, "config.json").read_bytes() == Path(final, "config.json").read_bytes()


@torch.no_grad()
def true_logps(folder, pairs):
    """log pi(y|x) (2, n) by transformers' own forward pass, one text at a time, in float32."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    logps = np.zeros((2, len(pairs)))
    for side, response in enumerate(("chosen", "rejected")):
        for i, pair in enumerate(pairs):
            ids, start = torch.tensor(pair["prompt"] + pair[response]), len(pair["prompt"])
            scores = model.eval()(ids[None], use_cache=False).logits[0].log_softmax(-1)
            logps[side, i] = scores[:-1].gather(1, ids[1:, None])[start - 1:].sum()
    return logps


def layout_errors(folder):
    """Largest difference, in nats, of the log-probs of five unequal pairs in each layout."""
    dpo.start_process_group("float32")
    truth, errors = true_logps(folder, FIVE), {}
    for layout in LAYOUTS:
        policy = tiny_policy(dpo, str(folder), layout)
        logps = policy(dpo.collate(FIVE, layout)).detach().numpy()
        errors[layout] = float(abs(logps - truth).max())
    return errors


@torch.no_grad()
def policy_logps(folder, out, pairs):
    """log pi(y|x) (2, n) of the policy in the last checkpoint of a run, with weights as they are
    and with weights rounded to bfloat16."""
    dpo.start_process_group("float32")
    policy = tiny_policy(dpo, str(folder))
    optimizer = torch.optim.AdamW(weight for weight in policy.parameters() if weight.requires_grad)
    dpo.load_checkpoint(policy, optimizer, STEPS, argparse.Namespace(out=out))
    exact = policy(dpo.collate(pairs, "packed")).numpy()
    for weight in policy.parameters():
        weight.copy_(weight.bfloat16())
    return exact, policy(dpo.collate(pairs, "packed")).numpy()


# ---- scripts as processes ----

def in_child(function, *args):
    """What the function returns in a fork of this process."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: sender.send(function(*args)))
    child.start()
    sender.close()
    if not receiver.poll(120):
        child.kill()
    result = receiver.recv()  # EOFError if the child is dead
    child.join()
    return result


def program(script, *flags):
    """Run a script as its command line would -> the line that it ends with, "" if all is well."""
    sys.argv = [f"{script}.py", *map(str, flags)]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
            contextlib.redirect_stderr(nowhere):
        try:
            run_as_program(importlib.import_module(script))
        except SystemExit as error:
            return str(error)
    return ""


def run(script, *flags):
    return in_child(program, script, *flags)


def must_run(script, *flags):
    line = run(script, *flags)
    assert not line, f"{script}.py {' '.join(map(str, flags))}: {line}"


def command(script, *flags):
    """Start a script by its command line."""
    flags = map(str, [sys.executable, ROOT / f"{script}.py", *flags])
    return subprocess.Popen(list(flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def killed(script, out, *flags):
    """Start a script and send SIGKILL once it has a checkpoint -> is it dead before its end?"""
    process = command(script, "--out", out, *flags)
    while process.poll() is None and not (out / "step-000002").exists():
        time.sleep(0.001)
    process.kill()
    process.communicate()
    return process.returncode < 0 and not (out / "final").exists()


def resumed(script, out, *flags):
    process = command(script, "--resume", "--out", out, *flags)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, f"{script}.py --resume: {errors[-3000:]}"


# ---- the whole way ----

def write_texts(path):
    """30 conversations of one turn, as text, for prepare_data.py."""
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for _ in range(30):
            row = {}
            for side in ("prompt", "chosen", "rejected"):
                words = rng.integers(3, VOCAB, rng.integers(1, 16))
                row[side] = " ".join(f"w{word}" for word in words)
            row["chosen"], row["rejected"] = " " + row["chosen"], " " + row["rejected"]
            file.write(json.dumps(row) + "\n")


def cache(common):
    """cache_ref.py with sketches -> the flags that auxdpo.py needs, the line of a refusal or ""."""
    flags = ["--sketch_dim", 64]
    line = run("cache_ref", *common, *flags)
    if line:  # it has stored log-probs all the same; now without what it cannot sketch
        flags += ["--sketch_modules", SKETCHED]
        must_run("cache_ref", *common, *flags)
    return flags, line


def the_whole_way(name, folder):
    """-> what is measured of one architecture, {column: value}."""
    model, data = folder / "model", folder / "data"
    make_model(name, model)
    write_texts(folder / "texts.jsonl")
    tiny_tokenizer().save_pretrained(folder / "words")  # alone: beside a config that says qwen2,
    must_run("prepare_data", "--dataset", folder / "texts.jsonl", "--model", folder / "words",
             "--out", data, "--val_fraction", 0.2, "--num_proc", 1)  # it would be read as Qwen2's
    pairs = list(datasets.load_from_disk(str(data / "val")))
    common = ["--model", model, "--data", data]
    sketch, refused = cache(common)
    common += ["--max_steps", STEPS, "--batch_size", 8, "--learning_rate", 3e-3, "--save_every", 1]
    runs = [folder / "dpo", folder / "auxdpo"]
    must_run("dpo", *common, "--out", runs[0])
    must_run("auxdpo", *common, *sketch, "--out", runs[1])
    stopped = killed("dpo", folder / "killed", *common)
    resumed("dpo", folder / "killed", *common)
    finals = [run / "final" for run in runs]
    truths = [true_logps(final, pairs) for final in finals]
    policies = [in_child(policy_logps, model, run, pairs) for run in runs]
    return dict(
        parameters=sum(tensor.numel() for tensor in tensors_of(model).values()),
        layouts=in_child(layout_errors, model),
        tensors=len(tensors_of(model)),
        trained=len(trained(model)),
        unlike={name for final in finals for name in unlike(model, final)},
        only_trained=all(changed(model, final) == trained(model) for final in finals),
        config=all(same_config(model, final) for final in finals),
        learned=abs(truths[0] - true_logps(model, pairs)).max(),
        rounding=abs(truths[0] - policies[0][0]).max(),
        read_back=max(abs(truth - each[1]).max() for truth, each in zip(truths, policies)),
        resume=stopped and same_files(finals[0], folder / "killed/final"),
        evaluate=evaluate_error(folder, runs, pairs, truths),
        refused=refused,
    )


def evaluate_error(folder, runs, pairs, truths):
    """Largest difference, in nats, of what evaluate.py says of these runs and of truths (2, n)."""
    must_run("evaluate", "--models", ",".join(map(str, runs)), "--reference", folder / "model",
             "--data", folder / "data", "--out", folder / "evaluation")
    file = np.load(folder / "evaluation/logps.npz")
    assert list(file["ids"]) == [pair["id"] for pair in pairs]
    models = list(file["models"])
    found = [file["logps"][models.index(str(run))].T for run in runs]
    return max(abs(logps - truth).max() for logps, truth in zip(found, truths))


# ---- the table ----

HEADING = ("| architecture | parameters | layouts | names, shapes, dtypes | config.json | final/ read back "
           "| killed and resumed | evaluate.py |")
LEGEND = """
- parameters: numbers in the files of weights; vocabulary 97, hidden size 32, 2 layers (Gemma 3n 4), in several files.
- layouts: how many of packed, concatenated and separate give the log-probs of the model's own forward pass (transformers, eager, one text at a time, float32), and the largest difference of ten responses, in nats.
- names, shapes, dtypes: how many tensors of the files of --model stand in final/, of dpo.py and of auxdpo.py, under their name, in their shape and type; in brackets, how many have changed. These are all but the vision tower, the layers that transformers does not read, and the router biases, which have kept their bits.
- config.json: final/ has the bytes of --model.
- final/ read back: of dpo.py and auxdpo.py, by transformers, against the policy in the last checkpoint with its weights rounded to bfloat16: the largest difference of a log-prob, in nats; in brackets, what the rounding itself changes, and what training has changed.
- killed and resumed: dpo.py, killed by SIGKILL once it had saved step 2 of 6, and resumed in a new process, has the final/ of the run that was left alone, to the bit.
- evaluate.py: its log-probs of final/ against transformers', in nats.
"""


def is_right(found):
    errors = [*found["layouts"].values(), found["read_back"], found["evaluate"]]
    files = not found["unlike"] and found["only_trained"] and found["config"] and found["resume"]
    return files and max(errors) < SAME and found["learned"] > 0.1


def row(name, found):
    """A line of the table."""
    errors = found["layouts"].values()
    cells = [
        name, found["parameters"],
        f"{sum(error < SAME for error in errors)} of 3, {max(errors):.0e}",
        f"{found['tensors'] - len(found['unlike'])} of {found['tensors']} "
        f"({found['trained'] if found['only_trained'] else 'others'})",
        "equal" if found["config"] else "differs",
        f"{found['read_back']:.0e} ({found['rounding']:.2g}, {found['learned']:.2g})",
        "equal" if found["resume"] else "differs",
        f"{found['evaluate']:.0e}",
    ]
    return "| " + " | ".join(map(str, cells)).replace("0e+00", "0") + " |"


def refusals(results):
    """What was refused, under the table: each line once, with the architectures that got it."""
    lines = {}
    for name, found in results.items():
        if found["refused"]:
            lines.setdefault(f"`{found['refused']}`", []).append(name)
    return "".join(f"- {', '.join(names)}: {line}\n" for line, names in lines.items())


def document(command, rows, results, seconds):
    """The text of the Markdown file."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    first = f"`{command}`, one CPU core, {versions}, {seconds:.0f} s:\n\n"
    notes = refusals(results)
    if notes:
        notes = ("\n`cache_ref.py --sketch_dim 64` refuses these by a line. auxdpo.py then ran with "
                 f"`--sketch_modules \"{SKETCHED}\"`:\n\n{notes}")
    return first + "\n".join([HEADING, "|---" * 8 + "|", *rows]) + "\n" + LEGEND + notes


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="part of a name, such as Gemma; empty = all")
    parser.add_argument("--out", default="results/architectures.md")
    args = parser.parse_args()
    # A fork makes torch's thread pool anew when it is first asked, which two threads must not do.
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
    transformers.utils.logging.disable_progress_bar()
    began, rows, results, wrong = time.time(), [], {}, 0
    for name in ARCHITECTURES:
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                results[name] = found = the_whole_way(name, Path(folder))
                rows.append(row(name, found))
                wrong += not is_right(found)
            except (AssertionError, EOFError) as error:  # of a script that should have run
                rows.append(f"| {name} | fails: `{' '.join(str(error).split())}` |" + " |" * 6)
                wrong += 1
        rows[-1] = rows[-1].replace(folder, "RUN")
        print(rows[-1], flush=True)
    text = document(f"python {' '.join(sys.argv)}", rows, results, time.time() - began)
    Path(args.out).write_text(text)
    print(f"{args.out} is written, {wrong} of {len(rows)} rows are wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
