#!/usr/bin/env bash
# One policy for libero_spatial, object, goal, 10 and 90 and for the three permuted suites, and its evaluation, on one machine
# with GPUs: the expert's demonstrations, a round of DAgger in which rsd-skip drives (what its skips lead into is what target
# and drafter have to learn), a training of each seed, a GPU each, the mean of their weights, its drafter trained on alone
# with each seed and averaged with what it was, the runs in the tables of docs/results.md. Every step continues where it was
# interrupted.
# Usage: train_libero.sh [RUN_FOLDER]. INIT: a checkpoint to begin from, which also drives; without one a policy is trained
# on the expert's demonstrations first. Of these steps, two GPUs and 32 cores: 4,700 demonstrations rendered in 5 minutes, 1,550
# driven (none of libero_90) and rendered in 7, a training 6.4 steps a second on each GPU (a quarter less where simulators draw:
# MUJOCO_EGL_DEVICE_ID), the drafter alone 21 (10 where policies were evaluated, too), 640 episodes a minute.
# Further: SEEDS, SUITES, NUM_DEMOS, NUM_NINETY (of libero_90), NUM_MOVING, NUM_DAGGER (a task), NUM_DAGGER_NINETY,
# EVERY, VIEWS, MAX_SKIPS, FIRST_MINUTES, MINUTES, DRAFTER_MINUTES, STEPS, BATCH, NUM_STATES, NUM_STATES_NINETY, WORKERS, DEVICE,
# and BIN, the folder of the commands. A run that an earlier version began does not continue.
set -euo pipefail
run=${1:-runs/libero}
rsd=${BIN:-.venv/bin}/rsd
device=${DEVICE:-cuda}
workers=${WORKERS:-$(nproc)}
skips=${MAX_SKIPS:-5}
read -ra seeds <<< "${SEEDS:-1 2}"
all="libero_10 libero_spatial_permuted libero_goal_permuted libero_object_permuted libero_spatial libero_goal libero_object libero_90"
read -ra suites <<< "${SUITES:-$all}"

gather() { # kind, suite, demonstrations a task, further options: collected, then rendered
    local kind=$1 suite=$2 number=$3
    shift 3
    "$rsd" demos collect --suite "$suite" --out "$run/states/$kind-$suite" --num-demos "$number" --states-only \
        --num-workers "$workers" "$@"
    "$rsd" demos render --source "$run/states/$kind-$suite" --out "$run/data/$kind-$suite" --image-size 128 \
        --every "${EVERY:-8}" --views "${VIEWS:-0.2}" --num-workers "$workers"
}
train() { # name, seed, GPU, minutes, further options
    local name=$1 seed=$2 gpu=$3 minutes=$4
    shift 4
    CUDA_VISIBLE_DEVICES=$gpu "$rsd" train policy --output "$run/$name" --device "$device" --loop.minutes "$minutes" \
        --loop.steps "${STEPS:-100000}" --loop.seed "$seed" --loop.save-every 500 --loop.compiled --loop.batch-size "${BATCH:-512}" \
        --loop.learning-rate 3e-4 --loop.warmup 60 --validation-every 200 \
        --loss.blind 0.3 --loss.counterfactual 0.3 --loss.grounding 1.0 --loss.forecast-every 5 "$@" \
        --loss.committed 0.3 --loss.levels-every 4 --policy.target.committed \
        --remembered-chunks 6 --policy.execute 8 --policy.acceptance "blind(0.95,moving)" --policy.max-skips "$skips" \
        --policy.target.dim 576 --policy.target.layers 12 --policy.target.heads 9 --policy.target.merge 1 2 \
        --policy.target.whole-block --policy.target.grounded policy.visual-drafter:visual-drafter-config \
        --policy.visual-drafter.depth 1 --policy.visual-drafter.layers 2 --policy.visual-drafter.channels 16 48 96 128
}

for suite in "${suites[@]}"; do
    number=${NUM_DEMOS:-60}
    [ "$suite" != libero_90 ] || number=${NUM_NINETY:-30}
    gather expert "$suite" "$number"
    case $suite in libero_object_permuted | libero_spatial_permuted)
        gather moving "$suite" "${NUM_MOVING:-15}" --seed 301 --motion thing;;
    esac
