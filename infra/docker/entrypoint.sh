#!/bin/sh
# A program that connects to Ray by the address of its head needs a Ray node on its own machine. In a
# container that is none (the pod of a flow run), this starts one that offers no CPU and no GPU.
set -eu
if [ -n "${RLHF_FLOWS_RAY_HEAD:-}" ]; then
    ray start --address="$RLHF_FLOWS_RAY_HEAD" --num-cpus=0 --num-gpus=0 --disable-usage-stats
fi
exec "$@"
