"""Claim: packed, concatenated and separate compute one and the same log pi(y|x), and its gradient.

Truth is the model's own forward of Hugging Face: one sequence at a time, no padding, all logits, in
float64 (and once in float32, to see that we lose nothing to its own rounding). Log-probs agree to 1e-5
relative, the gradient of each parameter to 1e-4 of its norm, for attention models with every peculiarity
that the gathering of tokens could break: sliding windows, soft-caps, sinks, grouped heads, learned
positions, tied heads, scaled logits, experts. The rows contain prompts and responses of one token, very
different lengths, the padding's id as a real token, and sequences longer than the window.

Also: recurrent models are refused where they would be wrong, and right elsewhere; what stands in the
padding never matters; activation checkpointing, torch.compile and LoRA change nothing that they should not;
the router loss is Hugging Face's own.
"""

import concurrent.futures
import functools
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from torch.nn.attention import varlen

import dpo
from conftest import ATTENTION, FAMILIES, MOE, RECURRENT, VOCAB, WINDOW, random_pairs

LAYOUTS = ["packed", "concatenated", "separate"]
EXPERTS = ["mixtral", "olmoe", "gpt-oss"]
BATCHES = {  # (prompt, chosen, rejected) lengths
    "one short pair": [(1, 1, 1)],
    "one long pair": [(13, 3, 20)],
    "five unequal pairs": [(1, 1, 4), (7, 9, 1), (23, 5, 17), (2, 30, 2), (12, 3, 11)],
}
LOGPS, GRADIENT = 1e-5, 1e-4  # relative to the value; to the norm of the parameter's gradient

pytestmark = pytest.mark.usefixtures("process_group")


def batch_of(name):
    return random_pairs(BATCHES[name], seed=len(name))


def coefficients(pairs):
    """(2, n) weights of the sum whose gradient is compared, chosen up and rejected down on average."""
    noise = np.random.default_rng(1).normal(size=(2, len(pairs))) / 4
    return torch.from_numpy(noise + [[1.0], [-1.0]])


@functools.cache
def make_policy(folder, layout, checkpointing="off", compiled=False, lora_rank=0, train_modules=""):
    model, weights, _ = dpo.build_model(types.SimpleNamespace(model=folder, layout=layout))
    chosen = dict(lora_rank=lora_rank, train_modules=train_modules, seed=0)
    dpo.choose_parameters(model, weights, types.SimpleNamespace(**chosen))
    if checkpointing != "off":
        dpo.checkpoint_blocks(model, checkpointing)
    return dpo.shard(dpo.Policy(model), weights, torch.float32, torch.device("cpu"), compiled=compiled)


def gradients(module):
    """{parameter: float64 gradient}; what the sum does not depend on has gradient 0. Clears them."""
    found = {}
    for name, weight in module.named_parameters():
        grad = torch.zeros(weight.shape) if weight.grad is None else weight.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found[name.removeprefix("model.") if isinstance(module, dpo.Policy) else name] = (
            grad.double()
        )
    module.zero_grad()
    return found


def ours(policy, batches, pairs):
    """Log-probs (2, n) and gradients from batches that collate made."""
    logps, _ = policy(batches)
    (logps * coefficients(pairs).to(logps)).sum().backward()
    return logps.detach().double(), gradients(policy)


@functools.cache
def ours_of(folder, layout, name):
    return ours(make_policy(folder, layout), dpo.collate(batch_of(name), layout), batch_of(name))


