#!/usr/bin/env bash
# The paper's V-IRL-L: navigation in words. Training has compass directions; the other rule of the
# tests has left and right.
#
#   MODEL=Llama-3.2-11B-Vision-Instruct DATA=FOLDER bash recipes/virl_l.sh
#   SMOKE=1 bash recipes/virl_l.sh
#
# recipes/paper.sh has the steps, and says what else can be set. data/synthetic_city.py makes data
# in the released format.
set -euo pipefail
task=virl-l
start_steps=25      # where the paper's RL starts (official sft/README.md), about 3,200 samples
# We chose about 4e9 GFLOPs, the right end of Fig. 5's axis, at 900 tokens a sample.
sft_steps=540
sft_save=54
sft_lr=1e-6         # official sft_scripts
updates=15          # of 2,048 turns (official scripts/virl_training)
rl_lr=1e-6
lr_horizon=20
verify_iter=2       # paper B.3
source "$(dirname "$0")/paper.sh"
