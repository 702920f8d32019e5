"""Success inside and outside the training distribution (paper Sections 4 and 5, appendix C.3).

An episode of GeneralPoints succeeds when the hand is solved within its tries. An episode of V-IRL
succeeds when every position of the route is solved, up to the stop. For V-IRL the paper reports
another measure: the share of all replies that are correct, retries included. Most of these replies
would be the same under any rule. So `summarise` also has shares for first tries alone, and for the
positions where a direction must be named (kind "turn").

Every episode is played until it is solved or out of tries. So one evaluation also gives the success
within every smaller number of tries. Curves are drawn against `gflops` of metrics.jsonl, which is
2 N (3 tokens_trained + tokens_rollout) / 1e9 with the N of `model.Policy.num_params`.

    python evaluate.py --model runs/sft/step_000400     # one checkpoint, printed only
    python evaluate.py --run-folder runs/rl             # all checkpoints of a run, and its start
    python evaluate.py --run-folder runs/rl --splits id rule=11,11,11    # J, Q, K count 11
    python evaluate.py --compare runs/sft runs/rl --html page.html  # tables; replies go to the page
    API_KEY=... python evaluate.py --api-url https://host/v1 --api-model NAME --out runs/api

Rows go to eval.jsonl of the run, one per checkpoint, split, seed and settings. What has a row is
not played again, and a stopped evaluation goes on where it was. Task and `--env` are those of the
checkpoint's run unless a flag changes them. Settings that followed the split's name in training,
such as `rule=11,11,11`, are not taken over: repeat them in --splits.
support/errors.py says how --compare makes means, errors and p values.

Left out: smoothing (the paper uses a Savitzky-Golay filter). `# differs N`: docs/differences.md.
"""
if __name__ == "__main__":
    from support import startup
    startup.begin(__file__)     # Ctrl-C and a mistyped flag are answered before torch is imported

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import envs
from model import (EVALUATION, RolloutMemory, decode_reply, encode, load_policy, picture_of,
                   sampling_uniforms)
from support import api, compare, evaluation, logs, report, run_folder, running, settings
from support.running import flag

# ---- What counts -------------------------------------------------------------------------------

def share(hits, counts, groups=None):
    """The share of `hits` in `counts`, lists with a number per episode, and its standard error.

        rate  = sum of hits / sum of counts
        error = sqrt(sum over episodes of (hits - rate * counts)^2) / sum of counts

    The error is over episodes, since replies of one episode are no independent samples; episodes
    with the same name in `groups` count as one. With all counts 1 it is sqrt(rate (1 - rate) / n).
    """
    total = max(1, sum(counts))
    rate = sum(hits) / total
    deviations = Counter()     # group -> its hits above those that the rate would give it
    for group, hit, count in zip(groups or range(len(hits)), hits, counts):
        deviations[group] += hit - rate * count
    return rate, math.sqrt(sum(value ** 2 for value in deviations.values())) / total


