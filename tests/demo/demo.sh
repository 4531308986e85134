# ./launch.sh demo: a world is made, every algorithm is trained in it, and what came out is shown.
# launch.sh reads this file; say, fail, dry, run and environment are its own.

demo() {  # [--only SCRIPT.py] [--also LOSS,LOSS] [FLAGS of tests/demo/demo_world.py]
  local only="" also="" names="dpo dpo_norm simpo wpo auxdpo clean compo" shown name
  local what part script text flags tag seed world out data base log model models curves=""
  local number=0 total began others=()
  while [ $# -gt 0 ]; do
    case $1 in
      --only) only=${2:-}; shift 2 || fail "--only needs a script" ;;
      --also) also=${2:-}; shift 2 || fail "--also needs losses of tests/losses: ipo,dpop" ;;
      --only=*|--also=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
      *) others+=("$1"); shift ;;
    esac
  done
  set -- ${others[@]+"${others[@]}"}
  also=${also//,/ }
  [ -z "$only" ] || [ -f "$only" ] || fail "there is no script $only; there are: $(echo *.py)"
  # a world of other flags has folders of its own
  tag=$(printf %s "$*" | tr -cs '[:alnum:].' -)
  seed=$(sed -n 's/.*--seed[ =]\([0-9]*\).*/\1/p' <<<"$*")
  world=data/demo_world$tag out=out/demo$tag
  data=$world/pairs base=$world/base models=$world/base log=$out/demo.log
  environment requirements.txt requirements-dev.txt
  for name in $also; do "$python" tests/losses/fork.py "$name" >/dev/null || exit 1; done
  export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1  # more threads would only wait for each other
  step() {  # SENTENCE SCRIPT ARGS: what the script says goes to the log
    number=$((number + 1)) began=$SECONDS
    echo "$number of $total: $1" >&2
    if dry; then run "$python" "${@:2}"; return; fi
    "$python" "${@:2}" >>"$log" 2>&1 &
    trap 'kill -TERM $!; wait $!; exit 143' TERM INT HUP  # no process is left behind
    wait $! || fail "$(tail -n 1 "$log"); all of it is in $log"
    echo "    $((SECONDS - began)) s" >&2
  }
  [ -z "$only" ] || names=$(basename "${only%.py}")
  names="$names $also"
  total=$(($(wc -w <<<"$names") + 2))  # and two evaluations
  if [ -z "$only" ] || [ ! -e "$data/meta.json" ]; then
    total=$((total + 3))
    run rm -rf "$world" "$out"; run mkdir -p "$out"
    step "a small world, and a model that knows its language" \
      tests/demo/demo_world.py --out "$world" "$@"
    step "pairs of its answers become tokens" prepare_data.py \
      --dataset "$world/pairs.jsonl" --model "$base" --out "$data" --val_fraction 0.2
    step "log-probs and gradient sketches of the untrained model" cache_ref.py \
      --model "$base" --data "$data" --sketch_dim 1024 --noise_margin 0.5
  fi
  for name in $names; do
    flags=(--learning_rate 5e-4 --log_every 5 --eval_every 10 --save_every 15 --keep 9)
    part=$data script=${only:-$name.py} what="" model=$base text=""
    case $name in
      clean) script=dpo.py part=$data/clean what=" on the clean pairs" ;;
      compo) part=$data/noisy what=" on the noisy pairs" model=$out/clean/final flags=() ;;
      orpo) flags+=(--beta 0.1) ;;  # it goes into simpo.py, whose default is another loss's
      robust) flags+=(--label_smoothing 0.1) ;;  # with 0 it would be DPO
    esac
    case " $also " in *" $name "*)
      script=$out/$name.py text=$("$python" tests/losses/fork.py "$name")
      dry || printf '%s\n' "$text" >"$script" ;;
    esac
    text=${text:-$(cat "$script")}
    ! grep -q 'gamma_beta_ratio: ' <<<"$text" || flags[1]=3e-4
    ! grep -q 'sketch_dim: ' <<<"$text" || flags+=(--sketch_dim 1024)
    ! grep -q ' beta: float = 0\.' <<<"$text" || flags+=(--beta 0.5)
    run rm -rf "$out/$name"
    step "${script##*/} trains a model$what" "$script" --model "$model" --data "$part" \
      --out "$out/$name" --seed "${seed:-0}" ${flags[@]+"${flags[@]}"}
  done
  shown="dpo dpo_norm simpo wpo auxdpo clean compo $names"
  for name in "$out"/*/final; do  # what earlier calls have trained
    [ ! -e "$name" ] || shown+=" $(basename "${name%/final}")"
  done
  for name in $shown; do
    case ",$models," in *",$out/$name,"*|*",$out/$name/final,"*) continue ;; esac
    dry || [ -d "$out/$name/final" ] || continue
    case $name in clean|compo) models+=,$out/$name/final ;; *) models+=,$out/$name ;; esac
  done
  for name in "$out"/*/step-*; do [ ! -e "$name" ] || curves+=,$name; done  # of short runs: none
  flags=(--reference "$base" --data "$data" --samples 400 --reward tests/demo/demo_world.py:true_reward)
  step "answers on the way are sampled, and curves drawn" evaluate.py --models "$models$curves" \
    --out "$out/curves" "${flags[@]}" --best_of 16 --plot "$out/plot.png"
  step "answers at the end are sampled and judged" evaluate.py --models "$models" --out "$out" \
    --columns all "${flags[@]}"
  run "$python" tests/demo/demo_summary.py "$out"
  echo "The picture is $out/plot.png, all figures are in $out/table.md," >&2
  echo "and what was printed is in $log." >&2
}
