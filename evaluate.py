"""Success inside and outside the training distribution (paper Sections 4 and 5, appendix C.3), and the paper's figure.

A GeneralPoints episode succeeds when it is solved within its verification turns; a V-IRL episode when every position
of the route is, up to the stop. The paper reports V-IRL by steps: the share of all replies that are correct, retries
counted as samples of their own. That holds the moves that are the same under both rules, so the turns are reported
apart, and so are first tries. Every episode is played until it is solved or out of tries, so one evaluation gives the
success within every smaller number of tries as well.

    python evaluate.py --model runs/sft/step_000400                  # one checkpoint, printed only
    python evaluate.py --run-folder runs/rl                          # all checkpoints of a run and its start
    python evaluate.py --compare runs/sft,runs/rl --figure fig.png   # table beside the paper's numbers, and curves
    API_KEY=... python evaluate.py --api-url https://host/v1 --api-model NAME --out runs/api   # a model behind an API

Rows of a run go to its eval.jsonl, one per checkpoint, split and seed; rows that are there already are not played
again, so a stopped evaluation goes on. Several runs of one arm (other seeds) are averaged: mean and standard error
over runs, which should be evaluated on hands of their own (--seeds) so that the error holds the draw of hands as
well; a single run has the standard error over its episodes (of a success: the binomial one).

Left out: smoothing (the paper's curves are Savitzky-Golay filtered).
"""
import base64
import hashlib
import io
import json
import math
import os
import re
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from huggingface_hub import InferenceClient, constants   # comes with transformers
from huggingface_hub.utils import httpx

import envs
from model import (WORLD, Sight, checkpoint_step, checkpoints, decode_reply, encode, fail, gather, knob, leave,
                   load_policy, log_jsonl, memory_advice, mine, parse_config, picture_of, progress, read_jsonl,
                   sampling_uniforms, say, start_processes, write_whole)

EVALUATION = 2   # the first number of a random stream's key; rl.py has 0 and 1
# What the tables show, the paper's own measure first. Each is explained in `summarise`.
METRICS = {"gp-l": ("success",), "gp-vl": ("success", "recognition", "rank_accuracy"),
           "virl-l": ("step_accuracy", "step_accuracy_turn", "success"),
           "virl-vl": ("step_accuracy", "step_accuracy_turn", "success")}
# Paper Fig. 6 and 7, Section 5.1 and 5.2: (%) at the start, after SFT and after RL, at equal compute.
PAPER = {("gp-l", "rule_ood", "success"): (11.5, 3.4, 15.0),
         ("virl-l", "rule_ood", "step_accuracy"): (80.8, 1.3, 91.8),
         ("gp-vl", "rule_ood", "success"): (11.2, 5.6, 14.2), ("gp-vl", "visual_ood", "success"): (23.6, 13.7, 41.2),
         ("virl-vl", "rule_ood", "step_accuracy"): (35.7, 2.5, 45.0),
         ("virl-vl", "visual_ood", "success"): (16.7, 11.1, 77.8)}
PAPER_EPISODES = {"gp": 234, "virl": 48, ("virl-vl", "visual_ood"): 18}


