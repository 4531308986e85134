"""Claims of tests/bench/gpu.py, which measures on a GPU: on a CPU a slice runs in its tiny size, with ours and TRL; a budget ends it
cleanly; no slice should take more than eight minutes; and what it computes from a trace and from lengths is right, by hand."""
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import dpo

sys.path.insert(0, str(ROOT / "tests/bench"))
import floor  # noqa: E402
import gpu  # noqa: E402


def run(out, *flags):
    command = [sys.executable, str(ROOT / "tests/bench/gpu.py"), "--size", "tiny", "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def rows_of(text):
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells if len(row) == 8 and row[0] not in ("variant", "---")}


@pytest.mark.slow
def test_a_slice_measures_ours_and_trl_and_writes_a_table(tmp_path):
    pytest.importorskip("trl")
    run(tmp_path, "--slice", "speed15b", "--only", "packed 16384,packed 16384 zero3,trl 4,trl 16 full")
    text = (tmp_path / "speed15b.md").read_text()
    rows = rows_of(text)
    assert list(rows) == ["packed 16384", "packed 16384 zero3", "trl 4", "trl 16 full"]
    for rate, fresh, repeated, first, peak, *_ in rows.values():
        assert min(map(float, (rate, fresh, repeated, peak))) > 0 and float(first) >= 0
    assert rows["packed 16384"][-1].endswith("(0)") and "Kernels of packed 16384: " in text
    assert "times the pairs/s of TRL's fastest" in text and "CPU, float32, torch" in text


@pytest.mark.slow
def test_every_variant_of_ours_that_speed_does_not_have_runs_too(tmp_path):
    run(tmp_path, "--slice", "layouts15b,lora7b", "--only",
        "packed 16384 single,concatenated 16384,separate 16384,packed 16384 lora full,packed 8192 lora selective")
    for name, count in ("layouts15b", 3), ("lora7b", 2):
        rows = rows_of((tmp_path / f"{name}.md").read_text())
        assert len(rows) == count and all(float(row[0]) > 0 for row in rows.values()), rows


@pytest.mark.slow
def test_no_variant_begins_after_the_budget_and_what_there_is_is_written(tmp_path):
    run(tmp_path, "--slice", "layouts15b,hh15b", "--budget", "0")
    for name, count in ("layouts15b", 6), ("hh15b", 7):
        rows = rows_of((tmp_path / f"{name}.md").read_text())
        assert len(rows) == count and {row[0] for row in rows.values()} == {"not reached"}
    # A process that is running when the time is over says the same of the variants that are left.
    said = run(tmp_path, "--slice", "layouts15b", "--contender", "ours", "--folder", str(tmp_path), "--until", "1")
    assert said.count('"trouble": "not reached"') == 6


def test_without_trl_it_is_left_out_with_a_line(tmp_path, monkeypatch, capsys):
    started = []

    def start(name, *_):
        started.append(name)
        yield dict(variant=name, trouble="not run")
    monkeypatch.setattr(gpu, "start", start)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    gpu.run_slice(SimpleNamespace(slice="speed15b", size="tiny", only="", rounds=1, out=tmp_path), tmp_path, float("inf"))
    assert started == ["ours"] and "TRL is not installed: it is left out" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a large card")
def test_a_slice_that_needs_a_large_card_is_left_out_with_a_line(tmp_path, capsys):
    gpu.run_slice(SimpleNamespace(slice="lora7b", size="", only="", rounds=1, out=tmp_path), tmp_path, 0)
    assert capsys.readouterr().out == "lora7b is left out: it needs a card of 140 GB\n"


def test_every_slice_should_take_at_most_eight_minutes():
    assert {name: gpu.estimate(name) for name in gpu.SLICES if gpu.estimate(name) > 480} == {}


def test_every_word_of_a_variant_is_known():
    for _, _, ours, trl in gpu.SLICES.values():
        for variant in ours:
            if variant == "compo":
                continue
            layout, tokens, *how = variant.rstrip("*").split()
            args = gpu.settings([layout, tokens, *how], "folder", False, dpo)
            assert layout in ("packed", "concatenated", "separate") and args.max_tokens == int(tokens)
            assert {*how} <= {*"full selective compile zero2 zero3 lora single scatter kernel head auxdpo hh".split()}
        for variant in trl:
            name, size, *how = variant.rstrip("*").split()
            assert name == "trl" and int(size) > 0 and set(how) <= {"full", "lora", "cudnn", "hh"}


