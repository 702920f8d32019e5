#!/usr/bin/env bash
# Makes the start of the tiny run: a small, weak model that stands in for a pretrained one.
#
#   bash recipes/base.sh                 data/base/gp-l: half an hour on one core
#   TASK=virl-l bash recipes/base.sh     data/base/virl-l: about 25 minutes on one core
#   TASK=gp-vl bash recipes/base.sh      data/base/gp-vl: 40 minutes on one core
#   TASK=virl-vl bash recipes/base.sh    data/base/virl-vl: an hour on one core, beside another job
#
# The committed folders of data/base/ are start 0 of a task, in bfloat16 (SEED=0). The stages stay
# in OUT. Ctrl-C stops the script at any time; the same command goes on.
#
# Settings, as environment variables:
#   TASK=gp-l          or virl-l, gp-vl, virl-vl
#   BASE=folder        the new folder to write [data/base/TASK, which is start 0, so for SEED=0]
#   OUT=folder         where the three stages go [runs/base-TASK]
#   SEED=0             another seed makes another start
#   SIZE=160x4         width and layers of the model [by task]
#   LRS="2e-3 1e-3 1e-3"      learning rates of the three stages
#   FAULTS=...         faults of the demonstrator in stage 3, with shares [by task]; empty for none
#   FAULTY_TRIES=5     gp-l and gp-vl: how many of a hand's tries, from the first, may hold a fault
#   AFTER=folder       the model that stage 3 begins with; stages 1 and 2 are then left out
#   KEEP=1             leave a BASE that is there as it is; if OUT tells how it was made, refuse
#                      other settings
#   SMOKE=1            a few steps; writes to OUT/base, never to data/base
#
# The three stages are all SFT, and training stops while the model is still weak:
#   1. single tries of an expert;
#   2. dialogues in which the model's failed replies stand before the expert's reply
#      (data/own_failures.py). The model learns to read a verdict and not to repeat itself;
#   3. such dialogues whose last reply comes from an imperfect demonstrator, with two faults.
#
# gp-l: a Llama of 1.3 M parameters plays GeneralPoints under a family of rules. J, Q and K are each
# worth a number from 1 to 13, drawn anew for each hand and told in the prompt. The two rules of the
# paper are never drawn, and a tenth of the hands is held out. In 60 % of its replies the
# demonstrator leaves out a card, or two. In 15 % it counts J, Q and K as ten, whatever the rule
# says. The first fault is wrong by both rules, so RL may cure it. The second, a mix-up of rules,
# makes the model unsure of the rule, like a model that knows other card games. With FAULTY_TRIES=1
# only first tries hold faults (results/gp_l.md).
#
# virl-l: a Llama of 0.9 M parameters walks routes of two or three legs through a synthetic city.
# Four samples in five have compass words; the fifth has the words of the other rule, which is
# tested later. In stage 3 both rules are equally frequent. At first tries the demonstrator walks on
# at 60 % of the intersections where a direction must be named. (A route's first direction comes
# before any intersection.) It names 15 % of all directions in the words of the rule not in force.
#
# gp-vl: as gp-l, but a vision model of 1.7 M parameters sees the hand on a canvas of 224 pixels.
# Four hands in five have black suits; the fifth has red ones, the look that is tested later.
#
# virl-vl: as virl-l, but a vision model of 1.7 M parameters sees four views on a canvas of 224
# pixels. It walks through another city than the runs will. There the boards of landmarks have any
# colour, and only the shape on a board tells the kind of place. In stage 1 it names what is in
# pictures of the city (data/captions.py), in stage 2 it walks. In stage 3 the failed tries are not
# its own but random ones, since pictures for its own would fill a gigabyte.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common.sh
TASK=${TASK:-gp-l}
OUT=${OUT:-runs/base-$TASK${SMOKE:+-smoke}}
[ -z "${SMOKE:-}" ] || BASE=${BASE:-$OUT/base}
BASE=${BASE:-data/base/$TASK}
BASE=${BASE%/}
SEED=${SEED:-0}
case $TASK in
gp-l) size=160x4 faults=leave_out:0.6,ten:0.15 ;;
gp-vl) size=128x4 faults=leave_out:0.6,ten:0.15 ;;
virl-l | virl-vl) size=128x4 faults=walk_past:0.6,other_word:0.15 ;;
*) echo "TASK=$TASK: allowed are gp-l, virl-l, gp-vl and virl-vl" >&2; exit 2 ;;
esac
[ "$SEED" = 0 ] || [ "$BASE" != "data/base/$TASK" ] || {
    echo "SEED=$SEED: needs BASE=folder, since $BASE is start 0" >&2
    exit 2
}
[ -z "${FAULTS+given}${SIZE:-}${LRS:-}${AFTER:-}${FAULTY_TRIES:-}${SMOKE:-}" ] ||
    [ "$BASE" != "data/base/$TASK" ] || {
    echo "FAULTS, SIZE, LRS, AFTER, FAULTY_TRIES and SMOKE need another BASE, since $BASE is the" \
        "start that comes of their defaults" >&2
    exit 2
}
size=${SIZE:-$size} faults=${FAULTS-$faults} faulty_tries=${FAULTY_TRIES:-5}
LRS=${LRS:-2e-3 1e-3 1e-3}
# What lies at BASE is replaced at the end, unless KEEP is set.
[ -n "${KEEP:-}" ] || [ -f "$OUT/writes" ] || [ ! -e "$BASE" ] ||
    [ "$BASE" = "data/base/$TASK" ] || {
    echo "BASE=$BASE: is there already, and not from OUT=$OUT: choose another BASE" >&2
    exit 2
}
# An OUT that is new does not tell how BASE was made.
[ -z "${KEEP:-}" ] || [ ! -d "$BASE" ] || [ -f "$OUT/settings" ] || exit 0
mkdir -p "$OUT"
same_settings "$OUT/writes" "BASE=$BASE"
# Some stages leave files that do not tell how they were made.
same_settings "$OUT/settings" "TASK=$TASK SEED=$SEED SIZE=$size LRS=$LRS FAULTS=$faults \
FAULTY_TRIES=$faulty_tries AFTER=${AFTER:-}${SMOKE:+ SMOKE=1}"
[ -z "${KEEP:-}" ] || [ ! -d "$BASE" ] || exit 0
newest() { ls -d "$1"/step_?????? | tail -1; }
say() { echo "== $TASK start: $1 ($((SECONDS / 60)) minutes so far)"; }
# blank SIZE SEED OPTION...: make OUT/blank, a random-init model, if it is not there.
blank() {
    size=$1 seed=$2
    shift 2
    [ -d "$OUT/blank" ] ||
        python support/tiny.py --task "$TASK" --out "$OUT/blank" --size "$size" --seed "$seed" \
            ${env[@]+--env "${env[@]}"} "$@"
}
# train NAME MODEL STEPS SEED OPTION...: train OUT/NAME from the model folder MODEL.
train() {
    name=$1 model=$2 steps=$3 seed=$4
    shift 4
    [ -z "${SMOKE:-}" ] || steps=4
    say "stage $name of $stages, $steps steps"
    attended python sft.py --task "$TASK" --model "$model" --out "$OUT/$name" --steps "$steps" \
        --seed "$seed" ${env[@]+--env "${env[@]}"} --micro-batch-tokens 8192 \
        ${SMOKE:+--batch-size 16} "$@"
}
# own NAME MODEL NUM SEED OPTION...: write NUM dialogues with failed replies of MODEL to
# OUT/own_NAME.json, if it is not there.
own() {
    file=$OUT/own_$1.json model=$2 num=$3 seed=$4
    shift 4
    [ -z "${SMOKE:-}" ] || num=64
    [ -f "$file" ] ||
        attended python data/own_failures.py --task "$TASK" --model "$model" --out "$file" \
            --num "$num" --seed "$seed" "$@"
}

