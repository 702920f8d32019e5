"""The page of `evaluate.py --compare ... --html FILE`: what was found, and what each arm says.

    the finding     a sentence for each split, from the table
    the figure      a panel a split, a curve an arm; values on hover or focus
    the table       as --compare prints it
    the hands       side by side: the start and each arm in columns, a split at a time. Verdicts and
                    rewards are shown, and what differs from the expert is marked
    how it was made the commands, the settings, the device's type and the minutes

The page is one file that loads nothing. It is read without JavaScript as well, which only hides the
hands that are not looked at. What a model wrote is escaped, and holds no control characters.
"""
import html
import json
import math
import re
import shlex
from collections import Counter
from pathlib import Path

from support import collect, compare, running, transcripts
from support.chat import printable
from support.reading import plain_action

SHOWN_KEYS = ("number", "cards", "action", "formula")    # of a reply: what is compared
# What the two rules are, by how a task begins.
RULES = {
    "gp": "Four cards make 24. Under the training rule J, Q and K count ten. Under the other rule "
          "they count 11, 12 and 13. The prompt states the rule.",
    "virl": "Instructions lead through a city, as \"turn right to face west\". Under the training "
            "rule an action takes the compass word. Under the other rule it takes left or right, "
            "also slightly left or slightly right. The prompt lists the words.",
}
WORDS = ("SFT imitates an expert. RL tries, and a verifier pays for right replies. Both go on from "
         "the same start. The paper is Chu et al., arXiv 2501.17161. GFLOPs measure the compute.")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 420, 260, 44, 40, 14, 14      # of a panel, in pixels

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --back: #fff;
  --card: #f6f8fa; --start: #59636e; --good: #116329; --good-back: #dafbe1; --bad: #a40e26;
  --bad-back: #ffebe9; --mark: #ffd33d; --link: #0550ae }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --back: #0d1117; --card: #161b22; --start: #9198a1; --good: #7ee787; --good-back: #12261e;
  --bad: #ff9d96; --bad-back: #2d1518; --mark: #9a6700; --link: #79c0ff } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 100rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
h3 { font-size: 1rem; margin: 0 0 .5rem }
.soft { color: var(--soft) } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid var(--line) }
td { white-space: nowrap }
.panels { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; flex: 1 1 20rem; max-width: 34rem } svg { width: 100%; height: auto }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif }
.axis { stroke: var(--line) } .paper { stroke-dasharray: 2 4; opacity: .8 }
svg a:focus circle, svg a:hover circle { stroke: var(--ink); stroke-width: 2.5px }
.legend span { display: inline-block; margin-right: 1.2rem }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 50%;
  margin-right: .4em; background: currentColor }
.controls { display: flex; flex-wrap: wrap; gap: .75rem; align-items: center;
  position: sticky; top: 0; background: var(--back); padding: .5rem 0; z-index: 1 }
button, select { font: inherit; color: inherit; background: var(--card); padding: .3rem .8rem;
  border: 1px solid var(--line); border-radius: 6px }
:focus-visible { outline: 3px solid var(--link); outline-offset: 1px }
.hand { border-top: 1px solid var(--line); padding: 1rem 0 }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card);
  border-radius: 8px; padding: .6rem .8rem }
.hand img { max-width: 20rem; width: 100%; border-radius: 6px }
.columns { display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)) }
.said { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; margin: .5rem 0 }
.said p { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .93rem }
.reply { font-family: ui-monospace, monospace; font-size: .85rem !important }
.chip { display: inline-block; border-radius: 1rem; padding: 0 .6rem; font-size: .85rem;
  margin-right: .3rem }
.right { color: var(--good); background: var(--good-back) }
.wrong { color: var(--bad); background: var(--bad-back) }
mark { background: var(--mark); color: inherit; border-radius: 3px; padding: 0 .15em }
details { margin: .5rem 0 } pre { white-space: pre-wrap; overflow-wrap: anywhere }
@media (max-width: 40rem) { .controls button { flex: 1 }
  th, td { padding: .2rem .35rem; font-size: .8rem; white-space: normal } }
