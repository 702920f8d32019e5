"""Write prompt files in the wording of the official code, from your own copy of it, to evaluate what was trained on that.

    git clone https://github.com/LeslieTrue/SFTvsRL
    python data/official_prompts.py --repo SFTvsRL --out official
    python evaluate.py --model PATH --task gp-l --env prompt_file=official/gp-l.json

recipes/official.sh does all of it. The files of the copy are read as text: nothing in them runs. First prompts, verdicts and the
shape of a reply are theirs, under both rules; V-IRL wants turn_words=unwrapped and view_headings=official beside them.
"""
import argparse
import ast
import json
import re
import string
import sys
from pathlib import Path

RULES = {"10,10,10": True, "11,12,13": False}     # of GeneralPoints: whether faces count as 10
SOURCES = {"prompts": "prompt_lib/prompts.py", "verdicts": "utils_rl.py",
           "walk": "gym/gym_virl/envs/navigation_environment.py",
           "arguments": "evaluation/evaluator/base_evaluator.py",
           "dialogue": "evaluation/evaluator/llama_evaluator.py"}


class OtherShape(ValueError):
    """A file does not say what is looked for in the way it is looked for."""


def expect(condition, what):
    if not condition:
        raise OtherShape(what)


def read_sources(repo):
    """{name: syntax tree} of the files of SOURCES."""
    trees = {}
    for name, path in SOURCES.items():
        try:
            trees[name] = ast.parse((Path(repo) / path).read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError, RecursionError) as error:
            raise ValueError(f"--repo {repo}: no copy of github.com/LeslieTrue/SFTvsRL: {path} "
                             f"cannot be read "
                             f"({getattr(error, 'strerror', None) or error})") from None
    return trees


# ---- Expressions as templates ----------------------------------------------------------------------------------

def literal(text):
    """A text that no template would take for a {name}."""
    expect(isinstance(text, str) and not re.search(r"\{\w+\}", text), f"the text {text!r}")
    return text


