"""What the tests share: tiny random models, tiny data folders, one process group. No network."""

import ast
import contextlib
import functools
import json
import os
import signal
import socket
import sys
import tempfile
import types
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # tiny matrices; and a process that has used more must not be forked

import pytest

with contextlib.suppress(ModuleNotFoundError):  # test_copies.py and test_readme.py need no package
    import datasets
    import numpy as np
    import torch
    import transformers

    datasets.disable_progress_bars()
    torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "tests", "tests/bench", "tests/demo", "tests/losses")]

VOCAB, WINDOW = 97, 8  # tokens; a sliding window shorter than the test sequences
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
MIXED = ["sliding_attention", "full_attention"]
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)

# family: (Config class, what it changes in SMALL)
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": (
        "LlamaConfig",
        dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", dict(tie_word_embeddings=True)),
    "gemma2": (
        "Gemma2Config",
        dict(
            tie_word_embeddings=True,
            sliding_window=WINDOW,
            layer_types=MIXED,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            query_pre_attn_scalar=5,
        ),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        dict(
            tie_word_embeddings=True,
            sliding_window=WINDOW,
            layer_types=MIXED,
            query_pre_attn_scalar=5,
        ),
    ),
    "mistral": ("MistralConfig", dict(sliding_window=WINDOW, num_key_value_heads=1)),
    "mixtral": ("MixtralConfig", MOE),
    "olmoe": ("OlmoeConfig", MOE),
    "cohere": ("CohereConfig", dict(tie_word_embeddings=True, logit_scale=0.25, use_qk_norm=True)),
    "granite": (
        "GraniteConfig",
        dict(
            logits_scaling=3.0,
            attention_multiplier=0.2,
            residual_multiplier=0.7,
            embedding_multiplier=2.0,
        ),
    ),
    "gpt2": (
        "GPT2Config",
        dict(tie_word_embeddings=True, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    ),
    "opt": ("OPTConfig", dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.3)),
    "phi": ("PhiConfig", dict(num_key_value_heads=4)),
    "gpt-oss": ("GptOssConfig", MOE | dict(sliding_window=WINDOW, layer_types=MIXED)),
    "mamba": ("MambaConfig", dict(state_size=4, time_step_rank=4)),
    "lfm2": (
        "Lfm2Config",
        dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        MOE
        | dict(
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            shared_expert_intermediate_size=24,
        ),
    ),
}
ATTENTION = [name for name in FAMILIES if name not in ("mamba", "lfm2", "qwen3-next")]
RECURRENT = ["mamba", "lfm2", "qwen3-next"]


def tiny_config(family, **changes):
    name, own = FAMILIES[family]
    return getattr(transformers, name)(**SMALL | own | changes)


def tiny_hf_model(family, seed=0, **changes):
    """A random model whose weights are so large that attention, windows and caps show in its log-probs."""
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        tiny_config(family, **changes), dtype=torch.float32
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if "embed" in name or "wte" in name:
                weight.copy_(noise)
            elif "A_log" in name or "dt_" in name:
                weight.add_(0.1 * noise)
            elif weight.dim() > 1:
                weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5)
            else:
                weight.add_(0.2 * noise)
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        model.get_input_embeddings().weight.data *= 0.3
    return model.eval()


def tiny_tokenizer():
    """One token per word, ids 0..VOCAB-1; the padding token is the end of text, as in many models."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model(family, seed=0, **config changes) -> folder for from_pretrained, with a tokenizer."""

    @functools.cache
    def make(family, seed=0, **changes):
        folder = tmp_path_factory.mktemp(family)
        tiny_hf_model(family, seed, **changes).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return str(folder)

    return make


def tiny_args(folder, **changes):
    """The settings that make a Policy, as the command line would give them."""
    settings = dict(model=folder, trust_remote_code=False, layout="packed", max_tokens=8192,
                    activation_checkpointing="off", compile=False, shard_group=0, zero="auto", lora_rank=0, train_modules="", seed=0)
    return types.SimpleNamespace(**settings | changes)


def tiny_policy(script, folder, layout="packed", checkpointing="off", **changes):
    """The Policy that main() of a training script makes of a model folder, in a process group."""
    args = tiny_args(folder, layout=layout, activation_checkpointing=checkpointing, **changes)
    model, weights = script.read_model(args.model, args)
    score = getattr(script, "token_scores", script.token_logps)
    return script.build_policy(model, weights, score, torch.device("cpu"), torch.float32, args)


def run_as_program(module):
    """What `python SCRIPT.py` does after the definitions: main(), and one line for errors of files."""
    block = ast.parse(Path(module.__file__).read_text()).body[-1]
    assert isinstance(block, ast.If) and ast.unparse(block.test) == "__name__ == '__main__'"
    exec(compile(ast.Module(block.body, []), module.__file__, "exec"), module.__dict__)


