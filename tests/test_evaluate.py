"""Claims: the numbers of evaluate.py are those that NumPy makes of the log-probs of Hugging Face's
own forward; errors are standard errors of the mean, and of the paired difference between models;
answers are those of generate() without padding; a reward function gets the texts; a printed table has
eight columns; what a user gets wrong is one line."""
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, random_pairs, run_as_program, run_ranks, tiny_hf_model

import evaluate

SIZES = [(5, 4, 7), (3, 9, 2), (8, 1, 1), (2, 6, 6), (5, 3, 8), (4, 12, 5), (9, 2, 3), (3, 5, 4)]


def hf_logps(folder, pairs):
    """(rows, 2): one row at a time through the model's own forward, all logits, float64 sums."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums = []
    for pair in pairs:
        for side in ("chosen", "rejected"):
            ids = torch.tensor(pair["prompt"] + pair[side])
            with torch.no_grad():
                logps = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
            sums.append(logps.gather(1, ids[1:, None])[len(pair["prompt"]) - 1:].sum().item())
    return np.array(sums).reshape(-1, 2)


def pair_metrics(logps, lengths=None, ref=None, first=None):
    """evaluate's, of pairs that are part of no question."""
    lengths = np.ones(logps.shape) if lengths is None else lengths
    return evaluate.pair_metrics(logps, lengths, np.full(len(logps), -1), ref, first)


def by_hand(values):
    """[mean, square root of (sum of squared deviations / (n - 1) / n)]"""
    mean = sum(values) / len(values)
    return [mean, (sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values)) ** 0.5]


@pytest.fixture(scope="module")
def world(tiny_model, tiny_data):
    """Two models, eight pairs in two subsets and none, as paths."""
    pairs = random_pairs(SIZES)
    for pair, subset in zip(pairs, ["easy", "easy", "hard", "", "hard", "easy", "hard", "hard"]):
        pair["subset"] = subset
    one, two = tiny_model("llama", 0), tiny_model("llama", 1)
    return dict(one=one, two=two, data=tiny_data(one, pairs, pairs), pairs=pairs)


