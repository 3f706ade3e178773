# SPDX-License-Identifier: MIT
"""The grader against the benchmarks' own rules and verdicts, arithmetic that can be checked by hand, and hostile text."""

import cmath
import json
import math
import operator
import os
import random
import string
import time
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings, strategies as st

EXAMPLES = int(os.environ.get("EXAMPLES", 300))  # of each property; more than by default are drawn at random
PARITY = Path(__file__).parents[2] / "shared/parity"
COLOURS = ["red", "blue", "green", "blue"]


def question(answer_type, answer, choices=(), precision=None, **more):
    return {
        "answer": answer,
        "answer_type": answer_type,
        "choices": list(choices),
        "unit": None,
        "precision": precision,
    } | more


def boxed(prepare, answer, *about, **more):
    return prepare.grade(f"<think>Let me see.</think>\\boxed{{{answer}}}", question(*about, **more)).correct


# where the answer stands


@pytest.mark.parametrize(
    "response",
    [
        "<think>I count them.</think>\\boxed{7}",
        "<think>I count them: 9.</think>\n\nThe answer is $\\boxed{7}$.",
        "<think>\\boxed{9}?</think> \\boxed{7}",
        "\\boxed{ 7 }",
    ],
)
def test_the_box_is_read_by_reward_and_score(prepare, response):
    assert prepare.grade(response, question("integer", "7")).correct
    assert prepare.grade(response, question("integer", "7", source="mathvista")).correct
    assert prepare.grade(response, question("integer", "7", source="mathvista"), reward=True).correct


@pytest.mark.parametrize("response", [
    "<think>9</think><answer> 7 </answer>", "<answer>7</answer>", "<think>9</think>The answer is 7.", "There are 7 of them.", "7"])
def test_free_text_counts_where_the_benchmark_has_a_rule_and_never_in_training(prepare, response):
    assert prepare.grade(response, question("integer", "7", source="mathvista")).correct
    for about in (question("integer", "7"), question("integer", "7", source="mine"), question("integer", "7", source="shapes")):
        assert not prepare.grade(response, about).correct
    assert not prepare.grade(response, question("integer", "7", source="mathvista"), reward=True).correct


def test_training_reads_one_box_and_a_score_reads_all_as_one_answer(prepare):
    two = "<think>9</think>\\boxed{2} and \\boxed{7}"
    about = question("math", "2, 7")
    assert prepare.grade(two, about).correct and not prepare.grade(two, about, reward=True).correct
    assert not prepare.grade("<think>9</think>\\boxed{7} \\boxed{7}", question("math", "7"), reward=True).correct
    assert prepare.grade("<think>9</think>\\boxed{2, 7}", about, reward=True).correct


def test_each_benchmark_has_one_rule_for_its_own_types(prepare):
    assert set(prepare.BENCHMARKS) == {"mathvista", "mmmu", "scienceqa", "mathvision", "mathverse", "wemath"}
    for source, rules in prepare.BENCHMARKS.items():
        assert prepare.grade("The answer is (B).", question("choice", "B", ["12", "14"], source=source)).correct
        assert prepare.grade("So the answer is 4.", question("math", "4", source=source)).correct is ("math" in rules)


@pytest.mark.parametrize("answer_type", ["integer", "float", "math", "text", "open", "choice", "list"])
@pytest.mark.parametrize(
    "response",
    [
        "",
        " \n",
        "<think></think>",
        "<think>GOLD</think>",
        "<think>\\boxed{GOLD}</think>",
        "<think>\\boxed{GOLD}",
        "<think>The answer is GOLD. <answer>GOLD</answer>",
        "< think >\\boxed{GOLD}</ think >",
        "</think>\\boxed{}",
        "</think>\\boxed{ }",
        "</think><answer></answer>",
        "</think>\\boxed{GOLD} \\boxed{WRONG}",
        "</think>\\boxed{WRONG} \\boxed{GOLD}",
        "</think><answer>GOLD</answer><answer>WRONG</answer>",
        "</think>\\boxed{GOLD or WRONG}",
        "</think>\\boxed{WRONG, GOLD}",
        "</think>\\boxed{WRONG/GOLD}",
        "</think>\\boxed{GOLD",
        "</think>\\boxed{WRONG} <answer>GOLD</answer>",
        "\\boxed{WRONG}<think>GOLD</think>",
    ],
)
def test_no_credit_for_nothing_for_reasoning_alone_or_for_two_answers(prepare, answer_type, response):
    gold, wrong = {
        "integer": ("7", "9"),
        "float": ("7.25", "9.25"),
        "math": ("\\frac { 20 } { 3 }", "\\sqrt { 3 }"),
        "text": ("yes", "no"),
        "open": ("parabola", "circle"),
        "choice": ("B", "A"),
        "list": ("[1, 2]", "[2, 1]"),
    }[answer_type]
    about = question(answer_type, gold, COLOURS if answer_type == "choice" else (), 2 if answer_type == "float" else None)
    assert prepare.grade(f"</think>\\boxed{{{gold}}}", about).correct  # the same without the trick
    assert not prepare.grade(response.replace("GOLD", gold).replace("WRONG", wrong), about).correct


def test_a_boxed_answer_goes_before_a_tagged_one_and_both_before_prose(prepare):
    about = question("integer", "7", source="mathvista")
    assert prepare.grade("</think><answer>9</answer> \\boxed{7} and not 9", about).correct
    assert prepare.grade("</think><answer>7</answer> and not 9", about).correct


@pytest.mark.parametrize(
    "response, well_formed",
    [
        ("<think>a</think>\\boxed{7}", True),
        ("<think>a</think> The answer is $\\boxed{\\frac{1}{2}}$.\n", True),
        ("  <think>\na\n</think>\n\n\\[ \\boxed{7} \\]", True),
        ("< think >a</ think >\\boxed{7}", True),
        ("<think>\\boxed{1}</think>\\boxed{7}", True),
        ("\\boxed{7}", False),
        ("<think>a\\boxed{7}", False),
        ("<think>a</think>", False),
        ("<think>a</think>7", False),
        ("<think>a</think>\\boxed{7", False),
        ("<think>a</think>\\boxed{}", False),
        ("<think>a</think>\\boxed{7}\\boxed{7}", False),
        ("<think>a</think>\\boxed{7} because I say so", False),
        ("So: <think>a</think>\\boxed{7}", False),
        ("<think>a</think><think>b</think>\\boxed{7}", False),
        ("</think><think>\\boxed{7}", False),
        ("<think>a</think><answer>7</answer>", False),
    ],
)
def test_well_formed(prepare, response, well_formed):
    assert prepare.grade(response, question("integer", "7")).well_formed is well_formed
    assert prepare.grade(response, question("text", "blue")).well_formed is well_formed  # form does not look at the answer


@pytest.mark.parametrize(
    "response, well_formed",
    [
        ("I count.</think>\\boxed{7}", True),
        ("\n</think>\\boxed{7}.", True),
        ("<think>I count.</think>\\boxed{7}", False),
        ("I count. \\boxed{7}", False),
        ("\\boxed{7}", False),
        ("a</think>b</think>\\boxed{7}", False),
    ],
)
def test_where_the_prompt_opened_the_reasoning_the_response_need_not(prepare, response, well_formed):
    verdict = prepare.grade(response, question("integer", "7"), think_opened=True)
    assert (verdict.well_formed, verdict.correct) == (well_formed, "</think>" in response)  # reasoning that never ends answers nothing
    assert not prepare.grade("I count.</think>\\boxed{7}", question("integer", "7")).well_formed


def test_whether_a_template_opens_the_reasoning(prepare):
    class Tokenizer:
        def __init__(self, end):
            self.end = end

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n" + self.end

    assert prepare.opens_think(Tokenizer("<think>\n")) and not prepare.opens_think(Tokenizer(""))
    assert not prepare.opens_think(Tokenizer("<think>\n\n</think>\n\n"))


# maths: both graders of the reference kits, or plain arithmetic, give these verdicts


@pytest.mark.parametrize(
    "gold, answers",
    {
        "97": ["97.0", "\\approx 97", "x \\approx 97", "194\\div2", "97°", "97^\\circ", "97 ^ { \\circ }", "97 degrees", "x = 97", "\\angle A = 97^\\circ", "\\text{97}", "97."],
        "2256": ["2,256", "2,\\!256", "\\$2256", "2256.00", "2.256e3", "2.256 \\times 10^3"],
        "0.96": ["24/25", "\\frac{24}{25}", ".96", "\\dfrac{48}{50}"],
        "8.5": ["17/2", "8.5 \\text{ in}", "8.5 cm", "8 1/2", "8\\frac{1}{2}", "8.5\\,\\mathrm{m}^2", "8.5 \\mathrm{~cm}^{2}", "8.5~\\text{cm}", "8.5 square feet"],
        "10 \\sqrt { 3 }": ["10√3", "10√{3}", "10\\sqrt{3}", "10\\cdot\\sqrt 3", "10*sqrt(3)", "\\sqrt{300}", "10 \\sqrt{3} cm"],
        "\\frac { 20 } { 3 }": ["20/3", "\\frac{20}{3}", "\\tfrac{20}3", "6 2/3", "6\\frac{2}{3}", "6.6666667", "\\frac{40}{6}"],
        "\\frac { 5 } { 3 } \\pi": ["5\\pi/3", "\\frac{5\\pi}{3}", "5π/3", "\\frac53\\pi", "(5/3)*pi"],
        "28\\%": ["28", "28 percent", "28%", "28 pct"],
        "-4": ["−4", "- 4", "x = -4", "-\\frac{8}{2}"],
        "2-2p": ["2(1-p)", "-2p + 2", "2 - 2 p"],
        "x^2+1": ["1+x^{2}", "x**2 + 1", "x*x+1"],
        "1 - \\frac{1}{\\mathrm{e}}": ["1-1/e", "1-e^{-1}"],
        "(1, 2)": ["(1,2)", "\\left(1, 2\\right)", "(1.0, 4/2)"],
        "1, -2": ["-2, 1", "-2 and 1"],
        "3:1": ["3:1", "3 : 1"],
        "\\text{Evelyn}": ["Evelyn", "\\text{evelyn}"],
    }.items(),
)
def test_equal_maths(prepare, gold, answers):
    for answer in [gold, f"${gold}$", *answers]:
        assert boxed(prepare, answer, "math", gold), answer


