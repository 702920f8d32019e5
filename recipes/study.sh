#!/usr/bin/env bash
# The paper's other figures in miniature, and what the result of the tiny run depends on. Panels of
# runs go on from the starts of the tiny run; a table of them all comes at the end.
#
#   bash recipes/study.sh                  all panels: twelve hours of one core, and three hours for
#                                          the starts
#   STARTS=0 bash recipes/study.sh         from one start: a good two hours on two cores
#   PANELS="two_by_two gate" bash recipes/study.sh
#   SMOKE=1 bash recipes/study.sh          everything once, a few steps; the numbers mean nothing
#
# The times are summed over the parts. They leave out the panel arms, which was not timed. Ctrl-C
# stops the script at any time; the same command goes on.
# results/paper.md has the table and the figures, and says what they show.
#
# A panel is recipes/tiny.sh with other settings or other starts, in OUT/PANEL:
#   virl        V-IRL-L: learning rates of SFT and temperatures of PPO that the training rule hardly
#               distinguishes (Fig. 17); one try or five at a position in training (Fig. 10); plain
#               feedback; a reward drawn at random; SFT on dialogues with failed tries (Fig. 15).
#               Tested on routes never trained on, too
#   two_by_two  V-IRL-L: starts with the fault that is wrong by both rules, with the mix-ups of
#               rules, with both and with neither, all from the same model before. From which starts
#               does which arm gain or lose?
#   gate        V-IRL-L: starts with the fault, and mix-ups in 5 % or 30 % of the directions, beside
#               the 0 and 15 % of two_by_two
#   long        V-IRL-L: three times as many updates of PPO. Does it lose the other rule later?
#   no_start    V-IRL-L: PPO from a model that knows nothing, not even the format (Fig. 9)
#   overfit     V-IRL-L: PPO from the end of SFT (Fig. 19); needs the panel virl
#   cards       GP-L: SFT on one rule, at two rates, and on many; PPO. Tested on hands never trained
#               on, and on a fake prompt that states the other rule while the training rule judges
#   arms        GP-L: what does a gain on the other rule take? PPO; RFT (recipes/rft.py) on right
#               tries, on right first tries, and on replies of the start alone; SFT at three rates,
#               on varied solutions, with a tenth of many rules mixed in, and on many rules alone.
#               Tested as cards is, and on a third rule, never trained on (J, Q, K count 11)
#   frozen      GP-VL: SFT of the whole model, of all but the vision encoder, and of the language
#               model alone (Fig. 16)
#
# Settings, as environment variables:
#   PANELS="..."       which panels [all of them, in this order]
#   STARTS="0 1 2"     numbers of the starts; each has one seed
#   OUT=folder         where everything goes [runs/study]
#   DATA=folder        the city to walk in [a synthetic one, made as OUT/city]
#   JOBS=2, SMOKE=1    as in recipes/tiny.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common.sh
OUT=${OUT:-runs/study${SMOKE:+-smoke}}
STARTS=${STARTS:-0 1 2}
[ -z "${SMOKE:-}" ] || STARTS=0
PANELS=${PANELS:-virl two_by_two gate long no_start overfit cards arms frozen}
check_data
check_unused SEED SEEDS START FAULTS FAULTY_TRIES SIZE LRS AFTER
export DATA=${DATA:-$OUT/city} SEEDS=0
unset MODEL                # it would take the place of start 0 in all panels
mkdir -p "$OUT"
[ -d "$DATA" ] ||
    python data/synthetic_city.py --out "$DATA" --routes 1000 --most-legs 5 --no-pictures