"""

SCRIPT = """
const hands = [...document.querySelectorAll('.hand')];
const only = document.getElementById('only'), split = document.getElementById('split');
const where = document.getElementById('where');
let chosen = [], at = 0;
function show() {
  hands.forEach(hand => { hand.hidden = hand !== chosen[at]; });
  where.textContent = chosen.length ? `${at + 1} of ${chosen.length}` : 'none';
}
function choose() {
  chosen = hands.filter(hand => (!split.value || hand.dataset.split === split.value)
                                && (!only.checked || hand.dataset.differ === 'yes'));
  at = 0;
  show();
}
function go(by) {
  if (chosen.length) { at = (at + by + chosen.length) % chosen.length; show(); }
}
document.getElementById('next').onclick = () => go(1);
document.getElementById('before').onclick = () => go(-1);
document.addEventListener('keydown', event => {
  if (event.target.matches('select, input, button')) return;
  if (event.key === 'ArrowRight') go(1);
  if (event.key === 'ArrowLeft') go(-1);
});
only.onchange = split.onchange = choose;
document.querySelector('.controls').hidden = false;
// Open where the arms differ on the other rule, if they do.
if (hands.some(hand => hand.dataset.split === 'rule_ood' && hand.dataset.differ === 'yes')) {
  split.value = 'rule_ood';
  only.checked = true;
}
choose();
"""


def text(value):
    """Any text as HTML, without what could be code or control the terminal or the page."""
    return html.escape(printable(str(value)))


# ---- The figure ----------------------------------------------------------------------------------

def colours_of(arms):
    """A colour for each arm: grey for the start, warm for SFT, green for RFT, blue for RL."""
    shades = {"SFT": ("#d1570a", "#e8912d", "#b3803e", "#8a5a1a"),
              "RFT": ("#2e8b3d", "#74b84e", "#4f7f58", "#93a33c"),
              "RL": ("#0a69da", "#4aa3df", "#6f7fd8", "#1f7a8c")}
    colours, seen = {"start": "var(--start)"}, dict.fromkeys(shades, 0)
    for arm in arms:
        method = collect.method_of(arm)
        colours[arm] = shades[method][seen[method] % 4]
        seen[method] += 1
    return colours


def nice_top(value):
    """The top of an axis in percent, at least `value`."""
    return next(top for top in (5, 10, 20, 40, 60, 80, 100) if top >= min(value, 100))


def panel(study, split, metric, colours, numbers):
    """One panel as SVG: curves of a metric, in %, against GFLOPs. `numbers`: the paper's three."""
    curves = {arm: compare.curve_of(study, arm, metric, split) for arm in study.tried}
    values = []
    for points in curves.values():
        values += [value if math.isnan(error) else value + error for _, value, error in points]
    top = nice_top(max([*values, *numbers]))
    longest = max(points[-1][0] for points in curves.values())

    def x(gflops):
        return LEFT + (WIDTH - LEFT - RIGHT) * gflops / longest

    def y(value):
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * min(value, top) / top

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" '
             f'aria-label="{text(compare.title_of(split))}">']
    for tick in (0, top / 2, top):
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" '
                     f'y2="{y(tick):.1f}"/><text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" '
                     f'text-anchor="end">{tick:g}</text>')
    for gflops, anchor in ((0, "start"), (longest, "end")):
        parts.append(f'<text x="{x(gflops):.1f}" y="{HEIGHT - BOTTOM + 18}" '
                     f'text-anchor="{anchor}">{gflops:,.0f}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
                 "GFLOPs of post-training</text>")
    for name, value in zip(("start", "SFT", "RL"), numbers):
        colour = colours["start"]
        if name != "start":
            colour = next(colours[arm] for arm in study.tried if collect.method_of(arm) == name)
        parts.append(f'<line class="paper" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" '
                     f'y2="{y(value):.1f}" stroke="{colour}"/><text x="{WIDTH - RIGHT}" '
                     f'y="{y(value) - 3:.1f}" text-anchor="end">paper: {name} {value:g}</text>')
    for arm, points in curves.items():
        line = " ".join(f"{x(gflops):.1f},{y(value):.1f}" for gflops, value, _ in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[arm]}" '
                     'stroke-width="2"/>')
        for gflops, value, error in points:
            if not math.isnan(error):
                parts.append(f'<line x1="{x(gflops):.1f}" x2="{x(gflops):.1f}" '
                             f'y1="{y(max(0, value - error)):.1f}" y2="{y(value + error):.1f}" '
                             f'stroke="{colours[arm]}"/>')
            said = f"{arm}, {gflops:,.0f} GFLOPs: {value:.1f} ± {error:.1f} %"
            parts.append(f'<a tabindex="0" role="img" aria-label="{text(said)}"><title>'
                         f'{text(said)}</title><circle cx="{x(gflops):.1f}" '
                         f'cy="{y(value):.1f}" r="4" fill="{colours[arm]}"/></a>')
    return "\n".join([*parts, "</svg>"])


