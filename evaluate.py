"""Success inside and outside the training distribution (paper Sections 4 and 5, appendix C.3), and the paper's figure.

A GeneralPoints episode succeeds when it is solved within its verification turns; a V-IRL episode when every position
of the route is, up to the stop. The paper reports V-IRL by steps: the share of all replies that are correct, retries
counted as samples of their own. Most of them are moves that are the same under both rules, so the positions at which a
direction must be named (kind "turn") are reported apart, and so are first tries. Every episode is played until it is
solved or out of tries, so one evaluation gives the success within every smaller number of tries as well. The x-axis is
`gflops` of metrics.jsonl, 2 N (3 tokens_trained + tokens_rollout) / 1e9 (`model.Policy.gflops` has N; the tokens are
counted by `rl.advance`, and in sft.py by `Policy.num_tokens`).

    python evaluate.py --model runs/sft/step_000400                  # one checkpoint, printed only
    python evaluate.py --run-folder runs/rl                          # all checkpoints of a run and its start
    python evaluate.py --run-folder runs/rl --splits id rule_ood id rule=11,11,11         # and by a rule of your own
    python evaluate.py --compare runs/sft,runs/rl --figure fig.png   # table beside the paper's numbers, and curves
    API_KEY=... python evaluate.py --api-url https://host/v1 --api-model NAME --out runs/api   # a model behind an API

Rows of a run go to its eval.jsonl, one per checkpoint, split and seed; rows that are there already are not played
again, and replies of an unfinished one are kept, so a stopped evaluation goes on where it was. Task and `--env` are
those of the run unless a flag says otherwise; what a run has behind its split's name (`--split id suits=HD`) is for its
training alone. Several runs of one arm are averaged: mean and standard error over their starts, or over runs if they have one
start; they should be evaluated on hands of their own (--seeds) so that the error holds the draw of hands as well. A single run
has the standard error over its episodes (of a success: the binomial one). Changes since the start are paired: each run with its
own start on the same hands.

Left out: smoothing (the paper's curves are Savitzky-Golay filtered).
"""
import json
import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import envs
from model import EVALUATION, RolloutMemory, decode_reply, encode, load_policy, picture_of, sampling_uniforms
from support import run_folder, running, settings
from support.api import ApiModel, read_extra
from support.running import knob


# ---- What counts -------------------------------------------------------------------------------------------

def mean(values):
    return sum(values) / len(values)


def share(hits, counts):
    """What share of the counts are hits, given both per episode, and its standard error over episodes."""
    total = max(1, sum(counts))
    rate = sum(hits) / total
    return rate, math.sqrt(sum((hit - rate * count) ** 2 for hit, count in zip(hits, counts))) / total


