"""Writes prompt files in the wording of the official code, to evaluate what was trained on it.

    git clone https://github.com/LeslieTrue/SFTvsRL
    python data/official_prompts.py --repo SFTvsRL --out official
    python evaluate.py --model PATH --task gp-l --env prompt_file=official/gp-l.json

recipes/official.sh does all of it. The wording comes from your copy of that code. Its files are
read as text: nothing in them runs. First prompts, verdicts and the shape of a reply are the
official ones, under both rules. V-IRL needs turn_words=unwrapped and view_headings=official beside
the prompt file.

A prompt file has templates: texts with names in braces, such as {target}, for what differs from
prompt to prompt. The official code joins the same texts in Python expressions. This script finds
each expression in the syntax tree and turns it into a template.
"""
import argparse
import ast
import json
import re
import string
import sys
from pathlib import Path

RULES = {"10,10,10": True, "11,12,13": False}     # of GeneralPoints: whether faces count as 10
SOURCES = {"prompts": "prompt_lib/prompts.py",
           "verdicts": "utils_rl.py",
           "walk": "gym/gym_virl/envs/navigation_environment.py",
           "arguments": "evaluation/evaluator/base_evaluator.py",
           "dialogue": "evaluation/evaluator/llama_evaluator.py"}


class OtherShape(ValueError):
    """A file does not say what is looked for in the way it is looked for."""


def expect(condition, what):
    if not condition:
        raise OtherShape(what)


def first(found, what):
    expect(found, what)
    return found[0]


def read_sources(repo):
    """{name: syntax tree} of the files of SOURCES."""
    trees = {}
    for name, path in SOURCES.items():
        try:
            trees[name] = ast.parse((Path(repo) / path).read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"--repo {repo}: no copy of github.com/LeslieTrue/SFTvsRL: "
                             f"{path} cannot be read ({reason})") from None
    return trees


# ---- Expressions as templates --------------------------------------------------------------------

def literal(text):
    """A text that no template would take for a {name}."""
    expect(isinstance(text, str) and not re.search(r"\{\w+\}", text), f"the text {text!r}")
    return text


def as_template(node, values):
    """The template of an expression that joins texts.

    `values` says what stands in the template for each name or call of the expression, by its
    source: with {"relative": "{rel}"} the expression `"Turn " + relative` is "Turn {rel}".
    """
    if isinstance(node, ast.Constant):
        return literal(node.value)
    if isinstance(node, ast.JoinedStr):                            # f"..."
        return "".join(as_template(part, values) for part in node.values)
    is_sum = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
    if is_sum and ast.unparse(node) not in values:
        return as_template(node.left, values) + as_template(node.right, values)
    if isinstance(node, ast.FormattedValue) and node.conversion == -1 and not node.format_spec:
        node = node.value                                          # {value} within f"..."
    expect(ast.unparse(node) in values, f"the expression {ast.unparse(node)}")
    return values[ast.unparse(node)]


def read_format(text, fields):
    """The texts before, between and behind the fields of a text for str.format.

    The text must have these fields, in this order.
    """
    texts, found = [""], []
    try:
        for before, field, _, _ in string.Formatter().parse(text):
            texts[-1] += before                    # a doubled brace ends a part as well
            if field is not None:
                found.append(field)
                texts.append("")
    except ValueError as error:
        raise OtherShape(f"a text for format ({error})") from None
    expect(found == fields, f"a text for format with the fields {', '.join(fields)}")
    return [literal(part) for part in texts]


def fill_format(text, fields, values):
    """A text for str.format as a template; `values` has what stands for each field."""
    texts = read_format(text, fields)
    return texts[0] + "".join(values[field] + after for field, after in zip(fields, texts[1:]))


# ---- Finding nodes -------------------------------------------------------------------------------

def find_function(tree, name):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise OtherShape(f"the function {name}")


def in_order(node, kind):
    """The nodes of a kind within another, in the order of the file."""
    found = [child for child in ast.walk(node) if isinstance(child, kind)]
    return sorted(found, key=lambda child: (child.lineno, child.col_offset))


def calls_of(node, call):
    """The arguments of each call of `call` within a node, in order."""
    return [child.args for child in in_order(node, ast.Call) if ast.unparse(child.func) == call]


def arguments_of(function, call, count):
    """The arguments of each call of `call` in a function, in order; there must be `count` calls."""
    found = calls_of(function, call)
    expect(len(found) == count, f"{count} calls of {call} in {function.name}")
    return found


