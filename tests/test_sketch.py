"""Claim: cache_ref.py --sketch_dim stores, for every response, the TensorSketch of the gradient of its log-prob.

- Exactly: it is the sketch, by its definition, of the gradient that autograd gives in Hugging Face's own model.
- Inner products of sketches estimate those of the gradients: without bias over hashes, and on a real pretrained
  model with the errors that DESIGN.md promises.
- The batch, the number of ranks and a kill change nothing.
- A response of several pairs is computed once, log-prob and sketch, and all pairs find them.
"""

import functools
import json
import re

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, VOCAB, own_numbers, random_pairs, run_main, write_tiny_data

import cache_ref
import sketch_check

pytestmark = pytest.mark.usefixtures("process_group")
SIZES = [(1, 1, 4), (7, 9, 1), (12, 5, 17), (2, 21, 2), (9, 3, 11)]
DIM = 64


def sketcher(folder, modules="", dim=DIM, **chosen):
    """sketch(pairs) -> (n, 2, dim), as main() makes it."""
    policy, state = sketch_check.policy_of(folder, dim, sketch_modules=modules, **chosen)
    return functools.partial(cache_ref.sketches, policy, state)


def gradients(folder, pairs, dtype=torch.float64, prepare=lambda model: None):
    """[{parameter: gradient of log pi(y|x)}] of chosen 0, rejected 0, chosen 1, ... by Hugging Face's own forward."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager",
                                                              experts_implementation="eager").eval()
    prepare(model)
    found = []
    for pair in pairs:
        for side in ("chosen", "rejected"):
            ids, start = torch.tensor(pair["prompt"] + pair[side]), len(pair["prompt"])
            model.zero_grad()
            logps = model(input_ids=ids[None], use_cache=False).logits[0].to(dtype).log_softmax(-1)
            logps[:-1].gather(1, ids[1:, None])[start - 1:].sum().backward()
            found.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                          for n, p in model.named_parameters() if p.requires_grad})
    return found


def by_definition(grads, dim, salt=""):
    """Every entry (i, j), with the sign s_i s_j, is added to bucket (b_i + b_j) mod dim; of a vector (or of a norm) b_i."""
    total = torch.zeros(dim, dtype=torch.float64)
    for name, grad in grads.items():
        grad = grad.flatten() if "norm" in name else grad
        signs, buckets = torch.ones(1), torch.zeros(1, dtype=torch.long)
        for axis, size in enumerate(grad.shape):
            sign, bucket = cache_ref.hash_table(f"{salt}{name}", axis, size, dim, torch.device("cpu"))
            signs = (signs[:, None] * sign).flatten()
            buckets = (buckets[:, None] + bucket).flatten() % dim
        total.index_add_(0, buckets, grad.flatten().double() * signs)
    return total


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gemma2", "gemma3", "mistral", "cohere", "granite", "gpt2", "phi"])
def test_a_sketch_is_that_of_the_exact_gradient_of_every_parameter(tiny_model, family):
    folder, pairs = tiny_model(family), random_pairs(SIZES)
    ours = sketcher(folder)(pairs).flatten(0, 1)
    for sketch, grads in zip(ours, gradients(folder, pairs)):
        truth = by_definition(grads, DIM)
        assert (sketch - truth).norm() < 2e-5 * truth.norm()


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_batch_of_more_responses_than_one_chunk_of_the_head(tiny_model, family):
    """The head runs some tokens at a time, here 512, and the sketches of all layers 1024."""
    folder, pairs = tiny_model(family), random_pairs([(9, 60 + i, 70 - i) for i in range(9)])
    assert sum(len(pair[side]) for pair in pairs for side in ("chosen", "rejected")) > 1100
    policy, state = sketch_check.policy_of(folder, DIM)
    policy.model.config.vocab_size = 2**26 // 512  # of which the size of a chunk is made
    ours = cache_ref.sketches(policy, state, pairs).flatten(0, 1)
    for sketch, grads in zip(ours, gradients(folder, pairs)):
        truth = by_definition(grads, DIM)
        assert (sketch - truth).norm() < 2e-5 * truth.norm()


def test_all_buckets_are_equally_full_and_signs_balance():
    for size, dim in [(50, 64), (1000, 64), (4096, 64)]:
        signs, buckets = cache_ref.hash_table("w", 0, size, dim, torch.device("cpu"))
        full = torch.bincount(buckets, minlength=dim)
        assert len(full) == dim and full.max() <= -(-size // dim) and signs.abs().eq(1).all()
        assert signs.sum().abs() < 5 * size**0.5


def test_modules_that_do_not_match_are_left_out(tiny_model):
    folder, pairs = tiny_model("llama"), random_pairs(SIZES[:2])
    for modules, chosen in [("layers.1.*weight", {}), ("", dict(train_modules="layers.1.")), ("norm", dict(train_modules="layers.1."))]:
        ours = sketcher(folder, modules, **chosen)(pairs).flatten(0, 1)
        for sketch, grads in zip(ours, gradients(folder, pairs)):
            kept = {n: g for n, g in grads.items() if re.search(modules, n) and re.search(chosen.get("train_modules", ""), n)}
            assert 0 < len(kept) < len(grads)
            truth = by_definition(kept, DIM)
            assert (sketch - truth).norm() < 2e-5 * truth.norm()


def test_with_lora_the_gradient_is_that_of_the_adapters(tiny_model):
    peft = pytest.importorskip("peft")
    folder, pairs = tiny_model("llama"), random_pairs(SIZES[:2])

    def prepare(model):  # the adapters of choose_trained
        torch.manual_seed(3)
        model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))

    truth = [by_definition(grads, DIM) for grads in gradients(folder, pairs, torch.float32, prepare)]
    ours = sketcher(folder, lora_rank=2, seed=3)(pairs).flatten(0, 1)
    for sketch, exact in zip(ours, truth):
        assert (sketch - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_a_parameter_that_cannot_be_sketched_is_named_and_can_be_left_out(tiny_model, family):
    folder, pairs = tiny_model(family), random_pairs(SIZES[:2])
    with pytest.raises(SystemExit, match=r"experts.*--sketch_modules|gate.*--sketch_modules"):
        sketcher(folder)(pairs)
    ours = sketcher(folder, "self_attn|norm|embed|head")(pairs).flatten(0, 1)
    for sketch, grads in zip(ours, gradients(folder, pairs)):
        truth = by_definition({n: g for n, g in grads.items() if re.search("self_attn|norm|embed|head", n)}, DIM)
        assert (sketch - truth).norm() < 1e-4 * truth.norm()


def test_rows_that_a_model_does_away_with_are_told_apart(tiny_model):
    """OPT's norm before its second half sees all tokens of a batch in one row. Its positions are no plain embedding."""
    folder, pairs, modules = tiny_model("opt"), random_pairs(SIZES), "fc|norm|proj"
    ours = sketcher(folder, modules)(pairs).flatten(0, 1)
    for sketch, grads in zip(ours, gradients(folder, pairs)):
        truth = by_definition({n: g for n, g in grads.items() if re.search(modules, n)}, DIM)
        assert (sketch - truth).norm() < 2e-5 * truth.norm()