@dataclass
class Config:
    """Defaults are ours: the paper does not say how it decodes in its tests."""
    model: str = knob("", "evaluate this one checkpoint")
    run_folder: str = knob("", "evaluate all checkpoints of this run folder, and the model it started from")
    start: bool = knob(True, "with --run-folder: evaluate the model it started from as well")
    compare: str = knob("", "print the table and draw the figure of these evaluated run folders, comma-separated")
    figure: str = knob("", "with --compare: write the figure here (needs matplotlib)")
    api_url: str = knob("", "evaluate a model behind this OpenAI-style API; its key stands in the variable API_KEY")
    api_model: str = knob("", "with --api-url: the model's name there")
    api_workers: int = knob(8, "with --api-url: requests at the same time", low=1)
    out: str = knob("", "with --api-url: folder for the replies and for eval.jsonl, new or stopped half-way")
    task: str = knob("gp-l", "which environment", choices=tuple(envs.TASKS))
    root: str = knob("", "V-IRL: the folder with its data sets")
    card_dir: str = knob("", "gp-vl: a folder with the official card pictures, instead of ours")
    resolution: int = knob(0, "pixels of a picture's side (V-IRL: of a view); 0: 1200 and 448", low=0)
    splits: str = knob("id,rule_ood", "what to evaluate on, comma-separated (envs.py lists them)")
    fold: str = knob("", "hands to test on: all, train or test; empty: as the split says", choices=("", *envs.FOLDS))
    verify_iter: int = knob(0, "judged replies per hand or position; 0: the paper's 5 (GP) or 2 (V-IRL)", low=0)
    feedback: str = knob("informative", "what the verifier tells the model", choices=("informative", "plain"))
    prompt_file: str = knob("", "JSON object of templates that replace ours")
    episodes: int = knob(1000, "per split and seed", low=1)
    paper: bool = knob(False, "the paper's sample size instead: 234 hands, 48 routes, 18 for V-IRL's visual_ood")
    seeds: str = knob("0", "evaluation seeds, comma-separated; never those of training, though a hand may come again")
    temperature: float = knob(0.0, "0 is greedy", low=0)
    max_new_tokens: int = knob(256, "a reply is cut here", low=1)
    generate_tokens: int = knob(65536, "padded tokens, replies included, that are sampled side by side", low=1)
    dtype: str = knob("float32", "compute in this type", choices=("float32", "bfloat16"))
    device: str = knob("auto", "cpu, cuda, or auto")


# ---- Playing -----------------------------------------------------------------------------------------------

class LocalModel:
    """A checkpoint as a player of dialogues; ids are kept from turn to turn, and so is what was seen of a picture."""

    def __init__(self, path, config):
        self.policy, self.processor = load_policy(path, config.dtype, start_processes(config.device),
                                                  vision=config.task.endswith("-vl"), param_dtype=config.dtype)
        self.config, self.sight = config, Sight(self.policy, config.generate_tokens)
        self.dialogues = {}                                        # episode -> ids of its dialogue so far

    def reply(self, split, seed, turn, conversations):
        """The texts of the next replies to {episode: (messages, whether they begin a dialogue)}, in order."""
        config, keys = self.config, [(EVALUATION, seed, i, turn) for i in conversations]
        prompts = [encode(self.processor, messages, None if new else self.dialogues[i])
                   for i, (messages, new) in conversations.items()]
        pictures = [picture_of(messages) for messages, _ in conversations.values()]
        with memory_advice("--generate-tokens"):
            replies = self.policy.generate(prompts, sampling_uniforms(keys, config.max_new_tokens),
                                           config.max_new_tokens, config.temperature, config.generate_tokens, pictures,
                                           self.sight)
        self.dialogues = {i: prompt + ids for i, prompt, (ids, _) in zip(conversations, prompts, replies)}
        return [decode_reply(self.processor, ids) for ids, _ in replies]