def summarise(episodes, verify_iter, kinds=()):
    """One row of eval.jsonl, from played episodes; each is a list of infos, one per reply.

    `kinds` are all kinds of position, since these episodes may lack some. A measure is hits /
    counts, both summed over episodes. Its standard error (`share`) is under NAME_stderr. A later
    reply is one after the first to a hand or at a position.

    measure              hits / counts
    success              episodes solved / episodes
    step_accuracy        correct replies / replies, retries included (paper C.3)
    paper_step_accuracy  correct replies / (replies + failed episodes): after a failed episode the
                         official code asks for one more reply, and counts it, unread, as wrong
    first_try            correct first replies / first replies to a hand or at a position
    retries              correct later replies / later replies
    repeats              later replies that are word for word an earlier one / later replies
    step_accuracy_turn   V-IRL: step_accuracy at "turn" positions alone; likewise for the kinds
                         "forward" and "stop", and for first_try
    recognition          first replies that name the four cards, in any order / episodes (Fig. 8)
    rank_accuracy        cards that first replies name in their place / 4 per episode
    solved_and_read      hands solved by a reply that also names the cards / hands. The official
                         code plays a solved hand on until its cards are named, too. Ours ends it
                         at once, so this is a lower bound of the official success.

    Further entries, explained in docs/metrics.md: success_within, routes, success_by_city, reward,
    numbers_right, statuses, endings, replies_empty.
    """
    replies = [info for episode in episodes for info in episode]
    row = {"episodes": len(episodes), "replies": len(replies)}
    # Routes in file order have numbers; one that comes round again counts as one in errors.
    routes = [each[-1]["route"] for each in episodes if each[-1].get("route") is not None]

    def measure(name, hits, counts):
        """Put a share and its error into the row; hits and counts have one number per episode."""
        row[name], row[f"{name}_stderr"] = share(hits, counts, routes)

    def is_correct(info):
        return info["status"] == "correct"

    def measure_replies(name, is_counted, is_hit=is_correct):
        """Put into the row the share of hits among the replies that are counted."""
        hits, counts = [], []
        for episode in episodes:
            counted = [info for info in episode if is_counted(info)]
            hits.append(sum(1 for info in counted if is_hit(info)))
            counts.append(len(counted))
        measure(name, hits, counts)

    ones = [1] * len(episodes)
    solved = [int(episode[-1]["success"]) for episode in episodes]
    measure("success", solved, ones)
    row["solved"] = "".join(map(str, solved))      # 1 or 0 per episode, to pair two runs' episodes
    measure_replies("step_accuracy", lambda info: True)
    # differs 22: steps as in the official code; for success on GP-VL see `solved_and_read` above.
    # With guided=true the expert leads on past a failed position. What follows does not count here.
    unguided = [[info for info in episode if "guided" not in info] for episode in episodes]
    correct = [sum(map(is_correct, episode)) for episode in unguided]
    with_unread = [len(episode) + int(not is_correct(episode[-1])) for episode in unguided]
    measure("paper_step_accuracy", correct, with_unread)
    measure_replies("first_try", lambda info: info["try"] == 1)
    measure_replies("retries", lambda info: info["try"] > 1)
    measure_replies("repeats", lambda info: info["try"] > 1, is_hit=lambda info: info["repeated"])

    kinds = sorted({*kinds, *(info["kind"] for info in replies)})
    if len(kinds) > 1:
        for kind in kinds:
            measure_replies(f"step_accuracy_{kind}", lambda info: info["kind"] == kind)
            measure_replies(f"first_try_{kind}",
                            lambda info: info["kind"] == kind and info["try"] == 1)
    if "ranks_right" in replies[0]:   # in GeneralPoints
        measure("recognition", [int(episode[0]["cards_read"]) for episode in episodes], ones)
        ranks_right = [episode[0]["ranks_right"] for episode in episodes]
        measure("rank_accuracy", ranks_right, [4] * len(episodes))
        both = [int(episode[-1]["success"] and episode[-1]["cards_read"]) for episode in episodes]
        measure("solved_and_read", both, ones)

    # A solved route needed as many tries as its hardest position.
    tries_needed = [max(info["try"] for info in episode)
                    for episode, success in zip(episodes, solved) if success]
    row["success_within"] = []
    for tries in range(1, verify_iter + 1):
        within = [needed for needed in tries_needed if needed <= tries]
        row["success_within"].append(len(within) / len(episodes))
    row["reward"] = sum(info["reward"] for info in replies) / len(episodes)
    if "numbers_right" in replies[0]:
        row["numbers_right"] = sum(info["numbers_right"] for info in replies) / len(replies)

    if routes:
        row["routes"] = len(set(routes))
        row["success_by_city"] = evaluation.by_city(routes, solved)
    row["statuses"] = dict(sorted(Counter(info["status"] for info in replies).items()))
    row["endings"] = dict(sorted(Counter(info["ending"] for info in replies).items()))
    row["replies_empty"] = sum(1 for info in replies if info["empty"])
    return row


# ---- Settings ----------------------------------------------------------------------------------

# Paper Fig. 6 and 7, Sections 5.1, 5.2: % at the start, after SFT and after RL, at equal compute.
PAPER = {
    ("gp-l", "rule_ood", "success"): (11.5, 3.4, 15.0),
    ("virl-l", "rule_ood", "paper_step_accuracy"): (80.8, 1.3, 91.8),
    ("gp-vl", "rule_ood", "solved_and_read"): (11.2, 5.6, 14.2),
    ("gp-vl", "visual_ood", "solved_and_read"): (23.6, 13.7, 41.2),
    ("virl-vl", "rule_ood", "paper_step_accuracy"): (35.7, 2.5, 45.0),
    ("virl-vl", "visual_ood", "success"): (16.7, 11.1, 77.8),
}
# Which way the paper's curves go on a split.
SIGNS = {
    "id": {"SFT": "up", "RL": "up"},
    "rule_ood": {"SFT": "down", "RL": "up"},
    "visual_ood": {"SFT": "down", "RL": "up"},
}
SIDE_BY_SIDE = 500   # episodes that a process plays at once: more of them need more memory