stages=3
read -r first second third <<<"$LRS"
seed_1=$((3 * SEED)) seed_2=$((3 * SEED + 1)) seed_3=$((3 * SEED + 2))
case $TASK in
gp-l | gp-vl)
    env=() mix="rule_family fold=train" first_steps=400
    if [ "$TASK" = gp-vl ]; then
        env=(resolution=224) first_steps=500
        mix="rule_family:0.8 fold=train rule_family:0.2 fold=train suits=HD"
    fi
    if [ -z "${AFTER:-}" ]; then
        blank "$size" $seed_1
        train 1 "$OUT/blank" $first_steps $seed_1 --lr "$first" --mix $mix --save-every 50
        own 2 "$(newest "$OUT/1")" 20480 $seed_2 --mix $mix ${env[@]+--env "${env[@]}"}
        train 2 "$(newest "$OUT/1")" 160 $seed_2 --lr "$second" --data "$OUT/own_2.json" \
            --save-every 40
        AFTER=$(newest "$OUT/2")
    fi
    own 3 "$AFTER" 15360 $seed_3 --mix $mix --env ${env[@]+"${env[@]}"} \
        "faults=$faults" "faulty_tries=$faulty_tries"
    train 3 "$AFTER" 120 $seed_3 --lr "$third" --data "$OUT/own_3.json" --save-every 40
    start=$(newest "$OUT/3") ;;