@pytest.mark.parametrize(
    "gold, answers",
    {
        "97": ["96", "98", "9.7", "-97", "97x", "97, 98", "97 or 98", "97/2", "97\\pi", "97^2", "9 7", "0.97", "197", "x"],
        "45": ["4 5", "4, 5", "9 5"],
        "20": ["4 5", "4 \\cdot 6"],
        "10 \\sqrt { 3 }": ["17.32", "17.3205", "10", "3", "10 \\cdot 3", "\\sqrt{3}", "10 + \\sqrt{3}"],
        "9.45": ["9.4", "9.5", "9.451"],
        "\\frac { 20 } { 3 }": ["6.67", "6.7", "20", "3", "3/20", "62/3"],
        "(1, 2)": ["(2, 1)", "(1, 2, 3)", "1", "(1, 3)"],
        "1, -2": ["1", "-2", "1, 2", "1, -2, 3"],
        "\\sqrt { 19 }": ["1", "19", "4.36"],
        "7": ["9**9**9", "9^{9^{9^{9}}}", "1/0", "\\frac{7}{0}", "7e99", "10^{400}", "((((7", "sin", "\\sqrt", "7 7"],
        "\\text{Evelyn}": ["Carla", "Eve", "{}"],
        "2x": ["x^2", "2", "x", "2y"],
        "3:1": ["1:3", "3, 1", "1, 3", "3"],
    }.items(),
)
def test_unequal_maths(prepare, gold, answers):
    for answer in answers:
        assert not boxed(prepare, answer, "math", gold), answer


@pytest.mark.parametrize(
    "answer_type, gold, precision, right, wrong",
    [
        ("integer", "5", None, ["5", "5.0", "5 apples", "about 5", "10/2", "+5"], ["5.7", "4.999", "five", "55", "5 of 6", "-5"]),
        ("integer", "-1", None, ["-1", "−1", "-1.0"], ["1", "0", "-2"]),
        ("float", "1.4", 1, ["1.4", "1.40", "1.44", "1.36", "7/5"], ["1.5", "1.46", "1.34", "14"]),
        ("float", "9.45", 2, ["9.45", "9.450", "9.452"], ["9.4", "9.44", "9.5"]),
        ("float", "0.5", None, ["0.5", ".5", "1/2"], ["0.51", "5"]),
        ("list", "[1, 2]", None, ["[1, 2]", "[1,2]", "[1.0, 2.0]", "1, 2"], ["[2, 1]", "2, 1", "[1]", "[1, 2, 3]", "1"]),
        ("text", "yes", None, ["yes", "Yes", " YES. ", "\\text{yes}"], ["no", "yes or no", "yes, no", "yes no", "yesterday", "not yes"]),
        ("text", "red circle", None, ["Red  circle", "\\text{red circle}"], ["red", "circle", "red circle blue circle"]),
    ],
)
def test_each_type_has_its_rule(prepare, answer_type, gold, precision, right, wrong):
    for answer in right:
        assert boxed(prepare, answer, answer_type, gold, precision=precision), answer
    for answer in wrong:
        assert not boxed(prepare, answer, answer_type, gold, precision=precision), answer


@pytest.mark.parametrize("gold", ["['24/7', '3.429']", '["24/7", "3.429"]', ["24/7", "3.429"]])
def test_an_open_question_may_have_alternatives(prepare, gold):
    about = question("open", gold)
    assert prepare.gold_texts(about) == ["24/7", "3.429"]
    for answer in ("3.43", "24/7", "3.429 Hz", "The answer is 3.43"):
        assert prepare.grade(f"\\boxed{{{answer}}}", about).correct, answer
    for answer in ("3.44", "24", "7"):
        assert not prepare.grade(f"\\boxed{{{answer}}}", about).correct, answer


def test_an_open_phrase_may_hold_the_gold_but_not_list_things(prepare):
    for answer, right in {
        "a parabola": True,
        "parabola": True,
        "a parabola, a circle or a line": False,
        "not a parabola": False,
        "parabolas": False,
        "par": False,
    }.items():
        assert boxed(prepare, answer, "open", "parabola") is right, answer


# choices


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"), ("(B)", "B"), ("b", "B"), ("B.", "B"), ("B) blue", "B"), ("B. blue", "B"), ("B: blue", "B"), ("\\text{B}", "B"),
        ("\\textbf{(B)}", "B"), ("option B", "B"), ("Answer: B", "B"), ("blue", "B"), ("Blue.", "B"), ("the blue one", "B"), ("D", "D"),
        ("A", "A"), ("C. green", "C"), ("A or B", None), ("A, B", None), ("AB", None), ("B. red", None), ("red blue", None), ("E", None),
        ("(A) red (B) blue (C) green (D) blue", None), ("purple", None), ("", None), ("bluefish", None),
    ],
)  # fmt: skip
def test_a_boxed_choice_is_a_letter_or_a_text(prepare, answer, letter):
    verdict = prepare.grade(f"<think>?</think>\\boxed{{{answer}}}", question("choice", "B", COLOURS))
    assert (verdict.answer, verdict.correct) == (letter, letter in ("B", "D"))  # B and D say the same


def test_choices_that_differ_in_case_or_marks_are_different(prepare):
    for texts in (["Alice in Space", "alice in Space"], ["***Life***", '"Life"'], ["I and II", "I AND II"]):
        for letter in "AB":
            assert boxed(prepare, letter, "choice", letter, texts) and not boxed(prepare, "BA"["AB".index(letter)], "choice", letter, texts)
            assert boxed(prepare, texts["AB".index(letter)], "choice", letter, texts)


def test_choices_that_talk_of_letters_or_numbers(prepare):
    letters = ["C to B.", "A to D.", "A", "B"]
    for i, letter in enumerate("ABCD"):
        assert boxed(prepare, letter, "choice", letter, letters) and boxed(prepare, f"{letter}. {letters[i]}", "choice", letter, letters)
    values = ["\\frac{6}{5}", "\\frac{7}{6}", "\\frac{9}{5}", "10m"]
    assert boxed(prepare, "9/5", "choice", "C", values) and boxed(prepare, "1.8", "choice", "C", values)
    assert not boxed(prepare, "9/6", "choice", "C", values) and boxed(prepare, "10 m", "choice", "D", values)


@pytest.mark.parametrize(
    "response, letter",
    [
        ("The answer is B.", "B"),
        ("It is red or green. So the answer is (C) green", "C"),
        ("Both (A) and (B) look good, but the best is (C).", "C"),
        ("I exclude A and D. Answer: B", "B"),
        ("The answer is B. Some say C, they are wrong.", "B"),
        ("The answer is blue.", "B"),
        ("Among all of these the right colour is green", "C"),
        ("The answer is A or C.", None),
        ("(A) (B) (C) (D)", None),
        ("A B C D", None),
        ("It has a colour I like.", None),
    ],
)
def test_a_choice_in_free_text(prepare, response, letter):
    assert prepare.grade(f"<think>D</think>{response}", question("choice", "B", COLOURS, source="mmmu")).answer == letter


@pytest.mark.parametrize("choices, answer, letter", [
    (["5", "-3", "2"], "-5", None), (["5", "3"], r"5\pi", None), (["5", "5√3"], r"5\sqrt{3}", "B"), (["1", "1/2"], r"\frac{1}{2}", "B"),
    (["7", "10", "12"], "7+5", "C"), (["1", "1/2"], r"B. \frac{1}{2}", "B"), (["5", r"5\sqrt{3}"], "B. 5√3", "B")])
def test_a_boxed_value_is_compared_as_a_value(prepare, choices, answer, letter):
    assert prepare.grade(f"\\boxed{{{answer}}}", question("choice", "A", choices)).answer == letter


@pytest.mark.parametrize("response", ["(A) or (B)", "B, A", "The answer is A. The answer is B.", "The answer is A or B."])
def test_two_choices_in_free_text_are_none(prepare, response):
    assert prepare.grade(response, question("choice", "B", ["yes", "no"], source="mmmu")).answer is None
    assert prepare.grade("5 or 7", question("integer", "7")).answer is None


def test_the_nearest_choice_counts_for_mathvista_alone(prepare):
    choices = ["12.75", "18.75", "25.5"]
    for source, right in {"mathvista": True, None: False, "mmmu": False, "shapes": False}.items():
        assert prepare.grade("2.75", question("choice", "A", choices, source=source)).correct is right
    assert not boxed(prepare, "2.75", "choice", "A", choices, source="mathvista")  # never in the box


def test_a_conclusion_is_nearer_than_the_sentence_around_it(prepare):
    """MathVista's rule takes the nearest choice to the answer alone: of "Therefore, the length is 18.5 metres", to that length."""
    about = question("choice", "B", ["the longest of all lengths", "18 metres", "25 metres"], source="mathvista")
    assert prepare.grade("I see a bar. Therefore, the longest length here is 18.5 metres.", about).correct