@dataclass
class Config:
    """Defaults are ours: the paper does not say how it decodes in its tests."""
    model: str = flag("", "evaluate this one checkpoint")
    run_folder: str = flag("", "evaluate all checkpoints of this run, and its start")
    start: bool = flag(True, "with --run-folder: evaluate the model that the run started from, too")
    compare: tuple = flag((), "print the tables of these evaluated run folders: runs/sft runs/rl")
    figure: str = flag("", "with --compare: draw the curves into this file (needs matplotlib)")
    html: str = flag("", "with --compare: write a page with the replies, such as page.html")
    api_url: str = flag("", "evaluate a model behind this OpenAI-style API; API_KEY holds its key")
    api_model: str = flag("", "with --api-url: the name of the model there")
    api_extra: str = flag("", "with --api-url: JSON with more fields for the request; null drops "
                          'a field: {"max_tokens": null, "max_completion_tokens": 4096}')
    api_header: tuple = flag((), "with --api-url: more headers, such as 'api-key: $API_KEY'")
    api_timeout: float = flag(600.0, "with --api-url: seconds for one whole answer", low=1)
    api_workers: int = flag(8, "with --api-url: requests at the same time", low=1)
    out: str = flag("", "with --model or --api-url: a folder for rows, dialogues and an API's "
                        "replies, new or stopped half-way")
    dialogues: int = flag(16, "episodes of each split and seed whose dialogues are kept for "
                              "envs.py --read and --html", low=0)
    task: str = flag("", "which environment; empty: the run's or gp-l", choices=("", *envs.TASKS))
    splits: tuple = flag(("id", "rule_ood"), "splits, with settings: id rule_ood id target=36")
    env: tuple = flag((), "settings on top of those of the run, such as: root=city0 verify_iter=3")
    episodes: int = flag(1000, "how many per split and seed", low=1)
    paper: bool = flag(False, "as many as the paper: 234 hands, 48 routes, 18 on visual_ood")
    seeds: str = flag("0", "comma-separated; no deal uses a training seed, but hands may recur")
    # differs 25: greedy by default; the official code samples
    temperature: float = flag(0.0, "0 is greedy; the official code samples as the checkpoint says, "
                              "a stock Llama-3.2 at 0.6", low=0)
    top_p: float = flag(1.0, "sample from the likeliest tokens that have this share of the "
                        "probability (official: 0.9)", low=0.01, high=1)
    max_new_tokens: int = flag(256, "a reply is cut after so many tokens", low=1)
    generate_tokens: int = flag(65536, "tokens sampled at once, with prompts and padding", low=1)
    kept_gib: float = flag(4.0, "GiB of keys and values kept from turn to turn", low=0)
    dtype: str = flag("auto", "type to compute in; auto: the run's, else what suits the processor",
                      choices=("auto", "float32", "bfloat16"))
    device: str = flag("auto", "cpu, cuda, or auto")


# ---- Playing -----------------------------------------------------------------------------------