def assigned(node, name):
    """What is assigned to a name within a node, in order."""
    found = []
    for child in in_order(node, ast.Assign):
        if ast.unparse(child.targets[0]) == name:
            found.append(child.value)
    return found


def values_of(node, key):
    """The values under a key in all dicts that are written within a node, in order."""
    found = []
    for child in in_order(node, ast.Dict):
        for name, value in zip(child.keys, child.values):
            if isinstance(name, ast.Constant) and name.value == key:
                found.append(value)
    return found


# ---- What the four tasks share -------------------------------------------------------------------

def read_retries(tree):
    """What stands around a verdict: (GeneralPoints, V-IRL)."""
    texts = in_order(find_function(tree, "formulate_prompt"), ast.JoinedStr)
    expect(len(texts) == 2, "two texts around a verdict in formulate_prompt")
    return [as_template(text, {"info['Verify Info']": "{verdict}"}) for text in texts]


def read_prompts(tree):
    """{name: text} of the texts for str.format."""
    names = ("Q_GeneralPoint_EQN_L", "Q_GeneralPoint_EQN_VL", "Q_VIRL_L", "Q_VIRL_VL",
             "ResponseEqn", "ResponseVIRL")
    values = {name: first(assigned(tree, name), f"the text {name}") for name in names}
    for value in values.values():
        expect(isinstance(value, ast.Constant) and isinstance(value.value, str), "texts")
    return {name: value.value for name, value in values.items()}


def read_verdict_frame(tree):
    """How the violations of a verdict are joined; ours joins them with a comma as well."""
    returned = first(in_order(find_function(tree, "aggregate_fn"), ast.Return),
                     "a result of aggregate_fn")
    return as_template(returned.value, {"', '.join(message_list)": "{violations}"})


# ---- GeneralPoints -------------------------------------------------------------------------------

# The calls of stepper.add in step_rewards, in order: our name of the violation (empty: no
# violation), and the key of the reward.
CARD_CALLS = [("characters", "ILLEGAL_FORMULA"), ("number", "ILLEGAL_FORMULA"),
              ("operator", "ILLEGAL_FORMULA"), ("opening", "ILLEGAL_FORMULA"),
              ("unmatched", "ILLEGAL_FORMULA"), ("closing", "ILLEGAL_FORMULA"),
              ("", "ILLEGAL_FORMULA"), ("foreign", "INCORRECT_NUMBER"),
              ("repeated", "INCORRECT_NUMBER"), ("unused", "INCORRECT_NUMBER"),
              ("", "CORRECT_SOLUTION"), ("breaks_off", "PARTIAL_SOLUTION"),
              ("no_solution", "NO_SOLUTION"), ("end", "NO_SOLUTION")]


def general_points_verdicts(tree):
    step, frame = find_function(tree, "step_rewards"), read_verdict_frame(tree)
    calls = arguments_of(step, "stepper.add", len(CARD_CALLS))
    rewards = [ast.unparse(reward) for reward, _ in calls]
    expect(rewards == [f"REWARD_FN['{key}']" for _, key in CARD_CALLS], "what stepper.add gets")
    values = {"invalid_numbers": "[{numbers}]", "overused_numbers": "[{numbers}]",
              "underused_numbers": "[{numbers}]", "prev_register": "{beginning}"}
    found = {}
    for (name, _), (_, text) in zip(CARD_CALLS, calls):
        if name:
            found[f"feedback_violation_{name}"] = as_template(text, values)
    for name in ("no_formula", "illegal_formula", "wrong_numbers", "wrong_value"):
        found[f"feedback_{name}"] = frame
    returned = []                                  # the texts of the pairs (reward, text)
    for node in in_order(step, ast.Return):
        if isinstance(node.value, ast.Tuple):
            returned.append(node.value.elts[1])
    misread = as_template(first(returned, "a verdict on misread cards in step_rewards"), {})
    return found | {"feedback_misread_cards": misread, "feedback_no_cards": misread}