class ApiModel:
    """A model behind an API as a player. Replies go to replies.jsonl as they come, each under the digest of its
    request, and are not asked for again."""

    retries, pause = 6, 1.0   # tries of one request, and seconds before the second; then twice as long each time

    def __init__(self, config):
        key = os.environ.get("API_KEY", "").strip()   # without one the client would send the user's Hugging Face token
        if not key or not key.isascii() or not key.isprintable():
            raise ValueError("--api-url needs a key of plain characters in the environment variable API_KEY; any word "
                             "will do for a server that asks for none")
        if WORLD > 1:
            raise ValueError("--api-url runs in one process, with --api-workers requests at the same time")
        if not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/\S*)?", config.api_url):
            raise ValueError(f"--api-url {config.api_url!r}: expected an address such as https://host/v1")
        if constants.HF_HUB_OFFLINE:
            raise ValueError("--api-url: HF_HUB_OFFLINE is set, which closes the network for huggingface_hub")
        if not config.api_model or not config.out:
            raise ValueError("--api-url needs --api-model and --out")
        out = Path(config.out)
        if out.exists() and not out.is_dir() or (out / "config.json").exists():
            raise ValueError(f"--out {config.out}: must be a new folder or one of an earlier evaluation, not "
                             f"{'a run folder' if out.is_dir() else 'a file'}")
        self.client = InferenceClient(base_url=config.api_url, api_key=key, timeout=120)
        self.config, self.path = config, out / "replies.jsonl"
        known = read_jsonl(self.path)
        out.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in known))   # without a torn last line
        self.known, self.lock = {row["request"]: row["reply"] for row in known}, Lock()

    def reply(self, split, seed, turn, conversations):
        """As LocalModel.reply; ValueError if the API refuses, or does not answer in several tries."""
        requests = {}
        for i, (messages, _) in conversations.items():
            messages = [message | {"content": api_content(message["content"])} for message in messages]
            key = json.dumps([self.config.api_url, self.config.api_model, self.config.temperature,
                              self.config.max_new_tokens, split, seed, i, turn, messages])
            requests[hashlib.sha256(key.encode()).hexdigest()] = messages
        missing = [digest for digest in requests if digest not in self.known]
        with ThreadPoolExecutor(self.config.api_workers) as pool:
            asked = pool.map(lambda digest: self.ask(digest, requests[digest]), missing)
            try:
                for _ in progress(asked, total=len(missing), desc=f"turn {turn + 1}", leave=False):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)                 # those on their way still come in
        return [self.known[digest] for digest in requests]

    def ask(self, digest, messages):
        """Get one reply; no content is an empty reply. Refusals are final; busy or failing servers, lost connections
        and answers that are none are tried again."""
        for attempt in range(self.retries):
            time.sleep(self.pause * 2 ** (attempt - 1) if attempt else 0)
            try:
                answer = self.client.chat_completion(messages, model=self.config.api_model,
                                                     temperature=self.config.temperature,
                                                     max_tokens=self.config.max_new_tokens)
                content = answer.choices[0].message.content or ""
                if not isinstance(content, str):
                    raise TypeError(f"content is no text but {content!r}")
                self.known[digest] = content.encode("utf-8", "replace").decode()
                with self.lock:
                    return log_jsonl(self.path, request=digest, reply=self.known[digest])
            except httpx.HTTPError as error:                       # also lost connections and no answer in time
                fault, status = error, getattr(getattr(error, "response", None), "status_code", 0)
                if 400 <= status < 500 and status not in (408, 409, 425, 429):
                    break
            except (ValueError, TypeError, LookupError, AttributeError) as error:   # not a chat completion
                fault = f"the answer is not a chat completion: {error}"
        fault = " ".join(str(fault).split())[:300]
        raise ValueError(f"--api-url {self.config.api_url}, model {self.config.api_model}: {fault}; replies so far are "
                         f"in {self.path}")


def api_content(content):
    """The content of a chat message as APIs take it, its picture as a data URL."""
    if isinstance(content, str):
        return content
    png = io.BytesIO()
    content[0]["image"].save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, content[1]]


def make_env(config, split):
    return envs.make_env(config.task, split, root=config.root, fold=config.fold, feedback=config.feedback,
                         verify_iter=config.verify_iter or None, prompt_file=config.prompt_file,
                         card_dir=config.card_dir, resolution=config.resolution or None)


def num_episodes(config, split):
    if config.paper:
        return PAPER_EPISODES.get((config.task, split)) or PAPER_EPISODES[config.task.split("-")[0]]
    return config.episodes


def play_episodes(model, environments, split, seed):
    """Play one episode in each environment, all side by side; the list of infos, one per turn, of each episode.

    Every process plays its part of them, and gets the infos of all.
    """
    conversations, turn = {}, 0
    for i in mine(range(len(environments))):
        messages, _ = environments[i].reset(seed=f"{seed}/evaluate/{i}", episode=i)
        conversations[i] = messages, True
    infos, bar = {i: [] for i in conversations}, progress(total=len(conversations), desc="episodes", leave=False)
    while conversations:
        replies, going = model.reply(split, seed, turn, conversations), {}
        for i, reply in zip(conversations, replies):
            messages, reward, _, _, info = environments[i].step(reply)
            infos[i].append(info | {"reward": reward})
            if environments[i].done:
                bar.update()
            else:
                going[i] = messages, info["new_dialogue"]
        conversations, turn = going, turn + 1
    bar.close()
    everyones = gather(list(infos.items()))
    return [episode for _, episode in sorted((pair for part in everyones for pair in part), key=lambda pair: pair[0])]


