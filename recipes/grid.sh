#!/usr/bin/env bash
# Which settings the tiny run has, chosen on the training rule alone: a grid for each arm at about equal compute, from a start and
# with a seed that are not reported. The other rule is not played here at all. What counts is the last checkpoint's success
# (gp-l) or paper_step_accuracy (virl-l); settings within one standard error of their arm's best tie, and tiny.sh runs them all.
#
#   SEED=9 BASE=runs/grid-gp-l/start OUT=runs/grid-gp-l/making bash recipes/base.sh     # the start
#   bash recipes/grid.sh                                      # gp-l; prints a table at its end, see results/grid_gp_l.md
#   TASK=virl-l ... likewise, with runs/grid-virl-l
#
# JOBS runs are trained at the same time, each on one core. It can be stopped; the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
TASK=${TASK:-gp-l}
OUT=${OUT:-runs/grid-$TASK}
MODEL=${MODEL:-$OUT/start}
JOBS=${JOBS:-2} SEED=9
export OMP_NUM_THREADS=1
case $TASK in
gp-l)
    common="--model $MODEL --task gp-l --micro-batch-tokens 8192 --seed $SEED"
    rl="--split id fold=train --updates 24 --save-every 6 --num-envs 128 --turns-per-env 5 --minibatch-turns 128 --epochs 1 --max-new-tokens 40"
    rl="$rl --generate-tokens 8192 --clip 0.2 --value-coef 0.1 --value-lr 1e-3 --lr-warmup 2 --lr-horizon 24 --thought-coef 1.0"
    sft="--mix id fold=train --steps 200 --save-every 50"
    test="--splits id --episodes 500 --seeds $SEED --dtype float32 --max-new-tokens 40 --no-start"
    temperatures="0.2 0.5" rl_rates="3e-5 5e-5" sft_rates="1e-4 3e-4 1e-3" counts=success ;;     # the first grid: results/grid_gp_l.md
virl-l)
    [ -d "$OUT/city" ] || python data/synthetic_city.py --out "$OUT/city" --routes 1000 --most-legs 5 --no-pictures
    common="--model $MODEL --task virl-l --env root=$OUT/city --micro-batch-tokens 8192 --seed $SEED"
    rl="--split id --updates 10 --save-every 5 --num-envs 128 --turns-per-env 4 --minibatch-turns 128 --epochs 1 --max-new-tokens 48"
    rl="$rl --generate-tokens 8192 --clip 0.2 --value-coef 0.1 --value-lr 1e-3 --lr-warmup 1 --lr-horizon 10 --thought-coef 1.0"
    sft="--mix id --steps 50 --save-every 25"
    test="--splits id --episodes 300 --seeds $SEED --dtype float32 --max-new-tokens 48 --no-start"
    temperatures="0.2 0.5 1.0" rl_rates="3e-5 1e-4 3e-4" sft_rates="1e-4 3e-4 1e-3" counts=paper_step_accuracy ;;
*) echo "TASK=$TASK: allowed are gp-l and virl-l" >&2; exit 2 ;;
esac
mkdir -p "$OUT"
jobs=()
for lr in $sft_rates; do
    jobs+=("python sft.py $common $sft --lr $lr --out $OUT/sft_$lr && python evaluate.py --run-folder $OUT/sft_$lr $test")
done
for temperature in $temperatures; do
    for lr in $rl_rates; do
        run=$OUT/rl_${temperature}_$lr
        jobs+=("python rl.py $common $rl --temperature $temperature --lr $lr --lr-final $lr --out $run && python evaluate.py --run-folder $run $test")
    done
done
printf '%s\n' "${jobs[@]}" | xargs -P "$JOBS" -d '\n' -I{} bash -c '{}' >"$OUT/log" 2>&1
python - "$OUT" "$TASK" "$counts" <<'PY'
import json, sys
from pathlib import Path
import envs
names = ("first_try", *envs.TASKS[sys.argv[2]].metrics)
print(f"| run | GFLOPs | {' | '.join(name.replace('_', ' ') for name in names)} | {sys.argv[3].replace('_', ' ')} at each checkpoint |")
print("|---|---|" + "---|" * len(names) + "---|")
for run in sorted(path.parent for path in Path(sys.argv[1]).glob("*/eval.jsonl")):
    rows = sorted(map(json.loads, (run / "eval.jsonl").read_text().splitlines()), key=lambda row: row["step"])
    cells = [f"{100 * rows[-1][name]:.1f} ± {100 * rows[-1][f'{name}_stderr']:.1f}" for name in names]
    curve = ", ".join(f"{100 * row[sys.argv[3]]:.1f}" for row in rows)
    print(f"| {run.name} | {rows[-1]['gflops']:,.0f} | {' | '.join(cells)} | {curve} |")
PY