def general_points(trees, vision):
    """The templates of gp-l or gp-vl."""
    prompts = read_prompts(trees["prompts"])
    sentence = "the sentence on face cards"
    value = first(assigned(find_function(trees["arguments"], "formulate_oracle_arguments"),
                           "self.oracle_arguments['face_card_msg']"), sentence)
    expect(isinstance(value, ast.IfExp)
           and ast.unparse(value.test) == "self.treat_face_cards_as_10", sentence)
    told = {}                                      # rule -> its sentence
    for rule, as_ten in RULES.items():
        told[rule] = as_template(value.body if as_ten else value.orelse, {})

    # The first prompt. In words the hand stands between the two tellings of the rule.
    if vision:
        text = prompts["Q_GeneralPoint_EQN_VL"]
        fields = ["target_number", "face_card_msg", "target_number",
                  "face_card_msg", "target_number"]
    else:
        text = prompts["Q_GeneralPoint_EQN_L"]
        fields = ["target_number", "face_card_msg", "target_number", "cards",
                  "face_card_msg", "target_number"]
    worded = {}
    for rule, said in told.items():
        values = {"target_number": "{target}", "face_card_msg": said, "cards": "{cards}"}
        worded[rule] = fill_format(text, fields, values)
    if vision:
        parts = {"gp_task": worded, "gp_input_picture": "", "gp_output": ""}
    else:
        parts = {"gp_task": {rule: whole.split("{cards}")[0] for rule, whole in worded.items()},
                 "gp_input_text": "{cards}",
                 "gp_output": {rule: whole.split("{cards}")[1] for rule, whole in worded.items()}}

    names = {"cards": "{cards}", "numbers": "{numbers}", "formula": "{formula}"}
    reply = fill_format(prompts["ResponseEqn"], list(names), names)
    return {**parts, "gp_card": "'{card}'", "gp_reply": reply,
            "gp_retry": read_retries(trees["dialogue"])[0],
            **general_points_verdicts(trees["verdicts"])}


# ---- V-IRL ---------------------------------------------------------------------------------------

# As CARD_CALLS, in step_rewards_virl.
WALK_CALLS = [("", "CORRECT_ACTION"), ("intersection", "INCORRECT_OBS"),
              ("no_intersection", "INCORRECT_OBS"), ("action", "INCORRECT_ACTION")]


def navigation_verdicts(tree):
    step, frame = find_function(tree, "step_rewards_virl"), read_verdict_frame(tree)
    token = first(assigned(step, "format_token"), "the text format_token")
    values = {"format_token": as_template(token, {})}
    calls = arguments_of(step, "stepper.add", len(WALK_CALLS))
    rewards = [ast.unparse(reward) for reward, _ in calls]
    expect(rewards == [f"REWARD_FN_VIRL['{key}']" for _, key in WALK_CALLS],
           "what stepper.add gets")
    found = {}
    for (name, _), (_, text) in zip(WALK_CALLS, calls):
        if name:
            found[f"feedback_violation_{name}"] = as_template(text, values)
    for name in ("no_action", "wrong_action"):
        found[f"feedback_{name}"] = frame
    for name in ("missed_landmark", "missed_intersection", "invented_intersection"):
        found[f"feedback_{name}"] = "{verdict}"
    return found


def read_sentences(tree):
    """The sentences of a route's instruction, and how they are numbered."""
    walk = find_function(tree, "_parse_instruction_and_rail")
    values = {"relative_heading": "{rel}", "next_heading": "{dir}", "landmark": "{landmarks}"}
    beginning = first(assigned(walk, "first_msg"), "the first turn")
    expect(isinstance(beginning, ast.IfExp), "the first turn")
    # A turn and a move for the last leg, then for a leg without a landmark and for one with it.
    last_turn, last_move, turn, move, same_turn, move_landmark = [
        arguments[0] for arguments in arguments_of(walk, "parsed_instruction.append", 6)]
    worded_first = as_template(turn, {**values, "first_msg": as_template(beginning.body, {})})
    worded = as_template(turn, {**values, "first_msg": as_template(beginning.orelse, {})})
    expect(worded == as_template(last_turn, values) and ast.unparse(turn) == ast.unparse(same_turn),
           "one wording of a turn")
    numbered = []
    for node in in_order(walk, ast.AugAssign):
        if ast.unparse(node.target) == "str_instruction":
            numbered.append(node.value)
    numbered = first(numbered, "numbered instructions")
    return {"nav_first_turn": worded_first, "nav_turn": worded,
            "nav_last_move": as_template(last_move, values),
            "nav_move": as_template(move, {}),
            "nav_move_landmark": as_template(move_landmark, values),
            "nav_sentence": as_template(numbered, {"idx + 1": "{n}", "instr": "{sentence}"})}