def share(hits, counts):
    """What share of the counts are hits, given both per episode, and its standard error over episodes."""
    total = max(1, sum(counts))
    mean = sum(hits) / total
    return mean, math.sqrt(sum((hit - mean * count) ** 2 for hit, count in zip(hits, counts))) / total


def summarise(infos, verify_iter):
    """What eval.jsonl says about a list of played episodes, each a list of infos.

    success             episodes solved
    step_accuracy       replies that are correct, retries included (paper C.3)
    first_try           first replies to a hand or at a position that are correct
    recognition         hands whose four cards the first reply names, in any order (paper Fig. 8); it must be a reply
                        that can be judged, with a formula
    rank_accuracy       cards that the first reply names in their place; by chance, one in thirteen
    ..._turn and so on  the same for one kind of position
    ..._stderr          standard error of each, over episodes
    success_by_city     V-IRL, visual_ood: of each city, two routes in file order; the first is the training city or
                        looks like it
    """
    def accuracy(wanted):
        picked = [[info["status"] == "correct" for info in episode if wanted(info)] for episode in infos]
        return share(list(map(sum, picked)), list(map(len, picked)))

    turns = [info for episode in infos for info in episode]
    shares = {"success": share([episode[-1]["success"] for episode in infos], [1] * len(infos)),
              "step_accuracy": accuracy(lambda info: True),
              "first_try": accuracy(lambda info: info["try"] == 1)}
    kinds = sorted({info["kind"] for info in turns})
    for kind in kinds if kinds != ["formula"] else ():
        shares[f"step_accuracy_{kind}"] = accuracy(lambda info: info["kind"] == kind)
        shares[f"first_try_{kind}"] = accuracy(lambda info: info["kind"] == kind and info["try"] == 1)
    if "ranks_right" in turns[0]:
        shares["recognition"] = share([episode[0]["cards_read"] for episode in infos], [1] * len(infos))
        shares["rank_accuracy"] = share([episode[0]["ranks_right"] for episode in infos], [4] * len(infos))
    row = {"episodes": len(infos), "replies": len(turns)}
    for name, (mean, error) in shares.items():
        row |= {name: mean, f"{name}_stderr": error}
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
    return row | {"statuses": dict(sorted(Counter(info["status"] for info in turns).items()))}


def evaluate_model(path, known, config, write):
    """Evaluate a checkpoint, or the API's model under its name, on every split and seed that `known` rows do not
    cover; `write` gets each new row."""
    wanted = dict.fromkeys((split, int(seed)) for split in config.splits.split(",") for seed in config.seeds.split(","))
    names = ("api_url", "task", "root", "card_dir", "resolution", "fold", "verify_iter", "feedback", "prompt_file",
             "episodes", "paper", "temperature", "max_new_tokens", "dtype")
    settings = {name: getattr(config, name) for name in names}
    done = [(row["split"], row["seed"]) for row in known
            if row["checkpoint"] == str(path) and row["settings"] == settings]
    missing = [pair for pair in wanted if pair not in done]
    if not missing:
        say(f"{path}: already evaluated")
        return
    model = ApiModel(config) if config.api_url else LocalModel(str(path), config)
    for split, seed in missing:
        environments = [make_env(config, split) for _ in range(num_episodes(config, split))]
        infos = play_episodes(model, environments, split, seed)
        row = {"checkpoint": str(path), "split": split, "seed": seed, **summarise(infos, environments[0].verify_iter),
               "settings": settings}
        told = ", ".join(f"{name.replace('_', ' ')} {100 * row[name]:.1f} +- {100 * row[f'{name}_stderr']:.1f} %"
                         for name in ("first_try", *METRICS[config.task]))
        say(f"{path.name:12s} {split:9s} seed {seed}: {told}")
        write(row)