@pytest.fixture
def run(process_group, monkeypatch, tmp_path, capsys):
    """run(--flags) -> what evaluation.json holds, with `printed`; the program in this process."""
    def main(*flags):
        argv = ["evaluate.py", "--out", tmp_path / "out", *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        monkeypatch.setattr(evaluate, "start_process_group",
                            lambda dtype: (0, 1, torch.device("cpu"), torch.float32))
        monkeypatch.setattr(evaluate.dist, "destroy_process_group", lambda: None)
        run_as_program(evaluate)
        file = tmp_path / "out/evaluation.json"
        record = json.loads(file.read_text()) if file.exists() else {}
        return record | {"printed": capsys.readouterr().out}
    return main


def means(record, model, subset=""):
    rows = {(row["model"], row["subset"]): row["metrics"] for row in record["results"]}
    return rows[model, subset]


# ---- numbers


def test_standard_errors_by_hand_on_four_pairs():
    logps = np.array([[-1.0, -2], [-3, -1], [-2, -2], [-5, -1]])
    metrics = pair_metrics(logps)
    assert metrics["accuracy"].tolist() == [1, 0, 0.5, 0]  # a tie counts half
    # mean 3/8, squared deviations 25 + 9 + 1 + 9 = 44 sixty-fourths; 44/64 / 3 / 4 = 0.0572917
    found = evaluate.mean_and_error(metrics["accuracy"])
    assert found == pytest.approx((0.375, 0.0572917 ** 0.5), rel=1e-6)
    # margins 1, -2, 0, -4: mean -5/4, squared deviations 81 + 9 + 25 + 121 = 236 sixteenths
    found = evaluate.mean_and_error(metrics["margin"])
    assert found == pytest.approx((-1.25, (236 / 16 / 12) ** 0.5))
    assert evaluate.mean_and_error([2.0]) == (2, None)


def test_the_error_of_a_gain_is_that_of_the_paired_difference():
    right, wrong = [-1.0, -2], [-2.0, -1]
    first, second = np.array([right, right, wrong, wrong]), np.array([right, right, right, wrong])
    gain = pair_metrics(second, first=first)["gain"]
    # differences 0, 0, 1, 0: 1/4 +- sqrt((3/16 + 9/16) / 3 / 4) = 1/4; unpaired it would be 0.38
    assert evaluate.mean_and_error(gain) == pytest.approx((0.25, 0.25))


def test_normalising_by_length_can_turn_a_preference():
    metrics = pair_metrics(np.array([[-4.0, -3.0]]), np.array([[4, 1]]))
    assert metrics["accuracy"] == 0 and metrics["accuracy/token"] == 1  # -1 > -3 per token


def test_against_the_reference_only_changes_count():
    metrics = pair_metrics(np.array([[-9.0, -3.0]]), ref=np.array([[-8.0, -1.0]]))
    assert metrics["accuracy"] == 0 and metrics["accuracy/ref"] == 1
    assert (metrics["chosen/ref"], metrics["rejected/ref"], metrics["margin/ref"]) == (-1, -2, 1)


@pytest.mark.parametrize("max_tokens", [1, 40, 8192])
def test_every_number_equals_numpy_on_the_log_probs_of_hf(max_tokens, run, world):
    record = run("--models", f"{world['one']},{world['two']}", "--data", world["data"],
                 "--reference", world["one"], "--max_tokens", max_tokens)
    ref, logps = (hf_logps(world[name], world["pairs"]) for name in ("one", "two"))
    lengths = np.array([[len(pair["chosen"]), len(pair["rejected"])] for pair in world["pairs"]])
    margins, change, rates = logps[:, 0] - logps[:, 1], logps - ref, logps / lengths
    truth = {"accuracy": margins > 0, "margin": margins,
             "accuracy/token": rates[:, 0] > rates[:, 1],
             "accuracy/ref/token": change[:, 0] / lengths[:, 0] > change[:, 1] / lengths[:, 1],
             "accuracy/ref": change[:, 0] > change[:, 1], "margin/ref": change[:, 0] - change[:, 1],
             "chosen/ref": change[:, 0], "rejected/ref": change[:, 1],
             "gain": 1.0 * (margins > 0) - (ref[:, 0] > ref[:, 1])}
    found = means(record, world["two"])
    assert found.keys() == truth.keys()
    for name, values in truth.items():
        assert found[name] == pytest.approx(by_hand(1.0 * values), abs=2e-4), name
    own = means(record, world["one"])  # the reference against itself
    assert own["accuracy/ref"] == [0.5, 0] and own["margin/ref"] == [0, 0] and "gain" not in own


def test_subsets_have_rows_of_their_own(run, world):
    record = run("--models", world["one"], "--data", world["data"])
    logps = hf_logps(world["one"], world["pairs"])
    counts = {r["subset"]: r["pairs"] for r in record["results"]}
    assert counts == {"": 8, "easy": 3, "hard": 4}  # a pair without subset is in the first row only
    for subset in ("easy", "hard"):
        group = [pair["subset"] == subset for pair in world["pairs"]]
        truth = by_hand((logps[group, 0] - logps[group, 1]).tolist())
        assert means(record, world["one"], subset)["margin"] == pytest.approx(truth, abs=2e-4)


def test_kl_is_the_mean_log_ratio_of_sampled_answers_by_hf_and_zero_for_the_reference(run, world, tmp_path):
    flags = ["--models", f"{world['one']},{world['two']}", "--data", world["data"], "--samples", 6, "--max_new_tokens", 9]
    record = run(*flags, "--reference", world["one"])
    assert means(record, world["one"])["kl"] == [0, 0]
    answers = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    answers = [answer for answer in answers if answer["model"] == world["two"]]
    pairs = {pair["id"]: pair for pair in world["pairs"]}
    found, truth = [answer["logp"] - answer["ref_logp"] for answer in answers], []
    for answer in answers:
        response = [int(word[1:]) if word[0] == "w" else {"<unk>": 0, "<s>": 1}[word] for word in answer["response"].split()]
        response += [2] * answer["ended"]
        if len(response) != answer["tokens"]:  # special tokens are not in the text
            found[len(truth)] = None
        pair = dict(prompt=pairs[answer["id"]]["prompt"], chosen=response or [3], rejected=[3])
        truth.append((hf_logps(world["two"], [pair]) - hf_logps(world["one"], [pair]))[0, 0])
    kept = [(x, y) for x, y in zip(found, truth) if x is not None]
    assert len(kept) >= 4 and len(answers) == 6
    assert [x for x, _ in kept] == pytest.approx([y for _, y in kept], abs=1e-3)
    assert means(record, world["two"])["kl"] == pytest.approx(by_hand([a["logp"] - a["ref_logp"] for a in answers])) and "KL" in record["printed"]
    assert "kl" not in means(run(*flags), world["two"])  # relative to what?
    cold = run(*flags, "--reference", world["one"], "--temperature", 0.5)
    assert "kl" not in means(cold, world["two"])  # those answers are not drawn from pi


def test_best_of_several_pairs_of_a_prompt_by_hand():
    values = np.array([[3.0, 1], [3, 2], [3, -1], [1, 5], [1, 0], [4, 0], [2, 2], [2, 1], [0, 9]])
    none = np.nan
    found = evaluate.beats_all(values, np.array([0, 0, 0, 1, 1, -1, 2, 2, -1]))
    np.testing.assert_equal(found, [1, none, none, 0, none, none, 0.5, none, none])


def test_a_question_is_several_pairs_of_one_prompt_and_chosen_response():
    prompts, chosen = [[1], [1], [2], [2], [3]], [[5], [5], [5], [5], [5]]
    numbers = evaluate.number_questions(prompts, chosen, [None] * 5)
    assert numbers[0] == numbers[1] != numbers[2] == numbers[3] and numbers[4] == -1
    ties = [None, None, "tie", "tie", None]  # which have a score of their own
    assert evaluate.number_questions(prompts, chosen, ties).tolist() == [0, 0, -1, -1, -1]
    prompts[3] = [4]  # two of five pairs share a side: these are plain pairs
    assert evaluate.number_questions(prompts, chosen, [None] * 5).tolist() == [-1] * 5
    assert evaluate.number_questions(prompts[:4], [[5], [6], [7], [8]], [None] * 4).tolist() == [-1] * 4


def test_multiple_choice_counts_questions_not_pairs(run, world, tiny_data):
    question = dict(prompt=[5, 6, 7], chosen=[8, 9], source="", subset="maths")
    pairs = [question | dict(rejected=wrong, id=f"q-{i}") for i, wrong in enumerate([[3], [4, 5], [6]])]
    pairs += [pair | dict(prompt=[9, 9], subset="law", id=f"law-{i}") for i, pair in enumerate(pairs[:2])]
    data = tiny_data(world["one"], pairs, pairs)
    record = run("--models", f"{world['one']},{world['two']}", "--reference", world["one"], "--data", data)
    logps, ref = (hf_logps(world[name], pairs) for name in ("two", "one"))
    for key, values in {"best": logps, "best/ref": logps - ref}.items():
        truth = [float(values[0, 0] > values[:3, 1].max()), float(values[3, 0] > values[3:, 1].max())]
        assert means(record, world["two"])[key] == pytest.approx(by_hand(truth))
        assert [means(record, world["two"], subset)[key][0] for subset in ("maths", "law")] == truth
    assert means(record, world["one"])["best/ref"] == [pytest.approx((1 / 4 + 1 / 3) / 2), pytest.approx(1 / 24)]  # ties


def test_a_judge_that_only_likes_length_gives_one_half_at_equal_length():
    random = np.random.default_rng(0)
    longer = random.normal(8, 20, 4000)  # our answers are longer by 8 tokens, which is all the judge sees
    wins = (random.random(4000) < 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))).astype(float)
    rate, error = evaluate.equal_length(wins, longer)
    assert wins.mean() > 0.58 and abs(rate - 0.5) < 3 * error and 0.005 < error < 0.02
    better = (random.random(4000) < 1 / (1 + np.exp(-1 - 2 * np.tanh(longer / longer.std())))).astype(float)
    rate, error = evaluate.equal_length(better, longer)
    assert abs(rate - 1 / (1 + np.exp(-1))) < 3 * error


def test_the_error_of_the_win_rate_at_equal_length_is_that_of_the_bootstrap():
    random = np.random.default_rng(4)
    longer = random.normal(3, 10, 300)
    wins = random.choice([0, 0.5, 1], 300, p=[0.3, 0.2, 0.5])
    draws = [random.integers(0, 300, 300) for _ in range(2000)]
    spread = np.std([evaluate.equal_length(wins[rows], longer[rows])[0] for rows in draws])
    assert evaluate.equal_length(wins, longer)[1] == pytest.approx(spread, rel=0.05)


