#!/usr/bin/env bash
# ./launch.sh demo                 a small world with a known true reward: data, every algorithm, table, plot
# ./launch.sh test [PYTEST ARGS]   all tests, the fast ones first
# ./launch.sh SCRIPT.py [ARGS]     a script on every device of this node, or of all nodes (see below);
#                                  the reference's log-probs are cached first if the script needs them
# ./launch.sh install              only the environment (once on every node, before a multi-node run)
#
# Relative paths are relative to this folder, wherever it is called from. Variables:
#   PYTHON   interpreter. If it has what requirements.txt asks for (a container with torch for ROCm or CUDA,
#            an activated environment), nothing is installed; else .venv is made from it
#   TORCH    which torch goes into .venv, e.g. TORCH=torch==2.13.0, or PIP_INDEX_URL and the like as in pip
#   NPROC    processes on this node; default: one per GPU, or one on a CPU
#   DRY_RUN  1 = print the commands instead of running them
# Several nodes: the same command on each, one task per node. SLURM is recognised:
#     srun --ntasks-per-node=1 ./launch.sh dpo.py --model M --data data/NAME
# elsewhere set MASTER_ADDR, NNODES and, for static ranks, NODE_RANK (else the nodes number themselves);
# MASTER_PORT is 29500 by default, and the port after it is used too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
algorithms="dpo dpo_norm simpo wpo auxdpo compo"

say() { echo "[launch, $SECONDS s] $*" >&2; }
fail() { echo "error: $*" >&2; exit 1; }
run() { if [ "${DRY_RUN:-0}" = 1 ]; then printf '%q ' "$@"; echo; else "$@"; fi; }

# ---- environment

has() {  # PYTHON REQUIREMENT_FILE...: is everything there, and $TORCH if it is set?
  local python=$1; shift
  "$python" -c '
import os, sys
from importlib.metadata import version
from packaging.requirements import Requirement
lines = [line.split("#")[0].strip() for path in sys.argv[1:] for line in open(path)]
for need in map(Requirement, filter(None, lines + [os.environ.get("TORCH")])):
    if not need.specifier.contains(version(need.name), prereleases=True):
        sys.exit(1)' "$@" 2>/dev/null
}

environment() {  # REQUIREMENT_FILE...: sets python
  local files=() file site="" venv=$PWD/.venv
  python=$(command -v "${PYTHON:-python3}" || command -v "${PYTHON:-python}") ||
    fail "${PYTHON:-python3} is not there; install Python 3.10 or newer, or name one with PYTHON="
  if has "$python" "$@"; then return; fi
  if [ -e .venv/complete ] && has .venv/bin/python "$@"; then python=$venv/bin/python; return; fi
  [ "${nnodes:-1}" = 1 ] || fail "packages are missing; run ./launch.sh install on every node first"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$python is older than Python 3.10"
  for file; do files+=(-r "$file"); done
  say "installing $* into .venv (once; with torch for CUDA 6 GB, about 2 minutes on a fast line)"
  # a torch that the machine brings along, such as a ROCm build, is kept
  if has "$python" <(grep '^torch' requirements.txt); then site=1; fi
  run rm -f .venv/complete  # so that an interrupted installation is completed by the next call
  run "$python" -m venv ${site:+--system-site-packages} .venv || fail "$python -m venv does not work (Debian: apt install python3-venv)"
  run "$venv/bin/python" -m pip install --disable-pip-version-check -q ${TORCH:+"$TORCH"} "${files[@]}" ||
    fail "the installation broke off; the same command continues it"
  run touch .venv/complete
  python=$venv/bin/python
}

# ---- where a script runs: processes, nodes, threads

