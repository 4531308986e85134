#!/usr/bin/env bash
# ./launch.sh demo [FLAGS]        a small world of known reward: all algorithms, table and plot;
#                                 --also ipo,dpop adds losses of tests/losses; --only mine.py puts a
#                                 fork beside the others; --seed 1 and the like make another world
# ./launch.sh test [PYTEST ARGS]  all tests, the fast ones first
# ./launch.sh SCRIPT.py [ARGS]    a script on every GPU of this node, or of several nodes (below);
#                                 cache_ref.py runs before it if it needs the reference's log-probs;
#                                 on GPUs, --max_tokens is the largest that fits, unless it is given
# ./launch.sh recipe [NAME]       lists published recipes; prints the commands of one; with --run
#                                 [FLAGS] runs them, FLAGS added to the training
# ./launch.sh plan MODEL [FLAGS]  GiB and FLOPs per rank, from config.json alone (plan --help)
# ./launch.sh install             the environment only
# Relative paths count from this folder, wherever launch.sh is called from. Variables:
#   PYTHON   interpreter [python3]; if it has the packages (a ROCm or CUDA container, an activated
#            environment), nothing is installed; else it makes .venv
#   TORCH    which torch to install: TORCH=torch==2.13.0; PIP_INDEX_URL and the like work too
#   NPROC    processes on this node [one per visible GPU, or one]
#   RESTARTS how often torchrun starts all processes again after one died; add --resume [0]
#   DRY_RUN  1 = print the commands instead of running them
# Several nodes: run the same command once on each. Under SLURM
#   srun --ntasks-per-node=1 ./launch.sh dpo.py --model MODEL --data data/NAME
# elsewhere set NNODES, MASTER_ADDR (the first node) and NODE_RANK (0, 1, ...; without it the nodes
# number themselves). MASTER_PORT [29500] and the port after it must be free on the first node.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")"  # also if it was called through a link
say() { echo "[launch, $SECONDS s] $*" >&2; }
fail() { echo "error: $*" >&2; exit 1; }
dry() { [ "${DRY_RUN:-0}" != 0 ]; }
run() {  # COMMAND: run it, or print it
  if ! dry; then "$@"; return; fi
  echo ${OMP_NUM_THREADS:+"OMP_NUM_THREADS=$OMP_NUM_THREADS"} "$(printf '%q ' "$@")"
}

# ---- environment
has() {  # PYTHON FILE...: are the packages of these requirement files there, and $TORCH?
  "$1" -c 'import os, sys; from importlib.metadata import version
from packaging.requirements import Requirement
lines = [line.split("#")[0].strip() for path in sys.argv[1:] for line in open(path)]
for need in map(Requirement, filter(None, lines + [os.environ.get("TORCH")])):
    assert need.specifier.contains(version(need.name), prereleases=True)' "${@:2}" 2>/dev/null
}
environment() {  # FILE...: sets python
  local file files=() site=""
  python=$(command -v "${PYTHON:-python3}" || command -v "${PYTHON:-python}") ||
    fail "no ${PYTHON:-python3} here; install Python 3.10 or newer, or name one: PYTHON=PATH"
  if has "$python" "$@"; then return; fi
  local base=$python; python=$PWD/.venv/bin/python
  if [ -e .venv/complete ] && has "$python" "$@"; then return; fi
  [ "${nnodes:-1}" = 1 ] || fail "packages are missing: first ./launch.sh install on each node"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$base is older than Python 3.10; name a newer one: PYTHON=PATH"
  say "installing $* into .venv: once, about 2 minutes; 6 GB if torch comes with CUDA"
  if has "$base" <(grep '^torch' requirements.txt); then site=1; fi  # a torch to keep
  for file; do files+=(-r "$file"); done
  run rm -f .venv/complete  # an interrupted installation is completed by the next call
  run "$base" -m venv ${site:+--system-site-packages} .venv ||
    fail "$base makes no virtual environment; on Debian: apt install python3-venv"
  run "$python" -m pip install -qq --disable-pip-version-check ${TORCH:+"$TORCH"} "${files[@]}" ||
    fail "the installation broke off, see above; the same command continues it"
  run touch .venv/complete
}

