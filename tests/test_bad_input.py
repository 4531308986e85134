"""Claim: whatever is broken, a user reads ONE line, `error: what, where, what to do`, and the exit status is 1.

TABLE has a broken flag, file or folder per line: the script, what is wrong with it, how to break it, and the words
that the line must have. No script may leave anything that looks finished. DROPPED are rows that prepare_data.py
leaves out and counts, KEPT are rows that look odd and must come back letter by letter. What is left of a killed
run and does no harm stands at the end, beside the disks that become full and the proof in real processes."""
import builtins
import gzip
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import ROOT, random_pairs, run_as_program, tiny_hf_model, tiny_tokenizer, write_tiny_data
from safetensors.torch import load_file, save_file
from test_prepare_data import CHATML, make_tokenizer

SIZES = [(4, 3, 5), (3, 6, 2), (5, 1, 4), (2, 4, 4), (6, 2, 3), (3, 5, 3)]  # tokens of prompt, chosen, rejected
ROWS = [dict(prompt=f"Why {i}?", chosen="good", rejected="bad") for i in range(60)]


# ---- a world in order, of which each case breaks one thing


class World:
    """Paths of a model, its data with cache, raw rows; `model` and `data` are copies, made when first asked for."""

    def __init__(self, kit, tmp, monkeypatch):
        self.kit, self.tmp, self.monkeypatch = kit, tmp, monkeypatch
        self.out, self.rows, self.paths = tmp / "out", tmp / "rows.jsonl", dict(model=kit.model, data=kit.data)
        self.rows.write_text(lines(ROWS))

    def own(self, name):
        if self.paths[name] == getattr(self.kit, name):
            self.paths[name] = Path(shutil.copytree(self.paths[name], self.tmp / name))
        return self.paths[name]

    model, data = property(lambda self: self.own("model")), property(lambda self: self.own("data"))

    @property
    def cache(self):
        return next(path for path in self.data.glob("ref-*") if path.is_dir())

    def new_data(self, pairs, **columns):
        """Data of these pairs without cache."""
        self.paths["data"] = Path(write_tiny_data(self.tmp / "new", str(self.paths["model"]), pairs, pairs, **columns))

    def new_model(self, model):
        self.paths["model"] = self.tmp / "other"
        model.save_pretrained(self.tmp / "other")
        tiny_tokenizer().save_pretrained(self.tmp / "other")

    def flags(self, script):
        model, out = self.paths["model"], self.out
        data = self.data if script == "cache_ref" else self.paths["data"]  # which it would write to
        return {"prepare_data": dict(dataset=self.rows, model=self.kit.chat, out=out, num_proc=1),
                "cache_ref": dict(model=model, data=data),
                "compo": dict(model=model, data=data, out=out, perturbations=8, eval_every=0),
                "evaluate": dict(models=model, data=data, out=out, max_new_tokens=2)}.get(
                    script, dict(model=model, data=data, out=out, batch_size=2, max_steps=2, eval_every=0, log_every=1))

    def finished(self):
        """What others would take for a result."""
        marks = ("out/final", "out/meta.json", "out/evaluation.json", "*/ref-*/meta.json")
        return sorted(path for mark in marks for path in self.tmp.glob(mark) if not path.is_symlink())


def argv(w, script, changes):
    """Command line of `script` with changed flags: True stands alone, None is left out, "extra" is a list."""
    words = [f"{script}.py", *changes.get("extra", [])]
    for name, value in (w.flags(script) | changes).items():
        words += [] if name == "extra" or value is None else [f"--{name}"] if value is True else [f"--{name}", value]
    return [str(word) for word in words]


