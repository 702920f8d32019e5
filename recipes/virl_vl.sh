#!/usr/bin/env bash
# The paper's V-IRL-VL: navigation from street views. Compass directions in one city in training; tested on left and
# right, and in other cities.
#
#   MODEL=Llama-3.2-11B-Vision-Instruct DATA=FOLDER bash recipes/virl_vl.sh
#   SMOKE=1 bash recipes/virl_vl.sh
#
# All other variables, and the steps: recipes/paper.sh. data/synthetic_city.py makes data in the released format.
set -euo pipefail
task=virl-vl
start_steps=970     # ours: Fig. 5 begins at 2e10 GFLOPs, so many steps of 128 x about 2,500 tokens: the official count
                    # has 1,600 for a picture. Ours has 4 x 1,601, and so an axis about three times as long
sft_steps=970       # ours: its right end, 4e10, counted likewise
sft_save=97
sft_lr=5e-7         # official sft_scripts
updates=15          # of 2,048 turns (official scripts/virl_training)
rl_lr=1e-7          # Fig. 19 has 2e-7 as well
lr_horizon=20
verify_iter=2       # paper B.3
settings=resolution=560    # of a view: the official pictures reach the model at about 559
source "$(dirname "$0")/paper.sh"