@pytest.mark.parametrize("response, answer", [
    ("There are two bags with at least 60 buttons.", "2"), ("Three of them are larger than 4.", "3"), ("It has 5 legs, one of two.", "5"),
    ("More than 7.", None), ("One of them.", None)])
def test_number_words_count_and_bounds_do_not(prepare, response, answer):
    assert prepare.grade(response, question("integer", "1", source="mathvista")).answer == answer
    assert prepare.grade("There are two.", question("integer", "2", source="shapes")).answer is None


# golds


@pytest.mark.parametrize(
    "about",
    [
        ("choice", "E", COLOURS), ("choice", "", COLOURS), ("choice", "blue", COLOURS), ("choice", "A", []), ("choice", "AB", COLOURS),
        ("integer", ""), ("math", " "), ("text", ""), ("open", "[]"), ("open", ["", "a"]),
    ],
)  # fmt: skip
def test_a_gold_that_cannot_be_graded_is_refused(prepare, about):
    with pytest.raises(ValueError, match="answer"):
        prepare.check_gold(question(*about))


@pytest.mark.parametrize("about", [
    ("integer", "several"), ("float", "1.2.3"), ("list", "[1, two]"), ("math", "the longer one")])
def test_a_gold_that_is_no_maths_is_compared_as_text(prepare, about):
    prepare.check_gold(question(*about))
    assert not prepare.reads_as_maths(question(*about))
    assert boxed(prepare, about[1].upper() if about[0] == "integer" else about[1], *about) and not boxed(prepare, "2", *about)


def test_an_answer_is_kept_as_it_was_written(prepare):
    assert prepare.grade("<think>?</think>\\boxed{x < 3}", question("math", "x<2")).answer == "x < 3"


def test_which_golds_read_as_maths(prepare):
    for about in (("math", "12 cm"), ("math", "x<2"), ("float", "2.5"), ("list", "[1, 2]"), ("text", "red"), ("math", "\\boxed{3} \\boxed{5}")):
        assert prepare.reads_as_maths(question(*about)), about


def test_a_product_of_letters_is_a_gold(prepare):
    for gold in ("xyz", "2abc", "\\frac{xyz}{2}"):
        prepare.check_gold(question("math", gold))
        assert boxed(prepare, gold, "math", gold) and not boxed(prepare, "2", "math", gold)
    assert boxed(prepare, "z x y", "math", "xyz") and boxed(prepare, "2 hours", "math", "2")


def test_all_boxes_of_a_gold_are_its_answer(prepare):
    gold = "\\boxed{2} or \\boxed{-7}"
    for answer, right in {"2, -7": True, "-7 and 2": True, "2": False, "-7": False}.items():
        assert boxed(prepare, answer, "math", gold) is right, answer


# what answers are, kind by kind, each with its neighbours: (answer type, gold, right, wrong, choices)

