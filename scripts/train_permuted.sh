#!/usr/bin/env bash
# A policy for the three permuted suites and its evaluation, on one machine with a GPU: the expert's demonstrations, a
# training, a round of DAgger in which rsd-skip drives (what its skips lead into is what the target and the drafter have to
# learn), a training on everything. Every step continues where it was interrupted.
# Usage: train_permuted.sh [RUN_FOLDER]; INIT may name a checkpoint to begin from; WORKERS, NUM_DEMOS, NUM_DAGGER,
# FIRST_MINUTES, SECOND_MINUTES, NUM_STATES, BATCH and DEVICE may be set.
set -euo pipefail
run=${1:-runs/permuted}
rsd=${BIN:-.venv/bin}/rsd
workers=${WORKERS:-$(nproc)}
device=${DEVICE:-cuda}
suites=(object spatial goal)

collect() { # kind, suite, demonstrations a task, further options
    local kind=$1 suite=$2 number=$3
    shift 3
    "$rsd" demos collect --suite "libero_${suite}_permuted" --out "$run/${kind}_${suite}_states" --num-demos "$number" \
        --states-only --num-workers "$workers" "$@"
    "$rsd" demos render --source "$run/${kind}_${suite}_states" --out "$run/${kind}_$suite" --image-size 128 --every 4 \
        --num-workers "$workers"
}
train() { # output, minutes, further options
    local output=$1 minutes=$2
    shift 2
    "$rsd" train policy --output "$run/$output" --device "$device" --loop.minutes "$minutes" \
        --loop.steps 100000 --loop.save-every 500 \
        --loop.batch-size "${BATCH:-512}" --loop.learning-rate 3e-4 --loop.warmup 60 --validation-every 200 \
        --loss.blind 0.3 --loss.counterfactual 0.3 --loss.grounding 1.0 --loss.forecast-every 5 "$@" \
        --remembered-chunks 6 --policy.execute 8 --policy.acceptance "blind(0.95,moving)" \
        --policy.target.dim 576 --policy.target.layers 12 --policy.target.heads 9 --policy.target.merge 1 2 \
        --policy.target.whole-block --policy.target.grounded policy.visual-drafter:visual-drafter-config \
        --policy.visual-drafter.depth 1 --policy.visual-drafter.layers 2 --policy.visual-drafter.channels 16 48 96 128
}

for suite in "${suites[@]}"; do collect expert "$suite" "${NUM_DEMOS:-100}"; done
if [ -n "${INIT:-}" ]; then
    begin=(--init "$INIT" --init-matching)
else
    [ -e "$run/tokenizer/tokenizer.json" ] || "$rsd" tokenizer fit --data "$run"/expert_{object,spatial,goal}_states \
        --tokenizer.horizon 16 --output "$run/tokenizer"
    begin=(--tokenizer "$run/tokenizer")
fi
expert=("$run"/expert_{object,spatial,goal})
train first "${FIRST_MINUTES:-20}" --data "${expert[@]}" "${begin[@]}"

for suite in "${suites[@]}"; do
    collect driven "$suite" "${NUM_DAGGER:-45}" --seed 61 --policy "$run/first/checkpoint" --policy-decode rsd-skip \
        --policy-skip-threshold-mm 100 --policy-memory-chunks 99
done
train second "${SECOND_MINUTES:-10}" --data "${expert[@]}" "$run"/driven_{object,spatial,goal} \
    --init "$run/first/checkpoint" --init-matching

evaluate() { # name, options
    local name=$1
    shift
    "$rsd" eval --policy "$run/second/checkpoint" --task-suite libero_object_permuted,libero_spatial_permuted,libero_goal_permuted \
        --tasks "libero_goal_permuted:0,1,2,4,6,7,8,9" --num-trials "${NUM_STATES:-20}" --device "$device" --batch 16 \
        --num-workers "$workers" --output "$run/eval/$name" "$@"
}
evaluate l1 --decode l1
evaluate rsd-fused --decode rsd-fused
evaluate rsd-skip --decode rsd-skip --skip-threshold-mm 1e9 --max-skips 3 --memory-chunks 99
evaluate drafter-only --decode drafter-only
"$rsd" compare "$run"/eval/{l1,rsd-fused,rsd-skip,drafter-only}
