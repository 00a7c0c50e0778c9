#!/usr/bin/env bash
# Somebody else's policies, from demonstrations to a table: LeRobot's own trainer makes its ACT and its diffusion policy, one
# of each for all suites, both at once on one GPU; each is evaluated alone, gets a drafter for every suite, and is evaluated
# with it and timed, with and without a GPU. The table is printed last and written as table.json.
# It runs by the clock: T_END (seconds of the epoch, by default in 24 minutes) is when everything has ended. Trainings get as
# many steps as fit (or STEPS), what is cut counts as far as it came, and diffusion is left out first. A stage that fails is
# told, with the end of its log, and stops no other.
# Usage: lerobot_case.sh. STATES: the folders of `rsd demos collect --states-only`, named in DATA; RSD_LEROBOT_PYTHON: the
# python of LeRobot's environment (docs/your_policy.md). Further: the variables below.
set -um
code=${CODE:-$(cd "$(dirname "$0")/.." && pwd)}
export CODE=$code PYTHONPATH=${SITE:+$SITE:}$code/src PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export HF_HUB_OFFLINE=1 HF_HOME=${OUT:=runs/lerobot_case}/hub MPLCONFIGDIR=$OUT/hub ACCELERATE_MIXED_PRECISION=${MIXED:-no}
python=${PYTHON:-python3}
states=${STATES:-data/states}
read -ra data <<< "${DATA:-st_spatial pk_object}"
read -ra policies <<< "${POLICIES:-act diffusion}"
read -ra suites <<< "${SUITES:-libero_spatial libero_object_permuted}"
device=${DEVICE:-cuda}
side=${IMAGE_SIZE:-128}
export CONTINUED=${CONTINUED-2 5} # denoising steps of diffusion's ten
t_end=${T_END:-$(($(date +%s) + 1440))}
mkdir -p "$OUT/log"
[ -z "${CORES:-}" ] || taskset -cp "$CORES" $$ > "$OUT/log/cores"
read -ra cores <<< "$("$python" -c 'import os; print(*sorted(os.sched_getaffinity(0)))')"
half=$(((${#cores[@]} + 1) / 2))
few=${cores[*]:0:3}; rest=${cores[*]:3}; few=${few// /,} rest=${rest// /,}; rest=${rest:-$few}

say() { printf '%s %s\n' "$(date +%T)" "$*" | tee -a "$OUT/log/stages"; }
left() { echo $((t_end - ${KEEP:-15} - $(date +%s))); } # KEEP: seconds that later stages need
stage() { # name, seconds at most, command: its status, its output in log/NAME
    local name=$1 most=$2 code begun
    shift 2
    ((most < $(left))) || most=$(left)
    if ((most < ${LEAST:-20})); then say "$name: left out, $most s are too few"; return 1; fi
    begun=$(date +%s)
    timeout -s INT -k 15 "$most" "$@" > "$OUT/log/$name" 2>&1 < /dev/null
    code=$?
    say "$name: status $code after $(($(date +%s) - begun)) s of $most"
    ((code == 0)) || tail -n 6 "$OUT/log/$name" | cut -c1-400 | sed "s/^/    $name: /"
    return "$code"
}
rsd() { # name, seconds at most, arguments
    local name=$1 most=$2
    shift 2
    stage "$name" "$most" "$python" -m rsd "$@"
}

## demonstrations
render() {
    local set
    for set in "${data[@]}"; do
        rsd "render-$set" "${RENDER_SECONDS:-240}" demos render --source "$states/$set" --out "$OUT/data/$set" --every 1 \
            --image-size "$side" --num-workers "${#cores[@]}" --max-per-task "${NUM_DEMOS:-20}"
    done
}
export_all() {
    local set found=()
    for set in "${data[@]}"; do
        ! compgen -G "$OUT/data/$set/*.hdf5" > /dev/null || found+=("$OUT/data/$set")
    done
    [ -e "$OUT/lerobot/meta/info.json" ] || rsd export 240 demos export --data "${found[@]}" --words --output "$OUT/lerobot"
}

## LeRobot's trainer
made() { echo "$OUT/$1/checkpoints/last/pretrained_model"; }
train() { # policy, name, seconds at most, steps, log every, further options
    local policy=$1 name=$2 most=$3 steps=$4 every=$5 own
    shift 5
    case $policy in
        act) own=(--policy.type=act --policy.chunk_size=16 --policy.n_action_steps=8
            --batch_size="${ACT_BATCH:-96}" --num_workers="${ACT_LOADERS:-3}" --optimizer.type=adamw --optimizer.weight_decay=1e-4
            --optimizer.lr="${ACT_RATE:-2e-4}" --scheduler.num_warmup_steps=$((steps / 20)));;
        # one observation: what `--execute` makes of its history; DDIM of ten steps: its usual fast setting
        diffusion) own=(--policy.type=diffusion --policy.n_obs_steps=1 --policy.horizon=16 --policy.n_action_steps=8
            --policy.drop_n_last_frames=0 --policy.crop_shape="[$((side * 7 / 8)),$((side * 7 / 8))]"
            --policy.down_dims="[256,512,1024]" --policy.noise_scheduler_type=DDIM --policy.num_inference_steps=10
            --batch_size="${DIFFUSION_BATCH:-64}" --num_workers="${DIFFUSION_LOADERS:-3}" --optimizer.type=adamw --optimizer.weight_decay=1e-6
            --optimizer.lr="${DIFFUSION_RATE:-3e-4}" --scheduler.num_warmup_steps=$((steps / 20)));;
    esac
    stage "$name" "$most" "$RSD_LEROBOT_PYTHON" "$code/scripts/lerobot_train.py" --dataset.repo_id=local \
        --dataset.root="$OUT/lerobot" --output_dir="$OUT/$name" --steps="$steps" --save_freq=$((steps / 4 + 1)) \
        --eval_freq=0 --log_freq="$every" --wandb.enable=false \
        --use_policy_training_preset=false --scheduler.type=diffuser --scheduler.name=cosine "${own[@]}" \
        --policy.pretrained_backbone_weights=null --policy.push_to_hub=false --policy.device="$device" "$@"
}
steps_in() { # policy, seconds: the trainer's steps, from a short one's last line and how long its start took
    "$python" - "$OUT/log/probe-$1" "$OUT/log/stages" "probe-$1" "$2" "${PROBE_STEPS:-200}" "${MAX_STEPS:-200000}" << 'END'
import re, sys
log, stages, name, seconds, probed, most = sys.argv[1:]
step = [float(a) + float(b) for a, b in re.findall(r"updt_s:([\d.]+) data_s:([\d.]+)", open(log).read())][-1]
wall = float(re.findall(rf"{name}: status \d+ after (\d+) s", open(stages).read())[-1])
start = max(wall - step * int(probed), 5)
print(max(min(int(0.9 * (float(seconds) - start) / max(step, 1e-3)), int(most)), 1))
END
}
train_both() {
    local policy seconds steps running=()
    for policy in "${policies[@]}"; do
        [ ! -e "$(made "$policy")" ] && [ -z "${STEPS:-}" ] || continue
        train "$policy" "probe-$policy" 150 "${PROBE_STEPS:-200}" $((${PROBE_STEPS:-200} / 4)) --save_checkpoint=false &
        running+=($!)
    done
    wait "${running[@]}"
    seconds=$(($(left) - ${AFTER_TRAINING:-680}))
    ((seconds < ${TRAIN_SECONDS:-480})) || seconds=${TRAIN_SECONDS:-480}
    ((seconds > 90)) || seconds=90
    running=()
    for policy in "${policies[@]}"; do
        [ ! -e "$(made "$policy")" ] || continue
        steps=${STEPS:-$(steps_in "$policy" "$seconds" || echo 4000)}
        say "$policy: $steps steps in $seconds s"
        train "$policy" "$policy" $((seconds + 20)) "$steps" 100 &
        running+=($!)
    done
    wait "${running[@]}"
}

## drafters, and episodes
evaluate() { # policy, name, seconds at most, suites, further options
    local policy=$1 name=$2 most=$3 suite=$4
    shift 4
    rsd "$policy-$name-$suite" "$most" eval --policy "lerobot:$(made "$policy")" --task-suite "$suite" --device "$device" \
        --tasks "${TASKS:-all}" --num-workers "${WORKERS:-$half}" --output "$OUT/eval/$policy/$suite/$name" "$@"
}
schedule=(--decode rsd-skip --skip-threshold-mm 1e9 --max-skips "${MAX_SKIPS:-5}") # instead of the drafter's own gate
speculate() { # policy, suite, states: a drafter, then with it and it alone
    local policy=$1 suite=$2 number=$3 steps
    KEEP=$((KEEP + ${AFTER_DISTIL:-280})) rsd "$policy-distil-$suite" "${DISTIL_SECONDS:-600}" drafter distil --target "lerobot:$(made "$policy")" \
        --task-suite "$suite" --tasks "${TASKS:-all}" --device "$device" --num-workers "${WORKERS:-$half}" \
        --num-rollouts "${ROLLOUTS:-8}" --num-dagger "${DAGGER:-5}" --rounds "${ROUNDS:-2}" \
        --num-calibration "${CALIBRATION:-3}" --loop.steps "${DISTIL_STEPS:-2000}" --output "$OUT/distil/$policy/$suite" \
        || return
    local drafter=$OUT/distil/$policy/$suite/drafter
    beside() { # name, states, further options: beside the others, on a share of the workers
        WORKERS=$(((${WORKERS:-$half} + 3) / 4)) evaluate "$policy" "$1" "${EVAL_SECONDS:-420}" "$suite" --num-trials "$2" \
            --drafter "$drafter" "${@:3}" &
    }
    if [ "$policy" = diffusion ]; then # it denoises: from the draft on, the last steps
        for steps in $CONTINUED; do beside "continue-$steps" "$number" --continue-steps "$steps"; done
    fi
    beside schedule "$number" "${schedule[@]}"
    beside drafter-only $(((number + 1) / 2)) --decode drafter-only
    beside rsd-skip "$number" --decode rsd-skip
    wait
}
whole() { # policy, states
    local suite running=()
    [ -e "$(made "$1")/model.safetensors" ] || { say "$1: no checkpoint"; return; }
    for suite in "${suites[@]}"; do
        (evaluate "$1" target-only "${ALONE_SECONDS:-420}" "$suite" --num-trials "$2" & speculate "$1" "$suite" "$2"; wait) &
        running+=($!)
    done
    wait "${running[@]}"
}
times() { # device, cores: one simulator at a time, on cores of its own
    local suite policy steps threads=1 options
    [ "$1" != cpu ] || threads=2
    for policy in "${policies[@]}"; do
        for suite in "${suites[@]}"; do
            [ -e "$OUT/distil/$policy/$suite/drafter" ] || continue
            options=(--num-workers 1 --policy "lerobot:$(made "$policy")" --drafter "$OUT/distil/$policy/$suite/drafter"
                --task-suite "$suite" --tasks "${TIMED_TASKS:-0}" --num-trials "${TIMED_STATES:-2}" --device "$1"
                --threads "$threads")
            LEAST=15 stage "times-$1-$policy-$suite" 120 taskset -c "$2" "$python" -m rsd eval --compare "${options[@]}" \
                --output "$OUT/times/$1/$policy/$suite"
            LEAST=15 stage "times-$1-$policy-$suite-schedule" 60 taskset -c "$2" "$python" -m rsd eval "${schedule[@]}" \
                "${options[@]}" --output "$OUT/times/$1/$policy/$suite/schedule"
            [ "$policy" = diffusion ] || continue
            for steps in $CONTINUED; do
                LEAST=15 stage "times-$1-$policy-$suite-continue-$steps" 60 taskset -c "$2" "$python" -m rsd eval "${options[@]}" \
                    --continue-steps "$steps" --output "$OUT/times/$1/$policy/$suite/continue-$steps"
            done
        done
    done
}
table() {
    "$python" - "$OUT" "$device" "${#policies[@]}" "${policies[@]}" "${suites[@]}" << 'END'
import json, os, sys
from pathlib import Path
from rsd.evaluation.statistics import paired_difference

out, device, count, *names = sys.argv[1:]
policies, suites = names[: int(count)], names[int(count) :]
speculating = [*(f"continue-{steps}" for steps in os.environ["CONTINUED"].split()), "schedule", "rsd-skip"]
def episodes(*where):
    path = Path(out, *where, "episodes.jsonl")
    read = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return {(e["task_id"], e["init_state"]): e for e in read if not e["failure"].startswith("error")}
def rate(found):
    return sum(e["success"] for e in found.values()) / len(found) if found else None
def share(found, name):
    seen = [v for e in found.values() for v in e["chunk_stats"].get(name, []) if v is not None]
    return sum(seen) / len(seen) if seen else None
def ms(found):
    steps = sum(e["steps"] for e in found.values())
    return sum(sum(e["latency_ms"]["total"]) for e in found.values()) / steps if steps else None
rows = []
for policy in policies:
    for suite in suites:
        runs = {name: episodes("eval", policy, suite, name) for name in ("target-only", *speculating, "drafter-only")}
        alone = runs["target-only"]
        row = {"policy": policy, "suite": suite}
        for name, found in runs.items():
            row |= {f"n {name}": len(found), f"success {name}": rate(found)}
        for name in speculating:
            skip = runs[name]
            if alone.keys() & skip.keys():
                pair = paired_difference(*({key: e["success"] for key, e in run.items()} for run in (alone, skip)))
                n = pair.both + pair.only_first + pair.only_second + pair.neither
                row |= {f"pairs {name}": n, f"only target, {name}": pair.only_first, f"only {name}": pair.only_second}
                row[f"paired points {name}"] = 100 * (pair.only_second - pair.only_first) / n
            chunks = sum(e["chunks"] for e in skip.values())
            row[f"target calls {name}"] = sum(e["prefills"] for e in skip.values()) / chunks if chunks else None
            row[f"kept where asked {name}"] = share(skip, "stood")
        for place in dict.fromkeys((device, "cpu")):
            timed = {name: ms(episodes("times", place, policy, suite, name)) for name in runs}
            row |= {f"ms a step {name}, {place}": value for name, value in timed.items()}
            for name in speculating:
                both = timed["target-only"] and timed[name]
                row[f"ratio {name}, {place}"] = timed["target-only"] / timed[name] if both else None
        rows.append(row)
Path(out, "table.json").write_text(json.dumps(rows, indent=1) + "\n")
names = list(dict.fromkeys(name for row in rows for name in row))
for name in names:
    cells = [row.get(name) for row in rows]
    print(f"{name:32}", *(f"{'-' if c is None else f'{c:.3f}' if isinstance(c, float) else c:>24}" for c in cells))
END
}

main() {
    KEEP=$((15 + ${AFTER_RENDER:-960})) render
    KEEP=$((15 + ${AFTER_TRAINING:-680})) export_all
    train_both
    KEEP=$((15 + ${TIMES_SECONDS:-150}))
    for policy in "${policies[@]}"; do
        case $policy in
            act) whole act "${ACT_STATES:-15}" &;;
            *) (renice -n 15 "$BASHPID" > /dev/null; whole "$policy" "${DIFFUSION_STATES:-5}") &;; # on cores that ACT leaves
        esac
    done
    wait
    KEEP=15
    if [ "$device" = cpu ]; then times cpu "$few"; else times "$device" "$rest" & times cpu "$few"; wait; fi
    table 2>&1 | tee "$OUT/table.txt"
}
main
exit
