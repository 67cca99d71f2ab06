#!/usr/bin/env bash
# Trains a small model on 1, 2 and 4 ranks and compares the losses. Arguments go to `nxd-cp demo`.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ensure_env sim,plot
exec .venv/bin/nxd-cp demo "$@"
