#!/usr/bin/env bash
# From nothing to a checkpoint like the shipped one and its evaluation, on one machine with a GPU. Two trainings: a small
# target on the expert's demonstrations, then one of the shipped sizes, whose cameras and words start from the first's, on
# those and on states that the first policy led itself into (DAgger). Every step continues where it was interrupted.
# Usage: train_libero_spatial.sh [RUN_FOLDER]; WORKERS, NUM_DEMOS, NUM_DAGGER,
# FIRST_MINUTES and SECOND_MINUTES may be set.
set -euo pipefail
run=${1:-runs/libero_spatial}
rsd=${BIN:-.venv/bin}/rsd
workers=${WORKERS:-$(nproc)}

render() { "$rsd" demos render --source "$run/$1_states" --out "$run/$1" --image-size 128 --every 4 --num-workers "$workers"; }
train() { "$rsd" train policy --loop.batch-size 512 --loop.steps 100000 --loop.save-every 500 "$@"; }

"$rsd" demos collect --out "$run/expert_states" --num-demos "${NUM_DEMOS:-180}" --states-only --num-workers "$workers"
render expert
[ -e "$run/tokenizer/tokenizer.json" ] || "$rsd" tokenizer fit --data "$run/expert_states" --output "$run/tokenizer"
train --data "$run/expert" --tokenizer "$run/tokenizer" --output "$run/first" --loop.minutes "${FIRST_MINUTES:-5}"

"$rsd" demos collect --out "$run/dagger_states" --num-demos "${NUM_DAGGER:-55}" --states-only --num-workers "$workers" \
    --policy "$run/first/checkpoint" --policy-share 0.85 --seed 101
render dagger
train --data "$run/expert" "$run/dagger" --init "$run/first/checkpoint" --init-matching --output "$run/second" \
    --loop.minutes "${SECOND_MINUTES:-8.5}" --loss.blind 0.3 --policy.acceptance "blind(0.95)" --loss.counterfactual 0.3 \
    --policy.target.dim 576 --policy.target.layers 12 --policy.target.heads 9 --policy.target.merge 2 2 \
    --policy.target.whole-block policy.visual-drafter:visual-drafter-config \
    --policy.visual-drafter.depth 1 --policy.visual-drafter.channels 16 48 96 128 --policy.visual-drafter.layers 2

"$rsd" calibrate --policy "$run/second/checkpoint" --device cuda --batch 16 --num-workers "$workers" \
    --output "$run/eval/calibration"
for decode in ar l1 rsd-fused rsd-skip draft-first; do
    "$rsd" eval --policy "$run/second/checkpoint" --decode "$decode" --num-trials 50 --device cuda --batch 16 \
        --num-workers "$workers" --output "$run/eval/$decode"
done
"$rsd" compare "$run"/eval/{ar,l1,rsd-fused,rsd-skip,draft-first}