class LocalModel:
    """A checkpoint as a player. It keeps the ids of its dialogues and what it read between turns.

    `stem` is how the paths of files with kept replies begin (`evaluation.KeptReplies`), or None.
    """

    def __init__(self, path, vision, config, stem=None):
        device = running.start_processes(config.device)
        self.policy, self.processor = load_policy(str(path), config.dtype, device, vision=vision,
                                                  param_dtype=config.dtype)
        self.config = config
        self.memory = RolloutMemory(self.policy, config.generate_tokens, config.kept_gib * 2 ** 30)
        self.ids_so_far = {}   # episode -> ids of its dialogue
        self.kept = evaluation.KeptReplies(stem)

    def reply(self, of, split, seed, turn, pending):
        """The next reply in each pending dialogue: pairs (text, ending), in the order of `pending`.

        pending: {episode: (messages, whether they begin a dialogue)}. ending: "stop", or "length"
        if the reply was cut. `of` names the evaluation (weights, split, seed, settings), and
        replies are kept under it in case of a stop. `split` is for `ApiModel.reply` alone.
        """
        prompts = {}
        for i, (messages, begins) in pending.items():
            prompts[i] = encode(self.processor, messages, None if begins else self.ids_so_far[i])
        replies = {i: self.kept.find(of, turn, i) for i in pending}
        missing = [i for i in pending if replies[i] is None]
        if missing:
            pictures = [picture_of(pending[i][0]) for i in missing]
            new = self.sample(seed, turn, missing, [prompts[i] for i in missing], pictures)
            replies |= new
            self.kept.add(of, turn, new)
        self.ids_so_far = {i: prompts[i] + replies[i] for i in pending}
        answers = []
        for ids in replies.values():
            ending = "stop" if ids[-1] == self.policy.eos_id else "length"
            answers.append((decode_reply(self.processor, ids), ending))
        return answers

    def sample(self, seed, turn, episodes, prompts, pictures):
        """{episode: ids of its reply}; the draws depend on seed, episode and turn alone."""
        config = self.config
        keys = [(EVALUATION, seed, i, turn) for i in episodes]
        uniforms = sampling_uniforms(keys, config.max_new_tokens)
        with running.memory_advice("--generate-tokens or --kept-gib"):
            replies = self.policy.generate(prompts, uniforms, config.max_new_tokens,
                                           config.temperature, config.generate_tokens, pictures,
                                           self.memory, episodes, config.top_p)
        return {i: ids for i, (ids, _) in zip(episodes, replies)}

    def forget(self, of):
        """Drop the kept replies of an evaluation: its row is written."""
        self.kept.forget(of)


def num_episodes(config, split):
    counts = envs.TASKS[config.task].paper_episodes      # by split; "" stands for the others
    return counts.get(split.name, counts[""]) if config.paper else config.episodes


def play_episodes(reply, environments, seed, first=0):
    """Play an episode in each environment, side by side; returns a list of infos per episode.

    Episode numbers begin at `first`. reply(turn, pending) is `LocalModel.reply` with its other
    arguments given. Every process plays its part, and gets the infos of all.
    """
    pending = {}
    environments = dict(enumerate(environments, first))
    for i in running.local_part(list(environments)):
        # differs 13: never a seed of training; on GeneralPoints the official code takes one
        messages, _ = environments[i].reset(seed=f"{seed}/evaluate/{i}", episode=i)
        pending[i] = (messages, True)
    infos = {i: [] for i in pending}
    bar = running.progress(total=len(pending), nested=True, desc="episodes")
    turn = 0
    while pending:
        going_on = {}
        for i, (text, ending) in zip(pending, reply(turn, pending)):
            earlier, _ = pending[i]
            failed = ending.startswith(api.FAILED)   # then the text is not the model's
            # Messages alternate user, assistant, ...: those at odd indices are earlier replies.
            repeated = not failed and any(message["content"] == text for message in earlier[1::2])
            messages, reward, _, _, info = environments[i].step(text)
            infos[i].append(info | {"reward": reward, "ending": ending, "repeated": repeated,
                                    "empty": not failed and not text.strip()})
            if environments[i].done:
                bar.update()
            else:
                going_on[i] = (messages, info["new_dialogue"])
        pending = going_on
        turn += 1
    bar.close()
    played = {}
    for part in running.gather(list(infos.items())):
        played.update(part)
    return [played[i] for i in sorted(played)]