def run(w, script, changes):
    """A script as a program, but in this process, on the CPU, in the process group that all tests share."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv(w, script, changes))
        if script != "prepare_data":
            patch.setattr(module, "start_process_group", lambda dtype: (0, 1, torch.device("cpu"), torch.float32))
            patch.setattr(module.dist, "destroy_process_group", lambda: None)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            run_as_program(module)
        finally:
            signal.signal(signal.SIGTERM, handler)


def error_of(w, script, changes):
    """The one line with which a script ends; any other exception is a traceback, so it fails the test."""
    argv(w, script, changes)  # makes the copies
    before = w.finished()
    with pytest.raises(SystemExit) as stop:
        run(w, script, changes)
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message, message
    assert len(message) < 700, message
    assert w.finished() == before
    return message


@pytest.fixture(scope="module")
def kit(process_group, tiny_model, tmp_path_factory):
    """Model, data, cache and a chat tokenizer that stay whole."""
    tmp, model = tmp_path_factory.mktemp("kit"), Path(tiny_model("llama"))
    pairs = random_pairs(SIZES)
    data = Path(write_tiny_data(tmp / "data", str(model), pairs, random_pairs(SIZES[:3], seed=1)))
    kit = SimpleNamespace(model=model, data=data, chat=make_tokenizer(tmp / "chat", CHATML), pairs=pairs, tmp=tmp,
                          tiny_model=tiny_model)
    w = World(kit, tmp, None)
    w.own = lambda name: w.paths[name]  # here the originals are what is wanted
    run(w, "cache_ref", {})
    return kit


@pytest.fixture
def w(kit, tmp_path, monkeypatch):
    return World(kit, tmp_path, monkeypatch)


# ---- ways to break things; what they return are the flags that the case needs


def lines(rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)

def cut(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[:int(keep * len(data))])

def cut_arrow(w):
    cut(next((w.data / "train").glob("*.arrow")))

def file(w, name, content):
    """--dataset with this content."""
    (w.tmp / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return dict(dataset=w.tmp / name)

def delete(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()

def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

def tokenizer(w, change=lambda core: None, **settings):
    """--model for prepare_data.py: the chat tokenizer with a changed tokenizer.json or other settings."""
    folder = Path(shutil.copytree(w.kit.chat, w.tmp / "tokenizer"))
    core = json.loads((folder / "tokenizer.json").read_text())
    change(core)
    (folder / "tokenizer.json").write_text(json.dumps(core))
    edit(folder / "tokenizer_config.json", **settings)
    return dict(model=folder)

def no_weights(w):
    delete(w.model / "model.safetensors")

def one_tensor_less(w):
    path = w.model / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})

def no_tokenizer(w):
    for path in w.model.glob("*token*"):
        path.unlink()

def other_vocabulary(w):
    path = w.model / "tokenizer.json"
    path.write_text(path.read_text().replace('"w96"', '"word"'))

def other_weights(w):
    w.new_model(tiny_hf_model("llama", 7))

def weights_that_are_nan(w):
    model = tiny_hf_model("llama")
    model.lm_head.weight.data[3] = float("nan")
    w.new_model(model)

def nan_policy(w):
    """With --reference it is not compared with the stored log-probs."""
    weights_that_are_nan(w)
    return dict(reference=w.kit.model)

def two_caches(w):
    """The reference was trained further under the same name."""
    meta = json.loads((w.cache / "meta.json").read_text())
    shutil.copytree(w.cache, w.data / "ref-new")
    edit(w.data / "ref-new/meta.json", key=meta["key"] | dict(weights="0" * 16))
    return dict(reference=w.kit.model)

def other_tokens(w):
    """The pairs were prepared anew, the cache is of the old ones."""
    rows = datasets.load_from_disk(str(w.data / "train"))
    rows.map(lambda pair: dict(chosen=pair["chosen"][::-1])).save_to_disk(str(w.data / "new"))
    shutil.rmtree(w.data / "train")
    (w.data / "new").rename(w.data / "train")

def cache_values(w, change, signed=False):
    """Other log-probs in the cache; signed: with their hash in meta.json, as if cache_ref.py had computed them."""
    path, meta = w.cache / "train-logps.npy", json.loads((w.cache / "meta.json").read_text())
    np.save(path, change(np.load(path)))
    if signed:
        edit(w.cache / "meta.json", sha256=meta["sha256"] | dict(train=hashlib.sha256(path.read_bytes()).hexdigest()))

def recurrent(w):
    """A model whose layers mix tokens in other ways than attention, with a cache that was made in another layout."""
    w.paths["model"] = Path(w.kit.tiny_model("lfm2"))
    run(w, "cache_ref", dict(layout="concatenated"))

def weighted(w, weight):
    pairs = [pair | dict(weight=weight if i == 4 else 1.0) for i, pair in enumerate(w.kit.pairs)]
    w.new_data(pairs, weight="float32")
    run(w, "cache_ref", {})
    return dict(max_steps=3)

def without(w, package):
    """As if this package were not installed."""
    real, find = builtins.__import__, importlib.util.find_spec
    def missing(name, *rest):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)
    w.monkeypatch.setattr(builtins, "__import__", missing)
    w.monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))

def earlier_run(w, **flags):
    """A run of two steps with its checkpoints."""
    run(w, "dpo", dict(save_every=1) | flags)
    shutil.rmtree(w.out / "final")
    return dict(resume=True, save_every=1)

def stopped_run(w, breaking):
    """--resume of a run of three steps that ended after two; then something is broken."""
    run(w, "dpo", dict(save_every=1, max_steps=3))
    for name in ("final", "step-000003"):
        shutil.rmtree(w.out / name)
    breaking(w.out)
    return dict(resume=True, save_every=1, max_steps=3)

def broken_checkpoint(w, breaking):
    run(w, "dpo", dict(save_every=1, max_steps=3, keep=1))
    shutil.rmtree(w.out / "final")
    breaking(w.out / "step-000003")
    return dict(resume=True, save_every=1, max_steps=3)

def below_a_file(w):
    (w.tmp / "file").write_text("")
    return w.tmp / "file" / "x"

def link_to_full(path):
    """A file to which nothing can be written, as on a full disk."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/full")

def reward(w, body):
    (w.tmp / "r.py").write_text(f"def score(prompt, response): {body}")
    return dict(samples=2, reward=f"{w.tmp}/r.py:score")

def unfinished(w):
    w.out.mkdir()
    (w.out / "args.json").write_text("{}")
    return dict(models=w.out)

def log_of(w, text):
    pytest.importorskip("matplotlib")
    (w.tmp / "run").mkdir()
    (w.tmp / "run/log.jsonl").write_text(text)
    return dict(models=w.tmp / "run", data=None, plot=w.tmp / "x.png")

def two_tokenizers(w):
    other_vocabulary(w)
    return dict(models=f"{w.kit.model},{w.model}")


# ---- the table: script, what is wrong, how, words of the line