def test_a_norm_of_two_tensors_is_refused_and_can_be_left_out(tmp_path):
    """Mamba-2's takes a gate as well, without which its gradient would be another one."""
    config = transformers.Mamba2Config(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8,
                                       state_size=8, n_groups=1, chunk_size=16)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="mixer.norm.weight.*2, out with --sketch_modules"):
        sketcher(str(tmp_path), "norm")(random_pairs(SIZES[:1]))
    assert sketcher(str(tmp_path), r"in_proj|norm_f|\d.norm.weight")(random_pairs(SIZES[:1])).isfinite().all()


def test_a_sketch_that_float16_cannot_hold_is_said_with_its_pair_and_float32_holds_it(tiny_model, tmp_path, monkeypatch):
    model, pairs, sketches = tiny_model("llama"), random_pairs(SIZES), cache_ref.sketches
    write_tiny_data(tmp_path, model, pairs, pairs[:1])
    monkeypatch.setattr(cache_ref, "sketches", lambda *rest: 1e6 * sketches(*rest))
    flags = ["--model", model, "--data", tmp_path, "--sketch_dim", 48]
    with pytest.raises(SystemExit, match=r"sketch.npy: the values of pair pair-\d are not finite in float16"):
        run_main(cache_ref, *flags)
    run_main(cache_ref, *flags, "--sketch_dtype", "float32")
    path, = tmp_path.glob("ref-*/sketch-*/train-sketch.npy")
    assert np.isfinite(np.load(path)).all() and np.abs(np.load(path)).max() > np.finfo(np.float16).max


