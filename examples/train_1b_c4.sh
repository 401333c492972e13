#!/usr/bin/env bash
# Train the 1b model on C4 with this machine's GPUs: examples/train_1b_c4.sh [key.path=value ...]
# What the environment can say stands in common.sh.
# shellcheck source=examples/common.sh
source "$(dirname "$0")/common.sh"
train_c4 1b "$@"