done
if [ -z "${INIT:-}" ]; then
    [ -e "$run/tokenizer/tokenizer.json" ] || "$rsd" tokenizer fit --data "$run"/states/expert-* \
        --tokenizer.horizon 16 --output "$run/tokenizer"
    train first 0 0 "${FIRST_MINUTES:-20}" --data "$run"/data/expert-* --tokenizer "$run/tokenizer"
    INIT=$run/first/checkpoint
fi
for suite in "${suites[@]}"; do
    number=${NUM_DAGGER:-20}
    [ "$suite" != libero_90 ] || number=${NUM_DAGGER_NINETY:-10}
    gather driven "$suite" "$number" --seed 201 --policy "$INIT" --policy-decode rsd-skip \
        --policy-skip-threshold-mm 1e9 --policy-max-skips "$skips" --policy-memory-chunks "$((skips + 1))"
done
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT # a training that failed ends the others
together() { for one in "$@"; do wait "$one"; done; }
trainings=()
for index in "${!seeds[@]}"; do
    train "seed-${seeds[$index]}" "${seeds[$index]}" "$index" "${MINUTES:-10}" --data "$run"/data/* --init "$INIT" \
        --init-matching &
    trainings+=($!)
done
together "${trainings[@]}"
policies=("${seeds[@]/#/seed-}")
members=("${policies[@]/#/$run/}")
[ "${#members[@]}" -gt 1 ] || members+=("${members[@]}")
[ -e "$run/mean/checkpoint/manifest.json" ] \
    || "$rsd" checkpoint average "${members[@]/%//checkpoint}" --output "$run/mean/checkpoint"
trainings=() drafted=()
for index in "${!seeds[@]}"; do
    out=$run/drafter-${seeds[$index]}
    drafted+=("$out/checkpoint")
    CUDA_VISIBLE_DEVICES=$index "$rsd" train drafter --policy "$run/mean/checkpoint" --kind visual --resume-weights \
        --output "$out" --data "$run"/data/* --device "$device" --loop.minutes "${DRAFTER_MINUTES:-4}" \
        --loop.steps "${STEPS:-100000}" --loop.save-every 1000 --loop.batch-size "${BATCH:-512}" --loop.learning-rate 3e-4 \
        --loop.warmup 60 --loop.seed "${seeds[$index]}" --validation-every 200 --remembered-chunks 6 --loss.blind 0.3 \
        --loss.forecast-every 5 &
    trainings+=($!)
done
together "${trainings[@]}"
[ -e "$run/both/checkpoint/manifest.json" ] \
    || "$rsd" checkpoint average "${drafted[@]}" "$run/mean/checkpoint" --output "$run/both/checkpoint"
policies+=(mean both)

tasks=() ten=() # the suites of ten tasks
for suite in "${suites[@]}"; do [ "$suite" = libero_90 ] || ten+=("$suite"); done
[[ " ${suites[*]} " != *" libero_goal_permuted "* ]] || tasks=(--tasks "libero_goal_permuted:0,1,2,4,6,7,8,9")
evaluate() { # policy, name, options
    local policy=$run/$1/checkpoint out=$run/eval/$1 name=$2
    shift 2
    [ "${#ten[@]}" -eq 0 ] || "$rsd" eval --policy "$policy" --task-suite "$(IFS=,; echo "${ten[*]}")" "${tasks[@]}" --num-trials "${NUM_STATES:-20}" \
        --device "$device" --batch 16 --num-workers "$workers" --output "$out/$name" "$@"
    [ "${#ten[@]}" -eq "${#suites[@]}" ] || "$rsd" eval --policy "$policy" --task-suite libero_90 --num-trials "${NUM_STATES_NINETY:-3}" \
        --device "$device" --batch 16 --num-workers "$workers" --output "$out/ninety/$name" "$@"
}
for policy in "${policies[@]}"; do
    evaluate "$policy" l1 --decode l1
    evaluate "$policy" "skip_own_$skips" --decode rsd-skip
    evaluate "$policy" fused_moving --decode rsd-fused
    evaluate "$policy" alone --decode drafter-only
    "$rsd" compare "$run/eval/$policy"/{l1,"skip_own_$skips",fused_moving,alone}
done
