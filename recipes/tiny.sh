#!/usr/bin/env bash
# The paper's experiment in miniature, on a laptop. One weak model goes on with SFT and with PPO on
# one rule; you see what each does to the rule it was not trained on.
#
#   bash recipes/tiny.sh                    GeneralPoints in words: about 13 minutes on two cores
#   TASK=virl-l bash recipes/tiny.sh        V-IRL in words: about 9 minutes
#   TASK=gp-vl bash recipes/tiny.sh         GeneralPoints from pictures: about 13 minutes
#   TASK=virl-vl bash recipes/tiny.sh       V-IRL from pictures: about 20 minutes
#   SMOKE=1 bash recipes/tiny.sh            everything once, in a minute; the numbers mean nothing
#   STARTS="0 1 2" BAND=1 bash recipes/tiny.sh        the runs of results/gp_l.md: half an hour for
#                                           each start, and as long to make one
#
# A start is the model that both arms, SFT and PPO, begin with. Each run is trained, then each of
# its checkpoints is played on every split. The script ends with a table of both arms, a figure, and
# a page that shows what each arm says on the same hands.
# Ctrl-C stops it at any time; the same command goes on.
#
# Settings, as environment variables:
#   TASK=gp-l          or virl-l, gp-vl, virl-vl; the last two are tested on another look as well
#   OUT=folder         where the runs and the logs go [runs/tiny-TASK]
#   JOBS=2             runs side by side, one core each
#   STARTS=0           numbers of the starts; 0 is data/base/TASK, recipes/base.sh makes the others
#   SEEDS=0            seeds of the runs from each start, from 0 to 9
#   MODEL=folder       another model as start 0
#   DATA=folder        V-IRL: the city to walk in [a synthetic one, made as OUT/city]
#   SMOKE=1            a few steps of everything, in a separate folder; without MORE_RL and MORE_SFT
#   BAND=1             run all settings of PPO that tied on the training rule, not the best alone
#   RL_SETTINGS=...    options of rl.py in place of those below, separated by ";", a run for each
#   SFT_SETTINGS=...   the same for sft.py; "none" leaves that arm out
#   RFT_SETTINGS=...   the same for recipes/rft.py, such as "--temperature 0.7"; if it is not set,
#                      that arm is left out
#   MORE_RL=...        further options for every PPO run; MORE_SFT and MORE_TEST likewise
#
# What the starts know. No start of gp-l or gp-vl has seen either rule of the paper: the test asks
# for generalisation. The starts of virl-l and virl-vl have walked by both rules: there the test
# asks for retention. Their routes had two or three legs; the routes here have up to five. The
# starts of gp-vl have seen red suits in a fifth of their hands; the runs here train on black ones
# alone.
#
# In virl-vl the boards of landmarks show a shape for each of six kinds of place. In the city of the
# runs their colour tells the kind as well, so an arm may come to read colours. The test of another
# look has 18 routes, two in each of nine other cities, where the colours tell nothing. Each route
# is played several times, each time from another heading. RL's rate is the better of two on the
# training rule, from a start that is not reported.
#
# Why these settings. Learning rates are larger than the published defaults, updates have fewer
# turns, and the value head learns faster. recipes/grid.sh compared settings on the training rule
# alone. All SFT settings that tied are run, and of PPO's the best one at the official temperature,
# 0.2. On gp-l four settings of PPO tie, on gp-vl three; BAND=1 runs them all. The four PPO settings
# of virl-l are always run. The comparisons are in results/gp_l.md, virl_l.md and gp_vl.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common.sh
TASK=${TASK:-gp-l}
OUT=${OUT:-runs/tiny-$TASK${SMOKE:+-smoke}}
STARTS=${STARTS:-0}
SEEDS=${SEEDS:-0}
export JOBS=${JOBS:-2} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
check_data
check_unused SEED START

# ---- The settings of each task ----

ppo="--clip 0.2 --value-coef 0.1 --value-lr 1e-3"
case $TASK in
gp-l | gp-vl)
    env=(); train="id fold=train"; max_new_tokens=40
    rl="--updates 24 --save-every 4 --num-envs 128 --turns-per-env 5 --minibatch-turns 128"
    rl="$rl --epochs 1 --lr-warmup 2 --lr-horizon 24 --thought-coef 1.0"
    sft="--steps 200 --save-every 40"
    rft="--rounds 8 --episodes 512 --steps 15"
    rl_settings=("--temperature 0.2 --lr 5e-5 --lr-final 5e-5")
    sft_settings=("--lr 1e-3" "--lr 3e-4")
    tied=("--temperature 0.2 --lr 3e-5 --lr-final 3e-5"
          "--temperature 0.5 --lr 3e-5 --lr-final 3e-5"
          "--temperature 0.5 --lr 5e-5 --lr-final 5e-5")
    test="--episodes 500 --dtype float32 --dialogues 64"
    if [ "$TASK" = gp-vl ]; then
        env=(resolution=224) test="--episodes 300 --dtype float32 --splits id rule_ood visual_ood"
        rl_settings=("--temperature 0.2 --lr 3e-5 --lr-final 3e-5")
        tied=("--temperature 0.5 --lr 5e-5 --lr-final 5e-5"
              "--temperature 0.5 --lr 3e-5 --lr-final 3e-5")
    fi ;;