def test_the_company_of_a_pair_in_its_batch_does_not_matter(tiny_model):
    sketch, pairs = sketcher(tiny_model("llama")), random_pairs(SIZES)
    together = sketch(pairs)
    for i, pair in enumerate(pairs):
        torch.testing.assert_close(sketch([pair])[0], together[i], rtol=1e-4, atol=1e-4 * together[i].abs().max().item())
    assert torch.equal(sketch(pairs), together)


def test_inner_products_are_unbiased_over_hashes(tiny_model, monkeypatch):
    """The mean of 300 sketches of K = 64 is within four standard errors of the exact inner products."""
    folder, pairs = tiny_model("llama", num_hidden_layers=1), random_pairs(SIZES[:2])
    grads = gradients(folder, pairs)
    flat = torch.stack([torch.cat([g.flatten() for g in each.values()]) for each in grads])
    exact = flat @ flat.T
    grams = []
    for salt in range(300):
        each = torch.stack([by_definition(g, DIM, f"{salt}/") for g in grads])
        grams.append(each @ each.T)
    grams = torch.stack(grams)
    errors = (grams.mean(0) - exact) / (grams.std(0) / 300**0.5)
    assert errors.abs().max() < 4, errors
    assert (grams.std(0) / exact.diag().sqrt().outer(exact.diag().sqrt())).max() < 2 * (2 / DIM) ** 0.5
    hash_table = cache_ref.hash_table
    monkeypatch.setattr(cache_ref, "hash_table", lambda name, *rest: hash_table(f"7/{name}", *rest))
    ours = sketcher(folder)(pairs).flatten(0, 1).double()
    torch.testing.assert_close(ours @ ours.T, grams[7], rtol=1e-4, atol=1e-4 * exact.max().item())


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "../shared/models/stories15M").exists(), reason="needs ../shared")
def test_on_a_real_model_and_real_text_inner_products_are_as_near_as_promised():
    """stories15M, 12 responses: DESIGN.md has correlations of the cosines of 0.981 (K = 1024) and 0.994 (4096)."""
    folder = str(ROOT / "../shared/models/stories15M")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lines = [json.loads(line) for line in open(ROOT / "../shared/data/instruction_preference.jsonl")][:6]
    pairs = [{side: tokenizer(str(row[side]), add_special_tokens=False)["input_ids"][:60] for side in ("prompt", "chosen", "rejected")}
             for row in lines]
    exact, _ = sketch_check.exact_gram(folder, pairs)
    for dim, error, correlation in [(1024, 0.12, 0.97), (4096, 0.06, 0.99)]:
        found = sketch_check.compare(sketch_check.sketched(folder, pairs, dim)[0], exact)
        assert found[0] < error and found[1] > correlation, found


# ---- each distinct response once


