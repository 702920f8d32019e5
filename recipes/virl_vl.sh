#!/usr/bin/env bash
# The paper's V-IRL-VL: navigation from street views. Training has compass directions in one city.
# The tests have left and right, and other cities.
#
#   MODEL=Llama-3.2-11B-Vision-Instruct DATA=FOLDER bash recipes/virl_vl.sh
#   SMOKE=1 bash recipes/virl_vl.sh
#
# recipes/paper.sh has the steps, and says what else can be set. data/synthetic_city.py makes data
# in the released format.
set -euo pipefail
task=virl-vl
# We chose the left end of Fig. 5's axis, 2e10 GFLOPs. By the official count, 1,600 tokens for a
# picture, a sample has about 2,500 tokens and a step 128 samples. We count 4 x 1,601 tokens for a
# picture, so our own axis is about three times as long.
start_steps=970
sft_steps=970       # our choice: from there to the right end, 4e10 GFLOPs, counted likewise
sft_save=97
sft_lr=5e-7         # official sft_scripts
updates=15          # of 2,048 turns (official scripts/virl_training)
rl_lr=1e-7          # Fig. 19 has 2e-7 as well
lr_horizon=20
verify_iter=2       # paper B.3
settings=resolution=560    # of a view: the official pictures reach the model at about 559
source "$(dirname "$0")/paper.sh"