virl-l)
    DATA=${DATA:-$OUT/city}
    env=("root=$DATA"); train="id"; max_new_tokens=48
    rl="--updates 10 --save-every 2 --num-envs 128 --turns-per-env 4 --minibatch-turns 128"
    rl="$rl --epochs 1 --lr-warmup 1 --lr-horizon 10 --thought-coef 1.0"
    sft="--steps 50 --save-every 10"
    rft="--rounds 8 --episodes 128 --steps 5"
    rl_settings=("--temperature 1.0 --lr 1e-4 --lr-final 1e-4"
                 "--temperature 1.0 --lr 3e-4 --lr-final 3e-4"
                 "--temperature 0.2 --lr 1e-4 --lr-final 1e-4"
                 "--temperature 0.2 --lr 3e-5 --lr-final 3e-5")
    sft_settings=("--lr 1e-3")
    tied=()
    test="--episodes 300 --dtype float32" ;;
virl-vl)
    DATA=${DATA:-$OUT/city}
    env=("root=$DATA" resolution=110); train="id"; max_new_tokens=48 routes=1000
    rl="--updates 20 --save-every 5 --num-envs 128 --turns-per-env 4 --minibatch-turns 128"
    rl="$rl --epochs 1 --lr-warmup 1 --lr-horizon 20 --thought-coef 1.0"
    sft="--steps 100 --save-every 25"
    rft="--rounds 8 --episodes 128 --steps 10"
    rl_settings=("--temperature 0.2 --lr 3e-5 --lr-final 3e-5")
    sft_settings=("--lr 1e-3")
    tied=()
    test="--episodes 216 --dtype float32 --splits id rule_ood visual_ood" ;;
*) echo "TASK=$TASK: allowed are gp-l, virl-l, gp-vl and virl-vl" >&2; exit 2 ;;
esac
[ -z "${BAND:-}" ] || rl_settings+=(${tied[@]+"${tied[@]}"})
# These come last on each command line: of two equal options the last one counts.
more_rl=${MORE_RL:-} more_sft=${MORE_SFT:-} test="$test ${MORE_TEST:-}"
if [ -n "${SMOKE:-}" ]; then
    rl="--updates 2 --save-every 1 --num-envs 16 --turns-per-env 2 --minibatch-turns 16 --epochs 1"
    sft="--steps 4 --save-every 2 --batch-size 16"
    rft="--rounds 2 --episodes 64 --steps 2 --batch-size 16"
    routes=4
    rl_settings=("${rl_settings[0]}") sft_settings=("${sft_settings[0]}") more_rl= more_sft=
    # Test on 32 episodes; a MORE_TEST that asks for fewer than 100 keeps its number.
    test=$(echo "$test" | sed -E "s/--episodes [0-9]{3,}/--episodes 32/g")
fi
[ -z "${RL_SETTINGS:-}" ] || IFS=';' read -ra rl_settings <<<"$RL_SETTINGS"
[ -z "${SFT_SETTINGS:-}" ] || IFS=';' read -ra sft_settings <<<"$SFT_SETTINGS"
[ "${RL_SETTINGS:-}" != none ] || rl_settings=()
[ "${SFT_SETTINGS:-}" != none ] || sft_settings=()
rft_settings=()
[ -z "${RFT_SETTINGS:-}" ] || IFS=';' read -ra rft_settings <<<"$RFT_SETTINGS"
[ "${RFT_SETTINGS:-}" != none ] || rft_settings=()

# ---- The starts and the list of runs ----

check_model
check_jobs
check_numbers STARTS SEEDS
[ -z "${MODEL:-}" ] || [[ " $STARTS " == *" 0 "* ]] || {
    echo "MODEL=$MODEL: is start 0, which STARTS=$STARTS does not have" >&2
    exit 2
}
[[ ! $SEEDS =~ [0-9][0-9] ]] || { echo "SEEDS=$SEEDS: each must be from 0 to 9" >&2; exit 2; }
[ ! -e "$OUT" ] || [ -d "$OUT" ] || { echo "OUT=$OUT: is a file, not a folder" >&2; exit 2; }
mkdir -p "$OUT"
# A start of other making than the defaults of base.sh is none of data/base.
other_making=${FAULTS+given}${FAULTY_TRIES:-}${SIZE:-}${LRS:-}${AFTER:-}
say() { echo "== $TASK: $1 ($((SECONDS / 60)) min so far)"; }
[ "$TASK" != virl-l ] || [ -d "$DATA" ] ||
    python data/synthetic_city.py --out "$DATA" --routes 1000 --most-legs 5 --no-pictures
