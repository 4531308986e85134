"""Claim: tests/bench/unpadded.py, another way of attention in the layout packed, gives the log-probs and gradients of dpo.py, text by
text and in torch's kernel for texts of unequal length. That runs on GPUs only: a loop that does what torch's documentation says
stands in for it, and its arguments are checked on tensors without content."""
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, random_pairs, tiny_policy

import dpo

sys.path.insert(0, str(ROOT / "tests/bench"))
import unpadded  # noqa: E402

PAIRS = random_pairs([(1, 1, 4), (7, 9, 1), (23, 5, 17), (2, 30, 2), (12, 3, 11)])

OURS = dpo.gathered_attention

pytestmark = pytest.mark.usefixtures("process_group")


def varlen_loop(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
                enable_gqa=False):
    """The last query of a text is beside its last key (https://docs.pytorch.org/docs/2.12/nn.attention.varlen.html, and the
    causal variant LOWER_RIGHT in torch/nn/attention/bias.py)."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or enable_gqa or not unpadded.GROUPED
    assert cu_seq_q.diff().max() == max_q and cu_seq_k.diff().max() == max_k
    before, after = window_size
    outputs = []
    parts = zip(*(tensor.split(starts.diff().tolist())
                  for tensor, starts in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))))
    for q, k, v in parts:
        distance = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))  # (queries, keys)
        seen = (distance <= after) & ((distance >= -before) | (before < 0))
        logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(groups, 1)) * (scale or q.shape[-1] ** -0.5)
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(groups, 1)))
    return torch.cat(outputs)


@pytest.fixture
def restored(monkeypatch):
    for name in ("attention_tables", "gathered_attention"):
        monkeypatch.setattr(dpo, name, getattr(dpo, name))
    yield
    transformers.AttentionInterface.register("gathered", OURS)  # for policies that other tests have made


def result(policy):
    logps = policy(dpo.collate(PAIRS, "packed"))
    (logps[0] - logps[1]).sum().backward()
    grads = [weight.grad.full_tensor().flatten() for weight in policy.parameters() if weight.grad is not None]
    return logps.detach(), torch.cat(grads)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "mixtral"])
def test_it_gives_the_log_probs_and_gradients_of_dpo(tiny_model, monkeypatch, restored, family, kernel):
    theirs = result(tiny_policy(dpo, tiny_model(family), "packed"))
    monkeypatch.setattr(unpadded, "varlen_attn", varlen_loop)
    unpadded.use(dpo, kernel)
    ours = result(tiny_policy(dpo, tiny_model(family), "packed"))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert (ours[1] - theirs[1]).norm() < 1e-4 * theirs[1].norm()


def test_torchs_kernel_takes_these_arguments_and_gives_gradients_of_these_shapes():
    texts = types.SimpleNamespace(queries=[5, 4, 2, 3], seen=[5, 4, 4, 4])
    texts.starts = [torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32, device="meta") for sizes in (texts.queries, texts.seen)]
    tensors = [torch.empty(tokens, heads, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
               for heads, tokens in ((8, 14), (2, 17), (2, 17))]
    output = unpadded.in_one_kernel(*tensors, texts, 7, 0.5)
    assert output.shape == (14, 8, 16)
    output.sum().backward()
    assert [tensor.grad.shape for tensor in tensors] == [tensor.shape for tensor in tensors]
