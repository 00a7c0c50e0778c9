#!/usr/bin/env bash
# A checkpoint like checkpoints/libero_object_goal_10 and its evaluation, on one machine with a GPU: demonstrations of
# three suites, then one training from the weights of another policy (of those of checkpoints/libero cameras and words
# fit). Every step continues where it was interrupted. Usage: train_suites.sh [RUN_FOLDER]; WORKERS, GPUS and MINUTES may
# be set. The one that ships had two GPUs, each with the batch below.
set -euo pipefail
run=${1:-runs/suites}
bin=${BIN:-.venv/bin}
workers=${WORKERS:-$(nproc)}
afresh="target.block target.level_head target.parallel_head target.residual_head feature_drafter visual_drafter.levels visual_drafter.residual_head"

collect() { # suite, demonstrations a task, of which rendered
    "$bin/rsd" demos collect --suite "$1" --out "$run/$1_states" --num-demos "$2" --states-only --num-workers "$workers"
    "$bin/rsd" demos render --source "$run/$1_states" --out "$run/$1" --image-size 128 --every 4 --max-per-task "$3" \
        --num-workers "$workers"
}
collect libero_goal 100 80
collect libero_object 100 60
collect libero_10 100 60

[ -e "$run/tokenizer/tokenizer.json" ] || "$bin/rsd" tokenizer fit --data "$run"/libero_{goal,object,10}_states --output "$run/tokenizer"
# shellcheck disable=SC2086
"$bin/torchrun" --nproc-per-node "${GPUS:-1}" -m rsd train policy --data "$run"/libero_{goal,object,10} \
    --tokenizer "$run/tokenizer" --init checkpoints/libero --init-matching --init-fresh $afresh \
    --output "$run/policy" --loop.steps 100000 --loop.minutes "${MINUTES:-4.2}" --loop.batch-size 512 \
    --loop.learning-rate 7e-4 --loop.save-every 500 --loss.blind 0.3

for decode in l1 drafter-only rsd-fused draft-first; do
    "$bin/rsd" eval --policy "$run/policy/checkpoint" --task-suite libero_object,libero_goal,libero_10 \
        --tasks "libero_goal:0,1,2,4,6,7,8,9;libero_10:0,1,2,4,6,7,8" --num-trials 18 --decode "$decode" \
        --device cuda --batch 16 --num-workers "$workers" --output "$run/eval/$decode"
done
"$bin/rsd" compare "$run"/eval/{l1,drafter-only,rsd-fused,draft-first}
