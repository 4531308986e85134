"""Claim: packed, concatenated and separate compute one and the same log pi(y|x), and its gradient.

Truth is the model's own forward of Hugging Face: one sequence at a time, no padding, all logits, in
float64 (and once in float32, to see that we lose nothing to its own rounding). Log-probs agree to
1e-5 relative, the gradient of each parameter to 1e-4 of its norm, for attention models with every
peculiarity that the gathering of tokens could break: sliding windows, soft-caps, sinks, grouped
heads, learned positions, tied heads, scaled logits, experts. The rows contain prompts and responses
of one token, very different lengths, the padding's id as a real token, and sequences longer than
the window.

Also: recurrent models are refused where they would be wrong, and right elsewhere; what stands in
the padding never matters; the packed row and the tables of its attention are what their docstrings
draw; activation checkpointing, torch.compile, LoRA, FSDP's units and the chunks of the output head
change nothing that they should not.
"""

import functools
import re

import numpy as np
import pytest
import torch
import transformers
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

import cache_ref
import dpo
from conftest import ATTENTION, FAMILIES, MIXED, MOE, RECURRENT, VOCAB, WINDOW, random_pairs
from conftest import split_of, tiny_args, tiny_config, tiny_policy

LAYOUTS = ["packed", "concatenated", "separate"]
FIVE = "five unequal pairs"
BATCHES = {  # (prompt, chosen, rejected) lengths
    "one short pair": [(1, 1, 1)],
    "one long pair": [(13, 3, 20)],
    FIVE: [(1, 1, 4), (7, 9, 1), (23, 5, 17), (2, 30, 2), (12, 3, 11)],
}
LOGPS, GRADIENT = 1e-5, 1e-4  # relative to the value; to the norm of the parameter's gradient

pytestmark = pytest.mark.usefixtures("process_group")


def batch_of(name):
    return random_pairs(BATCHES[name], seed=len(name))


def texts_of(pairs, sides=("chosen", "rejected")):
    """The token ids of all texts, those of the first side first."""
    return [pair["prompt"] + pair[side] for side in sides for pair in pairs]


def coefficients(pairs):
    """(2, n) weights of the sum whose gradient is compared: chosen up, rejected down on average."""
    noise = np.random.default_rng(1).normal(size=(2, len(pairs))) / 4
    return torch.from_numpy(noise + [[1.0], [-1.0]])


@functools.cache
def make_policy(folder, layout, checkpointing="off", **changes):
    return tiny_policy(dpo, folder, layout, checkpointing, **changes)


def gradients(module):
    """{parameter: float64 gradient}, 0 where the sum does not depend on it. Clears them."""
    found = {}
    for name, weight in module.named_parameters():
        grad = torch.zeros(weight.shape) if weight.grad is None else weight.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        name = name.removeprefix("model.") if isinstance(module, dpo.Policy) else name
        found[name] = grad.double()
    module.zero_grad()
    return found


def ours(policy, batches, pairs):
    """Log-probs (2, n) and gradients from batches that collate made."""
    logps = policy(batches)
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

    A gradient that is 0 in theory (of queries that see one key) is rounding, 1e-7 of the whole
    gradient, so norms below 1e-2 of the whole gradient's count as that much."""
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


# ---- the three layouts, and Hugging Face ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ATTENTION)
def test_every_layout_gives_the_log_probs_and_gradients_of_hugging_faces_own_forward(
    tiny_model, family, layout
):
    for name in BATCHES:
        truth = hugging_face(tiny_model(family), name)
        assert_same(ours_of(tiny_model(family), layout, name), truth)


@pytest.mark.parametrize("family", ATTENTION)
def test_the_three_layouts_agree_with_each_other(tiny_model, family):
    for name in BATCHES:
        packed, *others = [ours_of(tiny_model(family), layout, name) for layout in LAYOUTS]
        for other in others:
            assert_same(packed, other)