def run_main(script, *words):
    """main() of a script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
        patch.setattr(script, "start_process_group", lambda dtype: (0, 1, torch.device("cpu"), torch.float32))
        patch.setattr(script.dist, "destroy_process_group", lambda: None)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            run_as_program(script)
        finally:
            signal.signal(signal.SIGTERM, handler)


class Program:
    """`python SCRIPT FLAGS` like a subprocess.Popen that begins at once: a fork of a process that has imported the packages."""

    def __init__(self, script, *flags, **environment):
        from gpu_check import PACKAGES, SERVER, forked

        SERVER.set_forkserver_preload([*PACKAGES, "conftest"])
        self.log = tempfile.NamedTemporaryFile("r")
        self.process = SERVER.Process(target=forked, args=(script, list(map(str, flags)), self.log.name, environment))
        self.process.start()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self, timeout=300):
        """-> all that it said, on both streams."""
        self.process.join(timeout)
        assert not self.process.is_alive(), f"still running after {timeout} s"
        return self.log.read()


def run_ranks(count, script, *flags):
    """So many ranks of a script, with the variables that torchrun sets; all must end well."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    shared = dict(WORLD_SIZE=str(count), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    ranks = [Program(script, *flags, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(count)]
    said = [rank.wait() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * count, "\n".join(text[-3000:] for text in said)


def random_pairs(sizes, seed=0):
    """Pairs with the given (prompt, chosen, rejected) lengths; every id occurs, the padding's too."""
    rng = np.random.default_rng(seed)
    return [
        {
            side: rng.integers(0, VOCAB, size).tolist()
            for side, size in zip(("prompt", "chosen", "rejected"), three)
        }
        | {"id": f"pair-{i}", "source": "tiny", "subset": ""}
        for i, three in enumerate(sizes)
    ]


def with_numbers(pairs):
    """The pairs with prompt_id, chosen_id and rejected_id, as prepare_data.py numbers them."""
    prompts, responses, numbered = {}, {}, []
    for pair in pairs:
        prompt = tuple(pair["prompt"])
        ids = dict(prompt_id=prompts.setdefault(prompt, len(prompts)))
        for side in ("chosen", "rejected"):
            ids[f"{side}_id"] = responses.setdefault((prompt, tuple(pair[side])), len(responses))
        numbered.append(pair | ids)
    return numbered


def own_numbers(pairs):
    """The pairs as if no two had a prompt or a response in common."""
    return [pair | dict(prompt_id=i, chosen_id=2 * i, rejected_id=2 * i + 1) for i, pair in enumerate(pairs)]


def write_tiny_data(folder, model, train, val, numbers=None, **columns):
    """The data folder that prepare_data.py would make of these pairs, for the tokenizer of `model`."""
    import prepare_data

    numbers = numbers or with_numbers

    feature = datasets.List(datasets.Value("int32"))
    names = dict.fromkeys(("prompt", "chosen", "rejected"), feature)
    names |= dict.fromkeys(("id", "source", "subset"), datasets.Value("string"))
    names |= dict.fromkeys(("prompt_id", "chosen_id", "rejected_id"), datasets.Value("int64"))
    names |= {name: datasets.Value(kind) for name, kind in columns.items()}
    for name, pairs in dict(train=train, val=val).items():
        rows = datasets.Dataset.from_list(numbers(pairs), features=datasets.Features(names))
        rows.save_to_disk(str(Path(folder, name)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    meta = dict(
        arguments=dict(model=model),
        vocab_hash=prepare_data.vocab_hash(tokenizer),
        distinct=dict.fromkeys(("train", "val")),
    )
    Path(folder, "meta.json").write_text(json.dumps(meta))
    return str(folder)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """tiny_data(model folder, train pairs, val pairs, **extra columns) -> data folder."""
    return lambda model, train, val, **columns: write_tiny_data(
        tmp_path_factory.mktemp("data"), model, train, val, **columns
    )


@pytest.fixture(scope="session")
def process_group():
    """The process group of one that every script runs in when torchrun did not start it."""
    import dpo
    import torch.distributed as dist

    if not dist.is_initialized():
        dpo.start_process_group("float32")
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def split_of(pairs, reference=None):
    """What load_data and load_reference make of pairs, with `reference` a Policy."""
    import dpo

    lengths = np.array([[len(pair[side]) for side in ("prompt", "chosen", "rejected")] for pair in pairs])
    split = dict(pairs=pairs, lengths=lengths)
    if reference is not None:
        with torch.no_grad():
            split["ref_logps"] = reference(dpo.collate(pairs, "packed")).T.numpy()
    return split


def trl_dpo_loss(trainer, pairs):
    rows = [{f"{side}_ids": pair[side] for side in ("prompt", "chosen", "rejected")} for pair in pairs]
    trainer.model.train()
    return trainer.compute_loss(trainer.model, trainer.data_collator(rows))


def assert_same_gradients(policy, trainer):
    """Of our Policy and TRL's model, each parameter to 1e-4 of its norm."""
    grads = {name: weight.grad for name, weight in trainer.model.named_parameters()}
    for name, weight in policy.model.named_parameters():
        assert (weight.grad.full_tensor() - grads[name]).norm() < 1e-4 * grads[name].norm(), name


@pytest.fixture(scope="session")
def trl_trainer(tiny_model, tmp_path_factory, process_group):
    """trl_trainer(trainer, config, ...) with our tiny model; its data comes from the tests."""
    pytest.importorskip("trl")

    def make(trainer, config, reference=None, **changes):
        folder = tiny_model("llama")
        load = lambda path: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        rows = datasets.Dataset.from_list([dict(prompt="w3", chosen=" w4", rejected=" w5")] * 2)
        common = dict(output_dir=str(tmp_path_factory.mktemp("trl")), report_to="none", use_cpu=True, bf16=False)
        args = config(**common, max_length=None, gradient_checkpointing=False, disable_dropout=True, **changes)
        models = [load(folder)] + ([load(reference)] if reference else [])
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return trainer(*models, args=args, train_dataset=rows, processing_class=tokenizer)

    return make


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: any(map(item.get_closest_marker, ("slow", "torchrun"))))  # fast first


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: takes more than a few seconds; left out by -m 'not slow'"
    )
    config.addinivalue_line(
        "markers", "torchrun: starts several processes with torch.distributed.run"
    )