def as_template(node, values):
    """The template of an expression that joins texts; `values` has what stands for its names, by their source."""
    if isinstance(node, ast.Constant):
        return literal(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(as_template(part, values) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op,
                                                  ast.Add) and ast.unparse(node) not in values:
        return as_template(node.left, values) + as_template(node.right, values)
    node = node.value if isinstance(node,
                                    ast.FormattedValue) and node.conversion == -1 and not node.format_spec else node
    expect(ast.unparse(node) in values, f"the expression {ast.unparse(node)}")
    return values[ast.unparse(node)]


def read_format(text, fields):
    """The texts before, between and behind the fields of a text for str.format, which must be these in this order."""
    texts, found = [""], []
    try:
        for before, field, _, _ in string.Formatter().parse(text):
            # a doubled brace ends a part as well
            texts[-1] += before
            if field is not None:
                found.append(field)
                texts.append("")
    except ValueError as error:
        raise OtherShape(f"a text for format ({error})") from None
    expect(found == fields, f"a text for format with the fields {', '.join(fields)}")
    return [literal(part) for part in texts]


def fill_format(text, fields, values):
    texts = read_format(text, fields)
    return texts[0] + "".join(values[field] + after for field, after in zip(fields, texts[1:]))


def find_function(tree, name):
    found = [node
             for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    expect(found, f"the function {name}")
    return found[0]


def in_order(node, kind):
    """The nodes of a kind within another, in the order of the file."""
    found = [child for child in ast.walk(node) if isinstance(child, kind)]
    return sorted(found, key=lambda child: (child.lineno, child.col_offset))


def arguments_of(function, call, count):
    """The arguments of the calls of `call` in a function, in order; there must be so many calls."""
    found = [node.args for node in in_order(function, ast.Call) if ast.unparse(node.func) == call]
    expect(len(found) == count, f"{count} calls of {call} in {function.name}")
    return found


def assigned(node, name):
    """What is assigned to a name within a node, in order."""
    return [child.value
            for child in in_order(node, ast.Assign) if ast.unparse(child.targets[0]) == name]


def first(found, what):
    expect(found, what)
    return found[0]


# ---- What the four tasks share, and each of them ---------------------------------------------------------------

def read_retries(tree):
    """What stands around a verdict: (GeneralPoints, V-IRL)."""
    texts = [node for node in in_order(find_function(tree, "formulate_prompt"), ast.JoinedStr)]
    expect(len(texts) == 2, "two texts around a verdict in formulate_prompt")
    return [as_template(text, {"info['Verify Info']": "{verdict}"}) for text in texts]


def read_prompts(tree):
    """{name: text} of the texts for str.format."""
    names = "Q_GeneralPoint_EQN_L", "Q_GeneralPoint_EQN_VL", "Q_VIRL_L", "Q_VIRL_VL", "ResponseEqn", "ResponseVIRL"
    values = {name: first(assigned(tree, name), f"the text {name}") for name in names}
    expect(all(isinstance(value, ast.Constant) and isinstance(value.value, str)
               for value in values.values()), "texts")
    return {name: value.value for name, value in values.items()}


def read_verdict_frame(tree):
    """How the violations of a verdict are joined; ours joins them with a comma as well."""
    returned = first(in_order(find_function(tree, "aggregate_fn"), ast.Return),
                     "a result of aggregate_fn")
    return as_template(returned.value, {"', '.join(message_list)": "{violations}"})


def general_points_verdicts(tree):
    step, frame = find_function(tree, "step_rewards"), read_verdict_frame(tree)
    names = ("characters", "number", "operator", "opening", "unmatched", "closing", "", "foreign",
             "repeated", "unused", "", "breaks_off", "no_solution", "end")
    keys = ["ILLEGAL_FORMULA"] * 7 + ["INCORRECT_NUMBER"] * 3 + ["CORRECT_SOLUTION",
                                                                 "PARTIAL_SOLUTION"] + [
                                                                     "NO_SOLUTION"] * 2
    calls = arguments_of(step, "stepper.add", len(names))
    expect([ast.unparse(reward) for reward, _ in calls] == [f"REWARD_FN['{key}']" for key in keys],
           "what stepper.add gets")
    lists = {name: "[{numbers}]"
             for name in ("invalid_numbers", "overused_numbers", "underused_numbers")}
    found = {f"feedback_violation_{name}": as_template(text,
                                                       {**lists, "prev_register": "{beginning}"})
             for name, (_, text) in zip(names, calls) if name}
    found |= {f"feedback_{name}": frame
              for name in ("no_formula", "illegal_formula", "wrong_numbers", "wrong_value")}
    returned = [node.value.elts[1]
                for node in in_order(step, ast.Return) if isinstance(node.value, ast.Tuple)]
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
    told = {rule: as_template(value.body if as_ten else value.orelse, {})
            for rule, as_ten in RULES.items()}
    text = prompts["Q_GeneralPoint_EQN_VL" if vision else "Q_GeneralPoint_EQN_L"]
    task = ["target_number", "face_card_msg", "target_number"]
    fields = [*task, *([] if vision else ["cards"]), *task[1:]]
    worded = {rule: fill_format(text, fields,
                                {"target_number": "{target}", "face_card_msg": said,
                                 "cards": "{cards}"})
              for rule, said in told.items()}
    if vision:
        parts = {"gp_task": worded, "gp_input_picture": "", "gp_output": ""}
    else:
        before, after = ({rule: whole.split("{cards}")[part] for rule, whole in worded.items()}
                         for part in (0, 1))
        parts = {"gp_task": before, "gp_input_text": "{cards}", "gp_output": after}
    reply = fill_format(prompts["ResponseEqn"], ["cards", "numbers", "formula"],
                        {name: f"{{{name}}}" for name in ("cards", "numbers", "formula")})
    return {**parts, "gp_card": "'{card}'", "gp_reply": reply,
            "gp_retry": read_retries(trees["dialogue"])[0],
            **general_points_verdicts(trees["verdicts"])}


def navigation_verdicts(tree):
    step, frame = find_function(tree, "step_rewards_virl"), read_verdict_frame(tree)
    shape = {
        "format_token": as_template(first(assigned(step, "format_token"), "the text format_token"),
                                    {})}
    calls = arguments_of(step, "stepper.add", 4)
    keys = ["CORRECT_ACTION", "INCORRECT_OBS", "INCORRECT_OBS", "INCORRECT_ACTION"]
    expect([ast.unparse(reward) for reward, _ in calls] == [f"REWARD_FN_VIRL['{key}']"
                                                            for key in keys],
           "what stepper.add gets")
    found = {f"feedback_violation_{name}": as_template(text, shape)
             for name, (_, text) in zip(("intersection", "no_intersection", "action"), calls[1:])}
    found |= {f"feedback_{name}": frame for name in ("no_action", "wrong_action")}
    return found | {f"feedback_{name}": "{verdict}"
                    for name in ("missed_landmark", "missed_intersection", "invented_intersection")}


def read_sentences(tree):
    """The sentences of an instruction, and how they are numbered."""
    walk = find_function(tree, "_parse_instruction_and_rail")
    values = {"relative_heading": "{rel}", "next_heading": "{dir}", "landmark": "{landmarks}"}
    beginning = first(assigned(walk, "first_msg"), "the first turn")
    expect(isinstance(beginning, ast.IfExp), "the first turn")
    texts = [text for text, in arguments_of(walk, "parsed_instruction.append", 6)]
    first_turn, turn = (as_template(texts[2], {**values, "first_msg": as_template(begins, {})})
                        for begins in (beginning.body, beginning.orelse))
    expect(turn == as_template(texts[0], values) and ast.unparse(texts[2]) == ast.unparse(texts[4]),
           "one wording of a turn")
    numbered = first([node.value
                      for node in in_order(walk, ast.AugAssign)
                      if ast.unparse(node.target) == "str_instruction"],
                     "numbered instructions")
    return {"nav_first_turn": first_turn, "nav_turn": turn,
            "nav_last_move": as_template(texts[1], values),
            "nav_move": as_template(texts[3], {}),
            "nav_move_landmark": as_template(texts[5], values),
            "nav_sentence": as_template(numbered, {"idx + 1": "{n}", "instr": "{sentence}"})}


def values_of(node, key):
    """The values under a key in all dicts that are written within a node, in order."""
    return [value for child in in_order(node, ast.Dict)
            for name, value in zip(child.keys, child.values)
            if isinstance(name, ast.Constant) and name.value == key]


def read_observations(tree):
    """What is seen, and the history of it."""
    walk, past = find_function(tree, "_parse_instruction_and_rail"), find_function(tree,
                                                                                   "get_observation_action_sequence")
    crossing = first([value.body
                      for value in values_of(walk, "intersection_observation")
                      if isinstance(value, ast.IfExp)],
                     "an intersection")
    crossing = as_template(crossing, {})
    seen = first(values_of(find_function(tree, "_get_observation_rail"), "oracle_observation"),
                 "an observation")
    between, at_intersection = (as_template(seen,
                                            {"landmark_obs": "{landmark}",
                                             "intersection_obs": text})
                                for text in ("", crossing))
    nothing = as_template(arguments_of(walk, "landmark_list.insert", 1)[0][1], {})
    expect({as_template(value, {})
            for value in values_of(walk, "observation")
            if isinstance(value, ast.Constant)} == {nothing},
           "one wording of no landmark between intersections")
    here = as_template(first([args[1] for args in (node.args for node in in_order(walk, ast.Call)
                              if ast.unparse(node.func) == "intersection_dict.get")
                              if ast.unparse(args[0]) == "'landmarks'"],
                             "no landmark at an intersection"), {})
    values = {"i + 1": "{n}", "len(observation_list)": "{n}", "observation": "{observation}",
              "action": "{action}", "observation_list[-1]": "{observation}", "inter": "{inter}"}
    lines = [as_template(node.value, values) for node in in_order(past, ast.AugAssign)]
    expect(len(lines) == 6, "six lines of a history")
    whole, last = lines[0] + lines[1], lines[1].replace("{action}", "")
    head, _, tail = lines[0].partition("{observation}")
    views = lines[2].removeprefix(head).removesuffix(tail).removesuffix(
        between.replace("{landmark}", "") + "{inter}")
    expect(lines[2] == head + between.replace("{landmark}", views) + "{inter}" + tail
           and lines[3:] == [last, lines[0], last]
           and crossing == as_template(first(assigned(past, "inter"), "views").body, {}),
           "one wording of a history's lines")
    return {"nav_between": between, "nav_at_intersection": at_intersection,
            "nav_no_landmark": nothing, "nav_no_landmark_at_intersection": here, "nav_views": views,
            "nav_past": whole}


def navigation(trees, vision):
    """The templates of virl-l or virl-vl."""
    prompts = read_prompts(trees["prompts"])
    fields = ["instruction", "action_space", "obs_act_seq"]
    task, see, history, output = read_format(prompts["Q_VIRL_VL" if vision else "Q_VIRL_L"], fields)
    choices = [node
               for node in in_order(find_function(trees["verdicts"], "set_str_action_space"),
                                    ast.If)
               if "absolute_action" in ast.unparse(node.test)]
    choice = first(choices, "the list of actions")
    actions = {rule: as_template(branch[0].value, {})
               for rule, branch in (("absolute", choice.body), ("relative", choice.orelse))}
    names = {"current_observation": "{observation}", "current_instruction": "{instruction}",
             "action": "{action}"}
    reply = fill_format(prompts["ResponseVIRL"], list(names), names)
    return {"nav_task": task, "nav_instruction": "{instruction}",
            "nav_see_views" if vision else "nav_see_words": see,
            "nav_actions": actions, "nav_history": history + "{obs_act_seq}", "nav_output": output,
            "nav_reply": reply, "nav_retry": read_retries(trees["dialogue"])[1],
            **read_sentences(trees["walk"]), **read_observations(trees["walk"]),
            **navigation_verdicts(trees["verdicts"])}


def read_wording(repo):
    """{task: {name: template}} of a copy of the official repository; ValueError says what is not as expected."""
    trees = read_sources(repo)
    try:
        return {"gp-l": general_points(trees, vision=False),
                "gp-vl": general_points(trees, vision=True),
                "virl-l": navigation(trees, vision=False),
                "virl-vl": navigation(trees, vision=True)}
    # a part that is missing can raise any of them
    except (ValueError, AttributeError, IndexError, TypeError) as fault:
        raise ValueError(f"--repo {repo}: this copy is of another version than 5a6ea55, which can "
                         f"be read: it has not, or not as expected, {fault}") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", required=True, help="your copy of github.com/LeslieTrue/SFTvsRL")
    parser.add_argument("--out", required=True,
                        help="folder for TASK.json; files of these names are replaced")
    args = parser.parse_args()
    try:
        wording, out = read_wording(args.repo), Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        for task, templates in wording.items():
            (out / f"{task}.json").write_text(json.dumps(templates, indent=1) + "\n",
                                              encoding="utf-8")
            print(out / f"{task}.json")
    except (OSError, ValueError) as error:
        print(f"official_prompts.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