nodes() {  # sets nnodes and, if known, node_rank and MASTER_ADDR
  nnodes=${NNODES:-${SLURM_NNODES:-1}} node_rank=${NODE_RANK:-}
  [ "$nnodes" -gt 1 ] || return 0
  if [ -z "${NNODES:-}" ]; then
    [ "${SLURM_LOCALID:-0}" = 0 ] || fail "one task per node is enough: srun --ntasks-per-node=1 ./launch.sh ..."
    node_rank=${NODE_RANK:-$SLURM_NODEID}
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  fi
  [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$nnodes needs MASTER_ADDR, the name of the first node"
}

devices() { "$python" -c 'import torch; print(torch.cuda.device_count())'; }  # CUDA or ROCm, visible ones

command_line() {  # PORT_OFFSET SCRIPT ARGS: sets line
  local port=$((${MASTER_PORT:-29500} + $1)) meet=(--standalone); shift
  if [ "$nnodes" -gt 1 ] && [ -n "$node_rank" ]; then
    meet=(--nnodes "$nnodes" --node_rank "$node_rank" --master_addr "$MASTER_ADDR" --master_port "$port")
  elif [ "$nnodes" -gt 1 ]; then
    meet=(--nnodes "$nnodes" --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$port" --rdzv_id "${RDZV_ID:-launch}")
  fi
  if [ "$parallel" = 1 ]; then
    line=("$python" -m torch.distributed.run "${meet[@]}" --nproc_per_node "$nproc" "$@")
  else
    line=("$python" "$@")  # without torchrun an error stays one line
  fi
}

check_flags() {  # SCRIPT ARGS: a wrong flag shows now, in one line, not after the reference's pass or in every process
  [ "${DRY_RUN:-0}" != 1 ] && grep -q 'parse_args(Args)' "$1" || return 0
  "$python" -c '
import importlib.util, sys
spec = importlib.util.spec_from_file_location("script", sys.argv[1])
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
sys.argv = sys.argv[1:]
script.parse_args(script.Args)' "$@"
}

# ---- the reference's log-probs

reference_flags() {  # ARGS: sets model, data, dtype, and flags: what cache_ref.py has in common with the script
  model="" data="" dtype=auto flags=()
  local name value
  while [ $# -gt 0 ]; do
    name=${1%%=*} value=${1#*=}
    case $name in --model|--data|--dtype|--layout|--max_tokens)
      if [ "$name" = "$1" ] && [ $# -gt 1 ]; then value=$2; shift; fi
      flags+=("$name" "$value") ;;
    --cpu_offload|--no-cpu_offload) flags+=("$name") ;;
    esac
    case $name in --model) model=$value ;; --data) data=$value ;; --dtype) dtype=$value ;; esac
    shift
  done
}

# cache_ref.py does nothing if its cache is complete, but must read the model to know that. So it is left out if it
# can be told from outside: on one node, --model is a folder, a cache of it in this precision exists, and no file of
# model and data was touched since. In doubt it runs. No script trains with a cache that does not fit.
cached() {  # after reference_flags
  local meta
  if [ "$nnodes" != 1 ] || [ ! -d "$model" ]; then return 1; fi
  for meta in "$data"/ref-*/meta.json; do
    [ -f "$meta" ] || return 1
    if [ "$dtype" = auto ]; then dtype=float32; [ "$(devices)" = 0 ] || dtype=bfloat16; fi
    if grep -qF "\"model\": \"$model\"" "$meta" && grep -qF "\"dtype\": \"$dtype\"" "$meta" &&
      [ -z "$(find -L "$model" "$data/meta.json" "$data/train" "$data/val" -newercm "$meta" 2>&1)" ]; then return; fi
  done
  return 1
}

