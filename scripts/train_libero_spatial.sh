#!/usr/bin/env bash
# From nothing to the shipped checkpoint: collect, render, train, evaluate. One GPU and 16 cores; see the README for
# the time each step took. Every step resumes where it was interrupted. Usage: train_libero_spatial.sh [RUN_FOLDER]
set -euo pipefail
run=${1:-runs/libero_spatial}
rsd=${RSD:-.venv/bin/rsd}
data=$run/demos

$rsd demos collect --output "$data" --task-suite libero_spatial --num-demos "${NUM_DEMOS:-150}" --states-only
$rsd demos render --data "$data"
$rsd train tokenizer --data "$data" --output "$run/tokenizer"
$rsd train policy --data "$data" --tokenizer "$run/tokenizer" --output "$run/policy" \
    --loop.steps "${STEPS:-14000}" --loop.minutes "${MINUTES:-12}"
for decode in ar l1 rsd; do
    $rsd eval --policy "$run/policy/checkpoint" --decode $decode --num-trials 50 --output "$run/eval/$decode"
done
$rsd compare "$run"/eval/{ar,l1,rsd}