def summarise(infos, verify_iter, kinds=()):
    """What eval.jsonl says about a list of played episodes, each a list of infos; `kinds` of positions that there are.

    success             episodes solved
    step_accuracy       replies that are correct, retries included (paper C.3)
    paper_step_accuracy the same with one wrong reply more for an episode that was cut short: the official code has the
                        model write it, unread, and counts it
    first_try           first replies to a hand or at a position that are correct
    retries             later ones that are
    repeats             later ones that are word for word an earlier reply of the dialogue
    recognition         hands whose four cards the first reply names, in any order (paper Fig. 8); it must be a reply
                        that can be judged, with a formula
    rank_accuracy       cards that the first reply names in their place; by chance, one in thirteen
    solved_and_read     episodes solved by a reply that also names the cards: the official code counts no other
    ..._turn and so on  the same for one kind of position
    ..._stderr          standard error of each, over episodes
    success_by_city     V-IRL, visual_ood: of each city, two routes in file order; the first is the training city or
                        looks like it
    endings             replies by why they ended: "stop", "length" if cut at the limit, or another word of an API
    replies_empty       replies without any text
    """
    def accuracy(wanted):
        picked = [[info["status"] == "correct" for info in episode if wanted(info)] for episode in infos]
        return share(list(map(sum, picked)), list(map(len, picked)))

    turns = [info for episode in infos for info in episode]
    repeated = [[info["repeated"] for info in episode if info["try"] > 1] for episode in infos]
    shares = {"success": share([episode[-1]["success"] for episode in infos], [1] * len(infos)),
              "step_accuracy": accuracy(lambda info: True),
              # differs 22: theirs has no other, and solved_and_read below for success
              "paper_step_accuracy": share([sum(info["status"] == "correct" for info in episode) for episode in infos],
                                           [len(episode) + (not episode[-1]["success"]) for episode in infos]),
              "first_try": accuracy(lambda info: info["try"] == 1),
              "retries": accuracy(lambda info: info["try"] > 1),
              "repeats": share(list(map(sum, repeated)), list(map(len, repeated)))}
    kinds = sorted({*kinds, *(info["kind"] for info in turns)})
    for kind in kinds if len(kinds) > 1 else ():
        shares[f"step_accuracy_{kind}"] = accuracy(lambda info: info["kind"] == kind)
        shares[f"first_try_{kind}"] = accuracy(lambda info: info["kind"] == kind and info["try"] == 1)
    if "ranks_right" in turns[0]:
        shares["recognition"] = share([episode[0]["cards_read"] for episode in infos], [1] * len(infos))
        shares["rank_accuracy"] = share([episode[0]["ranks_right"] for episode in infos], [4] * len(infos))
        shares["solved_and_read"] = share([episode[-1]["success"] and episode[-1]["cards_read"] for episode in infos],
                                          [1] * len(infos))
    row = {"episodes": len(infos), "replies": len(turns)}
    for name, (value, error) in shares.items():
        row |= {name: value, f"{name}_stderr": error}
    solved_at = [max(info["try"] for info in episode) for episode in infos if episode[-1]["success"]]
    row["success_within"] = [sum(at <= tries for at in solved_at) / len(infos) for tries in range(1, verify_iter + 1)]
    row["reward"] = sum(info["reward"] for info in turns) / len(infos)
    if "numbers_right" in turns[0]:
        row["numbers_right"] = sum(info["numbers_right"] for info in turns) / len(turns)
    cities = defaultdict(list)
    for episode in infos:
        if episode[-1].get("route") is not None:
            cities[episode[-1]["route"] // 2].append(episode[-1]["success"])
    if cities:
        row["success_by_city"] = [sum(solved) / len(solved) for _, solved in sorted(cities.items())]
    row |= {name: dict(sorted(Counter(info[key] for info in turns).items()))
            for name, key in (("statuses", "status"), ("endings", "ending"))}
    return row | {"replies_empty": sum(info["empty"] for info in turns)}


# ---- Settings ----------------------------------------------------------------------------------------------

# Paper Fig. 6 and 7, Section 5.1 and 5.2: (%) at the start, after SFT and after RL, at equal compute.
PAPER = {("gp-l", "rule_ood", "success"): (11.5, 3.4, 15.0),
         ("virl-l", "rule_ood", "paper_step_accuracy"): (80.8, 1.3, 91.8),
         ("gp-vl", "rule_ood", "solved_and_read"): (11.2, 5.6, 14.2),
         ("gp-vl", "visual_ood", "solved_and_read"): (23.6, 13.7, 41.2),
         ("virl-vl", "rule_ood", "paper_step_accuracy"): (35.7, 2.5, 45.0),
         ("virl-vl", "visual_ood", "success"): (16.7, 11.1, 77.8)}
# Which way the paper's curves go on a split, and what it is called in a figure.
SIGNS = {"id": {"SFT": "up", "RL": "up"}, "rule_ood": {"SFT": "down", "RL": "up"},
         "visual_ood": {"SFT": "down", "RL": "up"}}
TITLES = {"id": "the training rule", "rule_ood": "the other rule", "visual_ood": "the training rule, another look",
          "unseen": "the training rule, held out from training"}


@dataclass
class Config:
    """Defaults are ours: the paper does not say how it decodes in its tests."""     # differs 25: greedy, theirs samples
    model: str = knob("", "evaluate this one checkpoint")
    run_folder: str = knob("", "evaluate all checkpoints of this run folder, and the model it started from")
    start: bool = knob(True, "with --run-folder: evaluate the model it started from as well")
    compare: str = knob("", "print the table and draw the figure of these evaluated run folders, comma-separated")
    figure: str = knob("", "with --compare: write the figure here (needs matplotlib)")
    api_url: str = knob("", "evaluate a model behind this OpenAI-style API; its key stands in the variable API_KEY")
    api_model: str = knob("", "with --api-url: the model's name there")
    api_extra: str = knob("", 'with --api-url: JSON with more fields for the request; null leaves one out, as in '
                          '{"max_tokens": null, "max_completion_tokens": 4096}')
    api_workers: int = knob(8, "with --api-url: requests at the same time", low=1)
    out: str = knob("", "with --api-url: folder for the replies and for eval.jsonl, new or stopped half-way")
    task: str = knob("", "which environment; empty: the run's, else gp-l", choices=("", *envs.TASKS))
    splits: tuple = knob(("id", "rule_ood"), "what to evaluate on, with settings such as: id rule_ood id target=36")
    env: tuple = knob((), "settings of the environment, such as: root=city0 verify_iter=3, on top of the run's")
    episodes: int = knob(1000, "per split and seed", low=1)
    paper: bool = knob(False, "the paper's sample size instead: 234 hands, 48 routes, 18 for V-IRL's visual_ood")
    seeds: str = knob("0", "evaluation seeds, comma-separated; never those of training, though a hand may come again")
    temperature: float = knob(0.0, "0 is greedy; theirs samples as the checkpoint says, a stock Llama-3.2 at 0.6", low=0)
    top_p: float = knob(1.0, "sample from the likeliest tokens that have this share (theirs: 0.9)", low=0.01, high=1)
    max_new_tokens: int = knob(256, "a reply is cut here", low=1)
    generate_tokens: int = knob(65536, "padded tokens, replies included, that are sampled side by side", low=1)
    kept_gib: float = knob(4.0, "keys and values that stay from turn to turn, in GiB", low=0)
    dtype: str = knob("auto", "compute in this type; auto: the run's, else the faster one",
                      choices=("auto", "float32", "bfloat16"))
    device: str = knob("auto", "cpu, cuda, or auto")


# ---- Playing -----------------------------------------------------------------------------------------------

class LocalModel:
    """A checkpoint as a player of dialogues; ids are kept from turn to turn, and so is what was seen of a picture.

    With `kept`, the stem of a path, replies go to a file as they come, so that a stopped evaluation goes on.
    """

    def __init__(self, path, vision, config, kept=None):
        self.policy, self.processor = load_policy(str(path), config.dtype, running.start_processes(config.device),
                                                  vision=vision, param_dtype=config.dtype)
        self.config, self.memory = config, RolloutMemory(self.policy, config.generate_tokens, config.kept_gib * 2 ** 30)
        self.ids_so_far = {}                                       # episode -> ids of its dialogue
        self.path = kept and Path(f"{kept}_{os.getpid()}.jsonl")   # every start of every process has one of its own
        rows = [row for file in sorted(kept.parent.glob(f"{kept.name}_*.jsonl"))
                for row in running.read_jsonl(file, "of", "turn", "replies")] if kept else []
        self.known = {(row["of"], row["turn"], int(i)): ids for row in rows for i, ids in row["replies"].items()}
        if self.known:
            running.say(f"goes on with {len(self.known)} replies that an evaluation before it left")

    def reply(self, of, split, seed, turn, pending):
        """The next replies to {episode: (messages, whether they begin a dialogue)}, in order: pairs of the text and why
        it ended, "stop", or "length" if it was cut at the limit. `of` says for whom they are kept."""
        config, known = self.config, {i: self.known.get((of, turn, i)) for i in pending}
        prompts = {i: encode(self.processor, messages, None if new else self.ids_so_far[i])
                   for i, (messages, new) in pending.items()}
        missing = [i for i in pending if known[i] is None]
        if missing:
            uniforms = sampling_uniforms([(EVALUATION, seed, i, turn) for i in missing], config.max_new_tokens)
            pictures = [picture_of(pending[i][0]) for i in missing]
            with running.memory_advice("--generate-tokens or --kept-gib"):
                replies = self.policy.generate([prompts[i] for i in missing], uniforms, config.max_new_tokens,
                                               config.temperature, config.generate_tokens, pictures,
                                               self.memory, missing, config.top_p)
            new = {i: ids for i, (ids, _) in zip(missing, replies)}
            known |= new
            if self.path:
                running.append_line(self.path, {"of": of, "turn": turn, "replies": new})
        self.ids_so_far = {i: prompts[i] + known[i] for i in pending}
        return [(decode_reply(self.processor, ids), "stop" if ids[-1] == self.policy.eos_id else "length")
                for ids in known.values()]

    def forget(self, of):
        """This evaluation is done and its row written: its replies may go from the files of all processes."""
        running.gather(None)
        files = self.path.parent.glob(f"{self.path.stem.rsplit('_', 1)[0]}_*.jsonl") if self.path and running.RANK == 0 else ()
        for file in files:
            rows = [row for row in running.read_jsonl(file, "of") if row["of"] != of]
            running.write_jsonl(file, rows)
            if not rows:
                file.unlink()
        running.gather(None)


def num_episodes(config, split):
    counts = envs.TASKS[config.task].paper_episodes
    return counts.get(split.name, counts[""]) if config.paper else config.episodes


def play_episodes(reply, environments, seed):
    """Play one episode in each environment, all side by side; the list of infos, one per turn, of each episode.

    reply(turn, {episode: (messages, whether they begin a dialogue)}) gives (text, ending) pairs as LocalModel.reply
    does. Every process plays its part of them, and gets the infos of all.
    """
    pending, turn = {}, 0
    for i in running.own_part(range(len(environments))):
        messages, _ = environments[i].reset(seed=f"{seed}/evaluate/{i}", episode=i)     # differs 13: never a seed of training
        pending[i] = messages, True
    infos, bar = {i: [] for i in pending}, running.progress(total=len(pending), nested=True, desc="episodes")
    while pending:
        replies, going = reply(turn, pending), {}
        for i, (text, ending) in zip(pending, replies):
            repeated = any(message["content"] == text for message in pending[i][0][1::2])     # the earlier replies
            messages, reward, _, _, info = environments[i].step(text)
            infos[i].append(info | {"reward": reward, "ending": ending, "empty": not text.strip(), "repeated": repeated})
            if environments[i].done:
                bar.update()
            else:
                going[i] = messages, info["new_dialogue"]
        pending, turn = going, turn + 1
    bar.close()
    everyones = running.gather(list(infos.items()))
    return [episode for _, episode in sorted((pair for part in everyones for pair in part), key=lambda pair: pair[0])]


def odd_replies(row):
    """In words, how many replies of an evaluation were cut, refused, filtered or empty; "" if none was."""
    limit = "their limit" if "api_extra" in row["settings"] else f"--max-new-tokens {row['settings']['max_new_tokens']}"
    odd = [f"{count} cut at {limit}" if ending == "length" else f"{count} ended with {ending}"
           for ending, count in row["endings"].items() if ending != "stop"]
    odd += [f"{row['replies_empty']} empty"] if row["replies_empty"] else []
    return f"of {row['replies']} replies, {', '.join(odd)}" if odd else ""


def beside_paper(task, row):
    """In words, a row of an evaluation beside the paper's numbers; "" where the paper has none."""
    return "; ".join(f"{metric.replace('_', ' ')} {100 * row[metric]:.1f} %, in the paper {start} at the start, {sft} after SFT, "
                     f"{rl} after RL" for (of, split, metric), (start, sft, rl) in PAPER.items() if (of, split) == (task, row["split"]))


def evaluate_model(path, called, known, config, write, kept=None):
    """Evaluate a checkpoint, or the API's model under its name, on every split and seed that its `known` rows do not
    cover; `write` gets each new row. `called` is what to call it, `kept` as in LocalModel."""
    model, common = None, settings.read_settings(config.env)
    names = ("api_url", "task", "episodes", "paper", "temperature", "top_p", "max_new_tokens", "dtype")
    for split in settings.read_splits(config.splits):
        env = envs.make_env(config.task, split.name, common, **split.settings)
        chosen = {name: getattr(config, name) for name in names}
        experts = ("solution", "faults", "faulty_tries")                                       # no expert plays
        chosen["env"] = {name: value for name, value in env.settings.items() if name not in experts}
        if config.api_url and (extra := read_extra(config.api_extra)):
            chosen["api_extra"] = extra
        done = {row["seed"] for row in known if row["split"] == split.label and row["settings"] == chosen
                and row.keys() >= set(envs.TASKS[config.task].metrics)}
        for seed in dict.fromkeys(map(int, config.seeds.split(","))):
            if seed in done:
                running.say(f"{called}, {split.label}, seed {seed}: already evaluated")
                continue
            model = model or (ApiModel(config) if config.api_url else LocalModel(path, env.vision, config, kept))
            of = json.dumps([str(path), split.label, seed, chosen])
            environments = [envs.make_env(config.task, split.name, common, **split.settings)
                            for _ in range(num_episodes(config, split))]
            infos = play_episodes(partial(model.reply, of, split.label, seed), environments, seed)
            row = {"checkpoint": str(path), "split": split.label, "seed": seed,
                   **summarise(infos, env.verify_iter, env.kinds), "settings": chosen}
            write(row)
            model.forget(of)
            found = ", ".join(f"{name.replace('_', ' ')} {100 * row[name]:.1f} +- {100 * row[f'{name}_stderr']:.1f} %"
                              for name in ("first_try", *envs.TASKS[config.task].metrics))
            running.say(f"{called}, {split.label}, seed {seed}: {found}")
            if config.paper and (beside := beside_paper(config.task, row)):
                running.say(f"{called}, {split.label}, seed {seed}: {beside}")
            if odd := odd_replies(row):
                running.say(f"{called}, {split.label}, seed {seed}: {odd}")


def take_settings(config, run, trained):
    """The config with task, settings and type of a run where no flag says otherwise; what is taken is said."""
    same_task = config.task in ("", trained["task"])
    taken = settings.read_settings(trained.get("env", ())) if same_task else {}
    given = settings.read_settings(config.env)
    splits = envs.TASKS[config.task or trained["task"]].splits
    clashing = {name: split.name for split in settings.read_splits(config.splits) for name in taken
                if name in splits.get(split.name, ())}             # such as fold=train where unseen hands are asked for
    taken = {name: value for name, value in taken.items() if name not in clashing}
    env = tuple(f"{name}={value}" for name, value in {**taken, **given}.items())
    changed = [f"{name}={given[name]} instead of {value}" for name, value in taken.items()
               if given.get(name, value) != value]
    changed += [f"{name}={value} given here" for name, value in given.items() if name not in taken]
    changed += [] if same_task else [f"task {config.task} instead of {trained['task']}"]
    changed += [f"{name}, which split {split} has of its own" for name, split in clashing.items()]
    running.say(f"{run}: task {' '.join([config.task or trained['task'], *env])}, as in its training"
                + (f" but for {', '.join(changed)}" if changed else ""))
    dtype = trained.get("dtype", "auto") if config.dtype == "auto" else config.dtype
    return replace(config, task=config.task or trained["task"], env=env, dtype=dtype)


def finish_config(config):
    """The config with its task and type settled; ValueError if a split or a setting is not allowed."""
    config = replace(config, task=config.task or "gp-l")
    for split in settings.read_splits(config.splits):
        envs.make_env(config.task, split.name, settings.read_settings(config.env), **split.settings)
    if config.api_url:
        return replace(config, dtype="")
    return replace(config, dtype=running.pick_dtype(config.dtype, running.start_processes(config.device)))


def evaluate_run(run, config):
    """Evaluate every checkpoint of a run; rows carry its step and the compute spent since the start."""
    trained = running.read_run_config(run)
    if not {"task", "model"} <= trained.keys():
        raise ValueError(f"run {str(run)!r}: no run folder (it would have a config.json that names task and model)")
    config = finish_config(take_settings(config, run, trained))
    run_folder.hold(run, "evaluating")
    start = trained["model"]
    if config.start and not Path(start).is_dir():
        raise ValueError(f"run {str(run)!r} started from {start!r}, which is no folder: use --no-start")
    points = [(0, Path(start))] if config.start else []
    points += [(run_folder.checkpoint_step(path), path) for path in run_folder.checkpoints(run) if run_folder.checkpoint_step(path)]
    spent = run_folder.read_metrics(run, [step for step, _ in points if step]) | {0: {"gflops": 0.0, "gflops_paper": 0.0}}
    known = running.read_jsonl(run / "eval.jsonl", "step", "split", "seed", "settings")
    running.write_jsonl(run / "eval.jsonl", known)                 # without a torn last line
    for step, path in running.progress(points, nested=True, desc=f"checkpoints of {run}"):
        compute = {name: spent[step][name] for name in ("gflops", "gflops_paper")}
        evaluate_model(path, f"{run} step {step}" if step else f"start {path}",
                       [row for row in known if row["step"] == step], config,
                       lambda row: running.log_jsonl(run / "eval.jsonl", step=step, **compute, **row),
                       run / "eval_unfinished")


# ---- Comparing ---------------------------------------------------------------------------------------------

def units(rows):
    """Rows by what an error is taken over: the starts if there are several, else the runs."""
    by, found = "start" if len({row["start"] for row in rows}) > 1 else "run", defaultdict(list)
    for row in rows:
        found[row[by]].append(row)
    return list(found.values())


def spread(values):
    """Mean of several values and its standard error."""
    return mean(values), math.sqrt(sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1) / len(values))