def read_observations(tree):
    """What is seen at a position, and how the history tells what was seen."""
    walk = find_function(tree, "_parse_instruction_and_rail")
    past = find_function(tree, "get_observation_action_sequence")

    # What is seen: a landmark or none, an intersection or none.
    crossings = []
    for value in values_of(walk, "intersection_observation"):
        if isinstance(value, ast.IfExp):
            crossings.append(value.body)
    crossing = as_template(first(crossings, "an intersection"), {})
    seen = first(values_of(find_function(tree, "_get_observation_rail"), "oracle_observation"),
                 "an observation")
    between = as_template(seen, {"landmark_obs": "{landmark}", "intersection_obs": ""})
    at_intersection = as_template(seen, {"landmark_obs": "{landmark}",
                                         "intersection_obs": crossing})
    nothing = as_template(arguments_of(walk, "landmark_list.insert", 1)[0][1], {})
    wordings = set()
    for value in values_of(walk, "observation"):
        if isinstance(value, ast.Constant):
            wordings.add(as_template(value, {}))
    expect(wordings == {nothing}, "one wording of no landmark between intersections")
    defaults = []
    for arguments in calls_of(walk, "intersection_dict.get"):
        if ast.unparse(arguments[0]) == "'landmarks'":
            defaults.append(arguments[1])
    here = as_template(first(defaults, "no landmark at an intersection"), {})

    # The history: an observation and an action of the past; then the same of the present, where
    # the action is still open, first for views and then for words.
    values = {"i + 1": "{n}", "len(observation_list)": "{n}", "observation": "{observation}",
              "action": "{action}", "observation_list[-1]": "{observation}", "inter": "{inter}"}
    lines = [as_template(node.value, values) for node in in_order(past, ast.AugAssign)]
    expect(len(lines) == 6, "six lines of a history")
    saw, did = lines[0], lines[1]
    still_open = did.replace("{action}", "")
    head, _, tail = saw.partition("{observation}")
    views = lines[2].removeprefix(head).removesuffix(tail)
    views = views.removesuffix(between.replace("{landmark}", "") + "{inter}")
    expect(lines[2] == head + between.replace("{landmark}", views) + "{inter}" + tail
           and lines[3:] == [still_open, saw, still_open]
           and crossing == as_template(first(assigned(past, "inter"), "views").body, {}),
           "one wording of a history's lines")
    return {"nav_between": between, "nav_at_intersection": at_intersection,
            "nav_no_landmark": nothing, "nav_no_landmark_at_intersection": here,
            "nav_views": views, "nav_past": saw + did}


def navigation(trees, vision):
    """The templates of virl-l or virl-vl."""
    prompts = read_prompts(trees["prompts"])
    task, see, history, output = read_format(prompts["Q_VIRL_VL" if vision else "Q_VIRL_L"],
                                             ["instruction", "action_space", "obs_act_seq"])
    choices = []
    for node in in_order(find_function(trees["verdicts"], "set_str_action_space"), ast.If):
        if "absolute_action" in ast.unparse(node.test):
            choices.append(node)
    choice = first(choices, "the list of actions")
    actions = {"absolute": as_template(choice.body[0].value, {}),
               "relative": as_template(choice.orelse[0].value, {})}
    names = {"current_observation": "{observation}", "current_instruction": "{instruction}",
             "action": "{action}"}
    reply = fill_format(prompts["ResponseVIRL"], list(names), names)
    return {"nav_task": task, "nav_instruction": "{instruction}",
            "nav_see_views" if vision else "nav_see_words": see,
            "nav_actions": actions, "nav_history": history + "{obs_act_seq}", "nav_output": output,
            "nav_reply": reply, "nav_retry": read_retries(trees["dialogue"])[1],
            **read_sentences(trees["walk"]), **read_observations(trees["walk"]),
            **navigation_verdicts(trees["verdicts"])}


# ---- All tasks -----------------------------------------------------------------------------------

def read_wording(repo):
    """{task: {name: template}} of a copy of the official repository.

    A ValueError says what is missing in the copy or not as expected.
    """
    trees = read_sources(repo)
    try:
        return {"gp-l": general_points(trees, vision=False),
                "gp-vl": general_points(trees, vision=True),
                "virl-l": navigation(trees, vision=False),
                "virl-vl": navigation(trees, vision=True)}
    except (ValueError, AttributeError, IndexError, TypeError) as fault:
        # A part that is missing can raise any of these.
        raise ValueError(f"--repo {repo}: this copy is not the version 5a6ea55, which can be read; "
                         f"missing or not as expected: {fault}") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", required=True, help="your copy of github.com/LeslieTrue/SFTvsRL")
    parser.add_argument("--out", required=True,
                        help="folder for TASK.json; files of these names are replaced")
    args = parser.parse_args()
    try:
        wording = read_wording(args.repo)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        for task, templates in wording.items():
            path = out / f"{task}.json"
            path.write_text(json.dumps(templates, indent=1) + "\n", encoding="utf-8")
            print(path)
    except (OSError, ValueError) as error:
        print(f"official_prompts.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
