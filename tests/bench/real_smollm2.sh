#!/usr/bin/env bash
# All algorithms on four kinds of real pairs, at equal tokens, SmolLM2-135M-Instruct; ends in results/real_smollm2/table.md.
#   PYTHON=... tests/bench/real_smollm2.sh SHARED MODEL    (SHARED/data as its README says; MODEL: a folder of SmolLM2-135M-Instruct)
# One mixture, as such models are trained: polite answers, harmless dialogues, ARC and MMLU-Pro with one wrong option each, of
# at most 384 tokens; 343 pairs to train on, 286 to evaluate, the subset says which. On two cores this takes about two hours.
set -euo pipefail
cd "$(dirname "$0")/../.."
shared=$1 model=$2 python=${PYTHON:-python} data=data/real_smollm2 out=out/real_smollm2
mkdir -p "$data-raw" "$out"
[ -e "$data/meta.json" ] || "$python" - "$shared/data" "$data-raw" <<'PY'
import gzip, json, pathlib, random, sys
source, folder = map(pathlib.Path, sys.argv[1:])
kinds = dict(polite=["instruction_preference.jsonl"], harmless=["raw/hh_harmless_test.jsonl.gz"],
             arc=["mc/arc_easy_val.jsonl", "mc/arc_challenge_val.jsonl"], mmlu_pro=["mc/mmlu_pro_sample.jsonl"])
for name, files in kinds.items():
    rows = [json.loads(line) for file in files
            for line in (gzip.open if file.endswith("gz") else open)(source / file, "rt")]
    short = [row for row in rows if len(json.dumps(row)) < dict(harmless=1200, mmlu_pro=900).get(name, 10**6)]
    rows = random.Random(0).sample(short, dict(polite=208, harmless=108, arc=208, mmlu_pro=108)[name])
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row | dict(subset=name)) + "\n" for row in rows))
PY
files=$(echo "$data-raw"/{polite,harmless,arc,mmlu_pro}.jsonl | tr ' ' ,)
[ -e "$data/meta.json" ] || "$python" prepare_data.py --dataset "$files" --model "$model" --out "$data" \
  --wrong_options one --max_length 384 --val_fraction 0.44
"$python" cache_ref.py --model "$model" --data "$data" --max_tokens 2048 --sketch_dim 1024
"$python" cache_ref.py --model "$model" --data "$data" --max_tokens 2048 --noise_margin 3
flags="--model $model --learning_rate 5e-5 --max_tokens 2048 --eval_every 0 --log_every 1 --save_every 4 --resume"
for name in dpo simpo dpo_norm wpo; do
  [ -d "$out/$name/final" ] || "$python" "$name.py" $flags --data "$data" --out "$out/$name"
done
[ -d "$out/auxdpo/final" ] || "$python" auxdpo.py $flags --data "$data" --out "$out/auxdpo" --sketch_dim 1024
[ -d "$out/clean/final" ] || "$python" dpo.py $flags --data "$data/clean" --out "$out/clean"
[ -d "$out/compo/final" ] || "$python" compo.py --model "$out/clean/final" --data "$data/noisy" --out "$out/compo" \
  --max_tokens 2048 --eval_every 0 --save_every 10 --resume