def mean_and_error(rows, metric):
    """Mean of a metric (%) and its standard error: over starts or runs if there are several, over episodes for one (nan if the
    row is from before that was kept)."""
    means = [100 * mean([row[metric] for row in own]) for own in units(rows)]
    if len(means) > 1:
        return spread(means)
    return means[0], 100 * math.sqrt(sum(row.get(f"{metric}_stderr", math.nan) ** 2 for row in rows)) / len(rows)


def change_and_error(rows, start_rows, metric):
    """Mean change of a metric since the start (points) and its standard error over starts or runs.

    Each run is compared with its own start, on the same hands or routes where that was played on them. The error is at
    least that over the runs' episodes: a few runs may agree by chance.
    """
    changes = []
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run]
        seeds, before = {row["seed"] for row in own}, [row for row in start_rows if row["start"] == own[0]["start"]]
        before = [row for row in before if row["seed"] in seeds] or before
        change = mean([row[metric] for row in own]) - mean([row[metric] for row in before])
        changes.append({"run": run, "start": own[0]["start"], metric: change,
                        f"{metric}_stderr": math.hypot(*(mean_and_error(part, metric)[1] / 100 for part in (own, before)))})
    change, error = mean_and_error(changes, metric)
    # `error` first: max then keeps it beside a nan
    return change, max(error, math.sqrt(sum((100 * row.get(f"{metric}_stderr", math.nan)) ** 2 for row in rows)) / len(rows))