def evaluate_model(path, called, known, config, write, stem=None):
    """Evaluate a checkpoint, or the API's model of this name, on every split and seed.

    What has a row in `known` is left out. `write` gets each new row and the dialogues of the first
    episodes. Printed lines call the model `called`. `stem`: as in LocalModel.
    """
    model = None
    metrics = envs.TASKS[config.task].metrics
    common = settings.read_settings(config.env)
    for split in settings.read_splits(config.splits):
        make_env = partial(envs.make_env, config.task, split.name, common, **split.settings)
        env = make_env()
        chosen = evaluation.chosen_settings(config, env)
        done = evaluation.finished_rows(known, split, chosen, metrics)
        for seed in dict.fromkeys(int(seed) for seed in config.seeds.split(",")):      # each once
            label = f"{called}, {split.label}, seed {seed}"
            if seed in done:
                running.print0(f"{label}: already evaluated")
                # Tables use a seed's last row. If it has other settings, append this one anew.
                if evaluation.is_hidden(done[seed], known):
                    write(done[seed], [])
                continue
            # The model is loaded when the first seed has to be played, not before.
            if model is None:
                model = (api.ApiModel(config) if config.api_url
                         else LocalModel(path, env.vision, config, stem))
            of = json.dumps([str(path), evaluation.content_of(path), split.label, seed, chosen])
            reply = partial(model.reply, of, split.label, seed)
            episodes, num = [], num_episodes(config, split)
            recorder = evaluation.Recorder(config.dialogues)
            while len(episodes) < num:
                block = min(num - len(episodes), SIDE_BY_SIDE * running.WORLD)
                environments = [recorder.watch(make_env()) for _ in range(block)]
                with running.one_line_errors(label):       # maybe in one process alone
                    episodes += play_episodes(reply, environments, seed, first=len(episodes))
            row = {"checkpoint": str(path), "split": split.label, "seed": seed,
                   **summarise(episodes, env.verify_iter, env.kinds), "settings": chosen}
            write(row, recorder.rows())
            model.forget(of)
            of_paper = compare.beside_paper(config.task, row, PAPER) if config.paper else ""
            evaluation.print_results(label, row, metrics, of_paper)


# ---- Four ways to evaluate ---------------------------------------------------------------------

def finish_config(config):
    """The config with task and dtype settled; ValueError if a split or setting is not allowed."""
    config = replace(config, task=config.task or "gp-l")
    for split in settings.read_splits(config.splits):          # only to check them
        common = settings.read_settings(config.env)
        envs.make_env(config.task, split.name, common, **split.settings)
    if config.api_url:
        return replace(config, dtype="")           # the server chooses it
    device = running.start_processes(config.device)
    return replace(config, dtype=running.pick_dtype(config.dtype, device))


def evaluate_checkpoint(config):
    """Evaluate one checkpoint. Its rows go to eval.jsonl in --out, or are printed."""
    config = finish_config(evaluation.as_in_its_run(config, envs.make_env, envs.TASKS))
    known, write = evaluation.open_out(config.out, config.model)
    evaluate_model(Path(config.model), config.model, known, config, write)


def evaluate_api(config):
    """Evaluate a model behind an API; its rows go to eval.jsonl in --out."""
    evaluation.check_out(config.out)
    known = evaluation.known_rows(config.out, config.api_model)
    evaluate_model(config.api_model, config.api_model, known, finish_config(config),
                   partial(evaluation.log_evaluation, config.out))


def evaluate_run(config):
    """Evaluate every checkpoint of a run; rows carry its step and the compute since the start."""
    run = Path(config.run_folder)
    trained = logs.read_trained(run)
    config = finish_config(
        evaluation.take_settings(config, run, trained, envs.make_env, envs.TASKS))
    run_folder.hold(run, "evaluating")
    checkpoints = evaluation.list_checkpoints(run, trained, config.start)
    known = evaluation.open_logs(run, "step")
    for point in running.progress(checkpoints, desc=f"checkpoints of {run}"):
        called = f"{run} step {point.step}" if point.step else f"start {point.path}"
        evaluate_model(point.path, called, point.rows(known), config,
                       partial(evaluation.log_evaluation, run, **point.numbers()),
                       run / "eval_unfinished")
    evaluation.print_path(run, config, envs.make_env, envs.TASKS[config.task].metrics[0])


def compare_runs(config):
    """Print the tables of evaluated runs, with the paper's numbers; write the figure and page."""
    metrics = {name: task.metrics for name, task in envs.TASKS.items()}
    reference = compare.Reference(PAPER, SIGNS, metrics)
    write_page = partial(report.write, config.html, envs.make_env) if config.html else None
    compare.compare(logs.list_runs(config.compare), config.figure, reference, write_page)


def main(config):
    with running.one_line_errors():
        evaluation.check_options(config)
        if config.compare:
            compare_runs(config)
        elif config.run_folder:
            evaluate_run(config)
        elif config.api_url:
            evaluate_api(config)
        else:
            evaluate_checkpoint(config)


if __name__ == "__main__":
    running.run(main, Config)