def evaluate_run(run, config):
    """Evaluate every checkpoint of a run; rows carry its step and the compute spent since the start."""
    if not (run / "config.json").is_file():
        raise ValueError(f"run {str(run)!r}: no run folder (it would have a config.json)")
    spent = {0: {"gflops": 0.0, "gflops_paper": 0.0}} | {row["step"]: row for row in read_jsonl(run / "metrics.jsonl")}
    trained = json.loads((run / "config.json").read_text())
    start = trained["model"]
    for name in ("task", "resolution"):
        if trained.get(name, getattr(config, name)) != getattr(config, name):
            raise ValueError(f"run {str(run)!r} was trained with --{name} {trained[name]}, not {getattr(config, name)}")
    if config.start and not Path(start).is_dir():
        raise ValueError(f"run {str(run)!r} started from {start!r}, which is no folder: use --no-start")
    points = [(0, Path(start))] if config.start else []
    points += [(checkpoint_step(path), path) for path in checkpoints(run) if checkpoint_step(path)]
    known = read_jsonl(run / "eval.jsonl")
    write_whole(run / "eval.jsonl", "".join(json.dumps(row) + "\n" for row in known))   # without a torn last line
    for step, path in progress(points, desc=f"checkpoints of {run}"):
        compute = {name: spent[step][name] for name in ("gflops", "gflops_paper")}
        evaluate_model(path, known, config, lambda row: log_jsonl(run / "eval.jsonl", step=step, **compute, **row))


# ---- Comparing ---------------------------------------------------------------------------------------------

def mean_and_error(rows, metric):
    """Mean of a metric (%) and its standard error: over runs if there are several, over episodes for one."""
    runs = defaultdict(list)
    for row in rows:
        runs[row["run"]].append(row)
    means = [100 * sum(row[metric] for row in own) / len(own) for own in runs.values()]
    mean = sum(means) / len(means)
    if len(means) == 1:
        return mean, 100 * math.sqrt(sum(row[f"{metric}_stderr"] ** 2 for row in rows)) / len(rows)
    return mean, math.sqrt(sum((m - mean) ** 2 for m in means) / (len(means) - 1) / len(means))


def load_arms(folders):
    """Evaluated rows by arm ("start", "SFT", "RL"), each with the run it comes from.

    ValueError unless all were evaluated with one set of settings, and every start they go on from has all three arms:
    one start with runs of many seeds, or many starts with one run each. The "runs" of a single start are the seeds it
    was evaluated on, those of several are the starts.
    """
    arms, starts, settings = defaultdict(list), defaultdict(lambda: defaultdict(set)), set()
    for run in map(Path, folders):
        rows = read_jsonl(run / "eval.jsonl")
        if not rows:
            raise ValueError(f"run {str(run)!r}: no eval.jsonl; run evaluate.py --run-folder {run} first")
        config = json.loads((run / "config.json").read_text())
        arm = "RL" if "updates" in config else "SFT"               # rl.py counts updates, sft.py steps
        for row in rows:
            settings.add(json.dumps(row["settings"], sort_keys=True))
            starts[config["model"]][arm if row["step"] else "start"].add(run)
            if row["step"]:
                arms[arm].append(row | {"run": str(run)})
            elif not any((own["run"], own["split"]) == ((config["model"], row["seed"]), row["split"])
                         for own in arms["start"]):                # once, though several runs may hold it
                arms["start"].append(row | {"run": (config["model"], row["seed"])})
    if len(settings) > 1:
        raise ValueError(f"--compare needs one set of settings; eval.jsonl holds {' and '.join(sorted(settings))}")
    for start, own in starts.items():
        if len(own) < 3:
            raise ValueError("--compare needs an SFT run, an RL run and an evaluation of the start they go on from; of "
                             f"{start} it found {', '.join(sorted(own))}; these started from {', '.join(starts)}")
        if len(starts) > 1 and (len(own["SFT"]), len(own["RL"])) != (1, 1):
            raise ValueError("--compare needs one SFT and one RL run of every start where there are several; "
                             f"{start} has {len(own['SFT'])} and {len(own['RL'])}")
    if len(starts) > 1:
        arms["start"] = [row | {"run": row["run"][:1]} for row in arms["start"]]
    return arms


def curve(rows, split, metric):
    """[(mean GFLOPs, mean of the metric, error)] over the checkpoints that all runs have, oldest first."""
    steps = defaultdict(list)
    for row in rows:
        if row["split"] == split:
            steps[row["step"]].append(row)
    num_runs = len({row["run"] for row in rows})
    points = [(sum(row["gflops"] for row in own) / len(own), *mean_and_error(own, metric))
              for _, own in sorted(steps.items()) if len({row["run"] for row in own}) == num_runs]
    if not points:
        raise ValueError(f"--compare: no checkpoint of every run was evaluated on {split}")
    return points