@pytest.mark.parametrize("family", ATTENTION)
def test_hugging_face_in_float32_is_as_close_to_the_truth_as_we_are(tiny_model, family):
    truth = hugging_face(tiny_model(family), FIVE)
    assert_same(hugging_face(tiny_model(family), FIVE, torch.float32), truth)


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
    folder = tiny_model(family)
    truth, other = hugging_face(folder, FIVE), hugging_face(folder, FIVE, **without)
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
        truth = hugging_face(tiny_model(family), name)
        assert_same(ours_of(tiny_model(family), layout, name), truth)


# Models that do something of their own, which their base model, head and attention function do not
# show.
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
    """cache_ref.py and simpo.py compare ours with its own forward pass before they start; what
    cache_ref.py stored is what the other scripts are compared with."""
    if not hasattr(transformers, ODD[family][0]):
        pytest.skip(f"{family} is not in transformers {transformers.__version__}")
    monkeypatch.setitem(FAMILIES, family, ODD[family])
    folder = tiny_model(family)
    try:
        args, split = tiny_args(folder, layout=layout), split_of(batch_of(FIVE))
        cache_ref.check_forward(make_policy(folder, layout), split, torch.float32, args)
        result = ours_of(folder, layout, FIVE)
    except SystemExit as refusal:
        assert "--layout" in str(refusal)
    else:
        assert_same(result, hugging_face(folder, FIVE))