KINDS = [
    ("math", "y=2x+1",
     ["y=1+2x", "2x-y+1=0", "y-1=2x", "-2x+y=1", "y = 2x + 1.0", "4x-2y=-2"],
     ["2x+1", "y=2x", "x=2y+1", "y=2x-1", "1", "y<2x+1", "2x+1=0"]),
    ("math", "x^2=4",
     ["2x^2=8", "x^2-4=0"],
     ["x=2", "4", "x^2", "x=4"]),
    ("math", "(x-1)^2+(y+2)^2=9",
     ["(y+2)^2+(x-1)^2=9"],
     ["(x-1)^2+(y-2)^2=9", "9", "3"]),
    ("math", "xy=6",
     ["yx=6", "6=xy", "2xy=12"],
     ["6", "x+y=6"]),
    ("math", "k=1",
     ["1", "k = 1", "1=k"],
     ["k=2", "m=1", "-1"]),
    ("math", "a=2, b=3",
     ["a=2, b=3", "b=3, a=2", "a=2 and b=3"],
     ["a=3, b=2", "b=2, a=3", "3, 2", "2"]),
    ("math", r"A=\pi r^2",
     [r"A = \pi r^{2}", "A=πr^2"],
     [r"B=\pi r^2", r"A = 2\pi r"]),
    ("math", "m+n",
     ["n+m"],
     ["2n", "m-n", "mn"]),
    ("math", "ad-bc",
     ["-bc+ad", "ad - cb"],
     ["ab-cd", "0"]),
    ("math", "x_1+x_2",
     ["x_2+x_1", "x_{1}+x_{2}"],
     ["2x_1", "x_1x_2", "x+x"]),
    ("math", r"\alpha+\beta",
     ["β+α", r"\beta + \alpha"],
     [r"2\alpha", r"\alpha\beta", "a+b"]),
    ("math", r"90^\circ-\alpha",
     [r"90-\alpha", "90°-α", r"90^{\circ} - \alpha"],
     ["90", r"180-\alpha", "90-a"]),
    ("math", "(3,-1)",
     ["(3, -1)", r"\left( 3,-1 \right)", "(3.0,-1)", "(6/2, -1)", "3,-1"],
     ["(-1,3)", "[3,-1]", "3", "(3,1)", "-1,3", "(3,-1,0)", "[3,-1)"]),
    ("math", "(1,000,2)",
     ["(1,0,2)"],
     ["(1000,2)"]),
    ("math", "(0,1]",
     ["(0,1]", "(0, 1.0]", r"0<x\le 1", r"x \in (0,1]"],
     ["[0,1]", "(0,1)", "[0,1)", r"0\le x<1"]),
    ("math", r"[2, \infty)",
     [r"x\geq 2", r"[2,+\infty)", r"2 \le x", "[2,∞)"],
     [r"(2,\infty)", "x>2", r"[2,\infty]", r"x\le 2", "2"]),
    ("math", "-1<x<3",
     ["(-1,3)", "3>x>-1", "-1 < x < 3", r"x\in(-1,3)"],
     ["[-1,3]", r"-1\le x<3", "-1<x", "-1<y<3", "-1,3"]),
    ("math", r"(-\infty,0)\cup(2,\infty)",
     [r"x<0 \text{ or } x>2", "x<0 or x>2", r"(2,\infty)\cup(-\infty,0)", "(-∞,0)∪(2,∞)"],
     ["(0,2)", "x<0", r"(-\infty,0]\cup(2,\infty)", r"(-\infty,2)\cup(0,\infty)"]),
    ("math", r"x \neq 2",
     [r"x\ne 2", "x ≠ 2"],
     ["2", "x=2", "x>2"]),
    ("math", "x<2y",
     ["2y>x", "x-2y<0"],
     ["x>2y", "x<y", "2y", r"x\le 2y"]),
    ("math", "2,3",
     ["3,2", "3 and 2", "2 or 3", "x=2 or x=3", "x=2, x=3", r"\{2,3\}", "2; 3", "x = 2, 3"],
     ["2", "5", "6", "2,3,4", "(2,3)", "2,2", "2.3", "x=2,y=3", "23"]),
    ("math", r"\pm\sqrt{2}",
     [r"\sqrt2, -\sqrt2", r"-\sqrt{2}, \sqrt{2}", r"\pm \sqrt 2", "±√2"],
     [r"\sqrt{2}", "2", r"\pm 2"]),
    ("math", r"1\pm i",
     ["1+i, 1-i", "1 - i, 1 + i"],
     ["1", "1+i"]),
    ("math", r"\frac{-1\pm\sqrt5}{2}",
     [r"\frac{-1+\sqrt5}{2}, \frac{-1-\sqrt5}{2}"],
     [r"\frac{1\pm\sqrt5}{2}"]),
    ("math", "1234567",
     ["1,234,567", "1{,}234{,}567", r"1\,234\,567", "1 234 567", "1\u2009234\u2009567",
      "1\u202f234\u202f567", "1\u00a0234\u00a0567", "1.234567e6"],
     ["1,234", "1.234567", "1,234,56", "1,234,568"]),
    ("math", "2500",
     ["2{,}500", "2,500", r"\$2,500", r"2\;500"],
     ["2,5", "2,50", "2.500", "25,00"]),
    ("math", r"\frac{2}{5}",
     [r"\cfrac{2}{5}", r"\tfrac25", "0.4", "2/5", r"\dfrac 2 5", r"\frac 25"],
     [r"\frac52", "2.5", "0.45"]),
    ("math", "8",
     [r"8\textnormal{ miles}", r"8\text{ miles}", r"8 \mbox{ cm}", r"8\textrm{ cm}",
      r"\mathbf{8}", r"\textbf{8}"],
     [r"8\text{ thousand}", "8x", r"8\text{ or }9", r"\frac18"]),
    ("math", r"\sec x",
     [r"1/\cos x", r"\frac{1}{\cos x}"],
     [r"\cos x", "x", r"\csc x"]),
    ("math", r"\log_3 7",
     [r"\frac{\ln 7}{\ln 3}", r"\log_{3} 7", r"\log_3(7)"],
     [r"\log_7 3", r"\log 7", "7/3"]),
    ("math", r"\arcsin\frac13",
     [r"\sin^{-1}\frac{1}{3}", r"\arcsin(1/3)"],
     ["1/3", r"\sin\frac13", r"\arccos\frac13"]),
    ("math", r"\cos^2 x",
     [r"(\cos x)^2", r"1-\sin^2 x", r"\cos^{2}x"],
     [r"\cos x^2", r"\cos 2x", r"\cos x"]),
    ("math", r"\sin 2x",
     [r"2\sin x\cos x", r"\sin(2x)"],
     [r"2\sin x", r"\sin^2 x"]),
    ("math", "|x-1|",
     ["|1-x|", r"\left|x-1\right|", r"\lvert x-1\rvert"],
     ["x-1", "1-x", "|x|-1"]),
    ("math", r"\sqrt[3]{2}",
     ["2^{1/3}", r"2^{\frac{1}{3}}"],
     [r"\sqrt2", r"3\sqrt2", r"\sqrt{2}/3"]),
    ("math", r"\frac12",
     [r"\sin 30^\circ", r"\cos 60°", "0.5", r"\sin(30^\circ)"],
     [r"\sin 30", r"50\%"]),
    ("math", r"\begin{pmatrix}1\\2\end{pmatrix}",
     [r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", r"\begin{pmatrix}1.0\\2\end{pmatrix}"],
     [r"\begin{pmatrix}2\\1\end{pmatrix}", "3", r"\begin{pmatrix}1&2\end{pmatrix}", "1", "(1,2)"]),
    ("math", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
     [r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"],
     [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", "-2", "1,2,3,4",
      r"\begin{pmatrix}1&2&3&4\end{pmatrix}"]),
    ("math", "17.32",
     [r"10\sqrt3 \approx 17.32", "17.32", r"x \approx 17.32"],
     [r"10\sqrt3", "17", r"17.3 \approx 17.32", r"17.4 \approx 17.32"]),
    ("math", r"10\sqrt3",
     [r"10\sqrt3\approx 17.32", r"10\sqrt{3} \approx 17.3", "10√3 = 17.32"],
     ["17.32", r"\approx 17.32", r"10\sqrt3 \approx 18", r"10\sqrt3+1"]),
    ("math", "6V",
     ["6V"],
     ["6", "V"]),
    ("math", "3mg",
     ["3 m g", "3gm"],
     ["3", "3 mg x"]),
    ("math", "5",
     [r"5\text{ m}", "5 V", "5 kg", "5 apples", r"5\,\mathrm{cm}"],
     ["5V", "5h", "5mg", "5x", "5/m", "5^2", "5 million", "5 thousand", "5 dozen"]),
    ("math", r"12\text{ cm}",
     ["12", "12 cm", r"12\text{cm}", "12 centimeters"],
     ["12 m", r"12\text{ mm}", r"12\text{ km}"]),
    ("math", r"60^\circ",
     ["60", "60°", "60 degrees"],
     [r"60\pi", "30"]),
    ("integer", "7",
     ["7", "7.0", "x=7", "about 7", "7 cm", "= 7", "14/2", "the answer is 7", "+7"],
     ["<7", r"\le 7", "≥7", r"\geq 7", "at most 7", "no more than 7", "more than 7", "over 7",
      "not 7", "isn't 7", "7!", "-7", r"\pm7", "7?8", "7 or 8", "7-8", "7, 8", "less than 7",
      "between 7 and 8", "approximately -7", "Type 7 collagen", "Boeing 7", "7:1", "1/7",
      "f(7)", "70", "seventh", "7 of 8", "x7", "7%7"]),
    ("float", "7",
     ["7", "7.0", "x=7", "about 7", "7 cm", "= 7", "14/2", "the answer is 7", "+7"],
     ["<7", r"\le 7", "≥7", r"\geq 7", "at most 7", "no more than 7", "more than 7", "over 7",
      "not 7", "isn't 7", "7!", "-7", r"\pm7", "7?8", "7 or 8", "7-8", "7, 8", "less than 7",
      "between 7 and 8", "approximately -7", "Type 7 collagen", "Boeing 7", "7:1", "1/7",
      "f(7)", "70", "seventh", "7 of 8", "x7", "7%7"]),
    ("math", "7",
     ["7", "7.0", "x=7", "about 7", "7 cm", "= 7", "14/2", "the answer is 7", "+7"],
     ["<7", r"\le 7", "≥7", r"\geq 7", "at most 7", "no more than 7", "more than 7", "over 7",
      "not 7", "isn't 7", "7!", "-7", r"\pm7", "7?8", "7 or 8", "7-8", "7, 8", "less than 7",
      "between 7 and 8", "approximately -7", "Type 7 collagen", "Boeing 7", "7:1", "1/7",
      "f(7)", "70", "seventh", "7 of 8", "x7", "7%7"]),
    ("integer", "2",
     ["2"],
     ["Type 2 diabetes", "H2O", "2nd", "Figure 2 shows"]),
    ("text", "H2O",
     ["H2O"],
     ["h2o2", "2", "HO", "H2O2"]),
    ("open", "Type 1",
     ["Type 1", "type 1"],
     ["1", "Type 2", "Type 11", "not Type 1"]),
    ("open", "3 kW",
     ["3 kW", "3kW"],
     ["3 KW", "3 W", "3", "3 MW"]),
    ("open", "Ca2+",
     ["Ca2+"],
     ["Ca2-", "Ca2", "Ca"]),
    ("open", "CO",
     ["CO"],
     ["Co", "CO2"]),
    ("open", "pH 7",
     ["pH 7"],
     ["7", "PH 7"]),
    ("text", "10^3",
     ["10^3", "10³"],
     ["103"]),
    ("open", "Na",
     ["Na"],
     ["Na+"]),
    ("open", "Na+",
     ["Na+", r"\text{Na}+", r"\mathrm{Na}+"],
     ["Na", "Na-", "K+"]),
    ("math", "10",
     [r"\binom{5}{2}", r"\dbinom52", r"\binom 5 3", "5!/(3!2!)"],
     [r"\binom{2}{5}", r"\frac52", r"\binom{5}{1}"]),
    ("math", "m+1",
     ["1+m"],
     ["1"]),
    ("math", "97",
     [r"m\angle A = 97^\circ", "m∠ABC = 97", "e = 97", "AB = 97", "f(2) = 97"],
     [r"m\angle A = 96", "AB = CD"]),
    ("math", r"-2",
     [r"\sqrt[3]{-8}", "-8^{1/3}", "(-8)^{1/3}"],
     [r"\sqrt{-8}", "2"]),
    ("math", r"17.4 \approx 17.32",
     [],
     [r"10\sqrt3 \approx 18", "17.32", "1 = 2"]),
    ("math", "e=0.5",
     ["0.5", "e = 1/2"],
     ["e", "i = 0.5", "2e"]),
    ("math", "2^{60}",
     ["1152921504606846976"],
     ["1152921504606846977", "2^{60}+1"]),
    ("text", ".25",
     [".25", "0.25"],
     ["25"]),
    ("text", "-3",
     ["-3"],
     ["3"]),
    ("open", "red",
     ["red", "a red", "the red one"],
     ["not red", "red or blue", "isn't red", "red, blue", "reddish", "no red", "never red",
      "anything but red"]),
    ("choice", "B",
     ["B", ".2", "$.2$", "0.2"],
     ["2", "A"],
     ["$2$", "$.2$"]),
    ("choice", "B",
     ["5^2", "B", "5²", "$5^{2}$"],
     ["52"],
     ["$52$", "$5^2$"]),
    ("choice", "B",
     ["g'"],
     ["g"],
     ["$g$", "$g'$"]),
    ("choice", "B",
     ["5 MW", "B"],
     ["5 mW", "5 mw"],
     ["5 mW", "5 MW"]),
    ("choice", "B",
     ["4"],
     ["-4", "±4"],
     ["-4", "4"]),
    ("choice", "A",
     ["true", "A", "True."],
     ["not true", "A is false", "isn't true", "untrue", "neither", "it is not A", "B"],
     ["true", "false"]),
    ("choice", "B",
     ["No.", "no"],
     ["No idea", "No way to tell", "not B", "There is no way", "No solution", "No one knows"],
     ["Yes", "No"]),
    ("choice", "A",
     ["it increases", "increases", "A. increases", "The current increases"],
     ["does not increase", "doesn't increases", "never increases", "increases and decreases"],
     ["increases", "decreases"]),
    ("choice", "A",
     ["circle", "a circle", "A circle", "The circle", "A"],
     ["A triangle", "A hexagon", "A big house", "a triangle", "A small thing"],
     ["circle", "triangle"]),
    ("choice", "B",
     ["to the right", "on the right side", "It is on the right", "right"],
     ["to the left", "not right", "left or right"],
     ["left", "right"]),
    ("choice", "B",
     ["a decrease", "A decrease", "it will decrease"],
     ["an increase", "A", "no decrease"],
     ["increase", "decrease"]),
    ("choice", "A",
     ["A dog", "the dog", "A"],
     ["A cat", "A mouse"],
     ["dog", "cat"]),
    ("math", r"\boxed{2}, \boxed{7}",
     ["2, 7", "7, 2", "2 and 7"],
     ["2", "7", "9"]),
    ("math", r"\boxed{2} and \boxed{7}",
     ["7 and 2"],
     ["7"]),
    ("list", "[3, 1]",
     ["[3,1]", "3, 1", "[3.0, 1.0]"],
     ["[1,3]", "31", "(3,1)", "[3]", "1, 3", "{3,1}"]),
    ("list", "[1,000]",
     ["[1, 0]"],
     ["1000"]),
    ("math", r"30^\circ",
     ["30", "30 degrees"],
     ["30 cm", "30 kg", r"30\%"]),
    ("math", r"20\%",
     ["20"],
     ["20 cm", "20 dollars"]),
    ("math", r"\$5",
     ["5", "5 dollars"],
     ["5 cm", "5 euros", "5 hours"]),
    ("math", "12 meters",
     ["12", "12 m", "12 metres"],
     ["12 miles", "12 minutes", "12 millimeters", "12 mm"]),
    ("math", r"5\text{ cm}",
     ["5 centimeters"],
     ["5 cubic meters", "5 cents", r"5^\circ", r"5\%"]),
    ("math", "3",
     ["3 apples"],
     ["3 quarters", "3 halves", "3 tenths", "3 thirds", "3 max", "3 below zero", "3 wrong", "3 incorrect", "3 false", r"3\text{ false}", "3 lakh", "3 negative", "3 tops"]),
    ("integer", "7",
     ["exactly 7"],
     ["under 7", "7 or more", "7 and above", "7+", "up to 7", "7 at most", "7 maximum", "7 max", "min 7"]),
    ("math", "7",
     ["total = 7"],
     [r"\text{not }=7", "never = 7", r"\text{not}\approx 7", "Fig. 7", "No. 7", "7th"]),
    ("text", "104",
     ["104"],
     ["10⁴"]),
    ("math", "25",
     ["5²"],
     ["2⁵"]),
    ("open", "10⁴",
     ["10⁴", "10^4"],
     ["104"]),
    ("choice", "A",
     ["A"],
     ["$10⁴$"],
     ["104", "10⁴"]),
    ("math", "10^{-3}",
     ["10⁻³", "0.001"],
     ["10-3"]),
    ("open", "5 mg",
     ["5 mg", "5mg"],
     ["5 Mg", "5 kg"]),
    ("text", "20 ms",
     ["20 ms"],
     ["20 Ms"]),
    ("open", "3 mm",
     ["3 mm"],
     ["3 Mm"]),
    ("open", "red",
     ["red", "It is red."],
     ["red green blue", "red & blue", "red + blue", "red blue", "opposite of red", "red versus blue", "red then blue"]),
    ("open", "parabola",
     ["a parabola"],
     ["parabola circle ellipse line"]),
    ("choice", "A",
     ["12", "12.0", "about 12", "24/2"],
     ["more than 12", "< 12", "at least 12", "12 thousand", "negative 12", "minus 12", "12 or more", "over 12", "under 12", "12 squared", "the square root of 12", "half of 12", "12 dozen", "twice 12"],
     ["12", "14", "12000", "-12"]),
    ("choice", "C",
     ["12,000", "12 000"],
     ["12"],
     ["12", "14", "12000", "-12"]),
    ("choice", "A",
     ["A", "red", "(A) red"],
     ["not A", "≠ A", r"\neq A", r"\neg A", "¬A", "A is unlikely", "A is impossible", "everything apart from A", "不是A", "不选A", "never red", "hardly red", "opposite of red", "A fails", r"\overline{A}"],
     ["red", "blue", "green"]),
    ("choice", "A",
     ["A"],
     ["A blue one", "A yellow one", "A. blue"],
     ["red", "blue", "green"]),
    ("choice", "B",
     ["dark red", "the dark red one"],
     ["red", "darkred"],
     ["red", "dark red"]),
    ("math", "|x|",
     ["|-x|"],
     ["x", "-x"]),
    ("math", "x^2-2x+1",
     [],
     ["|x-1|"]),
    ("math", r"\cos x",
     [r"\cos(x)"],
     [r"\sec^{-1} x", r"1/\cos x"]),
    ("math", r"\tan x",
     [r"\frac{\sin x}{\cos x}"],
     [r"\cot^{-1} x"]),
    ("math", r"\frac{1}{\sinh x}",
     [],
     [r"\sinh^{-1} x"]),
    ("math", r"\sin x",
     ["sin x", "sin(x)"],
     [r"\sin^2 x"]),
    ("math", "-2",
     [r"\log_{0.5} 4"],
     [r"\log_2 4"]),
    ("math", r"\frac{1}{23}",
     [r"\frac{1} {23}"],
     []),
    ("math", r"\frac13",
     [],
     ["0.3"]),
    ("math", "0",
     [],
     ["0.(3)"]),
    ("math", r"x>-1 \text{ and } x<3",
     ["x>-1 and x<3"],
     ["x>-1 or x<3"]),
    ("math", "x<0 or x>2",
     ["x>2 or x<0"],
     ["x<0 and x>2"]),
    ("math", "x<2",
     ["x-2<0", "-x > -2"],
     ["2x<2", "x<=2", "x-2>0", "-x<-2"]),
    ("math", "m+n \\text{ cm}",
     ["m+n", "n+m"],
     ["m-n", "m+n km"]),
    ("math", "|||1|-x||",
     ["|x-1|", "||x-1||"],
     ["x-1", "|x|-1"]),
    ("math", "(3,-1)",
     ["(3,-1)"],
     ["3<x<-1"]),
    ("math", "2x+1",
     ["y=2x+1", "f(x)=2x+1"],
     ["2x+1=0"]),
    ("math", "2,3",
     [],
     ["x_1=2"]),
    ("math", "x=2y",
     ["y=x/2"],
     ["x=y/2"]),
    ("math", r"\frac13",
     ["0.3333333"],
     ["0.33", "0.333"]),
    ("math", r"2\epsilon",
     [],
     [r"2\eta"]),
    ("math", "12345.67",
     ["12,345.67", r"12\,345.67"],
     ["12345", "12,345,67"]),
    ("math", "x^2=4",
     ["x^2-4=0", "4=x^2"],
     ["1=1", "0=0", "1=1=x", "x=x"]),
    ("math", "2x+3y=6",
     ["4x+6y=12"],
     ["1=1", "0=0", "2=2"]),
    ("math", "y=3",
     [],
     ["1=1=x", "1=1"]),
    ("math", "1<y<3",
     ["(1,3)"],
     ["0<0<x", "0<0<3"]),
    ("math", "x<2",
     [],
     ["x<2<1", "x<2<3", "1<x<2"]),
    ("math", "x>2",
     [],
     ["9<2<x", "1<2<x", "5<2<x"]),
    ("math", r"60^\circ, 30^\circ",
     [r"30^\circ and 60°", "30°, 60 degrees", "30, 60"],
     ["30%, 60%"]),
    ("math", "1000, 2000",
     [r"1{,}000 \text{ and } 2{,}000", "1,000 and 2,000"],
     ["3000"]),
    # braces say what a root, a power or a fraction reaches
    ("math", r"\sqrt{x + 1}",
     [r"\sqrt{x+1}", r"\sqrt { 1 + x }"],
     [r"\sqrt{x} + 1", r"\sqrt{x}+1"]),
    ("math", r"2\sqrt{3} - 1",
     [r"2 \sqrt 3 - 1"],
     [r"2\sqrt{3 - 1}"]),
    ("math", r"2^{n + 1}",
     [r"2^{1+n}", r"2\cdot 2^n"],
     [r"2^{n} + 1"]),
    ("math", r"\frac{a}{b + c}",
     [r"a/(b+c)"],
     [r"\frac{a}{b} + c"]),
    ("math", r"x_{n + 1}",
     [r"x_{n+1}"],
     [r"x_{n} + 1"]),
    ("math", r"\sum_{i=1}^{n} i",
     [r"\sum_{i=1}^n i"],
     [r"\sum_{i=1}^{n i}"]),
    ("open", r"e^{a x} + b",
     [r"e^{ax}+b"],
     [r"e^{a x + b}"]),
    ("text", r"\frac{a}{b + c}",
     [r"\frac{a}{b+c}"],
     [r"\frac{a}{b} + c"]),
    ("math", r"\lambda",
     [r"λ"],
     [r"\Lambda", "L"]),
    ("text", "Ω",
     ["Ω"],
     ["ω"]),
    ("math", "9",
     ["9."],
     ["9?!", "9!"]),
    # words and names of capitals are no products, vectors have a direction
    ("math", r"\text{DNE}",
     ["DNE"],
     ["END", r"\text{NED}"]),
    ("math", r"\angle ABC",
     [r"∠ABC", r"\angle{ABC}"],
     [r"\angle ACB"]),
    ("math", r"\overrightarrow{AB}",
     [r"\overrightarrow{AB}"],
     [r"\overrightarrow{BA}"]),
    ("math", r"\vec{a}+\vec{b}",
     [r"\vec b + \vec a"],
     [r"\vec a - \vec b"]),
    # a pair has an order, which alternatives and sets have not
    ("math", "(3,4)",
     ["3, 4", "(3, 4)"],
     ["3 or 4", r"\{3,4\}", "(4,3)", r"3\cup 4"]),
    ("list", "[1, 2]",
     ["1, 2", "[1,2]"],
     ["1 or 2", r"\{1,2\}", "2, 1"]),
    # what follows a number is its unit only if it leaves it as it is
    ("math", "4",
     ["4 apples", "4 meters", "4 red balls", "4 pairs", "4 points", "4 roots"],
     ["4 maybe three", "4 five", "4 point five", "4 twice", "4 tens", "4 modulo three", "4 or higher", "4 excluded", "4 except five", "4 tenfold", "4 Doubled"]),
    ("math", "12",
     ["Area = 12", "The total area = 12", "Maximum area = 12", "number of pairs = 12", "Answer: 12", "x = 12"],
     ["Area is not = 12", "answer cannot be = 12", r"\text{less than}=12", r"\text{twice the answer}=12", "area is at least = 12", "everything except = 12"]),
    ("math", r"12\text{ cm}, 5\text{ cm}",
     ["12 cm, 5 cm", "5 cm, 12 cm", "12, 5"],
     ["12 cm, 5 m", "12 kg, 5 cm"]),
    ("math", r"36\text{ cm}^2",
     ["36", "36 cm^2", "36 square centimeters", r"36\text{ cm}^2"],
     ["36 cm", "36 m^2"]),
    ("math", r"20\text{ m/s}",
     ["20", "20 m/s", "20 meters per second"],
     ["20 km/h", "20 m"]),
    ("math", "60 mph",
     ["60", "60 miles per hour"],
     ["60 km/h"]),
    ("math", r"25^\circ\text{C}",
     ["25", "25°C", r"25^\circ C"],
     ["25°F"]),
    ("open", "$12.5",
     ["12.5", "$12.50"],
     ["12.5%", "12.5 m"]),
    ("open", "50%",
     ["50%", "50"],
     ["50°"]),
    # numbers
    ("math", r"\frac{1}{3}",
     [r"0.\overline{3}", "1/3"],
     ["0.3", r"0.\overline{33}1", r"3.\overline{3}"]),
    ("math", r"\frac{1}{6}",
     [r"0.1\overline{6}"],
     [r"0.\overline{16}", "0.16"]),
    ("math", "12.5",
     ["12{,}5", "12.50"],
     ["125"]),
    ("math", "2^{100}",
     [r"4^{50}"],
     ["2^{100}+1"]),
    ("math", "13",
     ["13", r"\sqrt{169}=13"],
     [r"\sqrt{168}=13"]),
    ("math", "0, 2, -2",
     [r"0, \pm 2", r"\pm2, 0", r"x = 0, \pm 2", r"\{0, \pm 2\}"],
     [r"\pm 2", "0, 2"]),
    ("math", "f(x)=x^2-2x",
     ["x^2-2x", "f(x)=x(x-2)"],
     ["g(x)=x^2-2x", "f(x)=f(x)", "f(x)", "y"]),
    ("math", "(x,y)=(1,2)",
     ["(x, y) = (1, 2)", "(1,2)"],
     ["(x,y)=(2,1)"]),
    ("math", "A(1,2)",
     ["A(1, 2)"],
     ["A(2,1)", "B(1,2)"]),
    ("math", r"\begin{pmatrix}1&0\\0&1\end{pmatrix}",
     [r"\left[\begin{array}{cc}1&0\\0&1\end{array}\right]", r"\begin{bmatrix}1&0\\0&1\\\end{bmatrix}"],
     [r"\begin{pmatrix}0&1\\1&0\end{pmatrix}"]),
    # texts
    ("text", "Na+",
     ["Na+", r"\text{Na}+"],
     ["na+", "NA+"]),
    ("open", "no",
     ["no", "The answer is no."],
     ["no answer", "no one"]),
    ("math", "Monday, Tuesday",
     ["monday, tuesday"],
     ["Tuesday, Monday"]),
    # choices
    ("choice", "B",
     ["B", "(b)", "Option B", "blue", "B. blue", "B because blue"],
     ["A to B", "B or D", "B, D", "A vs B", r"\angle B", "∠B", "B_1", "any but B", "anything but blue", "least likely B", "I doubt B", "far from blue", "B fails",
      "B is invalid", "B错误", "A through C"],
     ["red", "blue", "green"]),
    ("choice", "A",
     ["A", "a dog", "dog", "A dog"],
     ["A Bird", "A 5 m rope", "A hexagon"],
     ["dog", "cat"]),
    ("choice", "C",
     ["15", "C"],
     ["5 to 15", "Figure 15", "page 15", "until 15", "5 or 15"],
     ["5", "10", "15"]),
    ("choice", "B",
     ["B", "B. A mitochondrial disorder", "Option B: A mitochondrial disorder", r"\text{B. A mitochondrial disorder}", r"\textbf{(B)} A mitochondrial disorder",
      "B - A mitochondrial disorder", "**B** A mitochondrial disorder", "A mitochondrial disorder"],
     ["A", "Option A: A mitochondrial disorder", "B. Hypoxia", "B or E", "A disorder"],
     ["Hypoxia", "A mitochondrial disorder", "Polymyositis", "Nemaline myopathy"]),
    ("choice", "E",
     ["The answer is E: M and T", "E ($M$ and $T$)"],
     ["E or B"],
     ["a", "b", "c", "d", "$M$ and $T$"]),
    ("open", r"\triangle ABC",
     ["triangle ABC", r"\triangle ABC"],
     [r"\angle ABC", "ABD"]),
    ("math", r"\angle AOB + \angle BOC",
     [r"\angle BOC + \angle AOB"],
     [r"\angle BOA + \angle BOC"]),
    ("math", r"\triangle ABC \cong \triangle DEF",
     [r"\triangle{ABC} \cong \triangle{DEF}"],
     [r"\triangle ABC \cong \triangle EDF"]),
    ("math", "AB=CD",
     ["AB = CD"],
     ["CD"]),
    ("math", r"\alpha=2\beta",
     [r"2\beta=\alpha"],
     [r"2\beta"]),
    ("math", "10 m/s",
     ["10", "10 m s^{-1}", r"10\text{ m s}^{-1}"],
     ["10 m", "10 km/h"]),
    ("math", "5",
     ["5 smaller cubes", "5 other sides", "**5**"],
     ["5 or smaller", "5 lower"]),
    ("math", r"[\pm 1,2]",
     [r"[\pm1, 2]"],
     ["[1,2]"]),
    ("math", r"\sin(19^3 a)",  # beyond a float at the complex place
     [r"\sin((a)(19^3))"],
     [r"\sin(19^2 a)", r"\cos(19^3 a)", "100!"]),
    ("math", "100!",
     ["100!"],
     ["99!", "101!", "a"]),
    ("math", "9",
     ["9"],
     ["(999999999/999999998)^256" * 15]),
    ("choice", "B",
     ["B. -5", r"\text{(B) } -5", "-5", r"B. \frac{-10}{2}"],
     ["B. 5", "5"],
     ["5", "-5", "10"]),
    ("choice", "A",
     ["one"],
     ["one third", "twenty one"],
     ["one", "two", "three"]),
]  # fmt: skip


@pytest.mark.parametrize("case", KINDS, ids=lambda case: f"{case[0]} {case[1]}")
def test_an_answer_is_compared_as_what_it_is(prepare, case):
    kind, gold, right, wrong, *choices = case
    about = kind, gold, *choices
    assert [answer for answer in right if not boxed(prepare, answer, *about)] == []
    assert [answer for answer in wrong if boxed(prepare, answer, *about)] == []


FREE_TEXT = [  # source, kind, gold, right responses, wrong ones, choices
    ("mathvista", "choice", "A",
     ["The answer is A.", "A is right."],
     ["The answer is not A.", "It is not A.", "It isn't (A)."],
     ["red", "blue", "green"]),
    ("mathvista", "choice", "B",
     ["B"],
     ["I cannot tell whether the answer is B.", "I am unable to say if it is A or B.", "Without the image I can't choose between A and B.", "I cannot determine whether it is B."],
     ["red", "blue", "green"]),
    ("mmmu", "choice", "A",
     ["The answer is A.", "A is right."],
     ["The answer is not A.", "It is not A.", "It isn't (A)."],
     ["red", "blue", "green"]),
    ("mmmu", "choice", "B",
     ["B"],
     ["I cannot tell whether the answer is B.", "I am unable to say if it is A or B.", "Without the image I can't choose between A and B.", "I cannot determine whether it is B."],
     ["red", "blue", "green"]),
    ("mathvista", "choice", "B",
     ["No.", "The left one is not taller."],
     ["I have no idea.", "I am not sure.", "I'm not certain.", "The image does not show a graph.", "The picture isn't visible.", "The image is blank.", "It is hard to tell."],
     ["Yes", "No"]),
    ("mathvista", "choice", "B",
     ["no"],
     ["It's not the smallest."],
     ["increase", "no", "decrease"]),
    ("mmmu", "choice", "C",
     ["Regardless of whether the base is 4 or 5, the answer is (C).",
      "The options are (A) 4 and (B) 5. No matter whether we round or not, the answer is (C)."],
     ["I cannot say whether it is (C)."],
     ["4", "5", "6"]),
    ("mathvista", "choice", "A",
     [],
     ["The image is blank.", "I see nothing in the picture.", "The picture is empty.", "It is hard to tell.", "This is only a guess."],
     ["18", "12", "14"]),
    ("mathvista", "choice", "B",
     [],
     ["The image is blank.", "I see nothing in the picture.", "The picture is empty.", "It is hard to tell.", "This is only a guess."],
     ["18", "the large blue one", "14"]),
    ("mathvista", "integer", "5",
     ["There are 5.", "5 bars"],
     ["It is not 5.", "The answer is not 5.", r"The length is \sqrt{5}.", r"It is \frac{1}{5}.", "It is 5 million.", "It is negative 5.", "minus 5", "over 5", "up to 5", "5 or more", "from 3 to 5", "3-5", "the 5th bar", "There are none in Figure 5.", r"The area is 5\pi.", "It is √5.", "5!", "5^2"],
     []),
    ("mathvision", "math", "5",
     ["So x = 5."],
     [r"So we get \sqrt{5} meters.", r"We obtain \frac{1}{5} of it.", "Hence we get 5 million."],
     []),
    ("mmmu", "open", "red",
     ["The colour is red."],
     ["The colour is not red.", "It is red or blue.", "It is red green blue.", "I don't know if it is red"],
     []),
    # texts of choices are denied and joined as their letters are
    *[(source, "choice", "B",
       ["It is blue.", "The color is blue, not red.", "Not only A but B.", "A and C are wrong. B is correct.", "The answer is blue because it is not red.", "B is correct because A is too small."],
       ["It isn't blue.", "It is neither red nor blue.", "All but B.", "Everything except B.", "I rule out B.", "B is wrong.", "B is not the answer.",
        "red or blue", "It is either red or blue.", "A and B are both right.", "The color is green, not blue."],
       ["red", "blue", "green"]) for source in ("mathvista", "mmmu", "mathverse")],
    *[(source, "choice", "B",
       ["It is 14, not 12."],
       ["It is not 14.", "It is more than 14.", "between 12 and 14", "from 12 to 14", "12 or 14", "The answer is 12 or 14."],
       ["12", "14", "18"]) for source in ("mathvista", "mmmu", "mathverse")],
    ("mathvista", "choice", "B",
     [],
     ["yes or no", "The image is missing.", "The image failed to load.", "Please upload the image.", "It depends.", "Answer: N/A", "I refuse to answer.",
      "It isn't possible to say.", "No figure is attached.", "The question is unanswerable.", "看不到图片", "The answer is D."],
     ["Yes", "No"]),
    *[(source, "choice", "A",
       ["The answer is A."],
       ["Point A is at (1, 2).", "Angle A is 30 degrees."],
       ["dim", "wet", "hot"]) for source in ("mmmu", "scienceqa")],
    ("mathvista", "integer", "5",
     ["five bars", "There are five.", "A total of 5."],
     ["2^5", "5√2", "5x", "log 5", "> 5", "≥5", "≠5", "twice 5", "more than five", "not five", "five hundred", "twenty-five", "five-sixths", "one of five"],
     []),
    ("mathvision", "math", "5",
     ["It is 5."],
     ["Step 5.", "It depends on 5"],
     []),
]


@pytest.mark.parametrize("case", FREE_TEXT, ids=lambda case: f"{case[0]} {case[1]} {case[2]}")
def test_a_statement_without_a_box_is_read_as_what_it_says(prepare, case):
    source, kind, gold, right, wrong, choices = case
    question = {"answer": gold, "answer_type": kind, "choices": choices, "source": source}
    assert [text for text in right if not prepare.grade(text, question).correct] == []
    assert [text for text in wrong if prepare.grade(text, question).correct] == []


FIRST_LETTER = ["B. An apple", "B) An apple", "(B) An apple", "B: An apple", "B. An apple\nBecause A is no fruit"]
CLAIMS = ["The answer is B.", "Answer: (B)", "The correct option is B.", "Answer: $\\text{B}$", "**Answer: B**", "The best choice is (B)."]
REFUSALS = ["I don't know.", "It cannot be determined.", "There is not enough information.", "I am unable to see the picture.", "Unknown",
            "As an AI, I cannot view images.", "The image is not provided.", "We need more information.", "None of the above"]


@pytest.mark.parametrize("source", ["mathvista", "mmmu", "scienceqa", "mathverse", "wemath"])
def test_choices_in_free_text_by_a_benchmarks_rule(prepare, source):
    grade = lambda response, gold="B": prepare.grade(response, question("choice", gold, ["A car", "An apple", "A tree"], source=source))
    for response in [*FIRST_LETTER, *CLAIMS]:
        assert grade(response).correct and not grade(response, "A").correct, response
    for response in [*REFUSALS, "The answer is A or B"]:
        assert grade(response).answer is None, response


def test_what_is_infinite_equals_nothing_else(prepare):
    for gold, wrong in {"\\infty": ["0", "8", "-\\infty"], "(2, \\infty)": ["(2, 5)", "x<2"], "x > 2": ["(2, 100)"]}.items():
        assert boxed(prepare, gold, "math", gold)
        assert [answer for answer in wrong if boxed(prepare, answer, "math", gold)] == []


def test_an_answer_of_yes_or_no(prepare):
    about = question("choice", "B", ["Yes", "No"], source="mathvista")
    right = ["No.", "No, it does not.", "The answer is no.", "No, the left one is not the largest.", "The left one is not the largest."]
    wrong = ["Yes.", "Yes, it is not small.", "No one can tell.", "I cannot say.", "No answer is possible", "There is no way to tell"]
    assert [response for response in right if not prepare.grade(response, about).correct] == []
    assert [response for response in wrong if prepare.grade(response, about).correct] == []


def test_no_number_out_of_something_else(prepare):
    about = question("math", "2", source="mathvision")
    right = ["The value is 2.", "So x = 2.", "Hence $x=2$.", "The largest $k$ is 2", "The result is $\\frac{4}{2}$."]
    wrong = ["The ratio is 2:3.", "The answer is (1, 2).", "f(2) cannot be found", "It lies in [1, 2].", "It is {1, 2}", "It is 1/2.",
             "2 is not the answer", "The point (2, 5) is unknown", "between 1 and 2", "x > 2"]
    assert [response for response in right if not prepare.grade(response, about).correct] == []
    assert [response for response in wrong if prepare.grade(response, about).correct] == []


# properties

NUMBERS = st.integers(-(10**18), 10**18)
GOLDS = st.one_of(
    st.tuples(st.just("integer"), NUMBERS.map(str)),
    st.tuples(st.just("float"), st.tuples(st.integers(-9999, 9999), st.sampled_from([10, 100])).map(lambda n: str(n[0] / n[1]))),
    st.tuples(st.just("list"), st.lists(st.integers(-999, 999), min_size=2, max_size=5).map(str)),
    st.tuples(st.just("text"), st.text(string.ascii_letters, min_size=1, max_size=20)),
    st.tuples(st.just("open"), st.text(string.ascii_letters, min_size=1, max_size=20)),
    st.tuples(
        st.just("math"),
        st.builds(
            lambda a, b, c, form: form.format(a=a, b=b, c=c),
            st.integers(1, 999),
            st.integers(2, 99),
            st.integers(2, 99),
            st.sampled_from(["{a}", "{a}.{b}", "\\frac {{ {a} }} {{ {b} }}", "{a} \\sqrt {{ {b} }}",
                             "\\frac {{ {a} }} {{ {b} }} \\pi",
                             "\\frac {{ {a} \\sqrt {{ {b} }} }} {{ {c} }}", "{a} + {b} \\sqrt {{ {c} }}", "{a} x ^ {{ {b} }}"]),
        ),
    ),
)  # fmt: skip


@given(GOLDS, st.sampled_from(["{}", " {} ", "${}$", "\\text{{{}}}", "\\( {} \\)"]), st.text(string.printable, max_size=50))
@settings(max_examples=400)
def test_a_boxed_gold_is_right_however_it_is_wrapped(prepare, gold, wrapping, before):
    about = question(*gold, precision=2 if gold[0] == "float" else None)
    prepare.check_gold(about)
    before = before.replace("\\", "").replace("<", "")
    wrapping = "{}" if gold[0] == "math" and "text" in wrapping else wrapping
    verdict = prepare.grade(f"<think>{before}</think>{before}\\boxed{{{wrapping.format(gold[1])}}}", about)
    assert verdict.correct and verdict.well_formed


@given(
    NUMBERS, NUMBERS,
    st.sampled_from(["\\boxed{{{}}}", "\\boxed{{The answer is {}.}}", "\\boxed{{x = {}}}", "\\boxed{{{} cm}}"]))  # fmt: skip
@settings(max_examples=400)
def test_a_whole_number_is_right_if_and_only_if_it_is_the_gold(prepare, gold, other, form):
    for kind in ("integer", "math"):
        for number in (gold, other, gold + 1, -gold):
            assert prepare.grade(form.format(number), question(kind, str(gold))).correct is (number == gold)


# expressions as trees, whose value plain complex arithmetic knows: (operator, operands ...)

LETTERS = "abcdfghkmnpqrstuvwxyzABCDEFGHRSTVXYZ"
PLACES = [{letter: random.Random(f"{letter} at {i}").uniform(-3, 3) for letter in LETTERS} for i in range(4)]
LEAVES = st.one_of(
    st.integers(0, 30).map(lambda n: ("number", n)), st.sampled_from(LETTERS).map(lambda c: ("letter", c)), st.just(("pi",)))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from("+-*/"), inner, inner),
        st.tuples(st.just("^"), inner, st.integers(2, 3)),
        st.tuples(st.sampled_from(["negative", "sin", "cos", "sqrt", "abs"]), inner),
    ),
    max_leaves=7,
)
VALUE = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "negative": operator.neg,
    "sin": cmath.sin, "cos": cmath.cos, "sqrt": cmath.sqrt, "abs": lambda x: complex(abs(x))}