def test_the_regression_is_the_maximum_of_its_likelihood():
    wins, longer = np.array([1.0, 0, 1, 0.5, 1, 0, 1, 1]), np.array([3.0, -5, 8, 0, -2, 4, 10, -1])
    x = np.tanh(longer / longer.std())
    a, b = np.meshgrid(np.linspace(-1, 3, 801), np.linspace(-3, 6, 901))
    p = 1 / (1 + np.exp(-(a[..., None] + b[..., None] * x)))
    value = (wins * np.log(p) + (1 - wins) * np.log(1 - p)).mean(-1) - 5e-4 * (a**2 + b**2)
    best = a.flatten()[value.argmax()]
    assert evaluate.equal_length(wins, longer)[0] == pytest.approx(1 / (1 + np.exp(-best)), abs=2e-3)


def test_one_answer_has_no_error_at_equal_length_as_it_has_none_elsewhere():
    rate, error = evaluate.equal_length(np.array([1.0]), np.array([3.0]))
    assert rate > 0.9 and error is None
    assert evaluate.equal_length(np.array([1.0, 0]), np.array([3.0, 1]))[1] > 0


def test_a_model_wins_half_against_itself_and_ties_count_half(run, world, tmp_path):
    (tmp_path / "judge.py").write_text("def judge(prompt, response):\n    return len(response.split()) % 3\n")
    record = run("--models", f"{world['one']},{world['two']}", "--data", world["data"], "--samples", 8, "--max_new_tokens", 6,
                 "--reward", f"{tmp_path}/judge.py:judge")
    assert means(record, world["one"])["win"] == [0.5, 0] and means(record, world["one"])["win/length"] == [0.5, 0]
    answers = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    rewards = {(answer["model"], answer["id"]): answer["reward"] for answer in answers}
    pairs = [(rewards[world["two"], name], rewards[world["one"], name]) for _, name in rewards if (world["two"], name) in rewards]
    wins = [1.0 * (a > b) + 0.5 * (a == b) for a, b in pairs[:8]]
    assert means(record, world["two"])["win"] == pytest.approx(by_hand(wins)) and "equal length %" in record["printed"]


def test_limit_takes_the_first_pairs(run, world):
    record = run("--models", world["one"], "--data", world["data"], "--limit", 3)
    logps = hf_logps(world["one"], world["pairs"][:3])
    assert means(record, world["one"])["margin"] == pytest.approx(by_hand((logps[:, 0] - logps[:, 1]).tolist()), abs=2e-4)
    assert [row["pairs"] for row in record["results"]] == [3, 2, 1]
    assert run("--models", world["one"], "--data", world["data"], "--limit", 99)["results"][0]["pairs"] == 8


# ---- statistics, against slow and obvious computations


def test_pairs_of_one_prompt_count_as_one_observation():
    # means of the clusters a 1, 1, 1 and b 0 and c 0.5: sums of deviations from 0.7: 0.9, -0.7, -0.2; 1.34 * 3 / 2 / 25
    found = evaluate.mean_and_error([1.0, 1, 1, 0, 0.5], ["a", "a", "a", "b", "c"])
    assert found == pytest.approx((0.7, (1.34 * 1.5) ** 0.5 / 5))
    values = np.random.default_rng(0).normal(size=50)  # copies of an observation add nothing
    _, error = evaluate.mean_and_error(np.repeat(values, 4), np.repeat(np.arange(50), 4))
    assert error == pytest.approx(evaluate.mean_and_error(values)[1])


def test_the_clustered_error_is_that_of_the_bootstrap_over_clusters():
    random = np.random.default_rng(1)
    clusters = np.repeat(np.arange(60), random.integers(1, 4, 60))
    values = random.normal(size=60)[clusters] + random.normal(size=len(clusters))
    means = []
    for _ in range(4000):
        drawn = random.integers(0, 60, 60)
        means.append(np.concatenate([values[clusters == each] for each in drawn]).mean())
    assert evaluate.mean_and_error(values, clusters)[1] == pytest.approx(np.std(means), rel=0.06)


def test_best_of_n_is_the_mean_maximum_over_all_choices_of_n():
    rewards = np.random.default_rng(0).integers(0, 4, (3, 8)).astype(float)
    for n, kl, mean, error in evaluate.best_of_n(rewards):
        choices = list(itertools.combinations(range(8), n))
        truth = [np.mean([row[list(choice)].max() for choice in choices]) for row in rewards]
        assert (mean, error) == pytest.approx(tuple(by_hand(truth))) and kl == pytest.approx(np.log(n) - 1 + 1 / n)
    assert [row[0] for row in evaluate.best_of_n(rewards)] == [1, 2, 4, 8]


def slow_ties(prompts):
    """prompts {(kind, number): (scores of right answers, of wrong ones)}, every answer against every other one."""
    right = {key: all(c > r for c in good for r in bad) for key, (good, bad) in prompts.items()}
    share = lambda kind: np.mean([value for key, value in right.items() if key[0] == kind])
    soft, hard, extra = [], [], []
    for number in sorted({key[1] for key in prompts}):
        (good, bad), (one, others) = prompts["tied", number], prompts["ref", number]
        spread = max(abs(a - b) for a in good for b in good)
        gaps = min(c - r for c in good for r in bad), min(c - r for c in one for r in others)
        soft.append(gaps[0] > spread)
        hard.append(min(gaps) > spread)
        extra.append(np.tanh(min(gaps) / spread - 1) if spread else float(min(gaps) > 0) - float(min(gaps) < 0))
    return 0.3 * share("tied") + 0.3 * share("ref") + 0.2 * np.mean(soft) + 0.2 * np.mean(hard) + 0.01 * np.mean(extra)


