"""What the model is told beside verdicts: our words in the structure of the paper's prompts.

`verify.fill` puts values into the {names}; all other braces stay as they are.

A prompt file may replace each text by its name (data/official_prompts.py writes such files). It
gives one text, or one for each rule: {"absolute": ..., "relative": ...} in V-IRL,
{"10,10,10": ..., "11,12,13": ...} in GeneralPoints.
"""

TEXTS = {
    # GeneralPoints (A.2): the task, the input, the output; a reply; what follows a verdict.
    "gp_task": "Make {target} from four cards. Combine their values with + - * / and parentheses, "
               "and use every card exactly once. An ace counts as 1, J counts as {J}, "
               "Q counts as {Q} and K counts as {K}.",
    "gp_input_text": "\nCards: {cards}",
    "gp_card": "\"{card}\"",
    "gp_input_picture": "\nThe picture shows the four cards.",
    "gp_output": "\nReply with a JSON object:\n"
                 "{\"cards\": [the ranks you see], \"number\": [their values], "
                 "\"formula\": \"an equation ending in ={target}\"}",
    "gp_reply": "{\"cards\": {cards}, \"number\": {numbers}, \"formula\": \"{formula}\"}",
    "gp_retry": "{verdict} Try another formula in the same format.",

    # V-IRL (B.2): the task, the instructions, what an observation is, the actions, the history,
    # the output; a reply; what follows a verdict.
    "nav_task": "Walk to a destination: follow the instructions, one action at a time.",
    "nav_instruction": "\nInstructions:{instruction}",
    "nav_sentence": "\n{sentence}",
    "nav_first_turn": "First turn {rel} to face {dir}.",
    "nav_turn": "Turn {rel} to face {dir}.",
    "nav_move": "Go on to the next intersection.",
    "nav_move_landmark": "Go on to the next intersection, where {landmarks}.",
    "nav_last_move": "Go on until you are there: {landmarks}.",
    "nav_see_words": "\nAn observation names the landmark in sight, "
                     "and the intersection if you are at one.",
    "nav_see_views": "\nThe picture shows what you see now: "
                     "front and right above, back and left below.",
    "nav_actions": "\nActions: forward(), stop() at the destination, "
                   "or turn_direction(x) where x is one of {words}.",
    "nav_word": "{word} for {meaning}",
    "nav_history": "\nSo far:{obs_act_seq}",
    "nav_past": "\n{observation} -> {action}",
    "nav_between": "{landmark}",
    "nav_at_intersection": "{landmark}; intersection",
    "nav_no_landmark": "No landmark",
    "nav_no_landmark_at_intersection": "No landmark",
    "nav_views": "The picture",
    "nav_output": "\nReply with a JSON object:\n{\"current observation\": what you see now, "
                  "\"current instruction\": the sentence you follow now, \"action\": your action}",
    "nav_reply": "{\"current observation\": \"{observation}\", "
                 "\"current instruction\": \"{instruction}\", \"action\": \"{action}\"}",
    "nav_retry": "{verdict} Try another action in the same format.",
}

# Names that a text may use beside those in ours: n counts sentences, or steps of the history.
MORE_VALUES = {"nav_sentence": {"n"}, "nav_past": {"n"}}
