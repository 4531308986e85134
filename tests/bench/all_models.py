"""Every causal LM type of transformers, tiny and random, through the checks of the scripts: python tests/bench/all_models.py [TYPE ...]

A type is made from its own default config with small sizes, saved in bfloat16, and read by simpo.py's functions. In each layout
it is either right (log-probs of five unequal pairs are those of its own eager forward pass, to 2e-3 nats) or refused by a line;
and final/, without training, has every tensor of the model's files to the bit. "not built" are types whose small config
transformers does not accept as it is made here. Writes results/all_models.md. About 4 minutes on one core.
"""
import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
warnings.filterwarnings("ignore")
import safetensors.torch
import simpo
import torch
import transformers
from conftest import SMALL, random_pairs, split_of, tiny_args
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

PAIRS = random_pairs([(1, 1, 4), (7, 9, 1), (23, 5, 17), (2, 30, 2), (12, 3, 11)], seed=3)
LAYOUTS = ("packed", "concatenated", "separate")
SIZES = SMALL | dict(  # under all the names that configs have for them
    sliding_window=8, attention_window_size=8, local_attention=16, num_experts=4, num_local_experts=4, moe_num_experts=4,
    n_routed_experts=4, num_experts_per_tok=2, moe_k=2, n_shared_experts=1, moe_intermediate_size=24, n_group=1,
    topk_group=1, first_k_dense_replace=1, num_nextn_predict_layers=0, shared_expert_intermediate_size=24,
    kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_embd=32, n_layer=2, n_head=4,
    n_inner=48, n_positions=128, max_seq_len=128, d_model=32, d_ff=48, n_layers=2, n_heads=4, num_layers=2, num_heads=4,
    ffn_dim=48, ffn_hidden_size=48, mlp_hidden_size=48, kv_channels=8, attention_heads=4, decoder_layers=2,
    decoder_ffn_dim=48, decoder_attention_heads=4, encoder_layers=2, encoder_ffn_dim=48, encoder_attention_heads=4,
    embedding_size=32, rotary_dim=8, state_size=4, time_step_rank=4, ssm_state_size=8, expand=2, chunk_size=16,
    mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64, mamba_d_state=8, mamba_n_groups=1, mamba_num_heads=8,
    mamba_head_dim=8, n_groups=1, lru_width=32, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=8, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8)


def small(cls):
    """A config of this class with small sizes, as far as it has them, and one layer of each kind."""
    has = cls().to_dict()
    settings = {name: value for name, value in SIZES.items() if name in has}
    if "kv_lora_rank" in has:  # latent attention has head sizes of its own
        settings.pop("head_dim", None)
        settings["num_key_value_heads"] = 4
    if "expand" in has and "num_heads" in has:  # Mamba-2: heads x head size = 2 x hidden size
        settings["num_heads"] = 8
    kinds = has.get("layer_types")
    if kinds and "num_hidden_layers" in has:
        settings["layer_types"] = (list(dict.fromkeys(kinds)) * 2)[:max(2, len(set(kinds)))]
        settings["num_hidden_layers"] = len(settings["layer_types"])
    for part in cls.sub_configs:
        if part in has and isinstance(getattr(cls(), part, None), transformers.PreTrainedConfig):
            settings[part] = small(type(getattr(cls(), part))).to_dict()
    if "image_size" in has:
        settings |= dict(image_size=16, patch_size=4)
    return cls(**settings)


def build(kind, folder):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(small(CONFIG_MAPPING[kind]), dtype=torch.float32)
    assert sum(weight.numel() for weight in model.parameters()) < 3e7, "it stays large"
    for name, weight in model.named_parameters():
        if weight.dim() > 1:  # so large that attention, positions and windows matter
            torch.nn.init.normal_(weight, std=0.3 if "embed" in name else 1.5 / weight.shape[-1] ** 0.5)
    model.to(torch.bfloat16).save_pretrained(folder)


def tensors(folder):
    found = {}
    for path in folder.glob("model*.safetensors"):
        found |= safetensors.torch.load_file(path)
    return found


@torch.no_grad()
def layout_of(folder, layout):
    """"right", or the line that refuses; and whether final/ is the model."""
    simpo.find_model.cache_clear()
    out = folder.parent / layout
    args = tiny_args(str(folder), layout=layout, out=str(out))
    with simpo.explain("refused"):  # as main() does
        model, weights = simpo.read_model(args.model, args)
    policy = simpo.build_policy(model, weights, simpo.token_logps, torch.device("cpu"), torch.float32, args)
    simpo.check_forward(policy, split_of(PAIRS), torch.float32, args)
    ours = policy(simpo.collate(PAIRS, layout)).numpy()
    simpo.free_weights(policy)
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    error = abs(ours - simpo.own_logps(own.eval(), PAIRS)).max()
    out.mkdir()
    simpo.copy_model_files(out / "final.tmp", args)
    simpo.save_final(policy, args)
    old, new = tensors(folder), tensors(out / "final")
    same = old.keys() == new.keys() and all(
        old[name].dtype == new[name].dtype and torch.equal(old[name], new[name]) for name in old)
    assert same, f"final/ differs in {[name for name in old if name not in new or not torch.equal(old[name], new[name])][:3]}"
    return "right" if error < 2e-3 else f"WRONG by {error:.2g} nats"


def too_slow(*_):
    raise TimeoutError("it takes over 90 s")


def outcome(kind):
    """{layout: "right", the line of the refusal, or what went wrong}, or why the type is not built."""
    folder = Path(tempfile.mkdtemp())
    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(90)
    found = {}
    try:
        try:
            build(kind, folder / "model")
        except Exception as error:
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"
        for layout in LAYOUTS:
            try:
                found[layout] = layout_of(folder / "model", layout)
            except SystemExit as line:
                found[layout] = f"refused: {line}".replace(str(folder), "")
            except Exception as error:  # main() makes a line of it, but of no known kind
                found[layout] = f"FAILED: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    finally:
        signal.alarm(0)
        shutil.rmtree(folder)
    return found


def main():
    simpo.start_process_group("float32")
    results = {kind: outcome(kind) for kind in sys.argv[1:] or sorted(TYPES)}
    built = {kind: found for kind, found in results.items() if isinstance(found, dict)}
    word = lambda text: text.split()[0].rstrip(":")
    counts = Counter(" / ".join(word(found[layout]) for layout in LAYOUTS) for found in built.values())
    lines = [f"`python tests/bench/all_models.py`, torch {torch.__version__}, transformers {transformers.__version__}: "
             f"{len(results)} types, of which {len(built)} could be built small.", "",
             "| packed / concatenated / separate | types |", "|---|---:|"]
    lines += [f"| {what} | {count} |" for what, count in counts.most_common()]
    lines += ["", "Every type that is right in a layout also gets a final/ that is the model to the bit.", "",
              "| type | packed | concatenated | separate |", "|---|---|---|---|"]
    for kind, found in built.items():
        cells = [found[layout] if word(found[layout]) in ("right", "WRONG", "FAILED") else "refused" for layout in LAYOUTS]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += ["", "Not built: " + "; ".join(f"{kind} ({found})" for kind, found in results.items() if kind not in built)]
    text = "\n".join(lines).replace(tempfile.gettempdir(), "") + "\n"
    print(text)
    if not sys.argv[1:]:
        (ROOT / "results/all_models.md").write_text(text)
        (ROOT / "results/all_models.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