script() {  # SCRIPT ARGS
  local first=0
  [ -f "$1" ] || fail "no script $1 here; there are $(echo ./*.py)"
  nodes
  environment requirements.txt
  case " $* " in *" -h "*|*" --help "*) exec "$python" "$@" ;; esac
  case $1 in
    prepare_data.py|evaluate.py) nproc=1 nnodes=1 ;;
    *) nproc=${NPROC:-$(devices)}; [ "$nproc" != 0 ] || nproc=1 ;;
  esac
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}  # s to save on SIGTERM
  parallel=0; if [ "$nproc" -gt 1 ] || [ "$nnodes" -gt 1 ]; then parallel=1; fi
  reference_flags "${@:2}"
  if grep -q 'load_reference(' "$1" && [ -n "$model" ] && [ -n "$data" ] && ! cached; then first=1; fi
  if [ "$first$parallel" != 00 ]; then check_flags "$@"; fi
  if [ "$first" = 1 ]; then
    say "cache_ref.py first: $1 needs the log-probs of the reference $model on $data"
    command_line 1 cache_ref.py "${flags[@]}"
    run "${line[@]}" &  # in the background, so that the trap passes signals on
    trap 'kill -TERM $! 2>/dev/null; wait $! || true; exit 143' TERM INT
    wait $! || fail "cache_ref.py did not finish; the same command continues where it stopped"
    trap - TERM INT
  fi
  [ "$nnodes" = 1 ] || say "node ${node_rank:-?} of $nnodes: starts once this command runs on all of them"
  command_line 0 "$@"
  if [ "${DRY_RUN:-0}" = 1 ]; then run env "OMP_NUM_THREADS=$OMP_NUM_THREADS" "${line[@]}"; exit; fi
  exec "${line[@]}"  # no shell in between: SIGTERM reaches the script, which then saves a checkpoint
}

# ---- tests and demo

tests() {  # PYTEST ARGS: one run, sorted so that what is fast comes first
  environment requirements.txt requirements-dev.txt
  export HF_HUB_OFFLINE=1
  run exec "$python" -c '
import sys, pytest
class FastFirst:
    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: any(map(item.get_closest_marker, ("slow", "torchrun"))))
sys.exit(pytest.main(["tests", *sys.argv[1:]], plugins=[FastFirst()]))' "$@"
}

demo() {
  local world=data/demo_world out=out/demo name models
  environment requirements.txt requirements-dev.txt
  export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
  run rm -rf "$world" "$out"
  say "a world of customers and a shopkeeper: pairs with a known reward, and a base model that knows its language"
  run "$python" tests/demo_world.py --out "$world" --no-progress
  say "prepare_data.py: text to tokens, train and val"
  run "$python" prepare_data.py --dataset "$world/pairs.jsonl" --model "$world/base" --out "$world/pairs" \
    --val_fraction 0.1 --max_length 256
  say "cache_ref.py: log-probs of the base model, the reference of all algorithms"
  run "$python" cache_ref.py --model "$world/base" --data "$world/pairs"
  models=$world/base
  for name in $algorithms; do
    [ -f "$name.py" ] || continue
    say "$name.py: from the base model, $out/$name"
    run "$python" "$name.py" --model "$world/base" --data "$world/pairs" --out "$out/$name" \
      --learning_rate 1e-3 --epochs 2 --eval_every 0
    models=$models,$out/$name/final
  done
  say "evaluate.py: samples and their true reward, preference accuracy, log-probs, length"
  run "$python" evaluate.py --models "$models" --reference "$world/base" --data "$world/pairs" \
    --samples 256 --reward tests/demo_world.py:true_reward --out "$out" --table "$out/table.md" --plot "$out/plot.png"
  say "done"
  run cat "$out/table.md"
  echo "table: $out/table.md    plot: $out/plot.png"
}

case ${1:-} in
  demo) demo ;;
  test) shift; tests "$@" ;;
  install) environment requirements.txt requirements-dev.txt; echo "$python has all packages" ;;
  *.py) script "$@" ;;
  ""|-h|--help|help) sed -n 's/^# \{0,1\}//p; /^set/q' "$0" | sed '1d' ;;
  *) fail "$1 is neither demo, test, install nor a script; see ./launch.sh -h" ;;
esac