@functools.cache
def hugging_face(folder, name, dtype=torch.float64, **config):
    """The same from the model's own forward, one sequence at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", **config
    )
    model.eval()
    pairs, sums = batch_of(name), []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            ids = torch.tensor(pair["prompt"] + pair[side])
            logits = model(input_ids=ids[None], use_cache=False).logits[0].to(dtype)
            logps = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
            sums.append(logps[len(pair["prompt"]) - 1 :].sum())
    logps = torch.stack(sums).view(2, len(pairs))
    (logps * coefficients(pairs).to(dtype)).sum().backward()
    return logps.detach().double(), gradients(model)


def differences(left, right):
    """Largest relative difference of the log-probs, and {parameter: that of its gradient, in norm}.

    A gradient that is 0 in theory (of queries that see one key) is rounding, 1e-7 of the whole gradient, so
    norms below 1e-2 of the whole gradient's count as that much."""
    logps = ((left[0] - right[0]) / right[0]).abs().max().item()
    assert left[1].keys() == right[1].keys()
    whole = torch.stack([grad.norm() for grad in right[1].values()]).norm()
    return logps, {
        name: ((left[1][name] - grad).norm() / max(grad.norm(), 1e-2 * whole)).item()
        for name, grad in right[1].items()
    }


def assert_same(left, right):
    logps, grads = differences(left, right)
    assert logps < LOGPS
    assert {name: value for name, value in grads.items() if not value < GRADIENT} == {}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ATTENTION)
def test_every_layout_gives_the_log_probs_and_gradients_of_hugging_faces_own_forward(
    tiny_model, family, layout
):
    for name in BATCHES:
        assert_same(
            ours_of(tiny_model(family), layout, name), hugging_face(tiny_model(family), name)
        )


@pytest.mark.parametrize("family", ATTENTION)
def test_the_three_layouts_agree_with_each_other(tiny_model, family):
    for name in BATCHES:
        packed, *others = [ours_of(tiny_model(family), layout, name) for layout in LAYOUTS]
        for other in others:
            assert_same(packed, other)


@pytest.mark.parametrize("family", ATTENTION)
def test_hugging_face_in_float32_is_as_close_to_the_truth_as_we_are(tiny_model, family):
    truth = hugging_face(tiny_model(family), "five unequal pairs")
    assert_same(hugging_face(tiny_model(family), "five unequal pairs", torch.float32), truth)


# Each family's peculiarity, and the configuration of the same weights without it.
PECULIAR = {
    "gemma2 window": ("gemma2", dict(sliding_window=1000)),
    "gemma2 soft-cap of attention": ("gemma2", dict(attn_logit_softcapping=None)),
    "gemma2 soft-cap of logits": ("gemma2", dict(final_logit_softcapping=None)),
    "gemma3 window": ("gemma3", dict(sliding_window=1000)),
    "mistral window": ("mistral", dict(sliding_window=None)),
    "cohere scale": ("cohere", dict(logit_scale=1.0)),
    "granite scale": ("granite", dict(logits_scaling=1.0)),
    "granite attention": ("granite", dict(attention_multiplier=1.0)),
    "gpt-oss window": ("gpt-oss", dict(sliding_window=1000)),
}


@pytest.mark.parametrize("which", PECULIAR)
def test_the_comparison_would_notice_that_a_peculiarity_is_ignored(tiny_model, which):
    family, without = PECULIAR[which]
    folder, name = tiny_model(family), "five unequal pairs"
    truth, other = hugging_face(folder, name), hugging_face(folder, name, **without)
    assert differences(other, truth)[0] > 100 * LOGPS


def test_the_truth_itself_depends_on_every_prompt_token_where_there_is_no_window(tiny_model):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    ids = torch.tensor(random_pairs([(40, 1, 1)])[0]["prompt"])
    before = model(input_ids=ids[None]).logits[0, -1]
    for place in range(len(ids)):
        changed = ids.clone()
        changed[place] = (ids[place] + 1) % VOCAB
        assert (model(input_ids=changed[None]).logits[0, -1] - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", RECURRENT)
def test_a_model_that_is_not_attention_alone_is_refused_when_packed_and_told_the_other_layouts(
    tiny_model, family
):
    with pytest.raises(SystemExit, match="--layout concatenated or --layout separate"):
        make_policy(tiny_model(family), "packed")


@pytest.mark.parametrize("layout", ["concatenated", "separate"])
@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrent_or_hybrid_model_is_right_in_the_padded_layouts(tiny_model, family, layout):
    for name in BATCHES:
        assert_same(
            ours_of(tiny_model(family), layout, name), hugging_face(tiny_model(family), name)
        )


# Models that do something of their own, which their base model, head and attention function do not show.
ODD = {
    "nemotron": ("NemotronConfig", {}),
    "phimoe": ("PhimoeConfig", MOE),
    "modernbert-decoder": ("ModernBertDecoderConfig", dict(local_attention=2 * WINDOW)),
    "hyperclovax": ("HyperCLOVAXConfig", dict(logits_scaling=3.0)),
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        dict(logits_soft_cap=3.0, lru_width=32, attention_window_size=WINDOW),
    ),
    "falcon-h1": (
        "FalconH1Config",
        dict(
            lm_head_multiplier=0.5,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_ssm=64,
            mamba_d_state=8,
            mamba_n_groups=1,
        ),
    ),
}


