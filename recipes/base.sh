#!/usr/bin/env bash
# Step 0 of the tiny run: a stand-in for a foundation model's pre-training, committed as data/base/gp-l (bfloat16).
#
# A random-init Llama of 1.4 M parameters learns from expert replies to play GeneralPoints under a family of rules: J, Q
# and K are each worth any number from 1 to 13, drawn anew for every hand and told in the prompt. The two rules of the
# paper (10/10/10 and 11/12/13) are never drawn, and a tenth of the hands is held out. First single tries, then
# dialogues with up to four failed tries before the expert's reply, so that the model can read a verdict. Training
# stops while the model is still weak. About twenty minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/base}
common="--task gp-l --mix rule_family:1 --fold train --dtype bfloat16 --micro-batch-tokens 8192 --save-every 50"
python sft.py --model tiny:160x4 --out "$OUT/first" --steps 400 --lr 2e-3 --seed 0 $common
python sft.py --model "$OUT/first/step_000400" --out "$OUT/second" --steps 200 --lr 1e-3 --failed-tries 4 --seed 1 $common
python sft.py --model "$OUT/second/step_000200" --out "$OUT/third" --steps 160 --lr 1e-3 --failed-tries 4 --seed 2 $common
python - "$OUT/third/step_000160" data/base/gp-l <<'PY'
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
PY