def pairs_of_prompts():
    """Pairs of a prompt with four responses (all six), of one with two, of one that has a response in common with the
    first, and of one with a chosen and two rejected responses; in a random order."""
    rng = np.random.default_rng(3)

    def text(size):
        return rng.integers(3, VOCAB, size).tolist()

    four, right = [text(size) for size in (5, 9, 2, 4)], text(6)
    groups = [[(four[i], four[j]) for i in range(4) for j in range(i)], [(text(7), text(4))], [(four[0], text(8))],
              [(right, text(2)), (right, text(3))]]
    pairs = []
    for prompt, both in zip((text(6), text(3), text(4), text(9)), groups):
        pairs += [dict(prompt=prompt, chosen=chosen, rejected=rejected) for chosen, rejected in both]
    return [pairs[i] | dict(id=f"pair-{i}", source="tiny", subset="") for i in rng.permutation(len(pairs))]


@pytest.mark.parametrize("layout", ["packed", "separate"])
def test_a_response_of_several_pairs_is_computed_once_and_all_pairs_find_its_values(tiny_model, tmp_path, capsys, layout):
    model, pairs = tiny_model("llama"), pairs_of_prompts()
    found = {}
    for name in ("shared", "occurrences"):
        folder = tmp_path / name
        numbers = None if name == "shared" else own_numbers  # every occurrence is a response of its own
        write_tiny_data(folder, model, pairs, pairs[:2], numbers=numbers)
        run_main(cache_ref, "--model", model, "--data", folder, "--layout", layout)
        run_main(cache_ref, "--model", model, "--data", folder, "--sketch_dim", 48, "--sketch_dtype", "float32")
        args = cache_ref.Args(model=model, data=str(folder), layout=layout)
        train = cache_ref.load_data(args)["train"]
        for kind in ("logps", "sketch"):
            path, = folder.glob(f"ref-*/**/train-{kind}.npy")
            found[name, kind] = np.load(path)[train["responses"]]
            assert len(np.load(path)) == dict(shared=11, occurrences=20)[name]
        found[name] = cache_ref.distinct_texts(train, args)
    assert "0 of 11 distinct responses are done; the 10 pairs have 20" in capsys.readouterr().out
    for kind in ("logps", "sketch"):
        once, truth = found["shared", kind], found["occurrences", kind]
        assert once.shape[:2] == (10, 2) and np.abs(truth).max() > 1
        np.testing.assert_allclose(once, truth, rtol=1e-4, atol=1e-4 * np.abs(truth).max())
    texts = found["shared"]
    assert sorted(np.unique(texts.twos)) == list(range(11)) and len(texts.twos) == 6
    for two, lengths in zip(texts.twos, texts.lengths):
        pair = cache_ref.text_pair(texts, two)
        assert [len(pair[side]) for side in ("prompt", "chosen", "rejected")] == lengths.tolist()


def test_two_responses_that_do_not_fit_into_max_tokens_together_are_computed_with_those_they_are_compared_with(tiny_model, tmp_path):
    """Short with short, and each of two long ones with a short one: the long ones would go together."""
    short, other, long, longer = [3, 4], [5, 6], [7] * 20, [8] * 22
    pairs = [dict(prompt=[9] * 5, chosen=chosen, rejected=rejected, id=f"pair-{i}", source="", subset="")
             for i, (chosen, rejected) in enumerate([(short, other), (long, short), (longer, short)])]
    write_tiny_data(tmp_path, tiny_model("llama"), pairs, pairs[:1])
    for max_tokens, twos in [(47, [[0, 1], [2, 3]]), (46, [[0, 1], [2, 0], [3, 0]])]:
        args = cache_ref.Args(model=tiny_model("llama"), data=str(tmp_path), max_tokens=max_tokens)
        train = cache_ref.load_data(args)["train"]
        texts = cache_ref.distinct_texts(train, args)
        assert texts.twos.tolist() == twos
        for two, lengths in zip(texts.twos, texts.lengths):
            pair = cache_ref.text_pair(texts, two)
            assert [len(pair[side]) for side in ("prompt", "chosen", "rejected")] == lengths.tolist()
