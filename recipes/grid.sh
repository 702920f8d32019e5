#!/usr/bin/env bash
# Which settings the tiny run has, chosen on the training rule alone: recipes/tiny.sh with a grid for each arm, at about equal
# compute, from a start that is not reported. The other rule is not played here at all. What counts is the task's first measure
# (envs.TASKS) at the last checkpoint; settings within one standard error of their arm's best tie, and tiny.sh runs them all.
#
#   bash recipes/grid.sh                   gp-l, by its parts an hour and a half on two cores, the start included; results/grid_gp_l.md
#   TASK=virl-l bash recipes/grid.sh       results/grid_virl_l.md
#   TASK=gp-vl bash recipes/grid.sh        results/grid_gp_vl.md
#
# It can be stopped; the same command goes on. JOBS and SMOKE=1 as in tiny.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
export TASK=${TASK:-gp-l}
export OUT=${OUT:-runs/grid-$TASK${SMOKE:+-smoke}}
case $TASK in
gp-l | gp-vl) temperatures="0.2 0.5" rl_rates="3e-5 5e-5" ;;
virl-l) temperatures="0.2 0.5 1.0" rl_rates="3e-5 1e-4 3e-4" ;;
*) echo "TASK=$TASK: allowed are gp-l, gp-vl and virl-l" >&2; exit 2 ;;
esac
rl_settings=
for temperature in $temperatures; do
    for lr in $rl_rates; do
        rl_settings="$rl_settings;--temperature $temperature --lr $lr --lr-final $lr"
    done
done
STARTS=9 SEEDS=0 RL_SETTINGS=${rl_settings#;} SFT_SETTINGS="--lr 1e-4;--lr 3e-4;--lr 1e-3" MORE_TEST="--splits id" bash recipes/tiny.sh
python - "$OUT" "$TASK" <<'PY'
import json, sys
from pathlib import Path
import envs
folder, task = sys.argv[1:]
names = ("first_try", *envs.TASKS[task].metrics)
counts = names[1]
print(f"| run | GFLOPs | {' | '.join(name.replace('_', ' ') for name in names)} | {counts.replace('_', ' ')} at each checkpoint |")
print("|---|---|" + "---|" * len(names) + "---|")
for run in sorted(path.parent for path in Path(folder).glob("*/eval.jsonl")):
    config = json.loads((run / "config.json").read_text())
    rows = sorted(map(json.loads, (run / "eval.jsonl").read_text().splitlines()), key=lambda row: row["step"])
    cells = [f"{100 * rows[-1][name]:.1f} ± {100 * rows[-1][f'{name}_stderr']:.1f}" for name in names]
    curve = ", ".join(f"{100 * row[counts]:.1f}" for row in rows)
    arm = f"PPO, temperature {config['temperature']}" if "updates" in config else "SFT"
    print(f"| {arm}, {config['lr']:g} | {rows[-1]['gflops']:,.0f} | {' | '.join(cells)} | {curve} |")
PY
