#!/usr/bin/env bash
# What the tiny run's effect hangs on, and the paper's other figures in miniature: a panel each, from the starts of the tiny run.
#
#   bash recipes/study.sh                  all panels; it can be stopped, the same command goes on
#   PANELS="two_by_two" bash recipes/study.sh
#   SMOKE=1 bash recipes/study.sh          everything once, a few steps each; the numbers mean nothing
#
# Panels, all on virl-l so far:
#   unseen_by_id   settings that a choice on the training rule alone does not tell apart, or only just: SFT at three learning rates,
#                  PPO at three temperatures, each tested on both rules
#   two_by_two     the starts again, with the fault that both rules share planted or not, with the mix-ups of the rules planted or
#                  not, from the same model before: which start gives which sign in which arm
#
# Each panel is recipes/tiny.sh with other settings or starts; its table and figure are in OUT/PANEL.
set -euo pipefail
cd "$(dirname "$0")/.."
export TASK=virl-l
OUT=${OUT:-runs/study${SMOKE:+-smoke}}
STARTS=${STARTS:-0 1 2}
[ -z "${SMOKE:-}" ] || STARTS=0
export DATA=${DATA:-$OUT/city}
mkdir -p "$OUT"
[ -d "$DATA" ] || python data/synthetic_city.py --out "$DATA" --routes 1000 --most-legs 5 --no-pictures
for start in $STARTS; do
    [ -d "$OUT/start_$start" ] || SEED=$start BASE=$OUT/start_$start OUT=$OUT/making_$start bash recipes/base.sh
done
panel() {    # NAME: recipes/tiny.sh in a folder of its own
    echo "== panel $1"
    OUT=$OUT/$1 STARTS=$STARTS SEEDS=0 bash recipes/tiny.sh | tee "$OUT/$1/table"
}
for name in ${PANELS:-unseen_by_id two_by_two}; do
    case $name in
    unseen_by_id)
        mkdir -p "$OUT/$name"
        for start in $STARTS; do
            [ -d "$OUT/$name/start_$start" ] || cp -r "$OUT/start_$start" "$OUT/$name/start_$start"
        done
        SFT_SETTINGS="--lr 1e-4;--lr 3e-4;--lr 1e-3" \
            RL_SETTINGS="--temperature 0.2 --lr 1e-4 --lr-final 1e-4;--temperature 0.5 --lr 1e-4 --lr-final 1e-4;--temperature 1.0 --lr 1e-4 --lr-final 1e-4" \
            panel "$name" ;;
    two_by_two)
        for cell in both:walk_past:0.6,other_word:0.15 fault_alone:walk_past:0.6 mix_ups_alone:other_word:0.15 neither:; do
            folder=$OUT/${cell%%:*}
            mkdir -p "$folder"
            for start in $STARTS; do
                after=$(ls -d "$OUT/making_$start"/2/step_?????? | tail -1)
                [ -d "$folder/start_$start" ] ||
                    SEED=$start BASE=$folder/start_$start OUT=$folder/making_$start FAULTS=${cell#*:} AFTER=$after bash recipes/base.sh
            done
            panel "${cell%%:*}"
        done ;;
    *) echo "PANELS=$name: allowed are unseen_by_id and two_by_two" >&2; exit 2 ;;
    esac
done
[ -z "${SMOKE:-}" ] || echo "This was SMOKE=1: a few steps to see that everything runs. Its numbers mean nothing."