def figure(study, paper, colours):
    parts = ['<div class="panels">']
    for split in study.splits:
        metric = paper.metric(study.task, split)
        numbers = paper.numbers.get((study.task, split, metric), ())
        parts.append(f"<figure><figcaption>{text(compare.title_of(split))}, % "
                     f"{text(study.counted(metric))}</figcaption>"
                     f"{panel(study, split, metric, colours, numbers)}</figure>")
    legend = "".join(f'<span><i style="color: {colours[arm]}"></i>{text(arm)}</span>'
                     for arm in study.tried)
    return "\n".join([*parts, "</div>", f'<p class="legend">{legend}</p>'])


# ---- The table -----------------------------------------------------------------------------------

def table(study, paper):
    """All measures on every split, an arm a line."""
    names = [text(compare.title_of(split)) for split in study.splits]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    parts = ['<div class="scroll"><table>']
    for metric in study.metrics:
        parts.append(f'<tr><th scope="col">{text(study.counted(metric))}, %</th>{head}</tr>')
        for name, cells in compare.metric_rows(study, metric, paper):
            values = "".join(f"<td>{text(cell)}</td>" for cell in cells)
            parts.append(f'<tr><th scope="row">{text(name)}</th>{values}</tr>')
    return "\n".join([*parts, "</table></div>"])


# ---- The hands -----------------------------------------------------------------------------------

def marked(reply, expert):
    """A reply as HTML. Marked: an action that is not the expert's, and each number or card that the
    expert has not, or not so often."""
    reply = printable(reply)
    try:
        right = json.loads(expert)
    except ValueError:                       # the expert of another environment may write no JSON
        return html.escape(reply)
    parts, end = [], 0
    for found in re.finditer(r'"(\w+)"\s*:\s*(\[[^\]]*\]|"[^"\n]*"?)', reply):
        key, value = found.groups()
        if key not in SHOWN_KEYS or key not in right:
            continue
        parts.append(html.escape(reply[end:found.start(2)]))
        parts.append(mark_value(key, value, right))
        end = found.end(2)
    return "".join([*parts, html.escape(reply[end:])])


def mark_value(key, value, right):
    """The value of a key in a reply as HTML; `right` is the expert's reply, a dict."""
    if key == "action":
        same = plain_action(value) == plain_action(str(right[key]))      # as the verifier does
        return html.escape(value) if same else f"<mark>{html.escape(value)}</mark>"
    left = Counter(map(str, right["number" if key == "formula" else key]))
    told, parts = value, []
    if key == "formula":                     # behind = stands what it should make
        told, _, _ = value.partition("=")
    pattern = r"\d+" if key == "formula" else r'[^\s\[\],"]+'
    end = 0
    for found in re.finditer(pattern, told):
        parts.append(html.escape(value[end:found.start()]))
        word, end = found[0], found.end()
        shown = html.escape(word)
        parts.append(shown if left[word] > 0 else f"<mark>{shown}</mark>")
        left[word] -= 1
    return "".join([*parts, html.escape(value[end:])])


def chip(status, reward):
    kind = "right" if status == "correct" else "wrong"
    return f'<span class="chip {kind}">{text(status.replace("_", " "))}, {reward:+g}</span>'


def column(arm, row):
    """What one arm said at a hand, and what the verifier answered."""
    parts = [f"<div><h3>{text(arm)}</h3>"]
    if isinstance(row, str):                 # why there is none
        return f"{parts[0]}<p class=\"soft\">{row}</p></div>"
    verdicts = iter(row["verdicts"])
    for message in row["messages"][1:]:
        if message["role"] == "assistant":
            status, reward = next(verdicts)
            parts.append(f'<div class="said">{chip(status, reward)}'
                         f'<p class="reply">{marked(message["content"], row["expert"])}</p></div>')
        else:
            parts.append(f'<p class="soft">{text(message["content"])}</p>')
    return "\n".join([*parts, "</div>"])


