#!/usr/bin/env bash
# Step 0 of the tiny run: a stand-in for a foundation model's pre-training, committed as data/base/ (bfloat16).
#
#   bash recipes/base.sh                 data/base/gp-l, about twenty minutes on two cores
#   TASK=virl-l bash recipes/base.sh     data/base/virl-l, about fifteen minutes on two cores (nineteen on one)
#   TASK=gp-vl bash recipes/base.sh      data/base/gp-vl, about twenty minutes on one core
#
# For gp-l, SIZE, SEED, LRS (learning rates of the three stages) and BASE (the folder to write) may be set (gpu.sh does), and
# SMOKE=1, which takes a few steps and writes to OUT/base.
#
# gp-l: a random-init Llama of 1.4 M parameters learns from expert replies to play GeneralPoints under a family of rules:
# J, Q and K are each worth any number from 1 to 13, drawn anew for every hand and told in the prompt. The two rules of
# the paper (10/10/10 and 11/12/13) are never drawn, and a tenth of the hands is held out. First single tries, then
# dialogues with up to four failed tries before the expert's reply, so that the model can read a verdict.
#
# virl-l: one of 1 M parameters learns to walk routes of two or three legs through a synthetic city, with compass words
# in four samples of five and relative words in the fifth: the rule that is tested later is in it. Then a while with
# failed tries. tiny.sh goes on with routes of up to five legs: what is weak is to find the current instruction, which
# both rules need.
#
# gp-vl: as gp-l, but a random-init vision model of 1.8 M parameters that sees the hand, in black suits only, on a canvas
# of 224 pixels. It learns to read them along with the rest; both parts are left before their end. How well it then reads
# red suits, which it has never seen, differs much from run to run: this one names all four cards of half the hands; another,
# with 300 and 80 steps on schedules of their own, of one in fifty. data/base/gp-vl is from before the curves of the drawn
# cards were made smoother.
#
# Training stops while the model is still weak.
set -euo pipefail
cd "$(dirname "$0")/.."
TASK=${TASK:-gp-l}
OUT=${OUT:-runs/base-$TASK}
[ -z "${SMOKE:-}" ] || BASE=${BASE:-$OUT/base}
BASE=${BASE:-data/base/$TASK}
SEED=${SEED:-0}
newest() { ls -d "$1"/step_?????? | tail -1; }
common="--task $TASK --dtype bfloat16 --micro-batch-tokens 8192 --save-every 50"
case $TASK in
gp-l)
    common="$common --mix rule_family:1 --fold train"
    read -r first second third <<<"${LRS:-2e-3 1e-3 1e-3}"
    steps=(400 200 160)
    [ -z "${SMOKE:-}" ] || steps=(4 2 2)
    python sft.py --model "${SIZE:-tiny:160x4}" --out "$OUT/first" --steps "${steps[0]}" --lr "$first" \
        --seed $((3 * SEED)) $common
    common="$common --failed-tries 4"
    python sft.py --model "$(newest "$OUT/first")" --out "$OUT/second" --steps "${steps[1]}" --lr "$second" \
        --seed $((3 * SEED + 1)) $common
    python sft.py --model "$(newest "$OUT/second")" --out "$OUT/third" --steps "${steps[2]}" --lr "$third" \
        --seed $((3 * SEED + 2)) $common
    start=$(newest "$OUT/third") ;;
virl-l)
    [ -d "$OUT/city" ] || python data/synthetic_city.py --out "$OUT/city" --routes 1000 --most-legs 3 --no-pictures
    common="$common --root $OUT/city --mix id:0.8,rule_ood:0.2 --balance"
    python sft.py --model tiny:128x4 --out "$OUT/first" --steps 400 --lr 2e-3 --seed 0 $common
    python sft.py --model "$OUT/first/step_000400" --out "$OUT/second" --steps 120 --lr 1e-3 --failed-tries 1 --seed 1 $common
    start=$OUT/second/step_000120 ;;
gp-vl)
    common="$common --resolution 224 --mix rule_family:1 --fold train"
    python sft.py --model tiny-vl:128x4 --out "$OUT/first" --steps 500 --lr 2e-3 --seed 0 $common
    common="$common --save-every 40"
    python sft.py --model "$OUT/first/step_000300" --out "$OUT/second" --steps 120 --lr 1e-3 --failed-tries 4 --seed 1 $common
    start=$OUT/second/step_000080 ;;
*) echo "TASK=$TASK: allowed are gp-l, virl-l and gp-vl" >&2; exit 2 ;;
esac
rm -rf "$BASE.tmp"
python - "$start" "$BASE.tmp" <<'PY'
import sys, torch
from model import load_policy
policy, processor = load_policy(sys.argv[1])
policy.backbone.to(torch.bfloat16).save_pretrained(sys.argv[2])
processor.save_pretrained(sys.argv[2])
PY
rm -rf "$BASE"
mv "$BASE.tmp" "$BASE"