def compare(folders, figure):
    """Print each metric at the start, after SFT and after RL at equal compute, beside the paper's; draw the curves."""
    arms = load_arms(folders)
    task = arms["start"][0]["settings"]["task"]
    splits = list(dict.fromkeys(row["split"] for row in arms["start"]))
    budget = min(max(row["gflops"] for row in arms[arm]) for arm in ("SFT", "RL"))
    num_starts = len({row["run"][0] for row in arms["start"]})
    num_runs = {arm: len({row["run"] for row in arms[arm]}) for arm in ("SFT", "RL")}
    print(f"\n{task}: %, at the checkpoints nearest to {budget:,.0f} GFLOPs of post-training "
          f"({num_runs['SFT']} SFT and {num_runs['RL']} RL runs, starts: {num_starts})\n")
    print("| metric | split | start | SFT | RL | paper: start | SFT | RL |\n|---|---|---|---|---|---|---|---|")
    for metric in METRICS[task]:
        for split in splits:
            start = mean_and_error([row for row in arms["start"] if row["split"] == split], metric)
            cells = ["{:.1f} ± {:.1f}".format(*start)]
            for arm in ("SFT", "RL"):
                _, mean, error = min(curve(arms[arm], split, metric), key=lambda point: abs(point[0] - budget))
                cells.append(f"{mean:.1f} ± {error:.1f} ({mean - start[0]:+.1f})")
            paper = PAPER.get((task, split, metric), ())
            cells += [f"{p} ({p - paper[0]:+.1f})" if i else f"{p}" for i, p in enumerate(paper)] or ["not printed"] * 3
            print(f"| {metric.replace('_', ' ')} | {split} | {' | '.join(cells)} |")
    if figure:
        draw(arms, task, splits, figure)


def draw(arms, task, splits, figure):
    """Two metrics at most against GFLOPs: a panel per metric and split, a curve per arm, error bars, the start."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("\nno figure: matplotlib is not installed (pip install matplotlib)")
        return
    metrics = METRICS[task][:2]
    shape = len(metrics), len(splits)
    fig, axes = plt.subplots(*shape, figsize=(4.5 * len(splits), 3.6 * len(metrics)), squeeze=False)
    for row, metric in zip(axes, metrics):
        for axis, split in zip(row, splits):
            mean, error = mean_and_error([row for row in arms["start"] if row["split"] == split], metric)
            for arm, colour in (("SFT", "tab:orange"), ("RL", "tab:blue")):
                x, y, e = zip((0.0, mean, error), *curve(arms[arm], split, metric))
                axis.errorbar(x, y, e, label=arm, color=colour, marker="o", markersize=3, capsize=2)
            axis.plot([0], [mean], "k*", markersize=11, label="start")
            axis.set(title=f"{task}, {split}", xlabel="GFLOPs of post-training", ylabel=f"{metric.replace('_', ' ')} %",
                     ylim=(0, None))
            axis.legend()
    fig.tight_layout()
    fig.savefig(figure, dpi=150)
    print(f"\nfigure: {figure}")


def main(config):
    try:
        for split in config.splits.split(","):
            make_env(config, split)
        if not all(seed.strip().isdecimal() for seed in config.seeds.split(",")):
            raise ValueError(f"--seeds {config.seeds!r}: expected whole numbers such as 0,1,2")
        if sum(map(bool, (config.model, config.run_folder, config.compare, config.api_url))) != 1:
            raise ValueError("exactly one of --model, --run-folder, --compare and --api-url is required")
        if config.compare:
            compare(config.compare.split(","), config.figure)
        elif config.run_folder:
            evaluate_run(Path(config.run_folder), config)
        elif config.api_url:
            rows = Path(config.out) / "eval.jsonl"

            def append(row):                                       # anew, without a torn last line
                write_whole(rows, "".join(json.dumps(known) + "\n" for known in [*read_jsonl(rows), row]))

            evaluate_model(Path(config.api_model), read_jsonl(rows), config, append)
        else:
            evaluate_model(Path(config.model), [], config, lambda row: say(json.dumps(row)))
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main(parse_config(Config))
    leave()