TABLE = [
    # flags
    ("dpo", "an unknown flag", lambda w: dict(beto=0.2), "--beto 0.2"),
    ("dpo", "an abbreviated flag", lambda w: dict(learning=1e-6), "--learning 1e-06"),
    ("dpo", "a choice that is none", lambda w: dict(layout="wide"), "--layout wide packed separate"),
    ("dpo", "no --model", lambda w: dict(model=None), "--model required"),
    ("dpo", "a flag without its value", lambda w: dict(extra=["--beta"]), "--beta argument"),
    ("dpo", "a word as a number", lambda w: dict(beta="big"), "--beta big"),
    ("dpo", "a float where an int is due", lambda w: dict(batch_size=2.5), "--batch_size 2.5 int"),
    ("dpo", "a batch of 0", lambda w: dict(batch_size=0), "--batch_size 0 above"),
    ("dpo", "a negative beta", lambda w: dict(beta=-0.1), "--beta -0.1 above"),
    ("dpo", "a negative seed", lambda w: dict(seed=-1), "--seed -1 at least 0"),
    ("dpo", "a learning rate that is NaN", lambda w: dict(learning_rate="nan"), "--learning_rate nan above"),
    ("dpo", "an infinite beta", lambda w: dict(beta="inf"), "--beta inf"),
    ("dpo", "ten steps of warm-up, where a fraction is wanted", lambda w: dict(warmup=10), "--warmup 10 at most 1"),
    ("prepare_data", "a fraction of NaN", lambda w: dict(val_fraction="nan"), "--val_fraction nan"),
    ("prepare_data", "a fraction of 1.5", lambda w: dict(val_fraction=1.5), "--val_fraction 1.5 at most 1"),
    ("prepare_data", "a maximum length of 0", lambda w: dict(max_length=0), "--max_length 0 above"),
    ("cache_ref", "a precision that is none", lambda w: dict(dtype="float8"), "--dtype float8 bfloat16"),
    ("cache_ref", "a bound of 0 tokens", lambda w: dict(max_tokens=0), "--max_tokens 0 above"),
    ("evaluate", "a negative temperature", lambda w: dict(temperature=-1), "--temperature -1"),
    # packages that are not installed
    ("dpo", "--wandb without wandb", lambda w: [without(w, "wandb"), dict(wandb="x")][1], "No module wandb same command"),
    ("dpo", "--lora_rank without peft", lambda w: [without(w, "peft"), dict(lora_rank=4)][1], "No module peft same command"),
    ("evaluate", "--plot without matplotlib", lambda w: [without(w, "matplotlib"), dict(plot="x.png")][1],
     "--plot pip install matplotlib"),
    # files of raw pairs
    ("prepare_data", "a file that is not there", lambda w: dict(dataset=w.tmp / "no.jsonl"), "no.jsonl --dataset"),
    ("prepare_data", "an empty file", lambda w: file(w, "a.jsonl", ""), "a.jsonl 0 rows"),
    ("prepare_data", "an empty .json", lambda w: file(w, "a.json", ""), "a.json JSON"),
    ("prepare_data", "truncated JSON", lambda w: file(w, "a.json", json.dumps(ROWS)[:-30]), "a.json not JSON"),
    ("prepare_data", "wrong columns", lambda w: file(w, "a.jsonl", lines([dict(ask="a", reply="b")] * 3)),
     "ask, reply malformed 3 dropped out.dropped.jsonl"),
    ("prepare_data", "gz cut off", lambda w: file(w, "a.jsonl.gz", gzip.compress(lines(ROWS).encode())[:-20]), "a.jsonl.gz row"),
    ("prepare_data", "gz with a flipped byte", lambda w: file(w, "a.jsonl.gz", flipped(gzip.compress(lines(ROWS).encode()))),
     "a.jsonl.gz row"),
    ("prepare_data", "gz that is none", lambda w: file(w, "a.jsonl.gz", lines(ROWS)), "a.jsonl.gz gzip"),
    ("prepare_data", "parquet cut off", lambda w: file(w, "a.parquet", parquet()[:-20]), "a.parquet"),
    ("prepare_data", "parquet with flipped bytes", lambda w: file(w, "a.parquet", flipped(parquet(), range(4, 200))),
     "a.parquet"),
    ("prepare_data", "an image as .json", lambda w: file(w, "a.json", b"\x89PNG\r\n\x1a\n\x00\xff"), "a.json JSON"),
    ("prepare_data", "a folder without data", lambda w: [w.out.with_name("empty").mkdir(), dict(dataset=w.tmp / "empty")][1],
     "--dataset empty"),
    ("prepare_data", "a folder named .jsonl", lambda w: [(w.tmp / "d.jsonl").mkdir(), dict(dataset=w.tmp / "d.jsonl")][1],
     "d.jsonl directory"),
    ("prepare_data", "a hub name without network", lambda w: dict(dataset="some-one/some-pairs"),
     "--dataset some-one/some-pairs"),
    ("prepare_data", "a file given twice", lambda w: dict(dataset=f"{w.rows},{w.rows}"), "twice"),
    ("prepare_data", "no pair for validation", lambda w: dict(val_fraction=1e-9), "no pair for val more --val_fraction"),
    ("prepare_data", "no pair for training", lambda w: dict(val_fraction=1 - 1e-9), "no pair for train more --val_fraction"),
    ("prepare_data", "no pair short enough", lambda w: dict(max_length=3), "'too long' raise --max_length"),
    # tokenizers
    ("prepare_data", "a tokenizer without EOS", lambda w: tokenizer(w, eos_token=None, chat_template=None) | no_template(w),
     "end token None --eos_token"),
    ("prepare_data", "an end token that is none", lambda w: dict(eos_token="<end>"), "'<end>' --eos_token"),
    ("prepare_data", "a chat template that is broken", lambda w: broken_template(w), "template --plain"),
    ("prepare_data", "a tokenizer.json cut off", lambda w: [m := tokenizer(w), cut(m["model"] / "tokenizer.json")][0],
     "tokenizer --model"),
    ("prepare_data", "a model that is not there", lambda w: dict(model=w.tmp / "no_model"), "--model no_model"),
    ("prepare_data", "a hub model without network", lambda w: dict(model="some-one/some-model"), "--model some-one/some-model"),
    # the model
    ("dpo", "a model that is not there", lambda w: dict(model=w.tmp / "no_model"), "--model no_model"),
    ("dpo", "a hub model without network", lambda w: dict(model="some-one/some-model"), "some-one/some-model"),
    ("dpo", "a run without final/ as model", lambda w: [earlier_run(w), dict(model=w.out, out=w.tmp / "two")][1],
     "--model out final/ config.json"),
    ("dpo", "a checkpoint as model",
     lambda w: [earlier_run(w), dict(model=w.out / "step-000002", out=w.tmp / "two")][1], "--model step-000002 config.json"),
    ("dpo", "a model without weights", no_weights, "--model model.safetensors"),
    ("dpo", "weights cut off", lambda w: cut(w.model / "model.safetensors"), "--model"),
    ("dpo", "weights that lack a tensor", one_tensor_less, "--model up_proj"),
    ("dpo", "weights of another shape", lambda w: edit(w.model / "config.json", intermediate_size=40), "--model up_proj 48 40"),
    ("dpo", "a config cut off", lambda w: cut(w.model / "config.json"), "--model config.json"),
    ("dpo", "a config of no known model", lambda w: edit(w.model / "config.json", model_type="best"), "--model best"),
    ("dpo", "a model without tokenizer", no_tokenizer, "tokenizer"),
    ("dpo", "a recurrent model under packed", lambda w: recurrent(w), "--layout packed concatenated lfm2"),
    ("cache_ref", "a recurrent model under packed", lambda w: w.paths.update(model=Path(w.kit.tiny_model("lfm2"))),
     "--layout packed concatenated lfm2"),
    ("dpo", "weights that are NaN", nan_policy, "not all weights in lm_head.weight finite"),
    ("cache_ref", "weights that are NaN", lambda w: [w.data, weights_that_are_nan(w), shutil.rmtree(w.cache)][1],
     "not all weights in lm_head.weight finite"),
    ("cache_ref", "weights that lack a tensor", one_tensor_less, "--model up_proj"),
    ("evaluate", "weights that are NaN", weights_that_are_nan, "pair- not finite other"),
    ("evaluate", "weights that lack a tensor", one_tensor_less, "--models up_proj"),
    ("evaluate", "weights cut off", lambda w: cut(w.model / "model.safetensors"), "--models model"),
    ("evaluate", "a model without tokenizer", no_tokenizer, "tokenizer"),
    # the data
    ("dpo", "data that are not there", lambda w: dict(data=w.tmp / "no_data"), "no_data/meta.json prepare_data.py"),
    ("dpo", "a file as data", lambda w: dict(data=w.rows), "rows.jsonl/meta.json prepare_data.py"),
    ("dpo", "meta.json cut off", lambda w: cut(w.data / "meta.json"), "data/meta.json prepare_data.py"),
    ("dpo", "meta.json of something else", lambda w: (w.data / "meta.json").write_text("{}") and None, "--data KeyError vocab_hash"),
    ("dpo", "no train folder", lambda w: delete(w.data / "train"), "--data data/train"),
    ("dpo", "an arrow file cut off", cut_arrow, "--data data read"),
    ("dpo", "another vocabulary", other_vocabulary, "other tokens prepare_data.py"),
    ("dpo", "a pair above --max_tokens", lambda w: dict(max_tokens=9), "pair- --max_tokens 9 --max_length"),
    ("dpo", "a weight that is NaN", lambda w: weighted(w, float("nan")), "pair-4 not finite"),
    ("cache_ref", "another vocabulary", other_vocabulary, "other tokens prepare_data.py"),
    ("cache_ref", "an arrow file cut off", cut_arrow, "--data data read"),
    ("evaluate", "models with different tokenizers", two_tokenizers, "another model"),
    ("evaluate", "a split that is not there", lambda w: dict(split="test"), "test prepare_data.py"),
    # the cache of the reference
    ("dpo", "no cache", lambda w: [delete(w.cache), dict(dtype="float32")][1], "0 caches cache_ref.py --model --data --dtype float32"),
    ("dpo", "a cache of other weights", lambda w: [w.data, other_weights(w)][1], "0 caches weights cache_ref.py"),
    ("dpo", "a cache of other tokens", other_tokens, "0 caches tokens cache_ref.py"),
    ("dpo", "a cache that is half done", lambda w: delete(w.cache / "meta.json"), "0 caches cache_ref.py"),
    ("dpo", "a cache whose meta.json is cut off", lambda w: cut(w.cache / "meta.json"), "ref- meta.json delete cache_ref.py"),
    ("dpo", "a --reference without cache", lambda w: [w.data, dict(reference="other")][1], "0 caches cache_ref.py --model other"),
    ("dpo", "two caches of one --reference", two_caches, "2 caches delete"),
    ("dpo", "log-probs cut off", lambda w: cut(w.cache / "train-logps.npy"), "train-logps.npy damaged cache_ref.py"),
    ("dpo", "log-probs cut off in the header", lambda w: cut(w.cache / "train-logps.npy", 0.1), "train-logps.npy damaged"),
    ("dpo", "log-probs that are empty", lambda w: cut(w.cache / "val-logps.npy", 0), "val-logps.npy damaged"),
    ("dpo", "log-probs of too few rows", lambda w: cache_values(w, lambda x: x[1:]), "train-logps.npy damaged"),
    ("dpo", "log-probs that are NaN", lambda w: cache_values(w, lambda x: x * np.nan), "train-logps.npy damaged"),
    ("dpo", "log-probs of other sides", lambda w: cache_values(w, lambda x: x.reshape(-1, 2)[:, ::-1].flatten(), signed=True),
     "reference nats --model delete ref- cache_ref.py"),
    # the folder of the run
    ("dpo", "an --out that holds a run", lambda w: [earlier_run(w), {}][1], "--out out --resume"),
    ("dpo", "--resume of a run that is complete", lambda w: [run(w, "dpo", {}), dict(resume=True)][1], "complete out/final"),
    ("dpo", "an --out with checkpoints and no log", lambda w: [earlier_run(w), delete(w.out / "log.jsonl"), {}][2],
     "--out out --resume"),
    ("dpo", "--resume with another beta and no log",
     lambda w: [earlier_run(w), delete(w.out / "log.jsonl"), dict(resume=True, beta=0.5)][2], "beta 0.1 0.5"),
    ("dpo", "--resume with another beta", lambda w: earlier_run(w) | dict(beta=0.5), "--out beta 0.1 0.5 another"),
    ("dpo", "args.json cut off", lambda w: stopped_run(w, lambda out: cut(out / "args.json")), "args.json"),
    ("dpo", "a checkpoint that lacks a file", lambda w: broken_checkpoint(w, lambda step: delete(next(step.glob("*.distcp")))),
     "step-000003"),
    ("dpo", "a checkpoint cut off", lambda w: broken_checkpoint(w, lambda step: cut(next(step.glob("*.distcp")))), "step-000003"),
    ("dpo", "a checkpoint without metadata", lambda w: broken_checkpoint(w, lambda step: delete(step / ".metadata")),
     "step-000003"),
    ("dpo", "an --out below a file", lambda w: dict(out=below_a_file(w)), "--out file/x directory"),
    ("prepare_data", "an --out below a file", lambda w: dict(out=below_a_file(w)), "cannot write file/x --out"),
    ("prepare_data", "an --out that exists", lambda w: w.out.mkdir(), "--out exists --overwrite"),
    ("prepare_data", "an --out that is no result", lambda w: [w.out.mkdir(), dict(overwrite=True)][1], "--out exists"),
    ("evaluate", "an --out below a file", lambda w: dict(out=below_a_file(w)), "cannot write --out"),
    ("evaluate", "a result on a full disk", lambda w: link_to_full(w.out / "evaluation.json"), "cannot write No space"),
    ("evaluate", "a table on a full disk", lambda w: link_to_full(w.out / "table.md"), "cannot write --out No space"),
    # evaluate.py's own inputs
    ("evaluate", "a run without final/", unfinished, "out final/ --resume"),
    ("evaluate", "a --reward that is no FILE:FUNCTION", lambda w: dict(samples=2, reward="score"),
     "--reward score FILE.py:FUNCTION"),
    ("evaluate", "a --reward with a syntax error", lambda w: reward(w, "return ("), "--reward r.py FILE.py:FUNCTION"),
    ("evaluate", "a --reward that raises", lambda w: reward(w, "return 1 / 0"), "--reward pair- ZeroDivisionError"),
    ("evaluate", "a --reward without a number", lambda w: reward(w, "return None"), "--reward number pair-"),
    ("evaluate", "a --reward that is NaN", lambda w: reward(w, "return float('nan')"), "--reward number pair-"),
    ("evaluate", "a --reward without a score", lambda w: dict(samples=2, reward=f"{w.rows}:score"), "--reward rows.jsonl"),
    ("evaluate", "--plot of a model that is no run", lambda w: [pytest.importorskip("matplotlib"), dict(plot="x.png")][1],
     "--plot x.png log.jsonl"),
    ("evaluate", "--plot of a log that is broken", lambda w: log_of(w, '{"step": 1, "lo}\n'), "log.jsonl"),
    ("evaluate", "--plot into an unknown kind of image", lambda w: log_of(w, '{"step": 1}\n') | dict(plot=w.tmp / "x.doc"),
     "--plot x.doc"),
]