def p_value(change, error, num):
    """Two-sided p of a mean change of `num` starts or runs, by Student's t (Abramowitz and Stegun 26.7.3, 26.7.4); too large where
    the error is that over episodes."""
    freedom = num - 1
    angle = math.atan2(abs(change), error * math.sqrt(freedom))
    term, total = math.cos(angle) ** (freedom % 2), 0.0
    for k in range(freedom % 2, freedom - 1, 2):
        total += term * math.sin(angle)
        term *= (k + 1) / (k + 2) * math.cos(angle) ** 2
    return 1 - (total if freedom % 2 == 0 else (total + angle) * 2 / math.pi)


def difference(one, two):
    """In words, in what two settings of an evaluation differ; "" if in nothing."""
    one, two = ({**given, **given.get("env", {})} for given in (one, two))
    return ", ".join(f"{name} {one.get(name)!r} and {two.get(name)!r}" for name in {**one, **two}
                     if name != "env" and run_folder.resolved(one.get(name)) != run_folder.resolved(two.get(name)))


NOT_OF_THE_METHOD = {"out", "model", "seed", "steps", "updates", "save_every", "keep_resume", "micro_batch_tokens", "generate_tokens",
                     "kept_gib", "gradient_checkpointing", "dtype", "param_dtype", "device"}