# start_of TASK START: make OUT/TASK/START, if it is not there. Start 0 is data/base/TASK. But that
# of V-IRL-L is made anew, because other panels begin with its stages.
start_of() {
    mkdir -p "$OUT/$1"
    [ "$1/$2" = virl-l/0 ] || [ "$2" != 0 ] || ln -sfn "$PWD/data/base/$1" "$OUT/$1/0"
    if [ ! -d "$OUT/$1/$2" ] || [ -d "$OUT/$1/making_$2" ]; then
        KEEP=1 TASK=$1 SEED=$2 BASE=$OUT/$1/$2 OUT=$OUT/$1/making_$2 attended bash recipes/base.sh
    fi
}
# begin PANEL FOLDER: link the starts of a panel; @ in FOLDER stands for the number of a start.
begin() {
    mkdir -p "$OUT/$1"
    for start in $STARTS; do
        ln -sfn "$(realpath "${2//@/$start}")" "$OUT/$1/start_$start"
    done
}
# panel PANEL TASK: make the runs of a panel; settings of tiny.sh stand before the call.
panel() {
    echo "== panel $1"
    OUT=$OUT/$1 TASK=$2 STARTS=$STARTS attended bash recipes/tiny.sh
}
ppo="--temperature 0.2 --lr 3e-5 --lr-final 3e-5"
warm="--lr 1e-4 --lr-final 1e-4 --temperature"
for name in $PANELS; do
    case $name in cards | arms) task=gp-l ;; frozen) task=gp-vl ;; *) task=virl-l ;; esac
    for start in $STARTS; do
        start_of $task "$start"
    done
    case $name in
    virl)
        begin virl "$OUT/virl-l/@"
        city="root=$DATA"
        RL_SETTINGS="$ppo;$warm 0.2;$warm 0.5;$warm 1.0;$ppo --env $city verify_iter=1;\
$ppo --env $city verify_iter=5;$ppo --env $city \
feedback=plain;$ppo --env $city reward=random;--temperature 1.0 --lr 3e-5 --lr-final 3e-5" \
            SFT_SETTINGS="--lr 1e-3;--lr 3e-4;--lr 1e-4;--lr 1e-3 --failed-tries 1;\
--lr 3e-5;--lr 1e-5" MORE_RL="--save-every 5" MORE_SFT="--save-every 25" \
            MORE_TEST="--splits id rule_ood unseen --env $city verify_iter=2 \
feedback=informative reward=verdict" panel virl virl-l ;;
    two_by_two | gate)
        # A cell of the experiment is NAME:FAULTS; the faults are those of its starts.
        if [ "$name" = two_by_two ]; then
            cells="both:walk_past:0.6,other_word:0.15 fault_alone:walk_past:0.6"
            cells="$cells mix_ups_alone:other_word:0.15 neither:"
        else
            cells="share_0.05:walk_past:0.6,other_word:0.05 share_0.3:walk_past:0.6,other_word:0.3"
        fi
        for cell in $cells; do
            folder=$OUT/$name/${cell%%:*}
            mkdir -p "$folder"
            for start in $STARTS; do
                after=$(ls -d "$OUT/virl-l/making_$start"/2/step_?????? | tail -1)
                KEEP=1 TASK=virl-l SEED=$start BASE=$folder/start_$start \
                    OUT=$folder/making_$start FAULTS=${cell#*:} AFTER=$after \
                    attended bash recipes/base.sh
            done
            RL_SETTINGS=$ppo SFT_SETTINGS="--lr 1e-3" MORE_RL="--save-every 10" \
                MORE_SFT="--save-every 50" panel "$name/${cell%%:*}" virl-l
        done ;;
    no_start)
        begin no_start "$OUT/virl-l/making_@/blank"
        RL_SETTINGS=$ppo SFT_SETTINGS=none MORE_RL="--save-every 10" panel no_start virl-l ;;
    long)
        begin long "$OUT/virl-l/@"
        RL_SETTINGS=$ppo SFT_SETTINGS=none MORE_RL="--updates 30 --lr-horizon 30 --save-every 5" \
            panel long virl-l ;;
    overfit)
        for start in $STARTS; do
            newest=$(realpath "$OUT/virl/sft_0_$((10 * start))"/step_?????? | tail -1)
            ln -sfn "$newest" "$OUT/virl-l/overfit_$start"
        done
        begin overfit "$OUT/virl-l/overfit_@"
        RL_SETTINGS=$ppo SFT_SETTINGS=none MORE_RL="--save-every 10" panel overfit virl-l ;;
    cards | arms)
        begin $name "$OUT/gp-l/@"
        told="Make {target} from four cards. Combine their values with + - * / and parentheses,"
        told="$told and use every card exactly once. An ace counts as 1, J counts as 11, Q counts"
        told="$told as 12 and K counts as 13."
        echo "{\"gp_task\": \"$told\"}" >"$OUT/fake.json"
        fake="id face_card=true id face_card=true prompt_file=$OUT/fake.json"
        sft="--lr 3e-4;--lr 3e-4 --mix rule_family fold=train;--lr 1e-4" rft= third=
        if [ "$name" = arms ]; then
            sft="$sft;--lr 1e-3;--lr 3e-4 --env solution=random"
            sft="$sft;--lr 3e-4 --mix id:0.9 fold=train rule_family:0.1 fold=train"
            rft="--temperature 0.7;--temperature 0.7 --first-tries --rounds 11"
            rft="$rft;--temperature 0.7 --sampler start"
            third="rule_ood rule=11,11,11"
        fi
        RL_SETTINGS="--temperature 0.2 --lr 5e-5 --lr-final 5e-5" SFT_SETTINGS=$sft \
            RFT_SETTINGS=$rft MORE_RL="--save-every 8" \
            MORE_TEST="--splits id rule_ood unseen $third $fake" panel $name gp-l ;;
    frozen)
        begin frozen "$OUT/gp-vl/@"
        freezing="--lr 1e-3 --freeze vision;--lr 1e-3 --freeze vision,projector"
        RL_SETTINGS=none SFT_SETTINGS="--lr 1e-3;$freezing" panel frozen gp-vl ;;
    *)
        allowed="virl, two_by_two, gate, long, no_start, overfit, cards, arms and frozen"
        echo "PANELS=$name: allowed are $allowed" >&2
        exit 2 ;;
    esac
done
python recipes/panels.py "$OUT" --figure "$OUT/panels.png"
for name in virl cards; do
    [ ! -d "$OUT/$name" ] ||
        python recipes/panels.py "$OUT/$name" --paths "$OUT/paths_$name.png" | tail -n 1
done
[ ! -d "$OUT/gate" ] || python recipes/panels.py "$OUT" --gate "$OUT/gate.png" | tail -n 1
if [ -d "$OUT/virl" ]; then
    # How far runs moved from their starts, for the arms that differ in rate or temperature alone.
    runs=()
    for start in $STARTS; do
        runs+=("$OUT/virl/"{sft_{0,1,2,4,5},rl_{0,1,2,3,8}}_$((10 * start)))
    done
    python recipes/distance.py "${runs[@]}" ${SMOKE:+--num 16}
fi
figures="the figures are in $OUT"
[ -f "$OUT/panels.png" ] || figures="no figure was drawn"
echo "== done; $figures, the logs of the runs are log_NAME in the folders below $OUT"
[ -z "${SMOKE:-}" ] ||
    echo "This was SMOKE=1: a few steps to see that everything runs. Its numbers mean nothing."
