#!/usr/bin/env bash
# Chooses the settings of the tiny run by the training rule alone. It is recipes/tiny.sh with a grid
# of settings for each arm, at about equal compute, from a start that is not reported.
#
#   bash recipes/grid.sh                   gp-l: an hour and a half on two cores, all parts summed
#   TASK=virl-l bash recipes/grid.sh
#   TASK=gp-vl bash recipes/grid.sh
#
# The other rule is never played here. What counts is the task's first measure (envs.TASKS) at the
# last checkpoint. Settings within one standard error of their arm's best tie with it; BAND=1 makes
# tiny.sh run all of these. The script ends with a table, a row for each run. What our tables said
# is in results/gp_l.md, virl_l.md and gp_vl.md.
#
# Ctrl-C stops the script at any time; the same command goes on. Settings, as environment variables:
#   TASK=gp-l          or virl-l, or gp-vl
#   OUT=folder         where the runs go [runs/grid-TASK]
#   JOBS=2, SMOKE=1    as in recipes/tiny.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common.sh
check_unused SEED SEEDS START STARTS
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
STARTS=9 SEEDS=0 RL_SETTINGS=${rl_settings#;} SFT_SETTINGS="--lr 1e-4;--lr 3e-4;--lr 1e-3" \
    MORE_TEST="--splits id" attended bash recipes/tiny.sh
python - "$OUT" "$TASK" <<'PY'
import json, sys
from pathlib import Path
import envs
folder, task = sys.argv[1:]
names = ("first_try", *envs.TASKS[task].metrics)
counts = names[1]

def percent(row, name):
    return f"{100 * row[name]:.1f} ± {100 * row[f'{name}_stderr']:.1f}"

titles = " | ".join(name.replace("_", " ") for name in names)
print(f"| run | GFLOPs | {titles} | {counts.replace('_', ' ')} at each checkpoint |")
print("|---|---|" + "---|" * len(names) + "---|")
for run in sorted(path.parent for path in Path(folder).glob("*/eval.jsonl")):
    config = json.loads((run / "config.json").read_text())
    rows = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    newest = {row["step"]: row for row in rows}        # of a checkpoint that was tested again
    rows = [newest[step] for step in sorted(newest)]
    cells = " | ".join(percent(rows[-1], name) for name in names)
    curve = ", ".join(f"{100 * row[counts]:.1f}" for row in rows)
    arm = f"PPO, temperature {config['temperature']}" if "updates" in config else "SFT"
    print(f"| {arm}, {config['lr']:g} | {rows[-1]['gflops']:,.0f} | {cells} | {curve} |")
PY