def test_reward_bench_2_in_its_published_layout_from_the_file_to_the_table(run, tiny_model, tmp_path, monkeypatch):
    """id, prompt, chosen (list), rejected (list), num_correct, subset; five subsets with best of four, and Ties."""
    import prepare_data
    words = iter(np.random.default_rng(3).permutation(90)[:80] + 5)
    text = lambda: f"w{next(words)} w{next(words)}"
    rows = [dict(id=str(i), prompt=text(), chosen=[text()], rejected=[text() for _ in range(3)], num_correct=1, subset=subset)
            for i, subset in enumerate(["Math", "Focus"])]
    for number in (4, 9):
        rows.append(dict(id=f"ref:{number}", prompt=text(), chosen=[text()], rejected=[text(), text()], num_correct=1, subset="Ties"))
        rows.append(dict(id=f"tied:{number}", prompt=text(), chosen=[text(), text()], rejected=[text(), text(), text()][:2], num_correct=2,
                         subset="Ties"))
    (tmp_path / "rb2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, ref = shutil.copytree(tiny_model("llama", 0), tmp_path / "model"), tiny_model("llama", 1)
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(model), str(model)
    tokenizer.chat_template = ("{% for m in messages %}{{ 'w3 ' if m.role == 'user' else '' }}{{ m.content }}"
                               "{{ ' w4 ' if m.role == 'user' else '</s>' }}{% endfor %}")
    tokenizer.save_pretrained(model)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--dataset", str(tmp_path / "rb2.jsonl"), "--model", model, "--out",
                                      str(tmp_path / "rb2"), "--ties", "--val_fraction", "0.3", "--num_proc", "1"])
    prepare_data.main()
    record = run("--models", model, "--reference", ref, "--data", tmp_path / "rb2", "--split", "train,val")
    import datasets
    pairs = [pair for split in ("train", "val") for pair in datasets.load_from_disk(str(tmp_path / "rb2" / split))]
    logps = [hf_logps(name, pairs) for name in (model, ref)]
    for key, values in {"": logps[0], "/ref": logps[0] - logps[1]}.items():
        prompts, best = {}, {}
        for pair, (chosen, rejected) in zip(pairs, values):
            if pair["subset"] == "Ties":
                kind, number = pair["id"].split("-")[0].split(":")[-2:]
                good, bad = prompts.setdefault((kind, number), ([], []))
                good.append(chosen)
                bad.append(rejected)
            else:
                best.setdefault(pair["subset"], []).append(chosen > rejected)
        assert set(prompts) == {("ref", "4"), ("ref", "9"), ("tied", "4"), ("tied", "9")}
        assert means(record, model, "Ties")[f"ties{key}"] == [pytest.approx(slow_ties(prompts)), None]
        for subset, wins in best.items():
            assert means(record, model, subset)[f"best{key}"] == [float(all(wins)), None]
        assert means(record, model)[f"ties{key}"] == means(record, model, "Ties")[f"ties{key}"]
        assert f"best{key}" not in means(record, model, "Ties")


@pytest.mark.parametrize("scores, score", [
    # accurate on both, gap 4 and ref gap 3 above the spread 1: all of it, and tanh(3 / 1 - 1) of the last per cent
    (dict(tied=([7, 6], [2, 1]), ref=([5], [2])), 0.3 + 0.3 + 0.2 + 0.2 + 0.01 * np.tanh(2)),
    # the ref gap 0.5 is below the spread
    (dict(tied=([7, 6], [2, 1]), ref=([2.5], [2])), 0.3 + 0.3 + 0.2 + 0.01 * np.tanh(-0.5)),
    # one right answer below a wrong one
    (dict(tied=([7, 1], [2, 1]), ref=([5], [2])), 0.3 + 0.01 * np.tanh(-1 / 6 - 1)),
    # equal right answers: the spread is 0
    (dict(tied=([7, 7], [2, 1]), ref=([5], [2])), 1.01)])
def test_the_ties_score_by_hand(scores, score):
    rows = [(c, r, (kind, "0")) for kind, (good, bad) in scores.items() for c, r in itertools.product(good, bad)]
    values = np.array([row[:2] for row in rows], float)
    assert evaluate.ties_score(values, [row[2] for row in rows]) == pytest.approx(score)


def test_every_two_models_are_compared_by_pairs(run, world, tmp_path):
    record = run("--models", f"{world['one']},{world['two']}", "--data", world["data"], "--reference", world["one"])
    table = (tmp_path / "out/differences.md").read_text().split("\n\n")[0].splitlines()
    head, cells = ([cell.strip() for cell in table[i].strip("|").split("|")] for i in (0, 2))
    assert head == ["model", "against", "accuracy %", "to ref %", "margin to ref"]
    assert cells[:2] == [world["two"], world["one"]] and len(table) == 3
    mean, error = means(record, world["two"])["gain"]
    assert cells[2] == f"{100 * mean:.1f} ± {100 * error:.1f}" + " *" * (abs(mean) > 2 * error)
    one, two = (hf_logps(world[name], world["pairs"]) @ [1, -1] for name in ("one", "two"))
    mean, error = by_hand((two - one).tolist())
    assert re.fullmatch(r"(\S+) ± (\S+)( \*)?", cells[4]).groups() == (
        f"{mean:.2f}", f"{error:.2f}", " *" if abs(mean) > 2 * error else None)


def test_a_difference_that_is_the_same_for_all_prompts_has_a_star_and_none_has_no_star():
    values = {"a": {"accuracy": np.zeros(4)}, "b": {"accuracy": np.ones(4)}, "c": {"accuracy": np.ones(4)}}
    rows = cells_of(evaluate.difference_table(["a", "b", "c"], values, dict(clusters=np.arange(4))))[2:]
    assert [row[2].split("*")[0].strip() for row in rows] == ["100.0 ± 0.0", "100.0 ± 0.0", "0.0 ± 0.0"]
    assert ["*" in row[2] for row in rows] == [True, True, False]
    one_prompt = evaluate.difference_table(["a", "b"], values, dict(clusters=np.zeros(4)))
    assert "100.0" in one_prompt and "*" not in one_prompt and "±" not in one_prompt


def test_the_rule_of_a_narrow_column_is_one_to_markdown():
    rule = evaluate.markdown([["model", "", "n"], ["one", "", "3"]]).splitlines()[1]
    assert all(re.fullmatch(" *-+:? *", cell) for cell in rule.strip("|").split("|")), rule


def test_step_0_the_untouched_model_has_changed_nothing(run, world, tmp_path):
    (tmp_path / "judge.py").write_text("def judge(prompt, response):\n    return len(response.split()) % 3\n")
    again = shutil.copytree(world["one"], tmp_path / "again")
    found = means(run("--models", f"{world['one']},{again}", "--data", world["data"], "--reference", world["one"], "--samples", 8,
                      "--max_new_tokens", 6, "--reward", f"{tmp_path}/judge.py:judge"), str(again))
    for key in ("accuracy/ref", "accuracy/ref/token", "win"):
        assert found[key] == [0.5, 0], key
    assert found["win/length"][0] == 0.5
    for key in ("gain", "margin/ref", "chosen/ref", "rejected/ref", "kl"):
        assert found[key] == [0, 0], key