WRITTEN = {
    "+": ["({0})+({1})"], "-": ["({0})-({1})"], "*": [r"({0})\cdot({1})", "({0})({1})", r"({0}) \times ({1})"],
    "/": [r"\frac{{{0}}}{{{1}}}", r"\dfrac {{{0}}} {{{1}}}", "({0})/({1})"], "negative": ["-({0})", r"-\left({0}\right)"],
    "sin": [r"\sin({0})", r"\sin\left({0}\right)"], "cos": [r"\cos({0})", r"\cos{{({0})}}"], "sqrt": [r"\sqrt{{{0}}}"],
    "abs": ["|{0}|", r"\left|{0}\right|", r"\lvert {0}\rvert "], "^": ["({0})^{1}", "({0})^{{{1}}}"]}


def value(tree, place):
    """By Python's own complex numbers."""
    kind, *parts = tree
    if kind in ("number", "letter", "pi"):
        return complex(math.pi if kind == "pi" else parts[0] if kind == "number" else place[parts[0]])
    if kind == "^":
        found = value(parts[0], place) ** parts[1]
    else:
        found = VALUE[kind](*(value(part, place) for part in parts))
    if found and not 1e-6 < abs(found) < 1e6:
        raise ArithmeticError("digits are lost: sin(pi) is 1e-16 here")
    return found