def hand(title, split, columns, picture):
    """A hand or a position as every arm played it; `columns`: arm -> dialogue, or in words why
    there is none."""
    rows = [row for row in columns.values() if not isinstance(row, str)]
    outcomes = set()                         # of each arm whether its first and last try are right
    for row in columns.values():
        if row == "did not get here":
            outcomes.add(None)
        elif not isinstance(row, str):
            outcomes.add((row["verdicts"][0][0] == "correct", row["verdicts"][-1][0] == "correct"))
    differ = "yes" if len(outcomes) > 1 else "no"
    said = "\n".join(column(arm, row) for arm, row in columns.items())
    prompt = text(rows[0]["messages"][0]["content"])
    return (f'<section class="hand" data-split="{text(split)}" data-differ="{differ}">'
            f'<h3>{text(title)}</h3>{transcripts.as_image(picture)}'
            f'<div class="prompt">{prompt}</div><div class="columns">{said}</div></section>')


def dialogues_of(study):
    """What was kept: {run: {evaluation (`transcripts.evaluation_of`): {place: dialogue}}}.

    The start's are under "start", as any run may have tested it. Two runs may have checkpoints of
    one path, if one of their folders has been moved.
    """
    found = {"start": {}}
    for run in sorted({row["run"] for arm in study.tried for row in study.arms[arm]}):
        for row in transcripts.read_dialogues(Path(run) / "dialogues.jsonl"):
            of = "start" if row["step"] == 0 else run
            evaluation = transcripts.evaluation_of(row)
            found.setdefault(of, {}).setdefault(evaluation, {})[row["episode"],
                                                                row["position"]] = row
    return found


def same_hands(study, split):
    """For the start and each arm a row of eval.jsonl, all of one start and one seed."""
    first = study.nearest(study.tried[0], split)[0]
    rows = {"start": [row for row in study.arms["start"] if row["split"] == split]}
    rows |= {arm: study.nearest(arm, split) for arm in study.tried}
    chosen = {}
    for arm in rows:
        for row in rows[arm]:
            if (row["start"], row["seed"]) == (first["start"], first["seed"]):
                chosen.setdefault(arm, row)
    return chosen


def hands(study, make_env):
    """The hands of every split that were kept, as every arm played them: HTML."""
    kept, parts = dialogues_of(study), []
    for split in study.splits:
        played = {}                          # (episode, position) -> arm -> dialogue
        chosen = same_hands(study, split)
        episodes = {}                        # arm -> episodes whose dialogues were kept
        for arm, tested in chosen.items():
            of = kept.get("start" if arm == "start" else tested["run"], {})
            dialogues = {place: row for place, row in
                         of.get(transcripts.evaluation_of(tested), {}).items()
                         if transcripts.is_of(row, tested)}
            episodes[arm] = {episode for episode, _ in dialogues}
            for place, row in dialogues.items():
                played.setdefault(place, {})[arm] = row
        on_routes = len({position for _, position in played}) > 1
        for (episode, position), columns in sorted(played.items()):
            title = f"{compare.title_of(split)}, {'route' if on_routes else 'hand'} "
            title += f"{episode + 1}" + (f", position {position + 1}" if on_routes else "")
            row = next(iter(columns.values()))
            shown = {}
            for arm in chosen:
                lost = "did not get here" if episode in episodes[arm] else "was not kept"
                shown[arm] = columns.get(arm, lost)
            parts.append(hand(title, split, shown, transcripts.picture_of_row(row, make_env)))
    return parts


# ---- The page ------------------------------------------------------------------------------------

def command_of(config):
    """The command line of a run, from its config.json."""
    script, words = "sft.py", []
    for name, other in ("updates", "rl.py"), ("rounds", "recipes/rft.py"):
        script = other if name in config else script
    for name, value in config.items():
        values = value if isinstance(value, list) else [value]
        if value is False or value is None or values in ([], [""]):
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += [shlex.quote(str(each)) for each in values]
    return f"python {script} {' '.join(words)}"


def minutes_of(run):
    """Minutes that a run has trained, by its log."""
    log = running.read_jsonl(Path(run) / "metrics.jsonl")
    return log[-1].get("seconds", 0) / 60 if log else 0


