"""The official wording: prompt files made from a copy of the official code, and our dialogues.

The dialogues are compared with those that the official code makes. That needs a copy:

    OFFICIAL_REPO=PATH python -m pytest tests/test_official.py
"""
import copy
import json
import os
import random
import subprocess
import sys

import pytest

import model
from conftest import ROOT
from data.official_prompts import read_wording
from envs import make_env
from support import violations
from support.chat import read_text
from support.settings import read_splits
from support.vocabularies import relative_word
from verify import judge_general_points, parse_formula

EPISODES, SEED = 40, 7
needs_repo = pytest.mark.skipif("OFFICIAL_REPO" not in os.environ,
                                reason="OFFICIAL_REPO is not set: it names a copy of "
                                       "github.com/LeslieTrue/SFTvsRL")


# ---- Against the official code -------------------------------------------------------------------

@pytest.fixture(scope="module")
def wording(tmp_path_factory):
    out = tmp_path_factory.mktemp("official")
    subprocess.run([sys.executable, ROOT / "data" / "official_prompts.py", "--repo",
                    os.environ["OFFICIAL_REPO"], "--out", out],
                   check=True, capture_output=True)
    return out


def play_theirs(task, split, routes):
    command = [sys.executable, ROOT / "tests" / "official_side.py", os.environ["OFFICIAL_REPO"],
               task, split, str(EPISODES), routes, str(SEED)]
    played = subprocess.run(command, capture_output=True, text=True, timeout=1000)
    assert played.returncode == 0, played.stderr[-3000:]
    return json.loads(played.stdout)


def follow(env, dialogues):
    """Give an environment the replies of an episode of theirs.

    Every message that a model reads must be the same. Returns how many replies were asked for.
    """
    asked = 0
    for dialogue in dialogues:
        for at in range(0, len(dialogue), 2):
            if env.done:                           # theirs asks once more, and reads no answer
                assert dialogue is dialogues[-1] and at == len(dialogue) - 2
                return asked
            assert ([[message["role"], read_text(message)] for message in env.messages]
                    == dialogue[:at + 1])
            env.step(dialogue[at + 1][1])
            asked += 1
    assert env.done
    return asked


def verdicts(played):
    return {text for episode in played for dialogue in episode["dialogues"]
            for role, text in dialogue[2::2]}


@needs_repo
@pytest.mark.parametrize("task", ["gp-l", "gp-vl"])
@pytest.mark.parametrize("split", ["id", "rule_ood"])
def test_dialogues_about_cards_are_byte_for_byte_those_of_the_official_code(task, split, wording):
    played = play_theirs(task, split, ".")
    env = make_env(task, split, prompt_file=str(wording / f"{task}.json"))
    env.picture = lambda: None
    for episode in played:
        hand = [(rank, "S") for rank in episode["cards"]]
        numbers = [env.rule_jqk["JQK".index(rank)] if rank in "JQK"
                   else 1 if rank == "A" else int(rank) for rank, _ in hand]
        env.deal = lambda: (hand, numbers)
        env.reset(seed=0)
        follow(env, episode["dialogues"])
    assert len(played) == EPISODES and len(verdicts(played)) > 40


@needs_repo
@pytest.mark.parametrize("task", ["virl-l", "virl-vl"])
@pytest.mark.parametrize("split", ["id", "rule_ood"])
def test_dialogues_on_a_walk_are_byte_for_byte_those_of_the_official_code(
        task, split, wording, city):
    played = play_theirs(task, split, city / "train")
    env = make_env("virl-l", split, root=city, turn_words="unwrapped",
                   prompt_file=str(wording / f"{task}.json"))
    # The city has no pictures; the words are the same.
    env.vision, env.picture = task == "virl-vl", lambda: None
    for number, episode in enumerate(played):
        env.rng = random.Random(SEED + number)
        env.lay_out(0)
        env.turn, env.at, env.done = 0, 0, False
        env.begin_dialogue()
        follow(env, episode["dialogues"])
    assert len(played) == EPISODES and len(verdicts(played)) == 2


# What their code pays for a formula over 2, 3, 4 and 6 that is illegal in ours (differences, 2).
PAID_BY_THEIRS = {"2*3*4*(6": -1, "4*6*(3-2": 1, "2*3*4*6+": -1, "2*3+": -2, "": -2, "2*3*5+": -4,
                  "\uff14*6*(3-2)": -1, "4/(2*3-6)": -1}