def values(tree):
    """At every place; None where one is no number or nothing, or digits are lost on the way."""
    try:
        found = [value(tree, place) for place in PLACES]
    except ArithmeticError:
        return None
    return found if all(found) else None


def written(tree, draw):
    kind, *parts = tree
    if kind in ("number", "letter", "pi"):
        return str(parts[0]) if parts else draw.choice(["π", r"\pi "])
    return draw.choice(WRITTEN[kind]).format(*(written(part, draw) if isinstance(part, tuple) else part for part in parts))


def rewritten(tree, draw):
    """Another tree with the same value."""
    kind, *parts = tree
    if kind in ("number", "letter", "pi"):
        return draw.choice([tree, ("negative", ("negative", tree)), ("+", tree, ("number", 0)), ("*", ("number", 1), tree)])
    a, *rest = (rewritten(part, draw) if isinstance(part, tuple) else part for part in parts)
    b = rest[0] if rest else None
    others = {
        "+": lambda: [("+", b, a), ("-", a, ("negative", b))],
        "-": lambda: [("+", a, ("negative", b)), ("negative", ("-", b, a))],
        "*": lambda: [("*", b, a)] + ([(b[0], ("*", a, b[1]), ("*", a, b[2]))] if b[0] in "+-" else []),
        "/": lambda: [("*", a, ("/", ("number", 1), b))],
        "^": lambda: [("*", a, a if b == 2 else ("^", a, 2))],
        "negative": lambda: [("*", ("negative", ("number", 1)), a), ("-", ("number", 0), a)],
    }
    return draw.choice([(kind, a, *rest), *others.get(kind, list)()])