# ---- where a script runs
whole() {  # NAME VALUE LEAST MOST
  [[ $2 =~ ^(0|[1-9][0-9]{0,4})$ && $2 -ge $3 && $2 -le $4 ]] ||
    fail "$1=$2 must be a whole number from $3 to $4"
}
nodes() {  # sets nnodes, node_rank (empty: not known) and, for more than one node, MASTER_ADDR
  nnodes=${NNODES:-${SLURM_NNODES:-1}} node_rank=${NODE_RANK:-${SLURM_NODEID:-}}
  whole NNODES "$nnodes" 1 9999; whole NODE_RANK "${NODE_RANK:-0}" 0 $((nnodes - 1))
  whole MASTER_PORT "${MASTER_PORT:-29500}" 1 65534; whole RESTARTS "${RESTARTS:-0}" 0 9999
  [[ ${SLURM_LOCALID:-0} = 0 || ${NNODES:-} = 1 ]] ||
    fail "one task per node is enough: srun --ntasks-per-node=1 (NNODES=1: each is its own run)"
  if [ "$nnodes" = 1 ]; then return; fi
  MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null |
    sed -n 1p || true)}
  [ "$MASTER_ADDR" ] || fail "NNODES=$nnodes needs MASTER_ADDR, the name of the first node"
}
command_line() {  # PORT_OFFSET SCRIPT ARGS: sets line
  local host=${MASTER_ADDR:-} port=$((${MASTER_PORT:-29500} + $1)) meet
  meet=(--node_rank "$node_rank" --master_addr "$host" --master_port "$port")
  [ "$node_rank" ] ||
    meet=(--rdzv_backend c10d --rdzv_id "${SLURM_JOB_ID:-0}" --rdzv_endpoint "$host:$port")
  [ "$nnodes" != 1 ] || meet=(--standalone)
  line=("$python")  # without torchrun an error stays one line
  [ "$nnodes $nproc ${RESTARTS:-0}" = "1 1 0" ] ||
    line+=(-m torch.distributed.run --nnodes "$nnodes" --nproc_per_node "$nproc" "${meet[@]}"
      ${RESTARTS:+--max_restarts "$RESTARTS"})
  line+=("${@:2}")
}
start() { dry || exec "$@"; run "$@"; }  # exec: signals reach the process
check_flags() {  # SCRIPT ARGS: a wrong flag shows now, not after an hour or once per process
  if dry || ! grep -q 'parse_args(Args)' "$1"; then return; fi
  "$python" -c 'import importlib.util, sys
spec = importlib.util.spec_from_file_location("script", sys.argv[1])
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
del sys.argv[0]; script.parse_args(script.Args)' "$@"
}
reference_flags() {  # ARGS: sets model, data, dtype, and flags, which are for cache_ref.py
  local flag name value words settings reference=""
  model="" data="" dtype=auto flags=()
  settings=" $(sed -n '/^class Args/,/^[^ ]/s/^    \([a-z_]*\): .*/\1/p' cache_ref.py | xargs) "
  while [ $# -gt 0 ]; do
    words=("$1") flag=${1%%=*} value=${1#*=}  # --flag=value
    if [ "$flag" = "$1" ] && [ $# -gt 1 ] && [[ $2 != --* ]]; then  # --flag value
      words+=("$2") value=$2; shift
    fi
    shift
    name=${flag#--} name=${name//-/_}  # the scripts take --max-tokens for --max_tokens
    case $name in model|reference|data|dtype) printf -v "$name" %s "$value" ;; esac
    case $settings in *" $name "*) flags+=("${words[@]}") ;; esac
  done
  [ -z "$reference" ] || { model=$reference; flags+=(--model "$model"); }  # the last one counts
}
# cache_ref.py must read the model to know that its cache is complete, so it is left out where there
# is no doubt: a folder --model has a cache in this precision, younger than it and than the data.
cached() {  # after reference_flags; sketches are not looked at
  local meta
  if [ "$dtype" = auto ]; then dtype=float32; [ "$gpus" = 0 ] || dtype=bfloat16; fi
  meta=$(grep -lF --null "\"model\": \"$model\"" "$data"/ref-*/meta.json |
    xargs -0 grep -lF "\"dtype\": \"$dtype\"" | sed -n 1p)
  [ -z "$sketch" ] && [ "$nnodes" = 1 ] && [ -d "$model" ] && [ "$meta" ] &&
    [ -z "$(find -L "$model" "$data"/{meta.json,train,val} -newercm "$meta" 2>&1)" ]
} 2>/dev/null
script() {  # SCRIPT ARGS
  local first=0 gpus cores sketch
  [[ -f $1 && -f cache_ref.py ]] || fail "there is no script $1 or cache_ref.py in: $(echo *.py)"
  case "$* " in prepare_data.py*|*" -h "*|*" --help "*) NNODES=1 NODE_RANK=0 NPROC=1 ;; esac
  nodes; environment requirements.txt
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null || echo 0)
  whole NPROC "${NPROC:-1}" 1 $((gpus ? gpus : 9999)); nproc=${NPROC:-$((gpus ? gpus : 1))}
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
  # seconds for a checkpoint on SIGTERM; before torch 2.13, torchrun always kills after 30
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else restarted processes hang (torch 2.13)
  if grep -q 'AdamW(' "$1" && [ "$gpus" != 0 ]; then
    set -- "$@" $("$python" tests/bench/plan.py --training $((nproc * nnodes)) "${@:2}")
  fi
  reference_flags "${@:2}"
  sketch=$(sed -n 's/^    sketch_dim: int = \([1-9][0-9]*\) .*/\1/p' "$1")  # default, if any
  case "$* " in *"--geometry"[\ =]"ridge "*) sketch="" ;; esac  # this needs none
  [ -z "$sketch" ] || flags=(--sketch_dim "$sketch" "${flags[@]}")
  if grep -q 'load_reference(' "$1" && [ "$model" ] && [ "$data" ] && ! cached; then first=1; fi
  # One process that starts at once checks its own flags, and needs no other that does.
  [ "$first $nproc $nnodes" = "0 1 1" ] || check_flags "$@"
  if [ "$first" = 1 ]; then
    say "cache_ref.py runs first: $1 needs the log-probs of the reference $model on $data"
    command_line 1 cache_ref.py "${flags[@]}"; start "${line[@]}" &
    trap 'kill -TERM $! 2>/dev/null; wait $! || true; exit 143' TERM INT HUP; wait $! || exit $?
  fi
  [ "$nnodes" = 1 ] || say "node ${node_rank:-?} of $nnodes: starts when all run this command"
  command_line 0 "$@"; start "${line[@]}"
}