[ "$TASK" != virl-vl ] || [ -d "$DATA" ] ||
    python data/synthetic_city.py --out "$DATA" --signs shapes --routes $routes --unseen 1 \
        --most-legs 5 --size 352 --workers "$JOBS"
jobs=() runs=()
# job NAME SCRIPT TEST-OPTION OPTION...: add a line for runs.py, which trains a run with the OPTIONs
# and then tests it.
job() {
    name=$1 script=$2 option=$3
    shift 3
    printf -v options '%q ' --out "$OUT/$name" --task "$TASK" --micro-batch-tokens 8192 "$@"
    printf -v folder %q "$OUT/$name"
    training="python $script $options"
    testing="python evaluate.py --run-folder $folder --seeds $number $sample $test $option"
    jobs+=("$name"$'\t'"$training"$'\t'"$testing")
    runs+=("$OUT/$name")
}
for start in $STARTS; do
    model=$OUT/start_$start
    if [ "$start" = 0 ] && [ -n "${MODEL:-}" ]; then
        model=$MODEL                       # also where OUT holds another start 0, as in gpu.sh
    elif [ ! -d "$model" ] && [ "$start" = 0 ] && [ -z "$other_making" ] &&
        [ -d "data/base/$TASK" ]; then
        model=data/base/$TASK
    elif [ ! -d "$model" ] || [ -d "$OUT/making_$start" ]; then
        [ -d "$model" ] || say "making start $start"
        KEEP=1 SEED=$start BASE=$model OUT=$OUT/making_$start attended bash recipes/base.sh
    fi
    for seed in $SEEDS; do
        # The start itself is tested once, with the first run that begins with it.
        number=$((10 * start + seed)) start_too=
        common=(--model "$model" --seed "$number" ${env[@]+--env "${env[@]}"})
        sample="--max-new-tokens $max_new_tokens --generate-tokens 16384"
        for i in "${!rl_settings[@]}"; do
            job "rl_${i}_$number" rl.py "$start_too" "${common[@]}" --split $train \
                $rl $ppo $sample ${rl_settings[i]} $more_rl
            start_too=--no-start
        done
        for i in "${!sft_settings[@]}"; do
            job "sft_${i}_$number" sft.py "$start_too" "${common[@]}" --mix $train \
                $sft ${sft_settings[i]} $more_sft
            start_too=--no-start
        done
        for i in "${!rft_settings[@]}"; do
            job "rft_${i}_$number" recipes/rft.py "$start_too" "${common[@]}" --split $train \
                --max-new-tokens $max_new_tokens $rft ${rft_settings[i]}
            start_too=--no-start
        done
    done
done

# ---- The runs, JOBS at a time, then the table and the figure ----

# explain NAME SETTING...: print what the names of the runs mean.
explain() {
    name=$1 i=0
    shift
    for setting in "$@"; do
        echo "   ${name}_${i}_...  $name with $setting"
        i=$((i + 1))
    done
}
[ -z "${SMOKE:-}" ] || echo "This is SMOKE=1: a few steps to see that everything runs."
explain rl ${rl_settings[@]+"${rl_settings[@]}"}
explain sft ${sft_settings[@]+"${sft_settings[@]}"}
explain rft ${rft_settings[@]+"${rft_settings[@]}"}
echo "   in place of ... a run's name has 10 times its start plus its seed"
[ ${#jobs[@]} != 0 ] || { echo "RL_SETTINGS and SFT_SETTINGS: both are none" >&2; exit 2; }
attended python recipes/runs.py --logs "$OUT" --side-by-side "$JOBS" --title "$TASK" \
    <<<"$(printf '%s\n' "${jobs[@]}")"
if [ ${#rl_settings[@]} != 0 ] && [ ${#sft_settings[@]} != 0 ]; then
    say "table, figure and page"
    python evaluate.py --compare "${runs[@]}" --figure "$OUT/figure.png" \
        --html "$OUT/report.html"
    say "done; open $OUT/report.html to see what each arm says"
fi
[ -z "${SMOKE:-}" ] || {
    smoke="This was SMOKE=1: a few steps to see that everything runs. Its numbers mean nothing."
    [ ! -f "$OUT/report.html" ] || sed -i.bak "s|<main>|<main><p><strong>$smoke</strong></p>|" \
        "$OUT/report.html" && rm -f "$OUT/report.html.bak"
    echo "$smoke"
}