@given(TREES, st.randoms(use_true_random=False))
@settings(max_examples=EXAMPLES)
def test_an_expression_equals_whatever_keeps_its_value(prepare, tree, draw):
    other = rewritten(tree, draw)
    gold, answer, known, again = written(tree, draw), written(other, draw), values(tree), values(other)
    assume(known and again and max(len(gold), len(answer)) < 380)
    assume(all(cmath.isclose(*pair, rel_tol=1e-9) for pair in zip(known, again)))  # else floating point took another branch of a root
    assert prepare.same_maths(answer, gold), (answer, gold)


@given(TREES, TREES, st.randoms(use_true_random=False))
@settings(max_examples=EXAMPLES)
def test_expressions_that_differ_somewhere_are_not_equal(prepare, tree, other, draw):
    gold, answer, known, again = written(tree, draw), written(other, draw), values(tree), values(other)
    assume(known and again and max(len(gold), len(answer)) < 380)
    assume(not all(cmath.isclose(*pair, rel_tol=1e-5) for pair in zip(known, again)))
    assert not prepare.same_maths(answer, gold), (answer, gold)


FIELD = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just("9" * 5000), st.none().map(lambda _: 10**5000),
              st.sampled_from(["choice", "integer", "float", "list", "math", "text", "open", "mathvista", "mmmu", "B", "7", "[1, 2]"])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=2), st.tuples(inner)),
    max_leaves=6,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["answer", "answer_type", "choices", "precision", "source", "unit"]), FIELD),
       st.sampled_from(["<think>a</think>\\boxed{B}", "The answer is 7.", "\\boxed{[1, 2]}", "\\boxed{x=7}", "", "No."]), st.booleans())
