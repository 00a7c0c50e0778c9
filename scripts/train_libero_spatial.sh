#!/usr/bin/env bash
# From nothing to the shipped checkpoint and its evaluation, with the settings that made it (on two GPUs). Every step
# continues where it was interrupted. Usage: train_libero_spatial.sh [RUN_FOLDER]; GPUS, WORKERS, NUM_DEMOS and MINUTES
# may be set; the batch is 320 chunks per GPU.
set -euo pipefail
run=${1:-runs/libero_spatial}
bin=${BIN:-.venv/bin}
gpus=${GPUS:-$(nvidia-smi -L | wc -l)}
workers=${WORKERS:-$(nproc)}

"$bin/rsd" demos collect --out "$run/states" --num-demos "${NUM_DEMOS:-118}" --states-only --num-workers "$workers"
"$bin/rsd" demos render --source "$run/states" --out "$run/demos" --image-size 128 --num-workers "$workers"
"$bin/rsd" tokenizer fit --data "$run/demos" --output "$run/tokenizer"
"$bin/torchrun" --standalone --nproc-per-node "$gpus" -m rsd train policy --data "$run/demos" \
    --tokenizer "$run/tokenizer" --output "$run/policy" \
    --loop.batch-size 320 --loop.steps 100000 --loop.minutes "${MINUTES:-6.2}" --loop.save-every 500
for decode in ar l1 rsd; do
    "$bin/rsd" eval --policy "$run/policy/checkpoint" --decode "$decode" --num-trials 50 --num-workers "$workers" \
        --output "$run/eval/$decode"
done
"$bin/rsd" compare "$run"/eval/{ar,l1,rsd}