@pytest.mark.parametrize("layout", ["packed", "concatenated"])
@pytest.mark.parametrize("family", ODD)
def test_a_model_is_either_right_or_refused_but_never_silently_wrong(
    tiny_model, monkeypatch, family, layout
):
    if not hasattr(transformers, ODD[family][0]):
        pytest.skip(f"{family} is not in transformers {transformers.__version__}")
    monkeypatch.setitem(FAMILIES, family, ODD[family])
    folder = tiny_model(family)
    try:
        result = ours_of(folder, layout, "five unequal pairs")
    except SystemExit as refusal:
        assert "--layout" in str(refusal)
    else:
        assert_same(result, hugging_face(folder, "five unequal pairs"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2", "mixtral", "mamba"])
@pytest.mark.parametrize("layout", ["concatenated", "separate"])
def test_what_the_padding_holds_never_matters(tiny_model, family, layout):
    pairs, policy = batch_of("five unequal pairs"), make_policy(tiny_model(family), layout)
    batches, noise = dpo.collate(pairs, layout), np.random.default_rng(2)
    for batch in batches:
        random = torch.from_numpy(noise.integers(0, VOCAB, batch["input_ids"].shape))
        assert not batch["real"].all() and batch["source"].max() < batch["input_ids"].numel()
        batch["input_ids"] = torch.where(batch["real"], batch["input_ids"], random)
    assert_same(
        ours(policy, batches, pairs), ours_of(tiny_model(family), layout, "five unequal pairs")
    )


def slow_kernel(query, key, value, ends, key_ends, longest, longest_key, scale=None, window_size=(-1, -1), enable_gqa=False,
                shift=0):
    """What torch.nn.attention.varlen computes on a GPU, from its documentation: rows stand one after another, and the last
    query of each is aligned with its last key (shift = 0)."""
    assert ends.dtype == key_ends.dtype == torch.int32 and ends[-1] == len(query) and key_ends[-1] == len(key) == len(value)
    assert longest == ends.diff().max() and longest_key == key_ends.diff().max()
    assert query.shape[2] % 8 == 0
    outputs, (back, ahead) = [], window_size
    for first, last, start, stop in zip(ends[:-1], ends[1:], key_ends[:-1], key_ends[1:]):
        q, k, v = query[first:last], key[start:stop], value[start:stop]
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        distance = torch.arange(len(q))[:, None] + (len(k) - len(q)) + shift - torch.arange(len(k))
        seen = (distance >= -ahead) & (distance <= (back if back >= 0 else len(k)))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[2] ** -0.5)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


OPERATORS = varlen._varlen_attn, varlen._varlen_attn_backward
kernels = []  # what is computed for PyTorch's operator on a CPU; nothing, as in reality, unless a test says so


@OPERATORS[0].register_kernel("cpu")
def forward_kernel(query, key, value, ends, key_ends, longest, longest_key, is_causal, scale, window, *_):
    if not kernels:
        raise NotImplementedError("none on a CPU")
    output = kernels[0](query, key, value, ends, key_ends, longest, longest_key, scale, tuple(window), True)
    return output, query.new_zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


@OPERATORS[1].register_kernel("cpu")
def backward_kernel(grad, query, key, value, output, lse, ends, key_ends, longest, longest_key, is_causal, rng, scale, window):
    def differentiate():
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        output = kernels[0](*leaves, ends, key_ends, longest, longest_key, scale, tuple(window), True)
        return torch.autograd.grad(output, leaves, grad)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # autograd is off within an operator, in its own thread
        return thread.submit(differentiate).result()


@pytest.fixture
def kernel(monkeypatch):
    """torch.nn.attention.varlen with its definition for the kernel that only a GPU has (tests/gpu_check.py): its checks, its
    shapes for the compiler, its gradient formula and its operator are the real ones. Gives the calls."""
    calls = []
    monkeypatch.setattr(sys.modules[__name__], "kernels", [lambda *inputs: calls.append(0) or slow_kernel(*inputs)])
    transformers.AttentionInterface.register("gathered", dpo.gathered_attention)  # not that of another script
    return calls


def fused_policy(kernel, *inputs, **flags):
    """A new packed policy, which has found the kernel by itself."""
    policy = make_policy.__wrapped__(inputs[0], "packed", *inputs[1:], **flags)
    assert policy.fused and len(kernel) == 6  # forward and backward, with three windows
    kernel.clear()
    return policy


@pytest.mark.parametrize("family", ATTENTION)
def test_a_kernel_for_rows_of_unequal_length_is_given_the_rows_that_a_packed_one_stands_for(tiny_model, family, kernel):
    policy = fused_policy(kernel, tiny_model(family))
    for name in BATCHES:
        result = ours(policy, dpo.collate(batch_of(name), "packed"), batch_of(name))
        assert_same(result, hugging_face(tiny_model(family), name))
    layers = policy.model.config.get_text_config().num_hidden_layers
    assert len(kernel) == (0 if family in ("gemma2", "gpt-oss") else 2 * layers * len(BATCHES))  # soft-caps and sinks


def test_that_kernel_is_taken_where_it_is_there_and_right(monkeypatch):
    cpu = torch.device("cpu"), torch.float32
    assert not dpo.varlen_agrees(*cpu)  # there is none for a CPU

    def no_window(*args):
        return slow_kernel(*args[:8], (-1, 0))

    def wide_window(*args):
        return slow_kernel(*args[:8], (args[8][0] + (args[8][0] > 0), 0))

    def wrong_gradient(query, key, value, *args):
        return slow_kernel(query, key, value.detach() + (value - value.detach()) / 2, *args)

    def another_interface(*args):
        raise TypeError("other arguments")
    for kernel, right in [(slow_kernel, True), (functools.partial(slow_kernel, shift=1), False), (no_window, False),
                          (wide_window, False), (wrong_gradient, False), (another_interface, False)]:
        monkeypatch.setattr(sys.modules[__name__], "kernels", [kernel])
        assert dpo.varlen_agrees(*cpu) == right, kernel


def test_the_choice_of_a_kernel_draws_no_random_number():
    before = torch.get_rng_state()
    dpo.varlen_agrees(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_packed_row_holds_every_prompt_and_every_response_once():
    pairs = batch_of("five unequal pairs")
    (batch,) = dpo.collate(pairs, "packed")
    assert batch["input_ids"].shape == (
        1,
        sum(len(p["prompt"] + p["chosen"] + p["rejected"]) for p in pairs),
    )
    texts = [p["prompt"] + p[side] for side in ("chosen", "rejected") for p in pairs]
    rows = batch["pack"]["keys"].split(batch["pack"]["counts"][:, 1].tolist())
    for row, text in zip(rows, texts, strict=True):
        assert batch["input_ids"][0, row].tolist() == text
        assert batch["position_ids"][0, row].tolist() == list(range(len(text)))
    new = [row[-count:] for row, (count, _) in zip(rows, batch["pack"]["counts"])]
    assert torch.cat(new).tolist() == list(range(batch["input_ids"].numel()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_targets_are_the_response_tokens_in_order_and_nothing_else(layout):
    pairs = batch_of("five unequal pairs")
    for i, batch in enumerate(dpo.collate(pairs, layout)):
        sides = ["chosen", "rejected"] if layout != "separate" else [["chosen"], ["rejected"]][i]
        wanted = [pair[side] for side in sides for pair in pairs]
        assert [part.tolist() for part in batch["targets"].split(batch["sizes"])] == wanted
        before = [
            (pair["prompt"] + pair[side])[len(pair["prompt"]) - 1 : -1]
            for side in sides
            for pair in pairs
        ]
        assert batch["input_ids"].flatten()[batch["source"]].tolist() == sum(before, [])


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_chunks_of_the_output_head_change_nothing(tiny_model, chunk):
    pairs, policy = batch_of("five unequal pairs"), make_policy(tiny_model("gemma2"), "packed")
    logps, _ = policy(dpo.collate(pairs, "packed"), chunk=chunk)
    (logps * coefficients(pairs).float()).sum().backward()
    assert_same(
        (logps.detach().double(), gradients(policy)),
        hugging_face(tiny_model("gemma2"), "five unequal pairs"),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how, family", [
    *(("full", family) for family in ("llama", "gemma2", "gemma3", "mistral", "mixtral", "gpt2", "gpt-oss")),
    *(("selective", family) for family in ("llama", "gemma2", "mixtral"))])
def test_activation_checkpointing_changes_no_gradient(tiny_model, family, layout, how):
    pairs, policy = (
        batch_of("five unequal pairs"),
        make_policy(tiny_model(family), layout, checkpointing=how),
    )
    assert policy.model.is_gradient_checkpointing
    result = ours(policy, dpo.collate(pairs, layout), pairs)
    assert_same(result, ours_of(tiny_model(family), layout, "five unequal pairs"))


def test_selective_checkpointing_computes_no_matrix_product_twice(tiny_model):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[func] = counts.get(func, 0) + 1
            return func(*args, **(kwargs or {}))

    made, pairs = {}, batch_of("five unequal pairs")
    for how in ("off", "selective", "full"):
        policy, counts = make_policy(tiny_model("llama"), "packed", how), {}
        policy(dpo.collate(pairs, "packed"))  # FSDP's first call
        with Count():
            policy(dpo.collate(pairs, "packed"))[0].sum().backward()
        made[how] = counts
    aten = torch.ops.aten
    cheap, dear = aten.silu.default, [aten.mm.default, aten._scaled_dot_product_flash_attention_for_cpu.default]
    for op in dear:
        assert 0 < made["off"][op] == made["selective"][op] < made["full"][op]
    assert 0 < made["off"][cheap] < made["selective"][cheap] == made["full"][cheap]


@pytest.mark.parametrize("how, calls", [("off", 2), ("selective", 2), ("full", 3)])
def test_selective_checkpointing_keeps_what_the_kernel_for_rows_made(tiny_model, kernel, how, calls):
    policy = fused_policy(kernel, tiny_model("llama"), how)
    policy(dpo.collate(batch_of("five unequal pairs"), "packed"))[0].sum().backward()
    assert len(kernel) == calls * policy.model.config.num_hidden_layers  # forward, backward, and again


def saved_bytes(policy):
    """What autograd keeps for the backward pass, of a batch, after a first call."""
    seen, batches = {}, dpo.collate(batch_of("five unequal pairs"), "packed")
    policy(batches)[0].sum().backward()

    def keep(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(batches)[0].sum().backward()
    policy.zero_grad()
    return sum(seen.values())


@pytest.mark.slow
def test_checkpointing_saves_as_much_when_blocks_are_compiled(tiny_model, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    folder = tiny_model("llama")
    plain = {how: saved_bytes(make_policy(folder, "packed", how)) for how in ("off", "full")}
    assert plain["full"] < 0.3 * plain["off"]
    assert saved_bytes(make_policy(folder, "packed", "full", compiled=True)) < 1.1 * plain["full"]
    assert saved_bytes(make_policy(folder, "packed", "off", compiled=True)) > 0.7 * plain["off"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
def test_compiled_blocks_are_one_graph_for_all_shapes(tiny_model, checkpointing, kernel, monkeypatch):
    """No graph break, and no recompilation for another number of pairs or tokens, where there is a kernel for all rows."""
    from torch._dynamo.utils import counters
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    folder = tiny_model("llama")
    policy = fused_policy(kernel, folder, checkpointing, compiled=True)
    torch._dynamo.reset()
    counters.clear()
    for name in ("five unequal pairs", "one long pair"):
        result = ours(policy, dpo.collate(batch_of(name), "packed"), batch_of(name))
        assert_same(result, ours_of(folder, "packed", name))
    random = [random_pairs([(5 + i, 9, 7 + j) for j in range(2, 5 + i)]) for i in range(4)]
    for pairs in random:
        policy(dpo.collate(pairs, "packed"))[0].sum().backward()
    inside = hasattr(policy.model, "activation_checkpointing_enable")  # since transformers 5.22; before, FSDP's hooks are in it too
    graphs = 1 if inside or checkpointing == "off" else 2  # and the second computation is another graph
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


@pytest.mark.slow
def test_compiled_blocks_are_compiled_once_where_attention_goes_row_by_row(tiny_model, monkeypatch):
    from torch._dynamo.utils import counters
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    policy, graphs = make_policy(tiny_model("llama"), "packed", compiled=True), []
    torch._dynamo.reset()
    counters.clear()
    for i in range(4):
        policy(dpo.collate(random_pairs([(5 + i, 9, 7 + j) for j in range(2, 5 + i)]), "packed"))[0].sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 4


@pytest.mark.slow
def test_compiled_blocks_change_no_gradient(tiny_model):
    folder = tiny_model("llama", num_hidden_layers=1)
    policy = make_policy(folder, "packed", compiled=True)
    for name in ("five unequal pairs", "one long pair"):  # two shapes
        result = ours(policy, dpo.collate(batch_of(name), "packed"), batch_of(name))
        assert_same(result, ours_of(folder, "packed", name))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_lora_starts_as_the_base_model_and_trains_its_adapters_only(tiny_model, family, layout):
    pytest.importorskip("peft")
    policy, pairs = (
        make_policy(tiny_model(family), layout, lora_rank=2),
        batch_of("five unequal pairs"),
    )
    logps, _ = policy(dpo.collate(pairs, layout))
    logps.square().sum().backward()
    truth = hugging_face(tiny_model(family), "five unequal pairs")[0]
    assert ((logps.detach() - truth) / truth).abs().max() < LOGPS
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for name, weight in policy.named_parameters():
        assert (weight.grad is not None) == (name in trained), name
        if "lora_B" in name:  # A has gradient 0 while B is 0
            assert weight.grad.full_tensor().norm() > 0, name
    policy.zero_grad()


def test_train_modules_trains_what_it_finds_and_with_the_same_gradient(tiny_model):
    policy, name = make_policy(tiny_model("llama"), "packed", train_modules=r"layers\.1\..*(down|norm)"), "five unequal pairs"
    policy(dpo.collate(batch_of(name), "packed"))
    pairs, truth = batch_of(name), ours_of(tiny_model("llama"), "packed", name)
    logps, _ = policy(dpo.collate(pairs, "packed"))
    (logps * coefficients(pairs).to(logps)).sum().backward()
    found = {key.removeprefix("model."): weight.grad for key, weight in policy.named_parameters() if weight.grad is not None}
    assert len(found) == 3 and all("layers.1." in key for key in found)
    for key, grad in found.items():
        assert torch.equal(grad.full_tensor().double(), truth[1][key]), key
    policy.zero_grad()


@functools.cache
def router_logits(folder, pieces):
    """Router logits of Hugging Face's own forward, as one tensor per layer over the tokens that `pieces`
    name: (ids of a sequence, how many of its last tokens count)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    layers = []
    for ids, count in pieces:
        output = model(input_ids=torch.tensor([ids]), output_router_logits=True, use_cache=False)
        layers.append(
            [logits.reshape(-1, logits.shape[-1])[-count:] for logits in output.router_logits]
        )
    return model, [torch.cat(parts) for parts in zip(*layers)]


def own_router_loss(folder, pieces):
    model, logits = router_logits(folder, tuple((tuple(ids), count) for ids, count in pieces))
    balance = sys.modules[type(model).__module__].load_balancing_loss_func
    return balance(tuple(logits), 4, 2).item()


@pytest.mark.parametrize("family", EXPERTS)
def test_the_router_loss_is_hugging_faces_own_on_the_same_tokens(tiny_model, family):
    pairs, folder = batch_of("five unequal pairs"), tiny_model(family)
    whole = {
        side: [(p["prompt"] + p[side], len(p["prompt"] + p[side])) for p in pairs]
        for side in ("chosen", "rejected")
    }
    each_once = whole["chosen"] + [(p["prompt"] + p["rejected"], len(p["rejected"])) for p in pairs]
    truth = {
        "packed": own_router_loss(folder, each_once),
        "concatenated": own_router_loss(folder, whole["chosen"] + whole["rejected"]),
        "separate": np.mean([own_router_loss(folder, whole[side]) for side in whole]),
    }
    for layout in LAYOUTS:
        _, loss = make_policy(folder, layout)(dpo.collate(pairs, layout), router=True)
        assert loss.item() == pytest.approx(truth[layout], rel=1e-5), layout


@pytest.mark.parametrize("family", EXPERTS)
def test_the_router_loss_of_padded_rows_is_the_aux_loss_that_hugging_face_returns(
    tiny_model, family
):
    pairs, folder = batch_of("five unequal pairs"), tiny_model(family)
    (batch,) = dpo.collate(pairs, "concatenated")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    output = model(
        input_ids=batch["input_ids"], attention_mask=batch["real"].long(), output_router_logits=True
    )
    _, loss = make_policy(folder, "concatenated")([batch], router=True)
    assert loss.item() == pytest.approx(output.aux_loss.item(), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_the_router_loss_reaches_the_routers_and_leaves_the_log_probs_alone(
    tiny_model, layout, checkpointing
):
    pairs, policy = (
        batch_of("five unequal pairs"),
        make_policy(tiny_model("mixtral"), layout, checkpointing),
    )
    logps, loss = policy(dpo.collate(pairs, layout), router=True)
    (loss + 0 * logps.sum()).backward()
    routers = {name: grad for name, grad in gradients(policy).items() if "gate.weight" in name}
    assert routers and all(grad.norm() > 0 for grad in routers.values())
    truth = hugging_face(tiny_model("mixtral"), "five unequal pairs")[0]
    assert ((logps.detach() - truth) / truth).abs().max() < LOGPS


@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_dropout_is_off_with_and_without_checkpointing(tiny_model, checkpointing):
    folder = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    policy, pairs = make_policy(folder, "packed", checkpointing), batch_of("five unequal pairs")
    logps, _ = policy(dpo.collate(pairs, "packed"))
    truth = hugging_face(folder, "five unequal pairs")[0]
    assert ((logps.detach() - truth) / truth).abs().max() < LOGPS


@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_checkpointing_computes_every_block_twice(tiny_model, checkpointing):
    policy, calls = make_policy(tiny_model("llama"), "packed", checkpointing), []
    for layer in policy.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    policy(dpo.collate(batch_of("five unequal pairs"), "packed"))[0].sum().backward()
    assert len(calls) == len(policy.model.model.layers) * (2 if checkpointing == "full" else 1)


def test_the_root_has_no_weight_left_on_the_meta_device(tiny_model):
    for family in ATTENTION:
        policy = make_policy(tiny_model(family), "packed")
        left = [
            name
            for name, tensor in [*policy.named_parameters(), *policy.named_buffers()]
            if tensor.is_meta
        ]
        assert left == [], family