@settings(max_examples=5 * EXAMPLES)
def test_no_field_of_a_question_raises(prepare, about, response, reward):
    verdict = prepare.grade(response, about, reward)
    assert isinstance(verdict.correct, bool)


@pytest.mark.parametrize("kind", ["choice", "integer", "float", "list", "math", "text", "open"])
@pytest.mark.parametrize("piece", ["9", "[", "(", "{", "\\boxed{", "x^", "1,", "'", " ", "a ", "\\frac", "|", "\u00e9"])
def test_a_million_hostile_characters_in_a_question_take_no_time(prepare, kind, piece):
    text = piece * (1_000_000 // len(piece))
    for about in (question(kind, text, [text, "B"], source="mathvista"), question(kind, "B", [text, "B"], source="mathvista")):
        times = []
        for _ in range(2):  # the better of two: a full garbage collection may fall into one
            start = time.process_time()
            prepare.grade("\\boxed{B}", about)
            prepare.grade("The answer is B.", about)
            times.append(time.process_time() - start)
        assert min(times) < 0.5  # of two responses


PIECES = st.lists(
    st.sampled_from([*"\\{}[]()<>$^_/*+-=.,:;|%'\"@#&~!√π°−²≈ \n09aABEeixİ中\x00\x1f", "\\boxed{", "</think>", "<think>", "<answer>",
                     "</answer>", "\\frac", "\\sqrt", "\\sqrt[", "\\text{", "The answer is ", "9**9**9",
                     "10^{400}", "1/0", "e999", " and ", "cm"]),
    max_size=40,
).map("".join)  # fmt: skip
ASKED = [("choice", "B", COLOURS), ("choice", "A", ["(", "[a-z]*", "\\", ""]), ("integer", "5"), ("float", "5.5", (), 1),
         ("list", "[1, 2]"),
         ("math", "\\sqrt{3}"), ("math", "x"), ("text", "yes"), ("open", "['a', '5']"), ("choice", "A")]  # fmt: skip


@given(st.one_of(st.text(max_size=60), PIECES), st.sampled_from(ASKED),
       st.sampled_from(["mathvista", "mmmu", "scienceqa", "mathvision", "mathverse", "wemath", "mine"]))
@settings(max_examples=5 * EXAMPLES)
@example("@E", ("choice", "B", COLOURS), "mathvista")  # marks that the grader may use for its own ends
@example("red\nE", ("choice", "B", COLOURS), "mathvista")
def test_no_text_raises(prepare, text, about, source):
    about = question(*about, source=source)
    for response in (text, f"\\boxed{{{text}}}", f"<answer>{text}</answer>"):
        verdict = prepare.grade(response, about)
        assert isinstance(verdict.correct, bool) and isinstance(verdict.well_formed, bool)
        assert verdict.answer is None or isinstance(verdict.answer, str)
        if about["answer_type"] == "choice" and verdict.answer is not None:
            assert ord(verdict.answer) - ord("A") in range(len(about["choices"]))


@pytest.mark.parametrize(
    "piece",
    ["{", "}", "\\boxed{", "\\boxed{}", "<think>", "</think>", "< think", "<answer>", "<answer></answer>", "(", "\\frac{",
     "\\sqrt", "9", "9**", "1,", "1,111", "-", "$", "$a$", "\\(", "\\[", " ", "\n", "A", "A ", "(A)", "red ", "The answer is ",
     "Therefore ", "is ", "=", "é", "中", "e9",
     ".", "[", "[1,", "\\text{", "x", "1 ", "\\", "cm ", "than 5 ", "A or "],
)  # fmt: skip
@pytest.mark.parametrize("where", ["{}", "</think>{}", "\\boxed{{{}}}", "<answer>{}</answer>", "<think>{}</think>\\boxed{{1000003}}"])
def test_a_million_hostile_characters_take_no_time(prepare, piece, where):
    text = where.format(piece * (1_000_000 // len(piece)))
    sources = {"choice": "mathvista", "integer": "mathvista", "math": "mathvision", "open": "mmmu"}
    for about in (("choice", "B", COLOURS), ("integer", "77"), ("math", "\\sqrt{3}"), ("open", "['abc', '7']")):
        times = []
        for _ in range(2):  # the better of two: a full garbage collection may fall into one
            start = time.process_time()
            verdict = prepare.grade(text, question(*about, source=sources[about[0]]))
            times.append(time.process_time() - start)
        assert min(times) < 0.5  # some 30 ms; what is not linear takes seconds
        assert not verdict.correct and len(verdict.answer or "") <= 400


def test_a_right_answer_after_long_reasoning_counts(prepare):
    verdict = prepare.grade("<think>" + "so 7 or 8? " * 100_000 + "</think>\\boxed{7}", question("integer", "7"))
    assert verdict.correct and verdict.well_formed


# the benchmarks' own verdicts on real outputs


@pytest.mark.skipif(not PARITY.is_dir(), reason="the parity material does not belong to the repository")
@pytest.mark.parametrize(
    "name, whole, extracted",  # a refusal (N/A too) answers nothing here, while MathVista credits the nearest choice
    [("mathvista", 0.94, 0.975), ("mmmu", 0.985, 0.997), ("scienceqa", 0.999, 0.999), ("mathverify", 0.975, 0.976)],
)
def test_verdicts_agree_with_the_benchmarks(prepare, name, whole, extracted):
    rows = [json.loads(line) for line in (PARITY / f"{name}.jsonl").open()]
    for field, bar in (("response", whole), ("extraction", extracted)):
        same = []
        for row in rows:
            if row["answer_type"] in ("relation_or_set", "tuple_or_set", "matrix") or row[field] is None:
                continue
            about = question(row["answer_type"], row["answer"], row["choices"], row["precision"], source=name)
            if name == "mathverify":
                about |= {"answer_type": "math", "precision": None, "source": "mathvision"}
            elif name == "mathvista" and row["choices"]:
                about["answer"] = "ABCDEFGHI"[row["choices"].index(row["answer"])]
            same.append(prepare.grade(str(row[field]), about).correct == row["correct"])
        assert sum(same) >= bar * len(same), f"{sum(same)} of {len(same)}"
