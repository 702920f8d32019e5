#!/usr/bin/env bash
# A random-init vision model learns to read cards: SFT on GP-VL with black suits, tested on black and on red ones.
#
#   bash recipes/read.sh               one seed, about ten minutes on two cores
#   SEEDS="0 1 2" bash recipes/read.sh
#
# Recognition is the paper's Fig. 8: one reply, no verifier, all four cards in any order; rank accuracy counts cards
# named in their place, by chance one in thirteen. The hands of the unseen split were never trained on.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/read}
for seed in ${SEEDS:-0}; do
    data="--task gp-vl --resolution 224 --dtype bfloat16"
    python sft.py --model tiny-vl:96x4 --out "$OUT/sft_$seed" --seed "$seed" $data --fold train \
        --steps 700 --save-every 100 --batch-size 64 --lr 1e-3 --micro-batch-tokens 8192
    python evaluate.py --run-folder "$OUT/sft_$seed" --no-start --seeds "$seed" $data --splits id,unseen,visual_ood \
        --verify-iter 1 --episodes 234 --max-new-tokens 48
done
