#!/usr/bin/env bash
# Train on any number of nodes, and go on by itself when processes or nodes fail. Run on each node:
#
#   examples/multi_node/torchrun.sh --config RECIPE [key.path=value ...]
#
# run.dir and the data must lie on storage that every node sees. Set in the environment:
#
#   NNODES         nodes; MIN:MAX to go on with fewer where the layout allows (default 1)
#   GPUS           processes of this node (default: its GPUs)
#   RDZV_ENDPOINT  HOST:PORT, the same on all nodes; HOST is one of them (needed for NNODES > 1)
#   RDZV_ID        name of the job, the same on all nodes (default megatron-ttt)
#   RDZV_CONF      torchrun's --rdzv-conf, such as join_timeout=1800
#   NODE_ADDR      this node's address, where its host name does not resolve on the others
#   MAX_RESTARTS   how often torchrun starts the processes again after a failure, and this script
#                  torchrun (default 3, each)
#
# SIGTERM, SIGINT, SIGUSR1, SIGHUP or SIGQUIT to any node's script: all processes save and leave. Exit
# code: 0 done; 75 stopped on purpose, give the same command again; 2 and 3 as docs/checkpoints.md has
# them; another: what failed failed again and again.

set -euo pipefail

# Between worker.sh and this script: process ids, the exit code that ends the job, and `stopping`.
WORKERS=$(mktemp -d)
export WORKERS
trap 'rm -rf "$WORKERS"' EXIT

# torchrun would give its processes 30 seconds to save. A signal goes to one of them instead, which
# lets the others know, and torchrun sees all leave: in a session of its own, and deaf, where it has
# --signals-to-handle, to every signal but HUP. Slurm sends its signals to all processes.
export PET_SIGNALS_TO_HANDLE=SIGHUP
stopping_since=
torchrun=

# shellcheck disable=SC2329 # stop calls it
heeds_usr1() {
    local caught
    caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null)
    ((0x${caught:-0} & 1 << (10 - 1)))
}

# "return 0": a bare return in a trap returns what the signal interrupted, and that ends the script.
# shellcheck disable=SC2329 # the traps call it
stop() {
    local file pid alive=1
    if [ -z "$stopping_since" ]; then
        stopping_since=$SECONDS
        # Processes that torchrun starts after this, as one of those there now fails, heed it too.
        : >"$WORKERS/stopping"
        # A process that has only just begun does not heed the signal yet.
        while [ -n "$alive" ]; do
            alive=
            for file in "$WORKERS"/*.pid; do
                pid=$(<"$file")
                if heeds_usr1 "$pid"; then
                    kill -USR1 "$pid" && return 0
                fi
                if kill -0 "$pid" 2>/dev/null; then alive=1; fi
            done
            sleep 0.2 || true # the signal may reach it too
        done
    elif ((SECONDS - stopping_since < 3)); then
        return 0 # the same signal, by another way
    fi
    # Nothing to save, or a second signal.
    [ -z "$torchrun" ] || kill -HUP "$torchrun" 2>/dev/null || true
}
shopt -s nullglob
trap stop TERM INT USR1 HUP QUIT

# shellcheck source=examples/common.sh
source "$(dirname "$0")/../common.sh"

nnodes=${NNODES:-1}
max_restarts=${MAX_RESTARTS:-3}
count_processes
[[ $nnodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "NNODES=$nnodes is neither N nor MIN:MAX"
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$max_restarts is no number: set 0 or more"
if [ -z "${RDZV_ENDPOINT:-}" ]; then
    [ "$nnodes" = 1 ] || fail "NNODES=$nnodes needs RDZV_ENDPOINT=HOST:PORT, the same on every node"
    RDZV_ENDPOINT=localhost:0
fi
rdzv_conf=${RDZV_CONF:-}
# torchrun knows its own host by name only; an address of this node can be bound.
if "$PYTHON" -c 'import socket, sys; socket.create_server((sys.argv[1], 0))' \
    "${RDZV_ENDPOINT%:*}" 2>/dev/null; then
    rdzv_conf=is_host=true${rdzv_conf:+,$rdzv_conf}
fi

# A store for each attempt: in one that torchrun keeps over its restarts, processes find the addresses
# of dead ones (github.com/pytorch/pytorch/issues/135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
launch=(
    "$PYTHON" -m torch.distributed.run
    --nnodes "$nnodes" --nproc-per-node "$GPUS" --max-restarts "$max_restarts"
    --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-megatron-ttt}"
    ${rdzv_conf:+--rdzv-conf "$rdzv_conf"}
    ${NODE_ADDR:+--local-addr "$NODE_ADDR"}
    --no-python examples/multi_node/worker.sh "${device[@]}"
)

# A torchrun ends with the node that RDZV_ENDPOINT names: the others start theirs again.
for ((attempt = 0; attempt <= max_restarts; attempt++)); do
    if ((attempt)); then
        echo "torchrun ended with exit code $code; restart $attempt of $max_restarts"
        sleep 5 || true
    fi
    [ -z "$stopping_since" ] || exit 75
    (
        trap '' USR1 TERM INT QUIT
        exec setsid "${launch[@]}" "$@"
    ) &
    torchrun=$!
    # wait returns early when a signal is handled.
    while code=0 && wait "$torchrun" || code=$?; kill -0 "$torchrun" 2>/dev/null; do :; done
    # A torchrun that was killed leaves its processes, which save and end when they notice.
    for file in "$WORKERS"/*.pid; do
        while kill -0 "$(<"$file")" 2>/dev/null; do sleep 0.5 || true; done
    done
    rm -f "$WORKERS"/*.pid
    [ ! -s "$WORKERS/exit_code" ] || exit "$(<"$WORKERS/exit_code")"
    [ "$code" != 0 ] || exit 0
    [ -z "$stopping_since" ] || exit 75
done
exit "$code"
