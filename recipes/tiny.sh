#!/usr/bin/env bash
# The paper's experiment in miniature, on a laptop: from one weak model, SFT and PPO on one rule, tests on both.
#
#   bash recipes/tiny.sh                    GeneralPoints in words, one seed, about twelve minutes on two cores
#   TASK=virl-l bash recipes/tiny.sh        V-IRL in words, in a synthetic city made on the spot, or in DATA=folder;
#                                           a quarter of an hour on two cores
#   TASK=gp-vl bash recipes/tiny.sh         GeneralPoints from pictures, tested on red suits as well; twenty-five minutes
#                                           on one core
#   SEEDS="0 1 2" bash recipes/tiny.sh      repeats it; the table then has standard errors over seeds
#   SMOKE=1 bash recipes/tiny.sh            everything once in about a minute, in a folder of its own; the numbers mean
#                                           nothing
#   MODEL=folder bash recipes/tiny.sh       another start, with SMOKE=1 as well; OUT=folder for the runs; MORE_RL,
#                                           MORE_SFT, MORE_TEST hold further options (gpu.sh)
#
# It can be stopped at any time (Ctrl-C); the same command goes on.
#
# The start is data/base/$TASK (recipes/base.sh). GP-L: neither rule of the paper was in its training, so what is asked
# there is generalisation. V-IRL-L: one expert reply in five of its training took relative actions, so what is asked is
# retention; its routes had two or three legs, those here have up to five. GP-VL: as GP-L, and red suits are nowhere in
# any training. What differs from the published defaults is
# written out below: larger learning rates, fewer turns to an update, a faster value head, sampling near temperature 1.
set -euo pipefail
cd "$(dirname "$0")/.."
TASK=${TASK:-gp-l}
OUT=${OUT:-runs/tiny-$TASK${SMOKE:+-smoke}}
SEEDS=${SEEDS:-0}
MODEL=${MODEL:-data/base/$TASK}
ppo="--clip 0.2 --value-coef 0.1 --value-lr 1e-3"
case $TASK in
gp-l)
    env=(); train="id fold=train"; max_new_tokens=40
    rl="--updates 14 --save-every 7 --num-envs 256 --turns-per-env 4 --minibatch-turns 256 --epochs 1"
    rl="$rl --lr 3e-5 --lr-final 1e-5 --lr-horizon 14 --temperature 0.7"
    sft="--steps 260 --save-every 65 --lr 1e-4"
    test="--episodes 500 --dtype float32" ;;
virl-l)
    DATA=${DATA:-$OUT/city}
    env=("root=$DATA"); train="id"; max_new_tokens=48
    rl="--updates 8 --save-every 4 --num-envs 256 --turns-per-env 4 --minibatch-turns 1024 --epochs 4"
    rl="$rl --lr 1e-4 --lr-final 5e-5 --lr-horizon 8 --lr-warmup 2 --temperature 1.0"
    sft="--steps 240 --save-every 80 --lr 1e-4"
    test="--episodes 300 --dtype float32" ;;
gp-vl)
    env=(resolution=224); train="id fold=train"; max_new_tokens=40
    rl="--updates 14 --save-every 7 --num-envs 256 --turns-per-env 4 --minibatch-turns 256 --epochs 1"
    rl="$rl --lr 3e-5 --lr-final 1e-5 --lr-horizon 14 --temperature 0.7"
    sft="--steps 184 --save-every 92 --lr 1e-4"
    test="--episodes 200 --splits id rule_ood visual_ood" ;;
*) echo "TASK=$TASK: allowed are gp-l, virl-l and gp-vl" >&2; exit 2 ;;
esac
# data/base/gp-l and gp-vl were trained when the prompt named the operations in words, and are told so still.
[ ! -f "$MODEL/prompts.json" ] || env+=("prompt_file=$MODEL/prompts.json")
rl="$rl ${MORE_RL:-}"; sft="$sft ${MORE_SFT:-}"; test="$test ${MORE_TEST:-}"   # the last of two equal options counts
if [ -n "${SMOKE:-}" ]; then
    rl="--updates 2 --save-every 1 --num-envs 16 --turns-per-env 2 --minibatch-turns 16 --lr 3e-5 --epochs 1"
    sft="--steps 4 --save-every 2 --batch-size 16 --lr 1e-4"
    test=$(echo "$test" | sed "s/--episodes [0-9]*/--episodes 32/g")
fi
read -ra seeds <<<"$SEEDS"
stages=$((4 * ${#seeds[@]} + 1)) stage=0
stage() {
    stage=$((stage + 1))
    echo "== $TASK, stage $stage of $stages: $1 ($((SECONDS / 60)) minutes so far)"
}
common=(--model "$MODEL" --task "$TASK" --micro-batch-tokens 8192 ${env[@]+--env "${env[@]}"})
sample="--max-new-tokens $max_new_tokens --generate-tokens 8192"
[ "$TASK" != virl-l ] || [ -d "$DATA" ] ||
    python data/synthetic_city.py --out "$DATA" --routes 1000 --most-legs 5 --no-pictures
runs=""
for seed in "${seeds[@]}"; do
    stage "PPO on the training rule, seed $seed"
    python rl.py --out "$OUT/rl_$seed" --seed "$seed" "${common[@]}" --split $train $rl $ppo $sample
    stage "SFT on the training rule, about as much compute, seed $seed"
    python sft.py --out "$OUT/sft_$seed" --seed "$seed" "${common[@]}" --mix $train $sft
    stage "the start and PPO's checkpoints on both rules, seed $seed"
    python evaluate.py --run-folder "$OUT/rl_$seed" --seeds "$seed" $test $sample
    stage "SFT's checkpoints on both rules, seed $seed"
    python evaluate.py --run-folder "$OUT/sft_$seed" --no-start --seeds "$seed" $test $sample
    runs="$runs,$OUT/sft_$seed,$OUT/rl_$seed"
done
stage "table and figure"
python evaluate.py --compare "${runs#,}" --figure "$OUT/figure.png"
[ -z "${SMOKE:-}" ] || echo "This was SMOKE=1: a few steps to see that everything runs. Its numbers mean nothing."
