#!/usr/bin/env bash
# Choose a model from a menu, see what it will cost, train it: examples/launch_training.sh
# [key.path=value ...]. What the environment can say besides stands in common.sh.
# shellcheck source=examples/common.sh
source "$(dirname "$0")/common.sh"

# choose QUESTION DEFAULT CHOICE...: sets $chosen
choose() {
    local question=$1 default=$2 choices=("${@:3}") i answer
    echo "$question"
    for i in "${!choices[@]}"; do echo "  $((i + 1))) ${choices[i]}"; done
    read -rp "[$default] " answer || fail "no answer to: $question"
    answer=${answer:-$default}
    for i in "${!choices[@]}"; do
        if [[ $answer == "$((i + 1))" || $answer == "${choices[i]}" ]]; then
            chosen=${choices[i]}
            return
        fi
    done
    fail "$answer is none of: ${choices[*]}"
}

choose "Size?" 125m 125m 350m 760m 1b
size=$chosen
choose "Model?" ttt_linear ttt_linear ttt_mlp transformer
export LAYER=$chosen
choose "Context?" 2k 2k 8k 32k
export CONTEXT=${chosen#2k}
found=${GPUS:-$(count_gpus)}
read -rp "GPUs (processes)? [$found] " answer || fail "no answer to: GPUs?"
[ -z "$answer" ] || export GPUS=$answer

echo
DRY_RUN=1 "examples/train_${size}_c4.sh" "$@"
echo
read -rp "Train it? [y/N] " answer || answer=n
[[ $answer == [yY]* ]] || exit 0
exec "examples/train_${size}_c4.sh" "$@"