def test_time_in_which_several_kernels_ran_counts_once():
    events = [dict(ts=0, dur=10), dict(ts=20, dur=10), dict(ts=5, dur=10), dict(ts=22, dur=3)]  # 0 to 15, 20 to 30
    assert gpu.busy(events) == pytest.approx(25e-6)


def test_kernels_are_counted_by_kind():
    names = ["nvjet_tst_128x256", "void flash_fwd_kernel<>", "triton_poi_fused_mul_0", "Memcpy DtoD", "cunn_SoftMaxForward",
             "multi_tensor_apply_kernel<FusedAdamMathFunctor>", "vectorized_elementwise_kernel<MulFunctor>", "reduce_kernel<MeanOps>"]
    kinds = gpu.by_kind([dict(name=name, dur=2**i) for i, name in enumerate(names)])
    assert list(kinds) == ["reductions", "elementwise", "optimiser", "softmax and loss", "copies", "compiled", "attention",
                           "matrix products"]
    assert kinds["attention"] == pytest.approx(2 / 255)


def test_useful_flops_count_a_prompt_once_and_the_head_for_responses():
    # tiny: hidden 64, MLP 128, 2 layers, 4 heads, 2 key-value heads, vocabulary 1000
    block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    assert gpu.flops("tiny", np.array([[5, 2, 3], [1, 1, 1]])) == 6 * (2 * block * 13 + 64_000 * 7)


def test_lengths_are_those_that_the_tables_name():
    rng = np.random.default_rng(0)
    means = {work: gpu.lengths_of(work, 20_000, rng).mean(0) for work in gpu.PAIRS}
    np.testing.assert_allclose(means["ultrafeedback"], (180, 350, 350), rtol=0.06)
    np.testing.assert_allclose(means["hh"], (175, 57, 57), rtol=0.02)
    np.testing.assert_allclose(means["long"], (2000, 1000, 1000), rtol=0.02)


def test_the_longest_kernels_come_first_with_their_calls():
    events = [dict(name=name, dur=time) for name, time in [("a", 1), ("b", 5), ("a", 3), ("c", 1)]]
    assert gpu.longest_kernels(events, 2) == [("b", 0.5, 1), ("a", 0.4, 2)]


def test_a_variant_with_other_lengths_is_compared_with_its_like():
    args = SimpleNamespace(slice="lease15b", size="tiny", only="", rounds=1)
    results = [dict(variant=name, fresh=[seconds], repeated=seconds, first=1.0, peak=1.0) for name, seconds in
               [("packed 16384", 1.0), ("packed 16384 hh", 0.5), ("trl 8", 2.0), ("trl 32 hh", 2.0)]]
    text = gpu.report(results, args)
    assert "ultrafeedback: the fastest of ours, packed 16384, makes 2.00 times" in text
    assert "hh: the fastest of ours, packed 16384 hh, makes 4.00 times" in text


def test_other_processes_on_the_card_are_named(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(gpu.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="11\n12\n13\n"))
        assert gpu.others() == 2
    args = SimpleNamespace(slice="lease15b", size="tiny", only="", rounds=1)
    result = dict(variant="packed 16384", fresh=[1.0], repeated=1.0, first=1.0, peak=1.0)
    assert "2 other processes were on the card with packed 16384" in gpu.report([result | dict(others=2)], args)
    assert "other processes" not in gpu.report([result | dict(others=0)], args)


def test_the_floor_has_the_products_that_mfu_counts_and_adds_no_gradient_by_atomics():
    lengths = np.array([[5, 2, 3], [9, 7, 1], [4, 4, 4]])
    counts = floor.step_counts("tiny", lengths, 16384)  # one chunk of logits, made once
    assert sum(counts[name][1] for name in ("mm", "addmm") if name in counts) == gpu.flops("tiny", lengths)
    assert not {"index_add_", "index_put_", "index_put"} & counts.keys() and counts["index"][2] == 2 * 4
    # Causal attention of the texts 16, 10, 8, 8, 8, 7 of 4 heads of 16, with their padding, in 2 layers:
    tables = dpo.attention_tables(dpo_places(lengths), int(lengths.sum())).shapes
    assert counts["attention"][1] == 2 * sum(7 * rows * width**2 * 64 for rows, width in tables)


def dpo_places(lengths):
    return [torch.zeros(row[0] + row[side], dtype=int) for side in (1, 2) for row in lengths]


def test_the_host_starts_the_kernels_of_every_kind_of_step(tmp_path):
    assert all(0 < gpu.launch_times(tmp_path / "model", how, layers=2, steps=1) < 5000 for how in ("eager", "full", "zero3"))