virl-l)
    env=("root=$OUT/city") mix="id:0.8 rule_ood:0.2"
    [ -d "$OUT/city" ] ||
        python data/synthetic_city.py --out "$OUT/city" --routes 1000 --most-legs 3 --no-pictures
    if [ -z "${AFTER:-}" ]; then
        blank "$size" $seed_1 --splits id rule_ood
        train 1 "$OUT/blank" 400 $seed_1 --lr "$first" --mix $mix --balance --save-every 50
        own 2 "$(newest "$OUT/1")" 15360 $seed_2 --mix $mix --balance --failed-tries 1 \
            --env "${env[@]}"
        train 2 "$(newest "$OUT/1")" 120 $seed_2 --lr "$second" --data "$OUT/own_2.json" \
            --save-every 40
        AFTER=$(newest "$OUT/2")
    fi
    own 3 "$AFTER" 12800 $seed_3 --mix id:0.5 rule_ood:0.5 --balance --failed-tries 1 \
        --env "${env[@]}" "faults=$faults"
    train 3 "$AFTER" 100 $seed_3 --lr "$third" --data "$OUT/own_3.json" --save-every 50
    start=$(newest "$OUT/3") ;;
virl-vl)
    env=("root=$OUT/city" resolution=110) routes=600 num=5000
    [ -z "${SMOKE:-}" ] || routes=2 num=64
    [ -d "$OUT/city" ] ||
        python data/synthetic_city.py --out "$OUT/city" --seed 1 --signs any-colour \
            --routes $routes --unseen 1 --most-legs 3 --size 352 --workers 1
    if [ -z "${AFTER:-}" ]; then
        blank "$size" $seed_1 --splits id rule_ood
        [ -f "$OUT/captions.json" ] ||
            python data/captions.py --root "$OUT/city" --out "$OUT/captions.json" --num $num \
                --seed $seed_1
        train 1 "$OUT/blank" 300 $seed_1 --lr "$first" --data "$OUT/captions.json" \
            --batch-size 64 --save-every 100
        train 2 "$(newest "$OUT/1")" 300 $seed_2 --lr "$second" --mix id:0.8 rule_ood:0.2 \
            --save-every 50
        AFTER=$(newest "$OUT/2")
    fi
    env+=("faults=$faults")
    train 3 "$AFTER" 100 $seed_3 --lr "$third" --mix id:0.5 rule_ood:0.5 --balance \
        --failed-tries 1 --save-every 50
    start=$(newest "$OUT/3") ;;
esac

# Write the last checkpoint in bfloat16, beside BASE first: a stopped script leaves no half start.
rm -rf "$BASE.tmp"
python - "$start" "$BASE.tmp" <<'PY'
import sys, torch
from model import load_policy
from support import loading, portable
policy, processor = load_policy(sys.argv[1])
policy.backbone.to(torch.bfloat16).save_pretrained(sys.argv[2])
processor.save_pretrained(sys.argv[2])
portable.make_portable(sys.argv[2], loading.tokenizer_of(processor))
PY
rm -rf "$BASE"
mv "$BASE.tmp" "$BASE"
say "written to $BASE"
[ -z "${SMOKE:-}" ] ||
    echo "This was SMOKE=1: a few steps to see that everything runs. The model knows nothing."