def flipped(data, places=None):
    data = bytearray(data)
    for place in places or [len(data) // 2]:
        data[place] ^= 255
    return bytes(data)

def parquet():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()

def no_template(w):
    delete(w.tmp / "tokenizer/chat_template.jinja")
    return {}

def broken_template(w):
    flags = tokenizer(w)
    (flags["model"] / "chat_template.jinja").write_text("{% for m in messages %}")
    return flags


def named(script, what, *rest):
    return pytest.param(script, *rest, id=f"{script}: {what}")


@pytest.mark.parametrize("script, breaking, words", [named(*row) for row in TABLE])
def test_one_line_says_what_is_wrong(script, breaking, words, w):
    changes = breaking(w) or {}
    message = error_of(w, script, changes)
    for word in words.split():
        assert word in message, message


MAIN = ["an unknown flag", "a negative beta", "--lora_rank without peft", "weights that are NaN",
        "a recurrent model under packed", "a pair above --max_tokens", "a weight that is NaN", "an --out below a file"]
CACHE = ["no cache", "a cache of other weights", "log-probs cut off", "log-probs of other sides"]

@pytest.mark.parametrize("script, what", [
    *((script, what) for script in ("dpo_norm", "wpo") for what in MAIN + CACHE), *(("simpo", what) for what in MAIN)])
def test_the_other_algorithms_say_the_same(script, what, w):
    """Their helpers are copies, so only what main() of each is about stands here."""
    (breaking, words), = [rest for name, case, *rest in TABLE if (name, case) == ("dpo", what)]
    changes = breaking(w) or {}
    if script == "simpo":
        changes.pop("reference", None)  # it has none
    message = error_of(w, script, changes)
    assert all(word in message for word in words.split()), message

SKETCH = dict(sketch_dim=16)

@pytest.mark.parametrize("what", [what for what in MAIN + CACHE if not any(
    word in what for word in ("NaN", "recurrent", "peft"))])
def test_auxdpo_says_the_same(what, w):
    """But before it looks at the model's layers it asks for the sketches, which need those too."""
    run(w, "cache_ref", SKETCH)
    (breaking, words), = [rest for name, case, *rest in TABLE if (name, case) == ("dpo", what)]
    message = error_of(w, "auxdpo", SKETCH | (breaking(w) or {}))
    assert all(word in message for word in words.split()), message

def test_auxdpo_names_pairs_that_are_not_finite(w):
    changes = weighted(w, float("nan")) or {}
    run(w, "cache_ref", SKETCH)
    message = error_of(w, "auxdpo", SKETCH | changes)
    assert "pair-4" in message and "not finite" in message

def test_auxdpo_without_its_sketches_gives_the_command_that_makes_them(w):
    w.cache
    message = error_of(w, "auxdpo", SKETCH | dict(train_modules="norm"))
    assert all(word in message for word in ("no sketches", "cache_ref.py", "--sketch_dim '16'", "--train_modules 'norm'"))
    run(w, "cache_ref", SKETCH)
    assert "--sketch_dim '8'" in error_of(w, "auxdpo", dict(sketch_dim=8))  # there is one, of another size
    path, = w.data.glob("ref-*/sketch-*/train-sketch.npy")
    cut(path)
    assert "damaged" in error_of(w, "auxdpo", SKETCH)

@pytest.mark.parametrize("script, changes, words", [
    ("auxdpo", dict(null="exact"), "--null exact independent --train_modules"),
    ("dpo", dict(train_modules="nothing"), "--train_modules nothing matches no parameter lm_head"),
    ("dpo", dict(train_modules="("), "--train_modules ( unterminated"),
    ("cache_ref", dict(sketch_modules="nothing"), "--sketch_modules nothing matches no"),
    ("cache_ref", dict(sketch_modules="("), "--sketch_modules ( unterminated")])
def test_flags_that_do_not_go_together_or_find_nothing(script, changes, words, w):
    if script != "dpo":
        run(w, "cache_ref", dict(sketch_dim=64))
        changes = dict(sketch_dim=64) | changes
    message = error_of(w, script, changes)
    assert all(word in message for word in words.split()), message

@pytest.mark.parametrize("what", [what for what in MAIN if not any(w in what for w in ("beta", "lora", "batch", "weight"))])
def test_compo_says_the_same(what, w):
    (breaking, words), = [rest for name, case, *rest in TABLE if (name, case) == ("dpo", what)]
    message = error_of(w, "compo", breaking(w) or {})
    assert all(word in message for word in words.split()), message

@pytest.mark.parametrize("changes, words", [
    (dict(keep_fraction=1.2), "--keep_fraction 1.2 at most 1"),
    (dict(gate=20), "--gate 20 at most 1"),
    (dict(radius=-1e-4), "--radius above 0"),
    (dict(estimator="best"), "--estimator gaussian span exact"),
    (dict(beta=0.1), "--beta"),
    (dict(step_size=3e38, estimator="exact", gate=0, keep_fraction=1), "not finite --step_size")])
def test_compo_refuses_flags_that_make_no_sense(changes, words, w):
    message = error_of(w, "compo", changes)
    assert all(word in message for word in words.split()), message

def test_compo_says_which_weights_are_not_finite(w):
    model = tiny_hf_model("llama")
    model.lm_head.weight.data[3:40] = float("nan")
    w.new_model(model)
    message = error_of(w, "compo", {})
    assert "not all weights in lm_head.weight are finite" in message and str(w.paths["model"]) in message

@pytest.mark.parametrize("script", ["simpo", "compo"])
def test_a_script_without_reference_needs_no_cache_and_refuses_the_flag(script, w):
    delete(w.cache)
    run(w, script, {})
    assert (w.out / "final/model.safetensors").exists() and not list(w.data.glob("ref-*"))
    assert "--reference" in error_of(w, script, dict(reference="x", out=w.tmp / "two"))

def test_the_ratio_of_simpo_is_above_0(w):
    assert "--gamma_beta_ratio -1" in error_of(w, "simpo", dict(gamma_beta_ratio=-1))

@pytest.mark.parametrize("script", ["dpo", "simpo"])
def test_a_batch_may_be_larger_than_the_data(script, w):
    """It is all pairs then; a line that is not finite names every pair of the batch, and only these."""
    run(w, script, dict(batch_size=7))
    line, = [line for line in (w.out / "log.jsonl").read_text().splitlines() if '"step": 2,' in line]
    assert json.loads(line)["pairs"] == len(SIZES)
    for size in (2, 7):
        changes = dict(batch_size=size, learning_rate=3e38, max_steps=9, max_grad_norm=1e30, out=w.tmp / str(size))
        message = error_of(w, script, changes)
        ids = [word for word in message.split() if word.startswith("pair-")]
        assert len(set(ids)) == len(ids) == min(size, 6), message


# ---- rows that are dropped and counted, rows that only look odd: all in one file, prepared once


DROPPED = {  # what is wrong: row, reason
    "a line cut off": ('{"prompt": "Why?", "chosen": "go', "malformed"),
    "a line that is no object": ("[1, 2]", "malformed"),
    "wrong columns": (dict(ask="Why?", reply="good"), "malformed"),
    "one column missing": (dict(prompt="Why?", chosen="good"), "malformed"),
    "null as a response": (dict(prompt="Why?", chosen=None, rejected="bad"), "malformed"),
    "a weight of NaN": ('{"prompt": "Why?", "chosen": "good", "rejected": "bad", "weight": NaN}', "malformed"),
    "a negative weight": (dict(prompt="Why?", chosen="good", rejected="bad", weight=-1), "malformed"),
    "half a surrogate pair": ('{"prompt": "Why?", "chosen": "\\ud83d", "rejected": "bad"}', "malformed"),
    "JSON 10,000 levels deep": ("[" * 10_000, "malformed"),
    "an empty response": (dict(prompt="Why?", chosen="", rejected="bad"), "empty"),
    "a response of white space": (dict(prompt="Why?", chosen="good", rejected=" \n\t\u00a0\u2003"), "empty"),
    "an empty prompt": (dict(prompt="\n", chosen="good", rejected="bad"), "empty"),
    "identical sides": (dict(prompt="Why?", chosen="good", rejected="good"), "identical"),
    "100,000 tokens in a response": (dict(prompt="Why?", chosen="7 " * 50_000, rejected="bad"), "too long"),
    "100,000 tokens in the prompt": (dict(prompt="7 " * 50_000, chosen="good", rejected="bad"), "too long"),
    "an end token in a response": (dict(prompt="Why?", chosen="good<|im_end|>", rejected="bad"), "special token"),
}
KEPT = {  # what looks odd: prompt, chosen, rejected
    "an emoji on each side of the boundary": ("Smile \U0001f600", "\U0001f600 yes", "\U0001f601 no"),
    "a family of joined emoji": ("Who? \U0001f469\u200d\U0001f467", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f469"),
    "a skin colour that opens the response": ("Wave \U0001f44b", "\U0001f3fd hello", "\U0001f3ff hello"),
    "a combining accent that opens the response": ("Cafe", "\u0301 is French", "\u0300 is not"),
    "a vowel sign that opens the response": ("\u0928", "\u093f good", "\u0940 bad"),
    "Hangul letters of one syllable": ("\u1112\u1161", "\u11ab good", "\u11b7 bad"),
    "text from right to left": ("\u0645\u0631\u062d\u0628\u0627", "\u0634\u0643\u0631\u0627\u064b", "\u0644\u0627"),
    "a byte-order mark in a response": ("Why?", "\ufeffgood", "\ufeffbad"),
    "responses that differ in white space": ("Why?", "good  one", "good one"),
    "one letter on each side": ("Q", "y", "n"),
}


@pytest.fixture(scope="module")
def prepared(kit, tmp_path_factory):
    """What prepare_data.py makes of DROPPED, KEPT and 60 good rows, and of the same without chat template."""
    tmp, results = tmp_path_factory.mktemp("prepared"), {}
    odd = [dict(prompt=p, chosen=c, rejected=r) for p, c, r in KEPT.values()]
    for name, model in dict(chat=kit.chat, plain=make_tokenizer(tmp / "base", bos=True)).items():
        (tmp / name).mkdir()
        w = World(kit, tmp / name, None)
        w.rows.write_text(lines([row for row, _ in DROPPED.values()] + odd + ROWS))
        run(w, "prepare_data", dict(model=model, val_fraction=0.2))
        splits = [datasets.load_from_disk(str(w.out / split)) for split in ("train", "val")]
        results[name] = SimpleNamespace(
            pairs={int(pair["id"].split(":")[1]): pair for rows in splits for pair in rows},
            dropped=[json.loads(line) for line in (w.out / "dropped.jsonl").read_text().splitlines()],
            counts=json.loads((w.out / "meta.json").read_text())["counts"],
            decode=transformers.AutoTokenizer.from_pretrained(model).decode)
    return results


@pytest.mark.parametrize("what", DROPPED)
def test_a_bad_row_is_dropped_with_line_and_reason(what, prepared):
    number = list(DROPPED).index(what) + 1
    found, = [record for record in prepared["chat"].dropped if record["line"] == number]
    assert found["reason"] == DROPPED[what][1] and len(found["value"]) < 300
    assert number not in prepared["chat"].pairs


def test_nothing_else_is_dropped_and_the_counts_add_up(prepared):
    counts, reasons = prepared["chat"].counts, [reason for _, reason in DROPPED.values()]
    assert counts["dropped"] == {reason: reasons.count(reason) for reason in reasons}
    assert counts["rows"] == counts["pairs_in"] == len(DROPPED) + len(KEPT) + len(ROWS)
    assert counts["pairs_out"] == len(KEPT) + len(ROWS) == counts["train"] + counts["val"]


@pytest.mark.parametrize("rendering", ["chat", "plain"])
def test_no_side_of_a_pair_is_empty_so_that_the_scripts_need_not_ask(rendering, prepared):
    pairs = prepared[rendering].pairs.values()
    assert pairs and all(pair[side] for pair in pairs for side in ("prompt", "chosen", "rejected"))


@pytest.mark.parametrize("rendering", ["chat", "plain"])
@pytest.mark.parametrize("what", KEPT)
def test_an_odd_row_comes_back_letter_by_letter(what, rendering, prepared):
    made = prepared[rendering]
    pair = made.pairs[len(DROPPED) + list(KEPT).index(what) + 1]
    prompt, *answers = KEPT[what]
    for side, answer in zip(("chosen", "rejected"), answers, strict=True):
        whole = made.decode(pair["prompt"] + pair[side])
        if rendering == "chat":
            assert whole == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
            assert made.decode(pair[side]) == answer + "<|im_end|>"
        else:
            assert whole == f"<|bos|>{prompt}{answer}<|eos|>"


# ---- disks that are full, folders that cannot be written


@pytest.fixture
def disk(tmp_path):
    """disk(options of mount) -> a small file system of its own; it is no error if nobody may mount one."""
    place = tmp_path / "disk"
    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
        if not place.exists():
            place.mkdir()
        if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no right to mount a small file system")
        return place
    yield mount
    subprocess.run(["umount", "-l", place], capture_output=True)


def test_a_full_disk_stops_prepare_data_and_leaves_nothing(w, disk):
    rows = [dict(prompt=f"Why {i}?", chosen="7 " * 400, rejected="8 " * 400) for i in range(60)]
    w.rows.write_text(lines(rows))
    w.out = disk("size=200k") / "out"
    message = error_of(w, "prepare_data", {})
    assert "cannot write" in message and "No space" in message and not list((w.tmp / "disk").iterdir())


@pytest.mark.parametrize("kilobytes", [0, 4, 8])
def test_a_full_disk_stops_cache_ref_and_the_next_call_goes_on(kilobytes, w, disk):
    """The disk has room for no file, for that of train only, or for both but not for meta.json."""
    whole, data = w.data, disk("size=4m") / "data"
    w.paths["data"] = Path(shutil.copytree(whole, data, ignore=shutil.ignore_patterns("ref-*")))
    used = sum(4096 * -(-path.stat().st_size // 4096) for path in data.rglob("*") if path.is_file()) // 1024
    disk_again(w, used + kilobytes)
    message = error_of(w, "cache_ref", {})
    assert "No space left on device" in message and "same command again" in message
    assert not list(data.glob("ref-*/meta.json"))
    disk_again(w, 4096)
    run(w, "cache_ref", {})
    made, = data.glob("ref-*/train-logps.npy")
    assert np.allclose(np.load(made), np.load(w.kit.data / made.relative_to(data)), atol=1e-4)
    assert sorted(path.name for path in made.parent.glob("*.npy")) == ["train-logps.npy", "val-logps.npy"]


def test_a_disk_without_room_for_the_sketches_shows_before_they_are_computed_and_nothing_is_left_on_it(w, disk):
    """Half a file of sketches may be a terabyte."""
    whole, data = w.data, disk("size=4m") / "data"
    w.paths["data"] = Path(shutil.copytree(whole, data))
    used = sum(4096 * -(-path.stat().st_size // 4096) for path in data.rglob("*") if path.is_file()) // 1024
    disk_again(w, used + 40)
    flags = dict(sketch_dim=4096)  # 98 kB
    message = error_of(w, "cache_ref", flags)
    assert "train-sketch.npy" in message and "cannot be written" in message and "same command again" in message
    assert not list(data.glob("ref-*/sketch-*/*"))
    disk_again(w, 4096)
    run(w, "cache_ref", flags)
    made, = data.glob("ref-*/sketch-*/train-sketch.npy")
    assert not np.isnan(np.load(made)).any()


def disk_again(w, kilobytes):
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", w.tmp / "disk"], check=True)


def test_a_full_disk_stops_a_checkpoint_and_the_one_before_it_continues(w, disk):
    flags = dict(save_every=1, epochs=2, max_steps=4, batch_size=3)
    run(w, "dpo", flags)
    truth = load_file(w.out / "final/model.safetensors")
    size = sum(path.stat().st_size for path in (w.out / "step-000003").iterdir()) // 1024
    w.out = disk(f"size={size * 2 - 20}k") / "out"
    message = error_of(w, "dpo", flags)
    assert "new.tmp cannot be written" in message and "make room" in message and "--resume" in message
    saved = sorted(path.name for path in w.out.glob("step-*"))
    assert saved == ["step-000001"], saved
    disk_again(w, 4096)
    run(w, "dpo", flags | dict(resume=True))
    made = load_file(w.out / "final/model.safetensors")
    assert all(torch.equal(made[key], tensor) for key, tensor in truth.items())
    assert not list(w.out.glob("*.tmp"))


def test_a_full_disk_stops_the_log(w, disk):
    size = sum(4 * -(-path.stat().st_size // 4096) for path in w.paths["model"].iterdir() if path.suffix == ".json")
    w.out = disk(f"size={size + 4}k") / "out"  # room for args.json and what is copied from the model
    message = error_of(w, "dpo", {})
    assert "No space left on device" in message and "same command again" in message
    disk_again(w, 4096)
    run(w, "dpo", dict(resume=True))
    assert (w.out / "final/model.safetensors").exists()


def test_a_full_disk_that_cannot_hold_what_is_copied_from_the_model_shows_before_the_first_step(w, disk):
    w.out = disk("size=8k") / "out"
    message = error_of(w, "dpo", {})
    assert "No space left on device" in message and "--out" in message and not (w.out / "log.jsonl").exists()


def test_a_full_disk_stops_final_and_the_last_checkpoint_continues(w, disk):
    flags = dict(save_every=2, max_steps=2)
    run(w, "dpo", flags)
    size = sum(path.stat().st_size for path in (w.out / "step-000002").iterdir()) // 1024
    w.out = disk(f"size={size + 60}k") / "out"
    message = error_of(w, "dpo", flags)
    assert "final.tmp cannot be written" in message and "No space left on device" in message
    assert "--resume" in message and not (w.out / "final").exists()
    disk_again(w, 4096)
    run(w, "dpo", flags | dict(resume=True))
    assert (w.out / "final/config.json").exists() and not (w.out / "final.tmp").exists()


@pytest.mark.parametrize("script", ["prepare_data", "cache_ref", "evaluate", pytest.param(
    "dpo")])
def test_without_write_permission_one_line_names_the_folder(script, w, disk):
    place = disk("size=4m")
    if script == "cache_ref":
        w.paths["data"] = Path(shutil.copytree(w.kit.data, place / "data", ignore=shutil.ignore_patterns("ref-*")))
    w.out = place / "out"
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    message = error_of(w, script, {})
    assert str(place) in message and "Read-only" in message


# ---- what a killed run leaves behind does no harm


def test_a_half_written_checkpoint_is_ignored_and_overwritten(w):
    def half_written(out):
        shutil.copytree(out / "step-000002", out / "new.tmp")
        for path in (out / "new.tmp").iterdir():
            cut(path)
        (out / "final.tmp").mkdir()
        (out / "final.tmp/model.safetensors").write_text("half")

    run(w, "dpo", stopped_run(w, half_written) | dict(keep=1))
    assert sorted(path.name for path in w.out.iterdir()) == ["args.json", "final", "log.jsonl", "step-000003"]


def test_a_log_line_cut_off_is_written_again(w):
    run(w, "dpo", stopped_run(w, lambda out: cut(out / "log.jsonl", 0.9)))
    steps = [json.loads(line)["step"] for line in (w.out / "log.jsonl").read_text().splitlines()]
    assert steps[-1] == 3 and len(set(steps)) == len(steps)


def test_a_log_that_is_damaged_or_missing_comes_back_from_the_checkpoint(w):
    def damage(out):
        log = out / "log.jsonl"
        log.write_text(log.read_text().replace('{"step": 1,', "\0" * 11))
    run(w, "dpo", stopped_run(w, damage))
    assert [json.loads(line)["step"] for line in (w.out / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    for name in ("final", "step-000003", "log.jsonl"):
        delete(w.out / name)
    run(w, "dpo", dict(resume=True, save_every=1, max_steps=3))
    assert [json.loads(line)["step"] for line in (w.out / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_copy_that_the_user_made_of_a_checkpoint_stays(w):
    run(w, "dpo", stopped_run(w, lambda out: shutil.copytree(out / "step-000002", out / "step-000002.good")) | dict(keep=1))
    assert sorted(path.name for path in w.out.glob("step-*")) == ["step-000002.good", "step-000003"]


@pytest.mark.parametrize("keep", [0, 0.1, 0.5, 0.9])
def test_a_file_of_the_cache_that_is_cut_off_is_said_to_be_damaged_and_computed_again(keep, w, capsys):
    truth = (w.cache / "train-logps.npy").read_bytes()
    cut(w.cache / "train-logps.npy", keep)
    run(w, "cache_ref", {})
    output = capsys.readouterr().out
    assert "train-logps.npy is damaged" in output and f"0 of {2 * len(SIZES)} distinct responses are done" in output
    assert (w.cache / "train-logps.npy").read_bytes() == truth
    run(w, "dpo", {})


@pytest.mark.parametrize("before, after", [("float32", "float16"), ("float16", "float32")])
def test_sketches_of_another_precision_that_are_half_done_are_computed_again(before, after, w):
    run(w, "cache_ref", SKETCH | dict(sketch_dtype=after))
    path, = w.data.glob("ref-*/sketch-*/train-sketch.npy")
    truth = np.load(path)
    half = truth.astype(before)
    half[3:] = np.nan
    np.save(path, half)
    (path.parent / "meta.json").unlink()
    run(w, "cache_ref", SKETCH | dict(sketch_dtype=after))
    assert np.load(path).dtype == truth.dtype and np.array_equal(np.load(path), truth)


# ---- real processes: one line on stderr, exit status 1


@pytest.mark.slow
def test_each_script_ends_with_one_line_and_exit_status_1(w):
    cases = dict(prepare_data=dict(dataset=w.tmp / "no.jsonl"), cache_ref=dict(model=w.tmp / "no_model"),
                 dpo=dict(data=w.tmp / "no_data"), evaluate=dict(models=w.tmp / "no_model"))
    running = {}
    for script, flags in cases.items():  # at once: most of the time they import
        first, *rest = argv(w, script, flags)
        running[script] = subprocess.Popen([sys.executable, ROOT / first, *rest], text=True, stdout=subprocess.PIPE,
                                           stderr=subprocess.PIPE, env=os.environ | dict(OMP_NUM_THREADS="1"))
    for script, process in running.items():
        output, errors = process.communicate(timeout=300)
        broken, = cases[script].values()
        assert process.returncode == 1 and not output, (script, output)
        line = [text for text in errors.splitlines() if text.strip() and "rows" not in text.split("error:")[0]]
        assert len(line) == 1 and line[0].startswith("error: ") and str(broken) in line[0], errors


@pytest.mark.parametrize("words, missing, said", [
    pytest.param(["dqo.py"], "", "dqo.py dpo.py", id="an unknown script"),
    pytest.param(["dpo"], "", "dpo script", id="a script without .py"),
    pytest.param(["dpo.py"], "dpo.py", "dpo.py there is no script", id="a script that was deleted"),
    pytest.param(["dpo.py", "--model", "a", "--data", "b"], "cache_ref.py", "cache_ref.py",
                 id="no cache_ref.py")])
def test_launch_sh_ends_with_one_line_for_a_script_that_is_not_there(words, missing, said, tmp_path):
    for path in [ROOT / "launch.sh", *ROOT.glob("*.py"), *ROOT.glob("requirements*.txt")]:
        if path.name != missing:
            shutil.copy(path, tmp_path)
    done = subprocess.run([tmp_path / "launch.sh", *words], capture_output=True, text=True, timeout=100,
                          env=os.environ | dict(PYTHON=sys.executable, NPROC="1", DRY_RUN="1"))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done
    assert all(word in done.stderr for word in said.split()), done.stderr