def name_arms(configs):
    """The arm of each run, by its config: SFT or RL, and where an arm was run with several settings those that differ, as in
    "SFT lr 0.001"."""
    kinds, names = {run: "RL" if "updates" in config else "SFT" for run, config in configs.items()}, {}   # sft.py has steps
    for run, config in configs.items():
        alike = [configs[other] for other in configs if kinds[other] == kinds[run]]
        varied = {key for key in config.keys() - NOT_OF_THE_METHOD if any(other.get(key) != config[key] for other in alike)}
        varied -= {"lr_final"} if config.get("lr_final") == config.get("lr") else set()       # constant: said once
        words = []
        for key in sorted(varied):
            value = config[key]
            if isinstance(value, list):                                # the words of it that not all have
                value = " ".join(word for word in value if any(word not in other.get(key, ()) for other in alike))
            if value:                                                  # what is off is left out
                words.append(key if value is True else value if key == "env" else f"{key} {value}")
        names[run] = " ".join([kinds[run], *words])
    return names


def load_arms(folders):
    """Evaluated rows by arm ("start", then those of `name_arms`), each with the run it comes from.

    ValueError unless all were evaluated with one set of settings, and every start they go on from has all arms. The "runs"
    of a start are the seeds it was evaluated on.
    """
    arms, starts, chosen, spellings = {"start": []}, defaultdict(lambda: defaultdict(set)), {}, {}
    runs = list({os.path.realpath(folder): Path(folder) for folder in folders}.values())      # one run, however it is spelt
    names = name_arms({run: running.read_run_config(run) for run in runs if run.is_dir()})
    for run in sorted(runs, key=lambda run: (not names.get(run, "").startswith("SFT"), names.get(run))):
        rows = running.read_jsonl(run / "eval.jsonl", "step", "split", "seed", "settings")
        if not run.is_dir():
            raise ValueError(f"run {str(run)!r}: there is no such folder; --compare takes run folders: SFT_RUN,RL_RUN")
        if not rows:
            raise ValueError(f"run {str(run)!r}: no eval.jsonl; run evaluate.py --run-folder {run} first")
        config = running.read_run_config(run)
        if "model" not in config:
            raise ValueError(f"run {str(run)!r}: its config.json is gone, or names no model that it started from")
        config["model"] = spellings.setdefault(os.path.realpath(config["model"]), os.path.normpath(config["model"]))
        arm = names[run]
        rows = {(row["step"], row["split"], row["seed"]): row for row in rows}             # the last of equals
        for row in rows.values():
            if lacking := set(envs.TASKS[row["settings"]["task"]].metrics) - row.keys():
                raise ValueError(f"run {str(run)!r}: its eval.jsonl is from an earlier version, without {min(lacking)}; run "
                                 f"evaluate.py --run-folder {run} again")
            first_run, first = chosen.setdefault(row["split"], (run, row["settings"]))
            if differing := difference(first, row["settings"]):
                raise ValueError(f"--compare needs one set of settings for a split; on {row['split']} {first_run} and {run} "
                                 f"differ: {differing}")
            starts[config["model"]][arm if row["step"] else "start"].add(run)
            row = row | {"start": config["model"], "run": str(run) if row["step"] else (config["model"], row["seed"])}
            if row["step"]:
                arms.setdefault(arm, []).append(row)
            elif not any((own["run"], own["split"]) == (row["run"], row["split"]) for own in arms["start"]):
                arms["start"].append(row)                          # once, though several runs may hold it
    for start, own in starts.items():
        if len(own) < max(len(arms), 3) or len({arm[:2] for arm in own}) < 3:
            raise ValueError("--compare needs an SFT run, an RL run and an evaluation of the start they go on from, and of each "
                             f"start all arms ({', '.join(arms)}); of {start} it found {', '.join(sorted(own))}; these started "
                             f"from {', '.join(starts)}")
    return arms


