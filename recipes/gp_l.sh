#!/usr/bin/env bash
# The paper's GP-L: GeneralPoints in words. In training J, Q and K count 10; the other rule of the
# tests has 11, 12 and 13.
#
#   MODEL=Llama-3.2-11B-Vision-Instruct bash recipes/gp_l.sh
#   SMOKE=1 bash recipes/gp_l.sh
#
# recipes/paper.sh has the steps, and says what else can be set.
set -euo pipefail
task=gp-l
start_steps=400     # where the paper's RL starts (official sft/README.md), about 51,000 samples
# We chose about 1e10 GFLOPs, the right end of Fig. 5's axis, at 350 tokens a sample.
sft_steps=3400
sft_save=340
sft_lr=1e-6         # official sft/sft_scripts/gp_l.sh; AdamW (0.9, 0.98), cosine, warm-up 0.03
updates=20          # of 2,048 turns (official scripts/gp_training)
rl_lr=1e-6
lr_horizon=100
verify_iter=5       # paper A.3
settings=solution=random   # SFT learns any of a hand's solutions, as in the official data
source "$(dirname "$0")/paper.sh"