# ---- reward models


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, tiny_model):
    """A random Llama with one label, and a chat template of its own."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model("llama", 0))
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(5)
    config = transformers.AutoConfig.from_pretrained(tiny_model("llama", 0))
    config.num_labels, config.pad_token_id = 1, None
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def slow_rewards(folder, tokenizer, texts):
    """One text at a time, by the parts of the model; texts of prompt and response tokens."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rewards = []
    for prompt, response in texts:
        words = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, response)]
        ids = tokenizer(f"w9 {words[0]} w9 {words[1]} ", add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            rewards.append(model.score(model.model(ids).last_hidden_state[0, -1]).item())
    return np.array(rewards)


def test_a_reward_model_judges_pairs_and_samples(run, world, reward_model, tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_MODEL", reward_model)
    judge = f"{ROOT}/tests/bench/reward_model.py:reward"
    flags = ["--models", f"{world['one']},{world['two']}", "--data", world["data"], "--reference", world["one"], "--reward", judge]
    record = run(*flags, "--samples", 6, "--max_new_tokens", 9, "--best_of", 4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world["one"])
    truth = np.stack([slow_rewards(reward_model, tokenizer, [(pair["prompt"], pair[side]) for pair in world["pairs"]])
                      for side in ("chosen", "rejected")], 1)
    assert means(record, judge)["margin"] == pytest.approx(by_hand((truth @ [1, -1]).tolist()), abs=1e-4)
    assert means(record, judge)["accuracy"] == pytest.approx(by_hand(1.0 * (truth[:, 0] > truth[:, 1])))
    answers = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    texts = [[tokenizer(answer[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "response")] for answer in answers]
    assert [answer["reward"] for answer in answers] == pytest.approx(slow_rewards(reward_model, tokenizer, texts).tolist(), abs=1e-4)
    assert {f"best of {n}" for n in (1, 2, 4)} <= {row["model"] for row in record["results"]}
    best = [means(record, f"best of {n}")["reward"][0] for n in (1, 2, 4)]
    assert best == sorted(best)
    assert "reward" not in means(run(*flags), world["one"])  # pairs alone


def test_a_reward_model_needs_one_label(run, world, tmp_path, reward_model, monkeypatch):
    config = transformers.AutoConfig.from_pretrained(reward_model, num_labels=2)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "two")
    for folder, words in {tmp_path / "two": "2 labels", world["two"]: "score.weight"}.items():
        monkeypatch.setenv("REWARD_MODEL", str(folder))
        with pytest.raises(SystemExit, match=f"^error: --reward .*{words}"):
            run("--models", world["one"], "--data", world["data"], "--reward", f"{ROOT}/tests/bench/reward_model.py:reward")


def test_the_file_of_a_reward_may_use_dataclasses(run, world, tmp_path):
    (tmp_path / "r.py").write_text(
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass Judge:\n    bonus: int = 2\n\n"
        "judge = Judge()\ndef score(prompt, response):\n    return judge.bonus\n")
    record = run("--models", world["one"], "--data", world["data"], "--reward", f"{tmp_path}/r.py:score")
    assert means(record, f"{tmp_path}/r.py:score")["margin"] == [0, 0]


def test_what_was_measured_before_an_error_is_kept(run, world, tmp_path):
    (tmp_path / "r.py").write_text("def score(prompt, response): return 1 / 0\n")
    shutil.copytree(world["two"], tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes(b"cut off")
    flags = ["--data", world["data"], "--samples", 3, "--max_new_tokens", 2]
    mistakes = [([world["one"], world["two"]], ["--reward", f"{tmp_path}/r.py:score"], [f"{tmp_path}/out has"]),
                ([world["one"], str(tmp_path / "broken")], [], ["broken"])]
    for number, (names, more, words) in enumerate(mistakes):
        with pytest.raises(SystemExit) as stop:
            run("--models", ",".join(names), *flags, *more)
        assert all(word in str(stop.value) for word in words), stop.value
        known = names[:2 - number]
        with np.load(tmp_path / "out/logps.npz") as stored:
            assert stored["models"].tolist() == known
            np.testing.assert_allclose(stored["logps"][0], hf_logps(world["one"], world["pairs"]), atol=2e-4)
        answers = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
        assert [answer["model"] for answer in answers] == [name for name in known for _ in range(3)]


# ---- checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dpo", "auxdpo"])  # which has delta in its checkpoints
def test_a_checkpoint_of_a_run_is_a_model(run, world, tmp_path, script):
    flags = ["--model", world["one"], "--data", world["data"], "--out", tmp_path / "run", "--max_steps", 2, "--batch_size", 4,
             "--learning_rate", 1e-2, "--save_every", 1, "--warmup", 0, "--schedule", "constant", "--log_every", 1]
    flags += ["--geometry", "ridge"] if script == "auxdpo" else []  # needs no sketches
    run_ranks(1, "cache_ref.py", "--model", world["one"], "--data", world["data"])
    run_ranks(1, f"{script}.py", *flags)
    names = [f"{tmp_path}/run/step-000001", f"{tmp_path}/run/step-000002", f"{tmp_path}/run"]
    record = run("--models", ",".join(names), "--data", world["data"], "--plot", tmp_path / "p.png", "--reference", world["one"])
    first, last, final = (means(record, name)["margin"][0] for name in names)
    assert last == final != first and (tmp_path / "p.png").stat().st_size > 10_000
    (tmp_path / "run/args.json").write_text(json.dumps(dict(args=dict(model=str(world["data"])))))
    with pytest.raises(SystemExit, match="^error: .*step-000001"):
        run("--models", names[0], "--data", world["data"])


# ---- files


def test_the_stored_log_probs_answer_questions_without_the_model(run, world, tmp_path):
    run("--models", world["two"], "--data", world["data"], "--reference", world["one"])
    with np.load(tmp_path / "out/logps.npz") as stored:
        assert stored["models"].tolist() == [world["two"], world["one"]]
        assert stored["ids"].tolist() == [pair["id"] for pair in world["pairs"]]
        assert stored["lengths"].tolist() == [list(size) for size in SIZES]
        for name, logps in zip(("two", "one"), stored["logps"]):
            np.testing.assert_allclose(logps, hf_logps(world[name], world["pairs"]), atol=2e-4)


def cells_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]


def test_the_table_is_aligned_markdown_with_hardware_and_versions(run, world, tmp_path):
    record = run("--models", f"{world['one']},{world['two']}", "--data", world["data"])
    text = (tmp_path / "out/table.md").read_text()
    assert text in record["printed"]
    table, note = text.strip().split("\n\n")
    head, rule, *rows = cells_of(table)
    assert len({len(line) for line in table.splitlines()}) == 1 and len(rows) == 6  # two models x (all + two)
    assert set(rule[0]) == {"-"} and rule[3].endswith("-:")
    row = dict(zip(head, rows[3]))
    assert (row["model"], row["subset"], row["n"]) == (world["two"], "all", "8")
    mean, error = means(record, world["two"])["gain"]
    assert row["gain %"] == f"{100 * mean:.1f} ± {100 * error:.1f}"
    assert rows[0][head.index("gain %")] == ""
    assert not {"to ref %", "margin to ref", "chosen"} & {*head}  # without a reference
    for word in (torch.__version__, transformers.__version__, "float32", "CPU"):
        assert word in note
    assert record["args"]["data"] == world["data"]
    assert record["seconds"].keys() == {world["one"], world["two"]}


def test_a_table_has_eight_columns_unless_others_are_named(run, world, tmp_path):
    (tmp_path / "judge.py").write_text("def judge(prompt, response):\n    return len(response.split()) % 3\n")
    flags = ["--models", f"{world['one']},{world['two']}", "--reference", world["one"], "--data", world["data"], "--samples", 3,
             "--max_new_tokens", 4, "--reward", f"{tmp_path}/judge.py:judge"]

    def heading(*more):
        record = run(*flags, *more)
        measured = {name for row in record["results"] for name in row["metrics"]}
        return cells_of((tmp_path / "out/table.md").read_text())[0], measured
    head, measured = heading()
    assert head == ["model", "subset", "n", "accuracy %", "reward", "equal length %", "tokens", "KL"] and len(measured) > 12
    assert heading("--columns", "all")[0] == head[:3] + [text for name, text in evaluate.COLUMNS.items() if name in measured]
    assert heading("--columns", "kl,gain")[0] == head[:3] + ["KL", "gain %"]
    for wrong in ("kl,win_rate", "all,kl", "kl,"):
        with pytest.raises(SystemExit, match=f"^error: --columns {wrong} are not all metrics; there are: .*win/length"):
            run(*flags, "--columns", wrong)


def test_a_metric_that_is_added_to_pair_metrics_reaches_the_table_and_the_file(run, world, tmp_path, monkeypatch):
    """As the docstring of evaluate.py says: values there, and a heading in COLUMNS."""
    pair_metrics = evaluate.pair_metrics
    monkeypatch.setattr(evaluate, "pair_metrics", lambda logps, *more: pair_metrics(logps, *more) | {"worst": logps.min(1)})
    monkeypatch.setitem(evaluate.COLUMNS, "worst", "worst of both")
    record = run("--models", world["one"], "--data", world["data"], "--columns", "worst")
    mean, error = means(record, world["one"])["worst"]
    assert [mean, error] == pytest.approx(by_hand(hf_logps(world["one"], world["pairs"]).min(1).tolist()), abs=1e-4)
    head, _, row, *_ = cells_of((tmp_path / "out/table.md").read_text())
    assert head[3:] == ["worst of both"] and row[3:] == [f"{mean:.2f} ± {error:.2f}"]


def test_answers_to_three_prompts_stand_side_by_side(run, world, tmp_path):
    record = run("--models", f"{world['one']},{world['two']}", "--data", world["data"], "--samples", 5, "--max_new_tokens", 9)
    text = (tmp_path / "out/samples.md").read_text()
    assert text in record["printed"]
    answers = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    prompts = re.findall("^> (.*)$", text, re.M)
    assert prompts == [answer["prompt"] for answer in answers[:3]]
    rows = [row for row in cells_of(text) if row[0] in (world["one"], world["two"])]
    expected = [(answer["model"], answer["response"]) for i in range(3) for answer in (answers[i], answers[5 + i])]
    assert [tuple(row[:2]) for row in rows] == expected


def write_run(folder, shift=0.0):
    folder.mkdir()
    (folder / "args.json").write_text("{}")
    lines = []
    for step in range(0, 60, 10):
        value = {"loss": 0.7 - step / 100, "rewards/accuracies": 0.5 + step / 200 - shift,
                 "rewards/margins": step / 50 + shift, "logps/chosen": -80 - step * shift}
        evals = {f"eval/{key}": x for key, x in value.items()}
        lines += [{"step": step} | evals] * (step % 20 == 0)
        lines += [{"step": step} | value] * (step > 0)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text + '{"step": 60, "lo')  # killed while writing
    return folder


def test_plot_draws_the_logs_of_runs_without_data_or_models(run, tmp_path):
    pytest.importorskip("matplotlib")
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", 0.1)
    record = run("--models", f"{one},{two},some/model", "--plot", tmp_path / "plots/p.png")
    assert (tmp_path / "plots/p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"{one}, {two}" in record["printed"] and "results" not in record


def test_the_curves_of_a_plot_differ_without_colour(run, tmp_path, monkeypatch):
    """Nine runs: no two have the same marker and kind of line, and every line has markers."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(evaluate, "curve_of", evaluate.curve_of)
    close = pyplot.Figure.savefig
    monkeypatch.setattr(pyplot.Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), close(figure, *a, **k))[1])
    runs = [str(write_run(tmp_path / f"run{i}", i / 100)) for i in range(9)]
    run("--models", ",".join(runs), "--plot", tmp_path / "p.png")
    figure, = drawn
    assert len(figure.axes) == 4
    for ax in figure.axes:
        styles = [(line.get_marker(), line.get_linestyle()) for line in ax.lines]
        assert len(set(styles)) == len(styles) == 9 and all(marker in "osD^vP*X<>" for marker, _ in styles)
        assert [text.get_text() for text in ax.get_legend().get_texts()] == runs


def test_a_run_folder_means_its_final_model(run, world, tmp_path):
    folder = write_run(tmp_path / "run")
    shutil.copytree(world["two"], folder / "final")
    record = run("--models", f"{world['two']},{folder}", "--data", world["data"])
    assert means(record, str(folder))["margin"] == means(record, world["two"])["margin"]


def test_a_lora_adapter_is_a_model(run, world, tmp_path):
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(world["one"])
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    transformers.AutoTokenizer.from_pretrained(world["one"]).save_pretrained(tmp_path / "adapter")
    run("--models", f"{world['one']},{tmp_path}/adapter", "--data", world["data"])
    with np.load(tmp_path / "out/logps.npz") as stored:
        truth = hf_logps(tmp_path / "adapter", world["pairs"])
        np.testing.assert_allclose(stored["logps"][1], truth, atol=2e-4)
        assert np.abs(truth - stored["logps"][0]).max() > 0.1


# ---- samples


@pytest.mark.parametrize("temperature", [0, 1])
def test_samples_are_those_of_generate_and_the_reward_function_scores_their_texts(
        temperature, run, world, tmp_path):
    (tmp_path / "my.py").write_text("def score(prompt, response):\n"
                                    "    return len(prompt.split()) - len(response.split())\n")
    record = run("--models", f"{world['one']},{world['two']}", "--data", world["data"],
                 "--samples", 5, "--max_new_tokens", 20, "--temperature", temperature,
                 "--max_tokens", 50,
                 "--reward", f"{tmp_path}/my.py:score")
    lines = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [line["model"] for line in lines] == [world["one"]] * 5 + [world["two"]] * 5
    assert [line["id"] for line in lines[:5]] == [line["id"] for line in lines[5:]]  # same prompts
    tokenizer = transformers.AutoTokenizer.from_pretrained(world["one"])
    for name in ("one", "two"):
        mine = [line for line in lines if line["model"] == world[name]]
        found = means(record, world[name])
        for heading, key in dict(length="tokens", ended="ended", reward="reward").items():
            assert found[heading] == pytest.approx(by_hand([line[key] for line in mine])), heading
        for line in mine:
            assert line["reward"] == len(line["prompt"].split()) - len(line["response"].split())
            assert line["ended"] or line["tokens"] == 20
            prompt = next(pair["prompt"] for pair in world["pairs"] if pair["id"] == line["id"])
            assert line["prompt"] == tokenizer.decode(prompt, skip_special_tokens=True)
            if temperature == 0:  # the truth: one prompt at a time, no padding, no cache, argmax
                assert line["response"] == greedy(world[name], prompt, world["pairs"], tokenizer)


def greedy(folder, prompt, pairs, tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = list(prompt)
    while len(ids) < len(prompt) + 20:
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] in (2, pairs[0]["chosen"][-1]):  # tokenizer's end, data's end of turn
            break
    return tokenizer.decode(ids[len(prompt):], skip_special_tokens=True)


def test_a_prompt_that_several_pairs_share_is_sampled_once(run, tiny_model, tiny_data, tmp_path):
    pairs, model = random_pairs(SIZES[:4]), tiny_model("llama", 0)
    pairs = [pair | {"id": f"{pair['id']}-{i}"} for i in range(3) for pair in pairs]
    record = run("--models", model, "--data", tiny_data(model, pairs, pairs), "--samples", 100,
                 "--max_new_tokens", 2)
    assert len((tmp_path / "out/samples.jsonl").read_text().splitlines()) == 4
    assert record["results"][0]["pairs"] == 12


# ---- what users get wrong


def prepare_mistake(mistake, world, tmp_path):
    """Flags that hold one mistake."""
    flags = {"models": world["one"], "data": world["data"], "max_new_tokens": 2}
    results = {"none": "None", "word": "'good'", "nan": "float('nan')", "boom": "1 / 0"}
    (tmp_path / "r.py").write_text("".join(
        f"def {name}(prompt, response): return {value}\n" for name, value in results.items()) + "constant = 3\n")
    if isinstance(mistake, dict):
        flags |= mistake
    elif mistake == "unfinished run":
        flags["models"] = write_run(tmp_path / "run")
    elif mistake == "other tokenizer":
        shutil.copytree(world["data"], tmp_path / "data")
        meta = json.loads((tmp_path / "data/meta.json").read_text()) | {"vocab_hash": "0" * 16}
        (tmp_path / "data/meta.json").write_text(json.dumps(meta))
        flags["data"] = tmp_path / "data"
    elif mistake == "empty split":
        import datasets
        shutil.copytree(world["data"], tmp_path / "data")
        rows = datasets.load_from_disk(world["data"] + "/val")
        rows.select([]).save_to_disk(str(tmp_path / "data/none"))
        meta = json.loads((tmp_path / "data/meta.json").read_text())
        (tmp_path / "data/meta.json").write_text(json.dumps(meta))
        flags |= {"data": tmp_path / "data", "split": "none"}
    elif mistake == "meta.json without the tokenizer":
        shutil.copytree(world["data"], tmp_path / "data")
        (tmp_path / "data/meta.json").write_text("{}")
        flags["data"] = tmp_path / "data"
    elif mistake == "rows without id":
        import datasets
        shutil.copytree(world["data"], tmp_path / "data")
        rows = datasets.load_from_disk(world["data"] + "/val").remove_columns(["id"])
        rows.save_to_disk(str(tmp_path / "data/other"))
        flags |= {"data": tmp_path / "data", "split": "other"}
    elif mistake == "no model":
        shutil.copytree(world["one"], tmp_path / "model")
        (tmp_path / "model/config.json").write_text("{}")
        (tmp_path / "model/model.safetensors").unlink()
        flags["models"] = tmp_path / "model"
    elif mistake == "weights that are not finite":
        model = tiny_hf_model("llama")
        model.lm_head.weight.data[3] = float("nan")
        model.save_pretrained(tmp_path / "model")
        transformers.AutoTokenizer.from_pretrained(world["one"]).save_pretrained(tmp_path / "model")
        flags["models"] = tmp_path / "model"
    elif mistake == "a file in the way":
        (tmp_path / "file").write_text("")
        flags["out"] = tmp_path / "file/x"
    else:
        flags |= {"samples": 2, "reward": f"{tmp_path}/{mistake}"}
    return [str(x) for key, value in flags.items() if value != "drop" for x in (f"--{key}", value)]


MISTAKES = [
    ({"models": "no/such/folder"}, ["no/such/folder"]),
    ({"models": " , "}, ["nothing to do", "--models"]),
    ({"data": "no/data"}, ["no/data", "prepare_data.py"]),
    ({"data": "drop"}, ["nothing to do", "--data", "--plot"]),
    ({"split": "test"}, ["test", "prepare_data.py"]),
    ({"max_tokens": 0}, ["--max_tokens 0", "above 0"]),
    ({"dtype": "float16"}, ["--dtype", "bfloat16"]),
    ({"models": "a;" * 200}, ["name too long", "run the same command again"]),
    ({"plot": "x.png"}, ["--plot x.png", "log.jsonl", "--reference"]),
    ({"reward": "my.py:score", "data": "drop", "plot": "x.png"}, ["my.py:score", "--data"]),
    ({"best_of": 4, "samples": 2}, ["--best_of 4", "--reward"]),
    ("unfinished run", ["run", "final/", "--resume"]),
    ("other tokenizer", ["another model", "prepare_data.py"]),
    ("empty split", ["--data", "prepare_data.py"]),
    ("meta.json without the tokenizer", ["--data", "vocab_hash", "prepare_data.py"]),
    ("rows without id", ["--data", "--split other", "'id'", "prepare_data.py"]),
    ("no model", ["model", "causal language model"]),
    ("weights that are not finite", ["pair-", "not finite"]),
    ("a file in the way", ["--out", "cannot write"]),
    ("r.py", ["r.py", "FILE.py:FUNCTION"]),
    ("missing.py:score", ["missing.py:score", "FILE.py:FUNCTION"]),
    ("r.py:missing", ["r.py:missing", "FILE.py:FUNCTION"]),
    ("r.py:constant", ["r.py:constant", "FILE.py:FUNCTION", "no function"]),
    ("r.py:none", ["number", "pair-"]),
    ("r.py:word", ["number", "could not convert"]),
    ("r.py:nan", ["number", "not finite"]),
    ("r.py:boom", ["pair-", "ZeroDivisionError"])]


@pytest.mark.parametrize("mistake, words", MISTAKES, ids=str)
def test_a_mistake_ends_in_one_line_that_names_it(mistake, words, run, world, tmp_path):
    if "plot" in mistake:
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as stop:
        run(*prepare_mistake(mistake, world, tmp_path))
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message
    for word in words:
        assert word in message, message


def test_a_last_model_that_is_none_is_told_before_the_first_one_runs(run, world, tmp_path):
    (tmp_path / "runs").mkdir()
    for flags in ["--models", f"{world['one']},{tmp_path}/runs"], ["--models", world["one"], "--reference", tmp_path / "runs"]:
        with pytest.raises(SystemExit, match=f"^error: {tmp_path}/runs is no model, run or checkpoint"):
            run(*flags, "--data", world["data"])
        assert not (tmp_path / "out/logps.npz").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("name", ["samples.jsonl", "logps.npz"])
def test_the_table_is_printed_even_if_the_disk_was_full_after_the_first_model(name, run, world, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="^error: cannot write .*No space"):
        run("--models", f"{world['one']},{world['two']}", "--data", world["data"], "--samples", 2, "--max_new_tokens", 2)
    assert f"| {world['two']} " in capsys.readouterr().out


@pytest.mark.parametrize("package, flags", [("matplotlib", ["--plot", "x.png"]), ("peft", [])])
def test_a_missing_optional_package_is_named(package, flags, run, world, tmp_path, monkeypatch):
    shutil.copytree(world["one"], tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    (tmp_path / "model/adapter_config.json").write_text(json.dumps(dict(base_model_name_or_path=world["one"])))
    find = evaluate.importlib.util.find_spec
    monkeypatch.setattr(evaluate.importlib.util, "find_spec",
                        lambda name: find(name) if name != package else None)
    with pytest.raises(SystemExit, match=f"pip install {package}"):
        run("--models", tmp_path / "model", "--data", world["data"], *flags)


# ---- several processes


@pytest.mark.torchrun
def test_two_processes_find_the_numbers_of_one(run, world, tmp_path):
    (tmp_path / "judge.py").write_text("def judge(prompt, response):\n    return len(response.split()) % 3\n")
    flags = ["--models", f"{world['one']},{world['two']}", "--data", world["data"], "--samples", 5, "--reference", world["one"],
             "--max_new_tokens", 8, "--max_tokens", 40, "--dtype", "float32", "--reward", f"{tmp_path}/judge.py:judge", "--best_of", 2]
    one = run(*flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "evaluate.py", *flags, "--out", tmp_path / "two"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    two = json.loads((tmp_path / "two/evaluation.json").read_text())
    assert two["ranks"] == 2
    for a, b in zip(one["results"], two["results"]):
        for name in a["metrics"]:
            assert a["metrics"][name] == pytest.approx(b["metrics"][name], abs=1e-4), name
    texts = [(tmp_path / name / "samples.md").read_text() for name in ("out", "two")]
    assert texts[0] == texts[1]


def test_only_the_first_process_waits_for_a_judge(world, process_group, tmp_path, monkeypatch):
    """Others that waited gave up after half an hour, and then torchrun ended the first one too."""
    (tmp_path / "r.py").write_text("def score(prompt, response): raise AssertionError('called')\n")
    argv = ["evaluate.py", "--models", world["one"], "--data", world["data"], "--reward", f"{tmp_path}/r.py:score",
            "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    monkeypatch.setattr(evaluate, "start_process_group", lambda dtype: (1, 2, torch.device("cpu"), torch.float32))
    ended = []
    monkeypatch.setattr(evaluate.dist, "destroy_process_group", lambda: ended.append(True))
    evaluate.main()
    assert ended and not list((tmp_path / "out").iterdir())


def test_a_model_is_not_spread_by_several_processes(run, world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="^error: --spread wants a single process"):
        run("--models", world["one"], "--data", world["data"], "--spread")


def test_blanks_and_slashes_around_the_names_of_models_do_not_matter(run, world):
    record = run("--models", f" {world['one']}/, {world['two']}", "--data", world["data"], "--samples", 2, "--max_new_tokens", 2)
    assert [means(record, world[name])["length"][0] > 0 for name in ("one", "two")] == [True, True]


def test_a_model_that_accelerate_has_placed_gives_the_same_numbers(run, world):
    pytest.importorskip("accelerate")
    flags = ["--models", world["one"], "--data", world["data"], "--samples", 3, "--max_new_tokens", 4]
    assert run(*flags, "--spread")["results"] == run(*flags)["results"]


def test_soft_caps_are_in_the_attention_of_every_version_of_transformers(tiny_model, monkeypatch):
    """Before 5.23, Gemma-2's default was SDPA, which left out the cap; so eager attention is asked for."""
    asked = []
    monkeypatch.setattr(transformers.PreTrainedModel, "set_attn_implementation", lambda model, name: asked.append(name))
    for family in ("gemma2", "llama"):
        args = evaluate.Args(models=tiny_model(family), data="")
        evaluate.load_model(args.models, args, torch.float32, torch.device("cpu"))
    assert asked == ["eager"]