# ---- published recipes: tests/recipes.txt
field() { sed -n "/^recipe *$1\$/,/^\$/{/^$2 /s/^.\{8\}//p}" tests/recipes.txt; }  # NAME KEY: value
recipe_commands() {  # NAME: sets prepare and train, as text
  local name=$1 first model compo key=train data=data/$1 out=out/$1
  first=$(field "$name" first) model=$(field "$name" model) compo=$(field "$name" compo)
  [ -z "$(field "$name" clean)" ] || key=clean data=data/$name/clean
  [ -z "$compo" ] || out=out/$name-$key
  prepare="${first:+$first
}[ -d data/$name ] ||
  ./launch.sh prepare_data.py --model $model \\
    --dataset $(field "$name" data) --out data/$name \\
    $(field "$name" prepare)"
  train="./launch.sh $(field "$name" $key) \\
    --model $model \\
    --data $data --out $out \\
    $(field "$name" steps) \\
    --activation_checkpointing full --save_every 100 --resume"
  if [ -z "$compo" ]; then return; fi
  # This was the first stage. The data is split before it, and compo.py trains after it.
  prepare="$prepare
[ -d data/$name/clean ] ||
  ./launch.sh cache_ref.py --model $model \\
    --data data/$name --noise_margin 3
[ -d $out/final ] ||
  $train"
  train="./launch.sh compo.py --model $out/final \\
    --data data/$name/noisy --out out/$name \\
    $compo --save_every 10 --resume"
}
recipe() {  # [NAME [--run [FLAGS]]]
  local name=${1:-} names prepare train
  names=$(sed -n 's/^recipe  *//p' tests/recipes.txt)
  case $name in ""|-*)
    for name in $names; do
      printf '%-22s %s <- %s: %s\n' "$name" "$(field "$name" model)" "$(field "$name" data)" \
        "$(field "$name" train)$(field "$name" clean)"  # it has one of the two
    done
    return ;; esac
  grep -qxF -e "$name" <<<"$names" || fail "there is no recipe $name; there are:" $names
  recipe_commands "$name"
  case ${2:-} in
    "") echo "$prepare"; echo "$train" ;;
    --run) nodes; environment requirements.txt; PATH=$(dirname "$python"):$PATH  # for hf
      if dry; then hf() { echo hf "$@"; }; export -f hf; fi
      [ "$nnodes" = 1 ] || [ -d "data/$name" ] || fail "first, on one node:" ${prepare//\\/}
      # the stages before the last are a process group, so that SIGTERM reaches all of it
      set -m; bash -euc "trap : TERM; $prepare" & set +m
      trap 'kill -TERM -- -$!; wait $!; exit 143' TERM INT HUP; wait $! || exit $?
      exec bash -euc "exec $train \"\$@\"" launch "${@:3}" ;;
    *) fail "$2 is not --run" ;;
  esac
}

case ${1:-} in
  demo) . tests/demo/demo.sh; demo "${@:2}" ;;
  test) environment requirements.txt requirements-dev.txt
    export HF_HUB_OFFLINE=1; start "$python" -m pytest tests "${@:2}" ;;
  recipe) recipe "${@:2}" ;;
  plan) environment requirements.txt; start "$python" tests/bench/plan.py "${@:2}" ;;
  install) environment requirements.txt requirements-dev.txt; echo "$python has all packages" ;;
  *.py) script "$@" ;;
  ""|-h|--help) sed -n '2,/^set/s/^# \{0,1\}//p' launch.sh ;;
  *) fail "$1 is none of demo, test, recipe, plan, install or a script; see ./launch.sh -h" ;;
esac
