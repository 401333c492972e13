#!/usr/bin/env bash
# One training process, started by torchrun for torchrun.sh. To torchrun every exit code but 0 is a
# failure, to be tried again. Here some are final: 75 (stopped on purpose) becomes 0, and where a
# process refused (2) or gave up (3), torchrun ends. torchrun.sh reads which it was.
set -uo pipefail

final=$WORKERS/exit_code
[ ! -s "$final" ] || exit 0

export MEGATRON_TTT_LAUNCHER=$PPID
[ ! -e "$WORKERS/stopping" ] || export MEGATRON_TTT_STOP=1

# torchrun's signals reach the training process too; this one waits for it.
trap : TERM INT USR1
"$PYTHON" pretrain_ttt.py "$@" &
training=$!
echo "$training" >"$WORKERS/${LOCAL_RANK:-0}.pid"
while code=0 && wait "$training" || code=$?; kill -0 "$training" 2>/dev/null; do :; done
case $code in
    75)
        # Without a folder torchrun.sh is gone; torchrun is still not to start this again.
        [ ! -d "$WORKERS" ] || echo 75 >"$final"
        exit 0
        ;;
    2 | 3)
        echo "$code" >"$final"
        kill -HUP "$PPID"
        ;;
esac
exit "$code"
