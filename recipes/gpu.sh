#!/usr/bin/env bash
# recipes/tiny.sh on one GPU: GeneralPoints in words with a Llama of 26 M parameters, and a start of its own for every seed.
#
#   bash recipes/gpu.sh              three seeds side by side; the table and the figure are over starts and seeds
#   SMOKE=1 bash recipes/gpu.sh      everything once, with a small model; the numbers mean nothing
#
# A seed makes its start (recipes/base.sh: rules of the family, neither of the paper's two), goes on from it with PPO and
# with SFT, and tests both (recipes/tiny.sh). The seeds run at the same time: one alone leaves most of a GPU idle, since a
# model of this size waits for Python. What a seed prints is in OUT/log_SEED.
set -euo pipefail
cd "$(dirname "$0")/.."
export TASK=gp-l
OUT=${OUT:-runs/gpu-gp-l${SMOKE:+-smoke}}
SEEDS=${SEEDS:-0 1 2}
export SIZE=${SIZE:-512x8} LRS=${LRS:-6e-4 3e-4 3e-4}
[ -z "${SMOKE:-}" ] || SIZE=64x2
export MORE_RL=${MORE_RL:---updates 40 --save-every 10 --lr-horizon 40}
export MORE_SFT=${MORE_SFT:---steps 700 --save-every 175} SFT_SETTINGS=${SFT_SETTINGS:---lr 3e-5}
export MORE_TEST=${MORE_TEST:---episodes 1000}
mkdir -p "$OUT"
runs="" jobs=()
for seed in $SEEDS; do
    start=$OUT/start_$seed
    (
        [ -d "$start" ] || SEED=$seed BASE=$start OUT=$OUT/making_$seed bash recipes/base.sh
        MODEL=$start SEEDS=$seed OUT=$OUT bash recipes/tiny.sh
    ) >"$OUT/log_$seed" 2>&1 &
    jobs+=($!)
    runs="$runs,$OUT/sft_0_$seed,$OUT/rl_0_$seed"
done
failed=""
for job in "${jobs[@]}"; do
    wait "$job" || failed=1
done
[ -z "$failed" ] || { echo "a seed failed; the ends of the logs:" >&2; tail -n 5 "$OUT"/log_* >&2; exit 1; }
python evaluate.py --compare "${runs#,}" --figure "$OUT/figure.png"
[ -z "${SMOKE:-}" ] || echo "This was SMOKE=1: a few steps to see that everything runs. Its numbers mean nothing."