def at_checkpoints(rows, split):
    """[(mean GFLOPs, rows)] of the checkpoints that all runs have, oldest first."""
    steps = defaultdict(list)
    for row in rows:
        if row["split"] == split:
            steps[row["step"]].append(row)
    num_runs = len({row["run"] for row in rows})
    points = [(mean([row["gflops"] for row in own]), own) for _, own in sorted(steps.items())
              if len({row["run"] for row in own}) == num_runs]
    if not points:
        raise ValueError(f"--compare: no checkpoint of every run was evaluated on {split}")
    return points


def judge_sign(expected, change, error):
    """Whether a change goes the paper's way by more than two standard errors."""
    if abs(change) <= 2 * error:
        return "undecided"
    return "met" if (change > 0) == (expected == "up") else "not met"


def paper_metric(task, split):
    """The metric by which the paper judges a split."""
    metrics = envs.TASKS[task].metrics
    return next((metric for metric in metrics if (task, split, metric) in PAPER), metrics[0])


def compare(folders, figure):
    """Print each metric at the start and after each arm at equal compute, beside the paper's, and in a sentence whether the
    paper's signs were met; draw the curves."""
    arms = load_arms(folders)
    task, start_rows = arms["start"][0]["settings"]["task"], arms["start"]
    tried = [arm for arm in arms if arm != "start"]
    splits = list(dict.fromkeys(row["split"] for row in start_rows))
    budget = min(at_checkpoints(arms[arm], split)[-1][0] for arm in tried for split in splits)
    num_starts = len({row["start"] for row in start_rows})
    num_runs = [len({row["run"] for row in arms[arm]}) for arm in tried]
    print(f"\n{task}: %, at the checkpoints nearest to {budget:,.0f} GFLOPs of post-training "
          f"({' and '.join(f'{num} {arm}' for num, arm in zip(num_runs, tried))} runs, starts: {num_starts})\n")
    print(f"| metric | split | start | {' | '.join(tried)} | paper: start | SFT | RL |\n{'|---' * (len(tried) + 6)}|")
    found, verdicts = [], Counter()
    for metric in (*envs.TASKS[task].metrics, "first_try", "retries", "repeats"):
        for split in splits:
            start = [row for row in start_rows if row["split"] == split]
            cells = ["{:.1f} ± {:.1f}".format(*mean_and_error(start, metric))]
            for arm in tried:
                _, rows = min(at_checkpoints(arms[arm], split), key=lambda point: abs(point[0] - budget))
                change, error = change_and_error(rows, start, metric)
                cells.append("{:.1f} ± {:.1f} ({:+.1f} ± {:.1f})".format(*mean_and_error(rows, metric), change, error))
                if split in SIGNS and metric == paper_metric(task, split):
                    sign = SIGNS[split][arm.split()[0]]
                    verdict = judge_sign(sign, change, error)
                    verdicts[verdict] += 1
                    num = len(units(rows))
                    p = f", p = {p_value(change, error, num):.2g}" if num > 1 else ""
                    found.append(f"{arm} on {TITLES[split]} {change:+.1f} ± {error:.1f}{p} (paper: {sign}; {verdict})")
            paper = PAPER.get((task, split, metric), ())
            cells += [f"{p} ({p - paper[0]:+.1f})" if i else f"{p}" for i, p in enumerate(paper)] or ["-"] * 3
            print(f"| {metric.replace('_', ' ')} | {split} | {' | '.join(cells)} |")
    judged = dict.fromkeys(paper_metric(task, split).replace("_", " ") for split in splits if split in SIGNS)
    print(f"\nFound, in points of {' and '.join(judged)}: {'; '.join(found)}. Of the paper's {len(found)} signs {verdicts['met']} met, "
          f"{verdicts['not met']} not met, {verdicts['undecided']} undecided: within two standard errors of no change.")
    if figure:
        draw(arms, task, splits, figure)


