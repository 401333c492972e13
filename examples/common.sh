# shellcheck shell=bash
# What the scripts beside this one share. Set in the environment:
#
#   LAYER    ttt_linear (default), ttt_mlp or transformer; hybrid and hybrid_mlp where there is a
#            recipe (docs/recipes.md)
#   CONTEXT  8k or 32k; empty: 2,048 tokens
#   GPUS     processes of this machine; default: as many as it has GPUs
#   RUN_DIR  folder of the run; default: one named by model, data and time. One that exists is
#            gone on with
#   DRY_RUN  1: print the plan, train nothing
#   PYTHON   default: .venv/bin/python where there is one, else python3

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python
fi
export PYTHON

fail() {
    echo "error: $*" >&2
    exit 2
}

# The GPUs that CUDA_VISIBLE_DEVICES leaves of this machine's.
count_gpus() {
    local visible
    if [[ ${CUDA_VISIBLE_DEVICES-} =~ ^(-1.*|NoDevFiles)$ ]]; then
        echo 0
    elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
        echo "${#visible[@]}"
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# Sets GPUS, where it is not, and `device`: where GPUs were counted, none may be a CPU in silence.
count_processes() {
    device=()
    if [ -z "${GPUS:-}" ]; then
        GPUS=$(count_gpus)
        [ "$GPUS" != 0 ] || fail "no GPU found: set GPUS=N for N processes on the CPU"
        device=(run.device=cuda)
    fi
    [[ $GPUS =~ ^[1-9][0-9]*$ ]] || fail "GPUS=$GPUS is no number of processes"
}

# The value of a key that stands once in the configuration "$1".
value_of() {
    sed -n "s/^  $2: //p" <<<"$1"
}

# train_c4 SIZE [key.path=value ...]
train_c4() {
    local size=$1 layer=${LAYER:-ttt_linear} context=${CONTEXT:-}
    shift
    [ "${NNODES:-1}" = 1 ] ||
        fail "NNODES=$NNODES: this script trains on one machine; unset it, or see docs/multi_node.md"
    count_processes
    set -- "${device[@]}" "$@"

    local name=${layer}_$size${context:+_$context}
    local config=(--config "yaml_recipes/$name.yaml")
    local suggested_for=1
    ((GPUS < 8)) || suggested_for=8
    ((GPUS < 64)) || suggested_for=64
    local overlay=yaml_recipes/overlays/${context:-$size}_${suggested_for}gpu.yaml
    [ ! -f "$overlay" ] || config+=(--config "$overlay")

    # Sequences that the replicas can share: the largest micro-batch up to the suggested one.
    local resolved tp pp replicas global micro
    resolved=$("$PYTHON" pretrain_ttt.py "${config[@]}" --print-config "$@") || exit $?
    tp=$(value_of "$resolved" tensor_model_parallel_size)
    pp=$(value_of "$resolved" pipeline_model_parallel_size)
    global=$(value_of "$resolved" global_batch_size)
    micro=$(value_of "$resolved" micro_batch_size)
    replicas=$((GPUS / (tp * pp)))
    ((replicas > 0)) || fail "TP x PP = $tp x $pp needs $((tp * pp)) processes, and there are $GPUS"
    local fitted=$((global / replicas * replicas))
    ((fitted > 0)) || fail "$global sequences a step are fewer than $replicas replicas"
    ((fitted == global)) ||
        echo "$global sequences a step do not divide over $replicas replicas: $fitted instead"
    while ((fitted % (micro * replicas))); do micro=$((micro - 1)); done
    local overrides=(
        "$@" "training.global_batch_size=$fitted" "training.micro_batch_size=$micro"
    )

    if [ -n "${DRY_RUN:-}" ]; then
        exec "$PYTHON" pretrain_ttt.py "${config[@]}" "${overrides[@]}" \
            --dry-run --world-size "$GPUS"
    fi
    local run_dir=${RUN_DIR:-runs/${name}_c4_$(date +%Y%m%d-%H%M%S)} given
    for given in "$@"; do
        [[ $given != run.dir=* ]] || run_dir=${given#run.dir=}
    done
    echo "$name on $GPUS processes, $fitted sequences a step in microbatches of $micro: $run_dir"
    export GPUS
    exec examples/multi_node/torchrun.sh \
        "${config[@]}" "${overrides[@]}" "run.dir=$run_dir"
}
