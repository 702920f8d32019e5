#!/usr/bin/env bash
# The tiny run of GeneralPoints in words on one GPU, with a larger model: a Llama of 26 M
# parameters, and a new start for each seed.
#
#   bash recipes/gpu.sh              three seeds side by side
#   SMOKE=1 bash recipes/gpu.sh      everything once, with a small model; the numbers mean nothing
#
# Each seed makes its start by SFT under a family of rules, without the paper's two
# (recipes/base.sh). PPO and SFT go on from it, and both are tested (recipes/tiny.sh). The script
# ends with a table and a figure over starts and seeds. The seeds run at the same time: a model of
# this size waits for Python, so one seed leaves most of a GPU idle.
#
# Settings, as environment variables:
#   OUT=folder         where the runs and the logs go [runs/gpu-gp-l]
#   SEEDS="0 1 2"      the seeds
#   SIZE=512x8         width and layers of the model
#   LRS="6e-4 3e-4 3e-4"     learning rates of the three stages of a start
#   MORE_RL, MORE_SFT, MORE_TEST, SFT_SETTINGS     as in recipes/tiny.sh
#   SMOKE=1            a few steps, in a separate folder
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common.sh
export TASK=gp-l
OUT=${OUT:-runs/gpu-gp-l${SMOKE:+-smoke}}
SEEDS=${SEEDS:-0 1 2}
export SIZE=${SIZE:-512x8} LRS=${LRS:-6e-4 3e-4 3e-4}
[ -z "${SMOKE:-}" ] || SIZE=64x2
export MORE_RL=${MORE_RL:---updates 40 --save-every 10 --lr-horizon 40}
export MORE_SFT=${MORE_SFT:---steps 700 --save-every 175} SFT_SETTINGS=${SFT_SETTINGS:---lr 3e-5}
export MORE_TEST=${MORE_TEST:---episodes 1000}
for setting in BAND RL_SETTINGS RFT_SETTINGS; do
    [ -z "${!setting:-}" ] || {
        echo "$setting=${!setting}: this recipe has one arm of PPO and no RFT" >&2
        exit 2
    }
done
check_unused SEED START
mkdir -p "$OUT"
check_numbers SEEDS
# The folder of a start does not tell how it was made.
same_settings "$OUT/settings" "SIZE=$SIZE LRS=$LRS FAULTS=${FAULTS-default} \
FAULTY_TRIES=${FAULTY_TRIES-default}${AFTER:+ AFTER=$AFTER}${SMOKE:+ SMOKE=1}"
IFS=';' read -ra sft_settings <<<"$SFT_SETTINGS"
runs=() jobs=()
for seed in $SEEDS; do
    printf -v start %q "$OUT/start_$seed"
    printf -v making %q "$OUT/making_$seed"
    printf -v out %q "$OUT"
    make="env SEED=$seed BASE=$start OUT=$making bash recipes/base.sh"$'\t'
    [ ! -d "$OUT/start_$seed" ] || make=
    tiny="env MODEL=$start STARTS=0 SEEDS=$seed OUT=$out bash recipes/tiny.sh"
    jobs+=("seed_$seed"$'\t'"$make$tiny")
    runs+=("$OUT/rl_0_$seed")
    for i in "${!sft_settings[@]}"; do
        runs+=("$OUT/sft_${i}_$seed")
    done
done
attended python recipes/runs.py --logs "$OUT" --side-by-side ${#jobs[@]} --title "$TASK" \
    <<<"$(printf '%s\n' "${jobs[@]}")"
python evaluate.py --compare "${runs[@]}" --figure "$OUT/figure.png" \
    --html "$OUT/report.html"
echo "== done; open $OUT/report.html; the log of each seed is $OUT/log_seed_SEED"
[ -z "${SMOKE:-}" ] ||
    echo "This was SMOKE=1: a few steps to see that everything runs. Its numbers mean nothing."
