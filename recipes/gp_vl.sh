#!/usr/bin/env bash
# The paper's GP-VL: GeneralPoints from a picture. Training has black suits and counts J, Q and K as
# 10. The tests have the other rule (11, 12 and 13), and red suits.
#
#   MODEL=Llama-3.2-11B-Vision-Instruct bash recipes/gp_vl.sh
#   SMOKE=1 bash recipes/gp_vl.sh
#
# recipes/paper.sh has the steps, and says what else can be set.
set -euo pipefail
task=gp-vl
# We chose the left end of Fig. 5's axis, 2e10 GFLOPs. By the official count, 1,600 tokens for a
# picture, a sample has about 1,950 tokens and a step 128 samples. We count 4 x 1,601 tokens for a
# picture, so our own axis is about three times as long.
start_steps=1250
sft_steps=2500      # our choice: from there to the right end, 6e10 GFLOPs, counted likewise
sft_save=250
sft_lr=5e-7         # official sft_scripts; all parts are tuned (C.2; Fig. 16 has --freeze)
updates=20          # of 2,048 turns (official scripts/gp_training)
rl_lr=1e-6          # Fig. 17 has 2e-6 as well
lr_horizon=100
verify_iter=5       # paper A.3
settings=solution=random   # SFT learns any of a hand's solutions, as in the official data
source "$(dirname "$0")/paper.sh"