def draw(arms, task, splits, figure):
    """Two metrics at most against GFLOPs: a panel per metric and split, a curve per arm with error bars, the start, and
    at the right edge the paper's values."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("\nno figure: matplotlib is not installed (pip install matplotlib)")
        return
    metrics = envs.TASKS[task].metrics[:2]
    colours = {"start": "black"}
    for kind, shades in (("SFT", plt.cm.Oranges), ("RL", plt.cm.Blues)):
        own = [arm for arm in arms if arm.split()[0] == kind]
        colours |= {arm: shades(0.75 - 0.45 * i / len(own)) for i, arm in enumerate(own)}
    shape = len(metrics), len(splits)
    fig, axes = plt.subplots(*shape, figsize=(4.5 * len(splits), 3.6 * len(metrics)), squeeze=False, layout="constrained")
    for panels, metric in zip(axes, metrics):
        for axis, split in zip(panels, splits):
            start = mean_and_error([row for row in arms["start"] if row["split"] == split], metric)
            for arm in list(arms)[1:]:
                x, y, e = zip((0.0, *start), *((gflops, *mean_and_error(rows, metric))
                                               for gflops, rows in at_checkpoints(arms[arm], split)))
                axis.errorbar(x, y, e, label=arm, color=colours[arm], marker="o", markersize=3, capsize=2)
            axis.plot([0], start[:1], "k*", markersize=11, label="start")
            for colour, value in zip(("black", "tab:orange", "tab:blue"), PAPER.get((task, split, metric), ())):
                axis.plot([1.04], [value], "<", color=colour, transform=axis.get_yaxis_transform(), clip_on=False,
                          label="paper: start, SFT, RL" if colour == "black" else None)
            axis.margins(0.06, 0.12)                                # no curve on the frame
            axis.set(title=f"{task.upper()}: {TITLES.get(split, split)}", xlabel="GFLOPs of post-training",
                     ylabel=f"{metric.replace('_', ' ')} %")
    labels = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    fig.legend(labels.values(), labels, loc="outside lower center", ncol=3, fontsize=8)
    fig.savefig(figure, dpi=150)
    print(f"\nfigure: {figure}")


# ---- The command line --------------------------------------------------------------------------------------

def main(config):
    with running.one_line_errors():
        if not all(seed.strip().isdecimal() for seed in config.seeds.split(",")):
            raise ValueError(f"--seeds {config.seeds!r}: expected whole numbers such as 0,1,2")
        if sum(map(bool, (config.model, config.run_folder, config.compare, config.api_url))) != 1:
            raise ValueError("exactly one of --model, --run-folder, --compare and --api-url is required")
        if config.figure and not Path(config.figure).parent.is_dir():
            raise ValueError(f"--figure {config.figure}: there is no folder {Path(config.figure).parent}")
        if config.compare:
            compare(config.compare.split(","), config.figure)
        elif config.run_folder:
            evaluate_run(Path(config.run_folder), config)
        elif config.api_url:
            rows = Path(config.out) / "eval.jsonl"

            def append(row):                                       # anew, without a torn last line
                running.write_jsonl(rows, [*running.read_jsonl(rows), row])

            known = [row for row in running.read_jsonl(rows, "checkpoint", "split", "seed", "settings")
                     if row["checkpoint"] == config.api_model]
            evaluate_model(config.api_model, config.api_model, known, finish_config(config), append)
        else:
            evaluate_model(Path(config.model), config.model, [], finish_config(config),
                           lambda row: running.say(json.dumps(row)))


if __name__ == "__main__":
    running.run(main, Config)