@pytest.fixture(scope="module")
def with_images(tmp_path_factory):
    """The folder of a Gemma 3 that has an image encoder as well, as those from 4B have."""
    if not hasattr(transformers, "Gemma3Config"):
        pytest.skip(f"Gemma 3 is not in transformers {transformers.__version__}")
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Gemma3Config(
        text_config=tiny_config("gemma3").to_dict(),
        vision_config=vision | dict(image_size=16, patch_size=4),
        mm_tokens_per_image=4,
        image_token_index=VOCAB,  # no token of the text
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            scale = 0.3 if "embed" in name else 1.5 / weight.shape[-1] ** 0.5
            torch.nn.init.normal_(weight, std=scale)
    folder = tmp_path_factory.mktemp("with-images")
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_that_could_read_images_is_right_on_text(with_images, layout):
    for name in BATCHES:
        assert_same(ours_of(with_images, layout, name), hugging_face(with_images, name))


# ---- collate: padded rows ----


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2", "mixtral", "mamba"])
@pytest.mark.parametrize("layout", ["concatenated", "separate"])
def test_what_the_padding_holds_never_matters(tiny_model, family, layout):
    pairs, policy = batch_of(FIVE), make_policy(tiny_model(family), layout)
    batches, noise = dpo.collate(pairs, layout), np.random.default_rng(2)
    texts = texts_of(pairs)
    for batch in batches:
        ids = batch["inputs"]["input_ids"]
        assert any(len(texts[row]) < ids.shape[1] for row in range(len(ids)))
        for row in ids:
            padding = row[len(texts.pop(0)) :]
            padding.copy_(torch.from_numpy(noise.integers(0, VOCAB, len(padding))))
    assert texts == []
    assert_same(ours(policy, batches, pairs), ours_of(tiny_model(family), layout, FIVE))


@pytest.mark.parametrize("layout", ["concatenated", "separate"])
def test_a_padded_row_holds_one_text_with_zeros_on_its_right(layout):
    pairs = batch_of(FIVE)
    rows = [row for batch in dpo.collate(pairs, layout) for row in batch["inputs"]["input_ids"]]
    for row, text in zip(rows, texts_of(pairs), strict=True):
        assert row.tolist() == text + [0] * (len(row) - len(text))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_targets_are_the_response_tokens_in_order_and_nothing_else(layout):
    pairs = batch_of(FIVE)
    for i, batch in enumerate(dpo.collate(pairs, layout)):
        sides = ["chosen", "rejected"] if layout != "separate" else [["chosen"], ["rejected"]][i]
        wanted = [pair[side] for side in sides for pair in pairs]
        assert [part.tolist() for part in batch["targets"].split(batch["sizes"])] == wanted
        before = []  # the token before each target
        for text, response in zip(texts_of(pairs, sides), wanted):
            before += text[-len(response) - 1 : -1]
        assert batch["inputs"]["input_ids"].flatten()[batch["source"]].tolist() == before


# ---- collate: the packed row, and the tables of its attention ----


def packed(pairs):
    """What collate makes of them: ids and positions (L,), tables, cells (2, L)."""
    (batch,) = dpo.collate(pairs, "packed")
    inputs = batch["inputs"]
    texts = inputs["texts"]
    cells = texts.tokens.split([shape.numel() for shape in texts.shapes])
    tables = [part.view(shape) for part, shape in zip(cells, texts.shapes)]
    return inputs["input_ids"][0], inputs["position_ids"][0], tables, texts.cells


def text_rows(tables):
    """The rows of all tables without their padding. A text has two tokens or more, so that its last
    place is not 0, which is the padding."""
    return [row[: row.nonzero().max() + 1] for table in tables for row in table]


def random_batches():
    rng = np.random.default_rng(3)
    for _ in range(50):
        sizes = np.ceil(rng.exponential(rng.choice([1, 5, 50]), (rng.integers(1, 12), 3)))
        yield random_pairs(sizes.astype(int).tolist())


def test_a_packed_row_holds_every_prompt_and_every_response_once():
    pairs = batch_of(FIVE)
    ids, *_ = packed(pairs)
    once = [pair["prompt"] + pair["chosen"] for pair in pairs]
    once += [pair["rejected"] for pair in pairs]
    assert ids.tolist() == sum(once, [])


def test_every_text_is_a_row_of_one_table_with_its_tokens_and_positions_in_order():
    for pairs in random_batches():
        ids, positions, tables, _ = packed(pairs)
        rows = text_rows(tables)
        for row in rows:
            assert positions[row].tolist() == list(range(len(row)))
        held = [ids[row].tolist() for row in rows]
        assert sorted(held) == sorted(texts_of(pairs))
        assert sum(map(len, rows)) == sum(map(len, texts_of(pairs)))  # the rest is zeros


def test_a_table_holds_texts_of_at_least_0_8_of_its_longest_and_the_next_one_shorter_texts():
    for pairs in random_batches():
        tables = packed(pairs)[2]
        for table in tables:
            lengths = [len(row) for row in text_rows([table])]
            assert max(lengths) == table.shape[1] and min(lengths) >= 0.8 * table.shape[1]
        for table, following in zip(tables, tables[1:]):
            assert following.shape[1] < 0.8 * table.shape[1]


def test_back_leads_every_place_of_the_packed_row_to_the_cells_that_hold_it():
    for pairs in random_batches():
        ids, positions, tables, back = packed(pairs)
        cells, columns, real = [], [], []
        for table in tables:
            cells += table.flatten().tolist()
            columns += list(range(table.shape[1])) * len(table)
            for row in text_rows([table]):
                real += [True] * len(row) + [False] * (table.shape[1] - len(row))
        for first, other in [(back[0], back[0]), back[:, back[1] >= 0]]:
            assert [cells[cell] for cell in first] == [cells[cell] for cell in other]
            assert [columns[cell] for cell in first] == [columns[cell] for cell in other]
            assert all(real[cell] for cell in other)  # and not the padding, which has place 0 as well
        assert [cells[cell] for cell in back[0]] == list(range(len(ids)))
        assert [columns[cell] for cell in back[0]] == positions.tolist()
        assert (back >= 0).sum() == sum(real)


# The pairs that are drawn in the docstrings of pack and attention_tables. A token is its letter.
DRAWN = [
    dict(prompt="pp", chosen="ccc", rejected="rr"),
    dict(prompt="P", chosen="CCC", rejected="RRR"),
]
DRAWN = [{side: list(map(ord, text)) for side, text in pair.items()} for pair in DRAWN]


def numbers(text):
    return list(map(int, text.split()))


def test_the_docstring_of_pack_draws_what_pack_gives():
    ids, positions, tables, _ = packed(DRAWN)
    drawing = {}
    for name in ("place", "input_ids", "position_ids"):
        drawing[name] = re.search(rf"^ +{name} +(.*)", dpo.pack.__doc__, re.MULTILINE)[1].split()
    assert numbers(" ".join(drawing["place"])) == list(range(len(ids)))
    assert drawing["input_ids"] == [chr(token) for token in ids]
    assert numbers(" ".join(drawing["position_ids"])) == positions.tolist()
    first = re.search(r"the places\s+([\d ]+) and ([\d ]+)\.", dpo.pack.__doc__)
    rows = [row.tolist() for row in text_rows(tables)]
    for places in first.groups():
        assert numbers(places) in rows
        letters = {chr(ids[place]) for place in numbers(places)}
        assert letters in ({"p", "c"}, {"p", "r"})  # the texts of the first pair


def test_the_docstring_of_attention_tables_draws_what_it_gives():
    lines = dpo.attention_tables.__doc__.splitlines()
    drawn = [re.fullmatch(r" {8}((?:\d+ +){4}\d+)(?: {4}\S.*)?", line) for line in lines]
    _, _, tables, cells = packed(DRAWN)
    assert len(tables) == 1
    assert [numbers(match[1]) for match in drawn if match] == tables[0].tolist()
    (found,) = [line.split(",") for line in lines if re.fullmatch(r"[-\d ]+,[-\d ]+", line)]
    assert [numbers(half) for half in found] == cells.tolist()


@pytest.mark.parametrize("name", BATCHES)
def test_the_gradients_of_the_gathers_are_those_of_autograd(name):
    texts = dpo.collate(batch_of(name), "packed")[0]["inputs"]["texts"]
    rows = torch.randn(texts.cells.shape[1], 2, 3, dtype=torch.float64, requires_grad=True)
    cells = torch.randn(len(texts.tokens), 2, 3, dtype=torch.float64, requires_grad=True)
    stands = texts.cells[texts.cells >= 0].tolist()
    padding = sorted({*range(len(cells))} - {*stands})
    assert len(stands) == len({*stands}) and (texts.tokens[padding] == 0).all()
    into, out = torch.randn_like(cells), torch.randn_like(rows)  # the gradients that come from attention, and go to it
    into[padding] = 0  # no token sees padding
    ours = torch.autograd.grad(dpo.Gather.apply(rows, texts.tokens, texts.cells), rows, into)
    assert torch.equal(ours[0], torch.autograd.grad(rows[texts.tokens], rows, into)[0])
    ours = torch.autograd.grad(dpo.Gather.apply(cells, texts.cells[0], texts.takers), cells, out)
    assert torch.equal(ours[0], torch.autograd.grad(cells[texts.cells[0]], cells, out)[0])


def test_attention_scatters_no_gradients(tiny_model):
    policy = make_policy(tiny_model("llama"), "packed")
    logps = policy(dpo.collate(batch_of(FIVE), "packed"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        logps.sum().backward()
    scattered = [event.name for event in found.events() if re.search("index_add|index_put", event.name)]
    assert scattered == ["aten::index_add_"]  # the gradient of the tokens that predict responses


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "mixtral"])
def test_attention_is_one_call_per_table_and_layer(tiny_model, monkeypatch, family):
    policy, shapes = make_policy(tiny_model(family), "packed"), []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counted(query, *args, **kwargs):
        shapes.append((query.shape[0], query.shape[2]))  # texts, tokens of the longest
        return kernel(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    for name in BATCHES:
        shapes.clear()
        with torch.no_grad():
            policy(dpo.collate(batch_of(name), "packed"))
        tables = packed(batch_of(name))[2]
        layers = policy.model.config.num_hidden_layers
        assert shapes == layers * [tuple(table.shape) for table in tables]
    assert len(tables) > 2  # the last batch needs several


# ---- the output head ----


def set_chunk(monkeypatch, policy, size):
    """Let Policy compute the logits of `size` tokens at a time, by telling it of a vocabulary with
    which that many are 256 MiB."""
    config = policy.model.config
    monkeypatch.setattr(config, "vocab_size", -(-(2**26) // size))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_size_of_the_output_heads_chunks_gives_the_same_numbers(
    tiny_model, monkeypatch, layout
):
    pairs, policy = batch_of(FIVE), make_policy(tiny_model("gemma2"), layout)
    for size in [*range(1, 14), 35, 47, 48, 82, 83, 1000]:  # 48 chosen tokens, 35 rejected
        set_chunk(monkeypatch, policy, size)
        result = ours(policy, dpo.collate(pairs, layout), pairs)
        assert_same(result, hugging_face(tiny_model("gemma2"), FIVE))


@pytest.mark.parametrize("size, calls", [(1000, 1), (83, 1), (82, 3), (42, 3), (28, 5), (1, 165)])
def test_the_last_chunk_of_the_output_head_is_not_computed_twice(
    tiny_model, monkeypatch, size, calls
):
    """83 response tokens: so many chunks in the forward pass, one fewer again in the backward."""
    policy, seen = make_policy(tiny_model("llama"), "packed"), []
    set_chunk(monkeypatch, policy, size)
    hook = policy.model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    policy(dpo.collate(batch_of(FIVE), "packed")).sum().backward()
    hook.remove()
    policy.zero_grad()
    assert len(seen) == calls


def test_no_more_logits_exist_at_once_than_256_mib_and_one_token(tiny_model):
    policy, seen = make_policy(tiny_model("llama"), "packed"), []
    tokens = 2**27 // VOCAB  # of which the logits would be 512 MiB
    (batch,) = dpo.collate(batch_of("one short pair"), "packed")
    batch["source"] = batch["source"][:1].expand(tokens)
    batch["targets"] = batch["targets"][:1].expand(tokens)
    batch["sizes"] = [tokens - 1, 1]
    count = lambda module, inputs, logits: seen.append(logits.numel())  # float32
    hook = policy.model.lm_head.register_forward_hook(count)
    with torch.no_grad():
        policy([batch])
    hook.remove()
    assert len(seen) == 2 and max(seen) < 2**26 + VOCAB


def test_what_policy_returns_is_no_view_of_another_tensor(tiny_model):
    """Of a view FSDP says on every rank's stderr that its hooks might be lost."""
    logps = make_policy(tiny_model("llama"), "packed")(dpo.collate(batch_of(FIVE), "packed"))
    assert not logps._is_view()


# ---- activation checkpointing ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how, family", [
    *(("full", family)
      for family in ("llama", "gemma2", "gemma3", "mistral", "mixtral", "gpt2", "gpt-oss")),
    *(("selective", family) for family in ("llama", "gemma2", "mixtral"))])
def test_activation_checkpointing_changes_no_gradient(tiny_model, family, layout, how):
    pairs, policy = batch_of(FIVE), make_policy(tiny_model(family), layout, checkpointing=how)
    result = ours(policy, dpo.collate(pairs, layout), pairs)
    assert_same(result, ours_of(tiny_model(family), layout, FIVE))


class Count(TorchDispatchMode):
    """Counts the operators that are computed, the backward pass included."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] = self.calls.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


def count_operators(folder, layout, how):
    policy, pairs = make_policy(folder, layout, how), batch_of(FIVE)
    policy(dpo.collate(pairs, layout))  # FSDP's first call
    with Count() as count:
        policy(dpo.collate(pairs, layout)).sum().backward()
    policy.zero_grad()
    return count.calls


def test_selective_checkpointing_computes_no_matrix_product_and_no_attention_twice(tiny_model):
    off, selective, full = [
        count_operators(tiny_model("llama"), "packed", how) for how in ("off", "selective", "full")
    ]
    aten = torch.ops.aten
    for op in (aten.mm.default, aten._scaled_dot_product_flash_attention_for_cpu.default):
        assert 0 < off[op] == selective[op] < full[op]
    assert 0 < off[aten.silu.default] < selective[aten.silu.default] == full[aten.silu.default]


# Gemma 3n changes the output of a batched matrix product in place. Its last two layers take the
# keys and values of the first two, as in the models that are published.
GEMMA_3N = dict(
    vocab_size_per_layer_input=VOCAB,
    hidden_size_per_layer_input=8,
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    laurel_rank=4,
    sliding_window=WINDOW,
    layer_types=2 * MIXED,
    activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0],
    tie_word_embeddings=True,
    final_logit_softcapping=3.0,
)


@pytest.fixture
def gemma3n(tiny_model, monkeypatch):
    if not hasattr(transformers, "Gemma3nTextConfig"):
        pytest.skip(f"Gemma 3n is not in transformers {transformers.__version__}")
    monkeypatch.setitem(FAMILIES, "gemma3n", ("Gemma3nTextConfig", GEMMA_3N))
    return tiny_model("gemma3n")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["off", "selective", "full"])
def test_checkpointing_changes_no_gradient_of_a_model_that_changes_a_product_in_place(
    gemma3n, layout, how
):
    pairs, policy = batch_of(FIVE), make_policy(gemma3n, layout, checkpointing=how)
    result = ours(policy, dpo.collate(pairs, layout), pairs)
    assert_same(result, hugging_face(gemma3n, FIVE))
    assert_same(result, ours_of(gemma3n, layout, FIVE))


def test_selective_checkpointing_keeps_no_output_of_a_batched_product(gemma3n):
    off, selective, full = [
        count_operators(gemma3n, "packed", how) for how in ("off", "selective", "full")
    ]
    bmm = torch.ops.aten.bmm.default
    assert 0 < off[bmm] < selective[bmm] == full[bmm]


def saved_bytes(policy):
    """What autograd keeps for the backward pass, of a batch, after a first call."""
    seen, batches = {}, dpo.collate(batch_of(FIVE), "packed")
    policy(batches).sum().backward()

    def keep(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(batches).sum().backward()
    policy.zero_grad()
    return sum(seen.values())


@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
def test_dropout_is_off_with_and_without_checkpointing(tiny_model, checkpointing):
    folder = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    policy, pairs = make_policy(folder, "packed", checkpointing), batch_of(FIVE)
    logps = policy(dpo.collate(pairs, "packed"))
    truth = hugging_face(folder, FIVE)[0]
    assert ((logps.detach() - truth) / truth).abs().max() < LOGPS


@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
def test_checkpointing_computes_every_block_twice(tiny_model, checkpointing):
    policy, calls = make_policy(tiny_model("llama"), "packed", checkpointing), []
    layers = policy.model.model.layers
    hooks = [layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in layers]
    policy(dpo.collate(batch_of(FIVE), "packed")).sum().backward()
    policy.zero_grad()
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(layers) * (1 if checkpointing == "off" else 2)


# ---- torch.compile ----


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile without the C++ compiler; gives the counters of its front end, all at 0."""
    from torch._dynamo.utils import counters

    backend = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", backend)
    torch._dynamo.reset()
    counters.clear()
    return counters


@pytest.mark.slow
def test_checkpointing_saves_as_much_when_blocks_are_compiled(tiny_model, compiler):
    folder = tiny_model("llama")
    plain = {how: saved_bytes(make_policy(folder, "packed", how)) for how in ("off", "full")}
    assert plain["full"] < 0.3 * plain["off"]
    full, off = [
        saved_bytes(tiny_policy(dpo, folder, "packed", how, compile=True))
        for how in ("full", "off")
    ]
    assert full < 1.1 * plain["full"]
    assert off > 0.7 * plain["off"]


@pytest.mark.slow
@pytest.mark.parametrize("layout, checkpointing", [
    ("packed", "off"), ("packed", "selective"), ("packed", "full"), ("concatenated", "off")])
def test_compiled_blocks_are_not_compiled_again_for_other_shapes(
    tiny_model, compiler, layout, checkpointing
):
    """Another number of pairs, of tokens or of tables is no reason to, after the first batch."""
    folder = tiny_model("llama")
    policy, graphs = tiny_policy(dpo, folder, layout, checkpointing, compile=True), []
    for name in (FIVE, "one long pair"):
        result = ours(policy, dpo.collate(batch_of(name), layout), batch_of(name))
        assert_same(result, ours_of(folder, layout, name))
    for i in range(4):
        pairs = random_pairs([(5 + i, 9, 7 + j) for j in range(2, 5 + i)])
        policy(dpo.collate(pairs, layout)).sum().backward()
        graphs.append(compiler["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs == [graphs[0]] * 4


@pytest.mark.slow
def test_compiled_blocks_change_no_gradient(tiny_model):
    folder = tiny_model("llama", num_hidden_layers=1)
    policy = make_policy(folder, "packed", compile=True)
    for name in (FIVE, "one long pair"):  # two shapes
        result = ours(policy, dpo.collate(batch_of(name), "packed"), batch_of(name))
        assert_same(result, ours_of(folder, "packed", name))


# ---- what is trained ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_lora_starts_as_the_base_model_and_trains_its_adapters_only(tiny_model, family, layout):
    pytest.importorskip("peft")
    policy, pairs = make_policy(tiny_model(family), layout, lora_rank=2), batch_of(FIVE)
    logps = policy(dpo.collate(pairs, layout))
    logps.square().sum().backward()
    truth = hugging_face(tiny_model(family), FIVE)[0]
    assert ((logps.detach() - truth) / truth).abs().max() < LOGPS
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for name, weight in policy.named_parameters():
        assert (weight.grad is not None) == (name in trained), name
        if "lora_B" in name:  # A has gradient 0 while B is 0
            assert weight.grad.full_tensor().norm() > 0, name
    policy.zero_grad()


def test_the_random_start_of_the_adapters_depends_on_the_seed_alone(tiny_model):
    pytest.importorskip("peft")

    def start(seed):
        torch.manual_seed(99)
        policy = tiny_policy(dpo, tiny_model("llama"), lora_rank=2, seed=seed)
        found = [w for name, w in policy.named_parameters() if "lora_A" in name]
        return torch.cat([weight.full_tensor().flatten() for weight in found])

    assert torch.equal(start(0), start(0)) and not torch.equal(start(0), start(1))


def test_train_modules_trains_what_it_finds_and_with_the_same_gradient(tiny_model):
    policy = make_policy(tiny_model("llama"), "packed", train_modules=r"layers\.1\..*(down|norm)")
    pairs, truth = batch_of(FIVE), ours_of(tiny_model("llama"), "packed", FIVE)
    logps = policy(dpo.collate(pairs, "packed"))
    (logps * coefficients(pairs).to(logps)).sum().backward()
    found = {name: weight.grad for name, weight in policy.named_parameters()}
    found = {name: grad for name, grad in found.items() if grad is not None}
    assert len(found) == 3 and all("layers.1." in name for name in found)
    for name, grad in found.items():
        name = name.removeprefix("model.")
        assert torch.equal(grad.full_tensor().double(), truth[1][name]), name
    policy.zero_grad()


# ---- FSDP ----


@pytest.mark.parametrize("family", ATTENTION)
def test_the_units_of_fsdp_are_the_blocks_an_untied_embedding_and_the_root(tiny_model, family):
    policy = make_policy(tiny_model(family), "packed")
    table, head = policy.model.get_input_embeddings(), policy.model.get_output_embeddings()
    tied = policy.model.config.tie_word_embeddings
    assert (table.weight is head.weight) == tied
    units = {module for module in policy.modules() if isinstance(module, FSDPModule)}
    blocks = set(dpo.blocks_of(policy.model))
    assert len(blocks) == policy.model.config.num_hidden_layers
    assert units == {policy, *blocks} | (set() if tied else {table})


def test_every_weight_and_buffer_is_that_of_the_model_and_none_is_left_on_the_meta_device(
    tiny_model,
):
    for family in ATTENTION:
        folder = tiny_model(family)
        policy = make_policy(folder, "packed")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ours = dict([*policy.model.named_parameters(), *policy.model.named_buffers()])
        truth = dict([*model.named_parameters(), *model.named_buffers()])
        assert ours.keys() == truth.keys(), family
        for name, tensor in ours.items():
            assert not tensor.is_meta, (family, name)
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert torch.equal(whole, truth[name]), (family, name)
