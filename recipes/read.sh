#!/usr/bin/env bash
# A small vision model learns to read cards: SFT on GP-VL with black suits, tested on black suits
# and on red ones.
#
#   bash recipes/read.sh                    one seed: about ten minutes on two cores
#   SEEDS="0 1 2" bash recipes/read.sh
#   FAMILY=qwen3_vl bash recipes/read.sh    another kind of vision model (support/vision.py)
#   SMOKE=1 bash recipes/read.sh            a few steps; the numbers mean nothing
#
# Expect recognition, the paper's Fig. 8, to come suddenly, within a hundred steps
# (results/data/read_cards.csv). Recognition means that all four cards are named, in any order, in
# one reply without a verifier. Rank accuracy counts the cards that are named in their place, by
# chance one in thirteen. Training has seen none of the hands of the split "unseen".
#
# Settings, as environment variables:
#   SEEDS=0            the seeds, one model each
#   FAMILY=mllama      or qwen3_vl
#   OUT=folder         where the models and the runs go [runs/read-FAMILY]
#   SMOKE=1            a few steps, in a separate folder
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common.sh
FAMILY=${FAMILY:-mllama}
OUT=${OUT:-runs/read-$FAMILY${SMOKE:+-smoke}}
steps="--steps 700 --save-every 100 --batch-size 64" test="--episodes 234"
if [ -n "${SMOKE:-}" ]; then
    steps="--steps 4 --save-every 2 --batch-size 8" test="--episodes 8"
    SEEDS=0
fi
mkdir -p "$OUT"
same_settings "$OUT/settings" "FAMILY=$FAMILY${SMOKE:+ SMOKE=1}"
for seed in ${SEEDS:-0}; do
    [ -d "$OUT/blank_$seed" ] ||
        python support/tiny.py --task gp-vl --family "$FAMILY" --out "$OUT/blank_$seed" \
            --size 96x4 --seed "$seed" --env resolution=224
    attended python sft.py --task gp-vl --model "$OUT/blank_$seed" --out "$OUT/sft_$seed" \
        --seed "$seed" --mix id fold=train --env resolution=224 verify_iter=1 $steps --lr 1e-3 \
        --micro-batch-tokens 8192
    attended python evaluate.py --run-folder "$OUT/sft_$seed" --no-start --seeds "$seed" \
        --splits id unseen visual_ood $test --max-new-tokens 48
    echo "== seed $seed: the results of every checkpoint are in $OUT/sft_$seed/eval.jsonl"
done
[ -z "${SMOKE:-}" ] ||
    echo "This was SMOKE=1: a few steps to see that everything runs. Its numbers mean nothing."
