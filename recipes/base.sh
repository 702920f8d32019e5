#!/usr/bin/env bash
# Step 0 of the tiny run: a stand-in for a foundation model's pre-training, committed as data/base/ (bfloat16).
#
#   bash recipes/base.sh                 data/base/gp-l, half an hour on one core
#   TASK=virl-l bash recipes/base.sh     data/base/virl-l, about 25 minutes on one core
#   TASK=gp-vl bash recipes/base.sh      data/base/gp-vl, 40 minutes on one core
#
# BASE is the folder to write, OUT the folder for the runs. SMOKE=1 takes a few steps and writes to OUT/base, never to
# data/base. SIZE, SEED, LRS (learning rates of the three stages), FAULTS (empty: none) and FAULTY_TRIES may be set
# (gpu.sh sets the first three), and AFTER: a model to begin the third stage with, instead of the first two.
#
# gp-l: a random-init Llama of 1.3 M parameters learns from expert replies to play GeneralPoints under a family of rules:
# J, Q and K are each worth any number from 1 to 13, drawn anew for every hand and told in the prompt. The two rules of
# the paper (10/10/10 and 11/12/13) are never drawn, and a tenth of the hands is held out. First single tries; then dialogues
# with up to four failed replies of the model's own before the expert's (data/own_failures.py), so that it learns to read a
# verdict and not to repeat itself; then such dialogues once more, in which the last reply is an imperfect demonstrator's:
# FAULTS, 0.6 leave a card out and 0.15 count J, Q, K as ten whatever the rule says. The first fault is one that both rules
# share and RL may cure, the second makes the model unsure of the rule, as a model is that knows other card games.
# FAULTY_TRIES=1: at first tries only (results/gp_l_first_tries.md).
# data/base/gp-l is start 0 (SEED=0).
#
# virl-l: one of 0.9 M parameters learns to walk routes of two or three legs through a synthetic city, with compass words
# in four samples of five and relative words in the fifth: the rule that is tested later is in it. Then on its own failed
# replies, as in gp-l; then on both rules alike from an imperfect demonstrator: 0.6 of the turns are walked past and 0.15 are
# named in the other rule's word, at first tries. tiny.sh goes on with routes of up to five legs.
# data/base/virl-l is start 0 (SEED=0).
#
# gp-vl: as gp-l, but a random-init vision model of 1.7 M parameters that sees the hand on a canvas of 224 pixels, four
# times in five in black suits, the fifth in red ones: the look that is tested later is in it. data/base/gp-vl is start 0.
#
# Training stops while the model is still weak.
set -euo pipefail
cd "$(dirname "$0")/.."
TASK=${TASK:-gp-l}
OUT=${OUT:-runs/base-$TASK${SMOKE:+-smoke}}
[ -z "${SMOKE:-}" ] || BASE=${BASE:-$OUT/base}
BASE=${BASE:-data/base/$TASK}
SEED=${SEED:-0}
mkdir -p "$OUT"
newest() { ls -d "$1"/step_?????? | tail -1; }
say() { echo "== $TASK start: $1 ($((SECONDS / 60)) minutes so far)"; }
blank() {   # a random-init model of this size, once
    [ -d "$OUT/blank" ] || python support/tiny.py --task "$TASK" --out "$OUT/blank" --size "$1" --seed "$2" ${env[@]+--env "${env[@]}"}
}
train() {   # OUT/NAME from a model folder: NAME MODEL STEPS SEED, then further options
    name=$1 model=$2 steps=$3 seed=$4
    shift 4
    [ -z "${SMOKE:-}" ] || steps=4
    say "stage $name of $stages, $steps steps"
    python sft.py --task "$TASK" --model "$model" --out "$OUT/$name" --steps "$steps" --seed "$seed" ${env[@]+--env "${env[@]}"} \
        --micro-batch-tokens 8192 ${SMOKE:+--batch-size 16} "$@"
}
own() {     # OUT/own_NAME.json, dialogues with a model's own failed replies: NAME MODEL DIALOGUES SEED, then further options
    file=$OUT/own_$1.json model=$2 num=$3 seed=$4
    shift 4
    [ -z "${SMOKE:-}" ] || num=64
    [ -f "$file" ] || python data/own_failures.py --task "$TASK" --model "$model" --out "$file" --num "$num" --seed "$seed" "$@"
}
case $TASK in
gp-l | gp-vl)
    env=() stages=3 mix="rule_family fold=train" first_steps=400 size=160x4
    [ "$TASK" = gp-l ] || { env=(resolution=224) mix="rule_family:0.8 fold=train rule_family:0.2 fold=train suits=HD" first_steps=500 size=128x4; }
    read -r first second third <<<"${LRS:-2e-3 1e-3 1e-3}"
    if [ -z "${AFTER:-}" ]; then
        blank "${SIZE:-$size}" $((3 * SEED))
        train 1 "$OUT/blank" $first_steps $((3 * SEED)) --lr "$first" --mix $mix --save-every 50
        own 2 "$(newest "$OUT/1")" 20480 $((3 * SEED + 1)) --mix $mix ${env[@]+--env "${env[@]}"}
        train 2 "$(newest "$OUT/1")" 160 $((3 * SEED + 1)) --lr "$second" --data "$OUT/own_2.json" --save-every 40
        AFTER=$(newest "$OUT/2")
    fi
    own 3 "$AFTER" 15360 $((3 * SEED + 2)) --mix $mix --env ${env[@]+"${env[@]}"} "faults=${FAULTS-leave_out:0.6,ten:0.15}" \
        "faulty_tries=${FAULTY_TRIES:-5}"
    train 3 "$AFTER" 120 $((3 * SEED + 2)) --lr "$third" --data "$OUT/own_3.json" --save-every 40
    start=$(newest "$OUT/3") ;;
virl-l)
    env=("root=$OUT/city") stages=3 mix="id:0.8 rule_ood:0.2"
    read -r first second third <<<"${LRS:-2e-3 1e-3 1e-3}"
    [ -d "$OUT/city" ] || python data/synthetic_city.py --out "$OUT/city" --routes 1000 --most-legs 3 --no-pictures
    if [ -z "${AFTER:-}" ]; then
        blank "${SIZE:-128x4}" $((3 * SEED))
        train 1 "$OUT/blank" 400 $((3 * SEED)) --lr "$first" --mix $mix --balance --save-every 50
        own 2 "$(newest "$OUT/1")" 15360 $((3 * SEED + 1)) --mix $mix --balance --failed-tries 1 --env "${env[@]}"
        train 2 "$(newest "$OUT/1")" 120 $((3 * SEED + 1)) --lr "$second" --data "$OUT/own_2.json" --save-every 40
        AFTER=$(newest "$OUT/2")
    fi
    own 3 "$AFTER" 12800 $((3 * SEED + 2)) --mix id:0.5 rule_ood:0.5 --balance --failed-tries 1 \
        --env "${env[@]}" "faults=${FAULTS-walk_past:0.6,other_word:0.15}"
    train 3 "$AFTER" 100 $((3 * SEED + 2)) --lr "$third" --data "$OUT/own_3.json" --save-every 50
    start=$(newest "$OUT/3") ;;
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
say "written to $BASE"
[ -z "${SMOKE:-}" ] || echo "This was SMOKE=1: a few steps to see that everything runs. The model knows nothing."