def how_the_start_was_made(path):
    """The folder of a start and, if a run of ours wrote it, the command of that run."""
    folder = Path(path).resolve()
    parts = [f"<h3>start</h3><p>{text(path)}</p>"]
    if (folder.parent / "metrics.jsonl").is_file():
        config = running.read_run_config(str(folder.parent))
        parts.append(f"<pre>{text(command_of(config))}</pre>")
    return parts


def how_it_was_made(study):
    """For the start and each arm: the command of its first run, and the settings of its tests."""
    parts = how_the_start_was_made(
        running.read_run_config(study.arms[study.tried[0]][0]["run"])["model"])
    for arm in study.tried:
        run = study.arms[arm][0]["run"]
        config = running.read_run_config(run)
        parts.append(f"<h3>{text(arm)}</h3><p>{minutes_of(run):.1f} minutes of training for "
                     f"{text(run)}, computed in {text(config.get('dtype', '?'))}.</p>"
                     f"<pre>{text(command_of(config))}</pre>")
    for split in study.splits:
        tested = [row["settings"] for row in study.arms["start"] if row["split"] == split][0]
        parts.append(f"<h3>Tests on {text(split)}</h3>"
                     f"<pre>{text(json.dumps(tested, indent=2))}</pre>")
    return "\n".join(parts)


def claim(study, paper):
    """The finding in a sentence for each split, as "On the other rule SFT went from 1.2 to 0.0"."""
    sentences = []
    for split in study.splits:
        metric = paper.metric(study.task, split)
        start = study.cells[metric, split, "start"].value
        ends = [f"{arm} from {start:.1f} to {study.cells[metric, split, arm].value:.1f}"
                for arm in study.tried]
        sentences.append(f"On {compare.title_of(split)}, in % of {study.counted(metric)}: "
                         f"{', '.join(ends)}.")
    return "".join(f"<p>{text(sentence)}</p>" for sentence in sentences)


def page(study, paper, make_env):
    """The whole page as HTML."""
    colours = colours_of(study.tried)
    sentences = [f"<li>{text(sentence)}</li>" for sentence in compare.findings(study, paper)]
    shown = hands(study, make_env)
    options = "".join(f'<option value="{text(split)}">{text(compare.title_of(split))}</option>'
                      for split in study.splits)
    viewer = ('<p class="soft">These runs hold no dialogues. To see some, delete their eval.jsonl '
              "and evaluate them again.</p>")
    if shown:
        viewer = f"""<div class="controls" hidden>
<button id="before" type="button">← previous</button>
<button id="next" type="button">next →</button>
<span id="where" aria-live="polite"></span>
<label>rule <select id="split"><option value="">all</option>{options}</select></label>
<label><input id="only" type="checkbox"> only where arms differ</label></div>
{"".join(shown)}"""
    played = compare.episodes_called(study)
    marks = "an action" if played == "routes" else "a number or a card"
    name = f"{compare.task_name(study.task)}: what SFT and RL do to a rule they were not trained on"
    trained_on = compare.trained_on(study) or "No arm is trained on the other rule."
    return "\n".join([
        '<!doctype html>', '<html lang="en">', '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(name)}</title>", f"<style>{STYLE}</style>",
        f"<main><h1>{text(name)}</h1>",
        f"<p>{RULES.get(study.task.partition('-')[0], '')} {text(trained_on)} {WORDS}</p>",
        f'<p class="soft">{text(compare.how_many(study))} Compared: '
        f"{text(compare.compared_at(study))}. {text(compare.left_out(study))} "
        f"{text(compare.tested_with(study))} {text(compare.cut_replies(study))}</p>",
        claim(study, paper), f"<ul>{''.join(sentences)}</ul>",
        "<h2>As training goes on</h2>", figure(study, paper, colours),
        "<h2>The table</h2><p class=\"soft\">The value, and in brackets its change since the start "
        "in points, ± standard error.</p>", table(study, paper),
        f"<h2>What each one says</h2><p class=\"soft\">The same {played} for the start and every "
        f"arm. Marked: {marks} that is not right. The arrow keys go on.</p>", viewer,
        "<h2>How it was made</h2><details><summary>Commands and settings</summary>"
        f"{how_it_was_made(study)}</details></main>",
        f"<script>{SCRIPT}</script>" if shown else "", "</html>", ""])


def write(file, make_env, study, paper):
    """Write the page to a file; returns what is to be printed of it."""
    running.write_atomically(file, page(study, paper, make_env))
    return f"page: {file}; open it in a browser"