ASK_THEIRS = """
import json, pathlib, sys
from official_side import install_stubs
install_stubs(pathlib.Path(sys.argv[1]).resolve())
from utils_rl import step_rewards
for formula in json.loads(sys.argv[2]):
    reward, _ = step_rewards([2, 3, 4, 6], formula, ["4*6*(3-2)"], 24)
    print(reward)
"""


@needs_repo
def test_their_code_pays_for_illegal_formulas_what_the_list_of_differences_says():
    command = [sys.executable, "-c", ASK_THEIRS, os.environ["OFFICIAL_REPO"],
               json.dumps(list(PAID_BY_THEIRS))]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT / "tests")})
    assert [float(line) for line in asked.stdout.split()] == list(PAID_BY_THEIRS.values())


def test_ours_calls_these_formulas_illegal():
    for formula in PAID_BY_THEIRS:
        reply = json.dumps({"formula": formula})
        verdict = judge_general_points(reply, ["2", "3", "4", "6"], [2, 3, 4, 6])
        assert (verdict.status, verdict.reward) == ("illegal_formula", -3), formula


@needs_repo
def test_the_recipe_runs_on_a_blank_model_and_names_the_papers_numbers(tmp_path):
    variables = {**os.environ, "SMOKE": "1", "TASK": "gp-l",
                 "REPO": os.path.abspath(os.environ["OFFICIAL_REPO"]),
                 "OUT": str(tmp_path),
                 "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
                 "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(["bash", ROOT / "recipes" / "official.sh"], env=variables,
                         capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ("decoded with --temperature 0.0 --top-p 1.0" in ran.stdout
            and "in the paper 11.5 at the start" in ran.stdout)


# ---- From files of the same shape, in words of our own -------------------------------------------

SHAPE = {
    "prompt_lib/prompts.py": '''
Q_GeneralPoint_EQN_L = ("T {target_number}; {face_card_msg} T {target_number}; C {cards} O {{ "
                        "{face_card_msg} {target_number}; }}")
Q_GeneralPoint_EQN_VL = ("V {target_number}; {face_card_msg} V {target_number}; O {{ "
                         "{face_card_msg} {target_number}; }}")
ResponseEqn = '{{"cards": {cards}, "number": {numbers}, "formula": "{formula}"}}'
Q_VIRL_L = "I {instruction} A {action_space} H {obs_act_seq} O {{}}"
Q_VIRL_VL = "I {instruction} see A {action_space} H {obs_act_seq} O {{}}"
ResponseVIRL = ('{{"current observation": "{current_observation}", '
                '"i": "{current_instruction}", "action": "{action}"}}')
''',
    "utils_rl.py": '''
def aggregate_fn(message_list):
    return ', '.join(message_list) + '!'

def step_rewards(invalid_numbers, overused_numbers, underused_numbers, prev_register):
    if vision:
        return REWARD_FN["INCORRECT_VISION"], "misread"
    stepper.add(REWARD_FN["ILLEGAL_FORMULA"], "v1")
    stepper.add(REWARD_FN["ILLEGAL_FORMULA"], "v2")
    stepper.add(REWARD_FN["ILLEGAL_FORMULA"], "v3")
    stepper.add(REWARD_FN["ILLEGAL_FORMULA"], "v4")
    stepper.add(REWARD_FN["ILLEGAL_FORMULA"], "v5")
    stepper.add(REWARD_FN["ILLEGAL_FORMULA"], "v6")
    stepper.add(REWARD_FN["ILLEGAL_FORMULA"], "v7")
    stepper.add(REWARD_FN["INCORRECT_NUMBER"], f"no {invalid_numbers}")
    stepper.add(REWARD_FN["INCORRECT_NUMBER"], f"often {overused_numbers}")
    stepper.add(REWARD_FN["INCORRECT_NUMBER"], f"missing {underused_numbers}")
    stepper.add(REWARD_FN["CORRECT_SOLUTION"], "v8")
    stepper.add(REWARD_FN["PARTIAL_SOLUTION"], "begun")
    stepper.add(REWARD_FN["NO_SOLUTION"], "none")
    stepper.add(REWARD_FN["NO_SOLUTION"], f"up to {prev_register}")

def set_str_action_space(env_config):
    if getattr(env_config, 'absolute_action', True):
        ACTION_SPACE = "go [north]"
    else:
        ACTION_SPACE = "go [left]"

def step_rewards_virl(raw_output):
    format_token = " {{ o }}"
    stepper.add(REWARD_FN_VIRL["CORRECT_ACTION"], "v9")
    stepper.add(REWARD_FN_VIRL["INCORRECT_OBS"], "not at a crossing" + format_token)
    stepper.add(REWARD_FN_VIRL["INCORRECT_OBS"], "at a crossing" + format_token)
    stepper.add(REWARD_FN_VIRL["INCORRECT_ACTION"], "wrong" + format_token)
''',
    "evaluation/evaluator/base_evaluator.py": '''
def formulate_oracle_arguments(self):
    self.oracle_arguments['face_card_msg'] = (
        "faces 10" if self.treat_face_cards_as_10 else "faces 11 to 13")
''',
    "evaluation/evaluator/llama_evaluator.py": '''
def formulate_prompt(self, info):
    self.payload.append(f"no: {info['Verify Info']}")
    self.payload.append(f"no, no: {info['Verify Info']}")
''',
    "gym/gym_virl/envs/navigation_environment.py": '''
def _get_observation_rail(self):
    return {"oracle_observation": landmark_obs + '; ' + intersection_obs}

def _parse_instruction_and_rail(self):
    landmark = intersection_dict.get('landmarks', "nothing here")
    parsed_instruction.append("T " + relative_heading + " to " + next_heading + ".")
    parsed_instruction.append("M to " + landmark + ".")
    first_msg = "T1" if idx == 0 else "T"
    parsed_instruction.append(f"{first_msg} " + relative_heading + " to " + next_heading + ".")
    parsed_instruction.append("M.")
    parsed_instruction.append(f"{first_msg} " + relative_heading + " to " + next_heading + ".")
    parsed_instruction.append("M at " + landmark + ".")
    str_instruction += f"{idx + 1}) {instr}|"
    landmark_list.insert(0, "nothing")
    rail.append({'observation': "nothing", 'intersection_observation': ""})
    rail.append({'observation': landmark_list[idx],
                 'intersection_observation': "crossing" if (idx != 0) else ""})

def get_observation_action_sequence(self):
    lines += f"o{i + 1} {observation}|"
    lines += f"a{i + 1} {action}|"
    inter = "crossing" if "crossing" in observation_list[-1] else ""
    lines += f"o{len(observation_list)} views; {inter}|"
    lines += f"a{len(observation_list)} |"
    lines += f"o{len(observation_list)} {observation_list[-1]}|"
    lines += f"a{len(observation_list)} |"
''',
}


def write_shape(folder):
    for path, text in SHAPE.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


@pytest.fixture
def shaped(tmp_path):
    write_shape(tmp_path / "repo")
    for task, templates in read_wording(tmp_path / "repo").items():
        (tmp_path / f"{task}.json").write_text(json.dumps(templates))
    return tmp_path


@pytest.mark.parametrize("task, split, told, replied", [
    ("gp-l", "id", "T 24; faces 10 T 24; C ['7', 'Q', '2', 'A'] O { faces 10 24; }",
     """{"cards": ['7', 'Q', '2', 'A'], "number": [7, 10, 2, 1], "formula": \""""),
    ("gp-l", "rule_ood",
     "T 24; faces 11 to 13 T 24; C ['7', 'Q', '2', 'A'] O { faces 11 to 13 24; }",
     '"number": [7, 12, 2, 1], "formula": "'),
    ("gp-vl", "id", "V 24; faces 10 V 24; O { faces 10 24; }", '"number": [7, 10, 2, 1], "f')])
def test_one_prompt_file_words_cards_under_both_rules(task, split, told, replied, shaped):
    env = make_env(task, split, prompt_file=str(shaped / f"{task}.json"))
    env.deal = lambda: ([(rank, "S") for rank in ("7", "Q", "2", "A")],
                        [7, 12 if split == "rule_ood" else 10, 2, 1])
    assert read_text(env.reset(seed=0)[0][0]) == told
    assert (replied in env.expert_reply()
            and env.judge(env.format_reply("1")).status == "wrong_numbers")


@pytest.mark.parametrize("reply, told", [
    ('{"formula": "7+10"}', "no: missing [2, 1]!"),
    ('{"formula": "7+9+9"}', "no: no [9], missing [10, 2, 1]!"),
    ('{"formula": "7+7+10+2+1+)"}', "no: v6, often [7]!"),
    ('{"formula": "2)(7+10+1"}', "no: v5, v4!"), ('{"formula": "*2 7+10+1"}', "no: v1!"),
    ("nothing", "no: v1!"), ('{"formula": "(7+10+2+1"}', "no: up to (7!"),
    ('{"formula": "1*(2*7+10"}', "no: begun!"), ('{"formula": "10-7*2+1=24"}', "no: up to 10!"),
    ('{"formula": "2*7/10+1"}', "no: up to 2*7/!")])
def test_a_verdict_may_list_all_that_is_wrong(reply, told, shaped):
    env = make_env("gp-l", "id", prompt_file=str(shaped / "gp-l.json"))
    env.deal = lambda: ([(rank, "S") for rank in ("7", "Q", "2", "A")], [7, 10, 2, 1])
    env.reset(seed=0)
    assert env.step(reply)[0][-1]["content"] == told


def test_walks_are_worded_by_one_prompt_file_under_both_rules(shaped, city):
    for split, actions in (("id", "go [north]"), ("rule_ood", "go [left]")):
        env = make_env("virl-l", split, root=city, prompt_file=str(shaped / "virl-l.json"),
                       turn_words="unwrapped")
        told = env.reset(seed=0)[0][0]["content"]
        assert told.startswith("I 1) T1 ") and f"| A {actions} H o1 nothing; |a1 | O {{}}" in told
        crossings = [position for position in env.rail
                     if position.intersection and not position.landmark]
        assert (crossings and {env.observation(position) for position in crossings}
                == {"nothing here; crossing"})
        assert env.format_reply("stop()").endswith(', "action": "stop()"}')
        wrong = '{"current observation": "%s", "action": "fly()"}'
        assert (env.step(wrong % "an intersection")[0][-1]["content"]
                == "no, no: not at a crossing {{ o }}!")
        assert env.step(wrong % "")[0][-1]["content"] == "wrong {{ o }}!"


def test_a_misread_hand_is_told_in_place_of_the_verdict_if_the_text_says_so(shaped):
    env = make_env("gp-vl", "id", prompt_file=str(shaped / "gp-vl.json"), resolution=112)
    env.reset(seed=0)
    assert env.step('{"cards": ["A"], "formula": "1"}')[0][-1]["content"] == "no: misread"


@pytest.mark.parametrize("path, old, new, named", [
    ("utils_rl.py", None, None, "utils_rl.py"),
    ("utils_rl.py", "def step_rewards(", "def step rewards(", "utils_rl.py"),
    ("utils_rl.py", "def step_rewards(", "def other(", "step_rewards"),
    ("utils_rl.py", "', '.join", "' '.join", "message_list"),
    ("utils_rl.py", '"v3")', 'v3())', "v3()"),
    ("utils_rl.py", '    stepper.add(REWARD_FN["NO_SOLUTION"], "none")\n', "", "stepper.add"),
    ("prompt_lib/prompts.py", "{cards} O", "O", "cards"),
    ("prompt_lib/prompts.py", "ResponseEqn =", "Other =", "ResponseEqn"),
    ("prompt_lib/prompts.py", "{obs_act_seq} O {{}}", "{obs_act_seq} O {", "format"),
    ("prompt_lib/prompts.py", "T {target_number}; {face", "T {{x}} {target_number}; {face", "{x}"),
    ("evaluation/evaluator/base_evaluator.py", "self.treat_face_cards_as_10", "other",
     "face cards"),
    ("gym/gym_virl/envs/navigation_environment.py", '"T1" if idx == 0 else "T"',
     '"T1" if idx == 0 else "U"', "turn"),
    ("gym/gym_virl/envs/navigation_environment.py", "views; {inter}", "views {inter}", "history"),
    ("gym/gym_virl/envs/navigation_environment.py", 'insert(0, "nothing")', "insert(0)", "version"),
    ("gym/gym_virl/envs/navigation_environment.py",
     '"crossing" if "crossing" in observation_list[-1] else ""', '""', "version"),
    ("gym/gym_virl/envs/navigation_environment.py", 'append("M.")', "append()", "version"),
    ("utils_rl.py", '["NO_SOLUTION"], "none")', '["NO_SOLUTION"])', "version")])
def test_another_repository_or_version_is_one_line_that_names_what_was_looked_for(
        path, old, new, named, tmp_path):
    write_shape(tmp_path)
    text = SHAPE[path]
    assert old is None or old in text
    ((tmp_path / path).unlink() if old is None
     else (tmp_path / path).write_text(text.replace(old, new)))
    with pytest.raises(ValueError, match="^--repo ") as error:
        read_wording(tmp_path)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_no_code_of_the_copy_runs(tmp_path):
    write_shape(tmp_path)
    for path, text in SHAPE.items():
        (tmp_path / path).write_text(f"{text}\nraise SystemExit\n")
    assert read_wording(tmp_path)["gp-l"]["gp_retry"] == "no: {verdict}"


@pytest.mark.parametrize("task", ["gp-l", "virl-l"])
def test_listing_what_is_wrong_takes_any_reply_and_stays_short(task, shaped, city):
    more = {"root": city} if task == "virl-l" else {}
    env = make_env(task, "id", prompt_file=str(shaped / f"{task}.json"), verify_iter=1000, **more)
    env.reset(seed=0)
    rng = random.Random(0)
    odd = ["9" * 5000, "(" * 5000, "1+" * 4000 + "1", "\u0663+1", "", None, 7, [1], {}, "\ud800",
           "1/0", "((1)"]
    odd += ["".join(rng.choices("0123456789+-*/()= x", k=rng.randint(1, 30))) for _ in range(300)]
    for said in odd:
        for reply in (json.dumps({"formula": said}),
                      json.dumps({"action": "fly()", "current observation": said}), str(said)):
            told = env.step(reply)[0][-1]["content"]
            assert "{" not in told.replace("{{ o }}", "") and len(told) < 1000
            if env.done:
                env.reset(seed=1)


# ---- What such a file may say --------------------------------------------------------------------

def test_a_text_by_rule_is_an_error_under_a_rule_that_it_has_not(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps({"gp_task": {"10,10,10": "tens", "3,12,7": "odd"}}))
    assert [make_env("gp-l", "id", prompt_file=str(path), **rule).prompts["gp_task"]
            for rule in ({}, {"rule": "10,10,10"}, {"rule": "3,12,7"})] == ["tens", "tens", "odd"]
    for split, rule in (("rule_ood", "11,12,13"), ("rule_family", "random")):
        with pytest.raises(ValueError, match=f"'gp_task' is worded for 10,10,10 and 3,12,7, "
                                             f"not for the rule {rule}"):
            make_env("gp-l", split, prompt_file=str(path))


def test_splits_may_have_prompt_files_of_their_own(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps({"gp_task": name}))
    splits = read_splits(["id", f"prompt_file={tmp_path / 'a.json'}", "rule_ood",
                          f"prompt_file={tmp_path / 'b.json'}"])
    assert [make_env("gp-l", split.name, **split.settings).prompts["gp_task"]
            for split in splits] == ["a", "b"]


def test_turn_words_are_wrapped_at_180_degrees_or_taken_from_the_headings_as_they_are(city):
    assert ([relative_word(angle) for angle in (300, -300, 10)]
            == ["left", "right", "slightly right"])
    assert ([relative_word(angle, wrapped=False) for angle in (300, -300, 10)]
            == ["right", "left", "slightly right"])
    ours, theirs = (make_env("virl-l", "rule_ood", root=city, turn_words=words)
                    for words in ("wrapped", "unwrapped"))
    turned = 0
    for seed in range(20):
        ours.reset(seed=seed), theirs.reset(seed=seed)
        told = [[position.action for position in env.rail if position.kind == "turn"]
                for env in (ours, theirs)]
        assert all(action[15:-1] in sentence
                   for action, sentence in zip(told[1], theirs.sentences[::2]))
        turned += told[0] != told[1]
    assert turned > 5


def test_bracketed_solutions_are_right_formulas_and_hold_redundant_brackets():
    found = violations.bracketed_solutions((1, 2, 3, 4), 24, parse_formula)
    assert ({"1*2*3*4", "(1*2)*3*4", "1*(2*3*4)", "(1+2+3)*4", "(4*3)*(2/1)"} <= set(found)
            and len(set(found)) == len(found))
    assert all((value := parse_formula(text)[0])[0] == 24 * value[1] for text in found)
    assert (violations.of_formula("3*8+8-3", [3, 3, 8, 8], 24, parse_formula)
            == [("violation_no_solution", {})])


def test_the_date_in_a_system_block_is_that_of_the_models_template_if_it_sets_one(tiny):
    processor = copy.copy(tiny[1])
    dated = ("{%- if not date_string is defined %}"
             "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
             "Today: {{ date_string }}")
    processor.chat_template = dated
    assert model.render(processor, [{"role": "user", "content": "x"}]) == "Today: 01 Jan 2025"
    processor.chat_template = "{% set date_string = '26 Jul 2024' %}" + dated
    assert model.render(processor, [{"role": "user", "content": "x"}]) == "Today: 26 Jul 2024"
