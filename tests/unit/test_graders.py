"""Graders: what they are worth against reference implementations, and what they say when they cannot grade."""

from __future__ import annotations

import errno
import math
import random
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from nltk.translate.gleu_score import sentence_gleu
from nltk.translate.meteor_score import single_meteor_score
from rapidfuzz import fuzz
from rouge_score import rouge_scorer

from lapis.errors import InputError, UnavailableError
from lapis.evaluate.graders.engine_ask import EngineAsk
from lapis.evaluate.graders.formula import Formula
from lapis.evaluate.graders.grader import passing, read_grader, singles
from lapis.evaluate.graders.grading import Grading, Means, check, grade
from lapis.evaluate.graders.model_grader import Answer, Question
from lapis.evaluate.graders.python_grader import PROGRAMS, PythonSandbox
from lapis.evaluate.graders.similarity import similarity
from lapis.evaluate.graders.template import MissingError, NotJsonError, render, variables
from lapis.inference.fake import FakeEngine

CHECK = {
    "type": "string_check", "name": "same", "operation": "eq",
    "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}",
}  # fmt: skip
SCORE = {
    "type": "score_model", "name": "judge", "model": "tiny", "range": [1, 5],
    "input": [{"role": "user", "content": "How good is {{sample.output_text}} for {{item.question}}?"}],
}  # fmt: skip
LABEL = {
    "type": "label_model", "name": "tone", "model": "tiny", "labels": ["good", "bad"], "passing_labels": ["good"],
    "input": [{"role": "developer", "content": [{"type": "input_text", "text": "{{ sample.output_text }}"}]}],
}  # fmt: skip


class Judge:
    """A model that grades: says what it is told to, and remembers what it was asked."""

    def __init__(self, *answers: Answer | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[Question] = []

    def __call__(self, question: Question) -> Answer:
        self.asked.append(question)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(scope="module")
def sandbox() -> Iterator[PythonSandbox]:
    with PythonSandbox(seconds=10) as made:
        yield made


def graded(value: dict[str, Any], text: str, item: Any, *answers: Answer | Exception) -> Grading:
    return grade(read_grader(value), text, item, Means(Judge(*answers), PythonSandbox()))


class NoStem:
    def stem(self, word: str) -> str:
        return word


class NoSynonyms:
    def synsets(self, word: str) -> list[str]:
        return []


def test_similarities_are_those_of_the_reference_implementations() -> None:
    """Over texts whose words are the same for all of them: runs of ASCII letters, and marks apart."""
    rng = random.Random(0)
    words = [
        "the",
        "a",
        "cat",
        "sat",
        "on",
        "mat",
        "Dog",
        "ran",
        "The",
        ",",
        ".",
        "far",
        "away",
        "twenty",
        "twentyone",
    ]
    rouges = ["rouge1", "rouge2", "rouge3", "rouge4", "rouge5", "rougeL"]
    scorer = rouge_scorer.RougeScorer(rouges)
    for _ in range(150):
        mine = rng.choices(words, k=rng.randint(1, 14))
        right = rng.choices(words, k=rng.randint(1, 14))
        text, reference = " ".join(mine), " ".join(right)
        expected = {"fuzzy_match": fuzz.ratio(text, reference) / 100, "gleu": sentence_gleu([right], mine)}
        for name, score in scorer.score(reference, text).items():
            expected[f"rouge_{name[5:].lower()}"] = score.fmeasure
        expected["meteor"] = single_meteor_score(right, mine, stemmer=NoStem(), wordnet=NoSynonyms())
        orders = min(4, len(mine))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of orders without a match
            smooth = SmoothingFunction().method3
            expected["bleu"] = sentence_bleu([right], mine, (1 / orders,) * orders, smooth)
        for name, value in expected.items():
            assert similarity(name, text, reference) == pytest.approx(value, abs=1e-9), (
                name,
                text,
                reference,
            )  # type: ignore[arg-type]


def test_cosine_counts_words_and_every_measure_knows_equal_and_unlike_texts() -> None:
    assert similarity("cosine", "a b b", "b a") == pytest.approx(3 / (5**0.5 * 2**0.5))
    assert similarity("rouge_1", "Straße über", "straße unter") == 0.5
    long = "one two three four five six"
    for metric in (
        "cosine", "fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l",
    ):  # fmt: skip
        assert similarity(metric, long, long) == pytest.approx(1.0)  # type: ignore[arg-type]
        assert similarity(metric, long, "ZZZ") < 0.1  # type: ignore[arg-type]
    assert similarity("bleu", "Paris", "Paris") == 1.0  # no n-grams beyond its one word are asked for
    with pytest.raises(InputError, match="100,000 characters"):
        similarity("fuzzy_match", "a" * 100_001, "a")


def test_string_checks_compare_as_named() -> None:
    def reward(operation: str, text: str) -> float:
        return graded({**CHECK, "operation": operation}, text, {"answer": "Paris"}).reward

    assert [reward("eq", text) for text in ("Paris", "paris", "Paris.")] == [1, 0, 0]
    assert [reward("ne", text) for text in ("Paris", "paris")] == [0, 1]
    assert [reward("like", text) for text in ("It is Paris.", "It is paris.")] == [1, 0]
    assert [reward("ilike", text) for text in ("It is pARIS.", "It is Rome.")] == [1, 0]


def test_templates_reach_into_items_and_json_answers_and_are_read_once() -> None:
    values = variables({"a b": [{"c": "{{ sample.output_text }}"}], "n": {"x": 1.5}}, '{"k": ["v", true]}')
    assert render("<{{ item['a b'][0].c }}|{{item.n}}|{{ sample.output_json.k[1] }}>", values) == (
        '<{{ sample.output_text }}|{"x": 1.5}|true>'
    )
    assert render("{{ sample.output_json.k.0 }}{{sample.output_text}}", values) == 'v{"k": ["v", true]}'
    with pytest.raises(MissingError, match="no 'z' in item"):
        render("{{ item.z }}", values)
    with pytest.raises(NotJsonError):
        render("{{ sample.output_json }}", variables({}, "no JSON"))
    for wrong in ("{{ name }}", "{{ item.a() }}", "{{ item | upper }}", "{{ }}"):
        with pytest.raises(InputError):
            read_grader({**CHECK, "input": wrong})


NUMBERS = st.floats(0.125, 8).map(lambda number: f"{number:.3f}")
EXPRESSIONS = st.recursive(
    st.one_of(NUMBERS, st.sampled_from(["a", "bc_1"])),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map(" ".join),
        inner.map("({})".format),
        inner.map("-({})".format),
        st.tuples(inner, inner).map(lambda both: f"min({both[0]}, max({both[1]}, 1))"),
        inner.map("sqrt(abs({}))".format),
        inner.map("2 ^ -({}) ^ 0".format),
    ),
    max_leaves=12,
)


@settings(max_examples=50)
@given(EXPRESSIONS)
def test_a_formula_is_worth_what_python_says(text: str) -> None:
    names = {"a": 0.25, "bc_1": 3.0}
    functions = {"min": min, "max": max, "sqrt": math.sqrt, "abs": abs}
    try:
        expected = eval(text.replace("^", "**"), {"__builtins__": {}}, {**names, **functions})
    except ZeroDivisionError:
        expected = None
    formula = Formula(text, names.keys())
    if expected is None:
        with pytest.raises(InputError, match="no value here"):
            formula(names)
    else:
        assert formula(names) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a +", "ends too early"),
        ("a b", "at 'b'"),
        ("a.__class__", "at '.'"),
        ("__import__('os')", "calls '__import__'"),
        ("open", "names 'open'"),
        ("log(1, 2)", "takes one"),
        ("(" * 60 + "1" + ")" * 60, "nested deeper"),
        ("-" * 60 + "1", "nested deeper"),
        ("1+" * 1000 + "1", "longer than"),
        ("", "ends too early"),
    ],
)
def test_a_formula_that_is_no_arithmetic_is_refused(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Formula(text, {"a"})


def test_long_and_huge_formulas_have_bounds() -> None:
    assert Formula("a+" * 400 + "a", {"a"})({"a": 1.0}) == 401
    for text in ("9^9^9^9", "exp(1000)", "log(0)", "a/0", "(-8)^(1/3)"):
        with pytest.raises(InputError, match="no value here"):
            Formula(text, {"a"})({"a": 1.0})


def test_a_model_scores_within_a_range() -> None:
    judge = Judge(Answer('{"reasoning": "fine", "result": 4}', prompt_tokens=10, completion_tokens=5))
    done = grade(read_grader(SCORE), "42", {"question": "6*7"}, Means(judge, PythonSandbox()))
    assert done.reward == 4 and not done.errors.any
    assert done.usage["tiny"].total_tokens == 15
    (asked,) = judge.asked
    assert asked.messages == [{"role": "user", "content": "How good is 42 for 6*7?"}]
    assert asked.schema["properties"]["result"] == {"type": "number", "minimum": 1.0, "maximum": 5.0}
    assert asked.temperature == 0


@pytest.mark.parametrize(
    ("answer", "flags"),
    [
        (Answer('{"reasoning": "x", "result": 7}'), ["model_grader_parse_error"]),
        (Answer('{"reasoning": "x', cut=True), ["truncated_observation_error", "model_grader_parse_error"]),
        (Answer("I cannot", refused=True), ["model_grader_refusal_error"]),
        (UnavailableError("It is gone."), ["model_grader_server_error: It is gone."]),
    ],
)
def test_what_a_judge_fails_at_is_flagged(answer: Answer | Exception, flags: list[str]) -> None:
    done = graded(SCORE, "42", {"question": "6*7"}, answer)
    assert done.reward == 0 and done.errors.names == flags and done.message


def test_a_model_chooses_a_label() -> None:
    assert graded(LABEL, "hi", {}, Answer('{"label": "good"}')).reward == 1
    bad = graded(LABEL, "hi", {}, Answer('{"label": "bad"}'))
    assert bad.reward == 0 and bad.label == "bad" and not bad.errors.any
    assert graded(LABEL, "hi", {}, Answer('{"label": "ugly"}')).errors.model_grader_parse_error


def test_graders_together_are_one_formula() -> None:
    multi = {
        "type": "multi", "name": "all", "calculate_output": "0.75 * same + 0.25 * (judge - 1) / 4",
        "graders": {"same": {**CHECK, "name": "whatever"}, "judge": SCORE},
    }  # fmt: skip
    item = {"answer": "42", "question": "6*7"}
    done = graded(multi, "42", item, Answer('{"result": 3}'))
    assert done.reward == 0.875 and done.sub_rewards == {"same": 1.0, "judge": 3.0}
    listed = {**multi, "graders": [CHECK, SCORE]}
    assert graded(listed, "42", item, Answer('{"result": 3}')).reward == 0.875
    failed = graded(multi, "42", {"question": "6*7"}, Answer('{"result": 3}'))
    assert failed.reward == 0 and failed.errors.names == ["invalid_variable_error"]
    single = {**multi, "graders": CHECK, "calculate_output": "1 - same"}
    assert graded(single, "no", item).reward == 1
    assert graded({**single, "calculate_output": "1 / same"}, "no", item).errors.formula_parse_error


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({**CHECK, "operation": "equals"}, "operation"),
        ({**CHECK, "colour": "red"}, "colour"),
        ({"type": "vibes"}, "does not match any of the expected tags"),
        ({**SCORE, "range": [5, 1]}, "the smaller one first"),
        (
            {**SCORE, "input": [{"role": "user", "content": {"type": "input_image", "image_url": "x"}}]},
            "read text",
        ),
        ({**LABEL, "passing_labels": ["fine"]}, "'fine', which is no label"),
        ({"type": "multi", "name": "m", "graders": [CHECK, CHECK], "calculate_output": "same"}, "same name"),
        ({"type": "multi", "name": "m", "graders": [], "calculate_output": "1"}, "must hold graders"),
        ({"type": "multi", "name": "m", "graders": {"a": CHECK}, "calculate_output": "b"}, "names 'b'"),
        ({"type": "python", "name": "p", "source": "x", "image_tag": "2025"}, "image_tag"),
    ],
)
def test_a_grader_that_makes_no_sense_is_refused(value: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_grader(value)


def test_what_passes() -> None:
    (check_,) = singles(read_grader(CHECK))
    assert passing(check_, 1.0) and not passing(check_, 0.0)
    (score,) = singles(read_grader(SCORE))  # the middle of 1 to 5
    assert passing(score, 3.0) and not passing(score, 2.9)
    (strict,) = singles(read_grader({**SCORE, "pass_threshold": 4.5}))
    assert passing(strict, 4.5) and not passing(strict, 4.0)


def test_an_engine_grades_in_the_form_that_is_asked_for() -> None:
    """Whatever the model would say: the schema binds its answer."""
    asked: list[str] = []

    def load(name: str) -> FakeEngine:
        asked.append(name)
        return FakeEngine(name)

    ask = EngineAsk(load)
    means = Means(ask, PythonSandbox())
    try:
        done = grade(read_grader(SCORE), "42", {"question": "6*7"}, means)
        assert not done.errors.any and 1 <= done.reward <= 5
        assert grade(read_grader(LABEL), "hi", {}, means).label in ("good", "bad")
        assert asked == ["tiny"] and done.usage["tiny"].prompt_tokens > 5
    finally:
        ask.close()


OPEN = """
import errno, os

def grade(sample, item):
    for number in range(3, 100):
        try:
            os.lseek(number, 0, 1)
        except OSError as error:
            if error.errno == errno.ESPIPE:
                return number
"""
HERITAGE = """
import os

def grade(sample, item):
    return len({*os.environ} - {"LC_CTYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"})
"""


def program(source: str) -> dict[str, Any]:
    return {"type": "python", "name": "code", "source": source}


def test_a_program_grades(sandbox: PythonSandbox) -> None:
    means = Means(Judge(), sandbox)
    source = """
import re, json
from difflib import SequenceMatcher

def grade(sample, item):
    found = re.search(r"\\d+", sample["output_text"])
    return 0.5 * (int(found[0]) == item["n"]) + SequenceMatcher(None, "ab", "ab").ratio() / 2
"""
    grader = read_grader(program(source))
    check(grader, sandbox)
    assert grade(grader, "It is 42.", {"n": 42}, means).reward == 1.0
    assert grade(grader, "It is 41.", {"n": 42}, means).reward == 0.5
    none = grade(grader, "?", {"n": 42}, means)
    assert none.reward == 0 and "TypeError" in (none.errors.python_grader_runtime_error_details or "")
    assert "(line 7)" in none.message
    with pytest.raises(InputError, match="no function grade"):
        check(read_grader(program("x = 1")), sandbox)
    with pytest.raises(InputError, match="SyntaxError"):
        check(read_grader(program("def grade(sample, item) return 1")), sandbox)


def test_a_program_may_use_numpy(sandbox: PythonSandbox) -> None:
    source = "import numpy as np\ndef grade(sample, item):\n    return (np.ones((4, 4)) @ np.ones(4)).mean()"
    assert sandbox.grade(source, {}, {}).value == 4.0


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("open('/etc/passwd').read()", "PermissionError"),
        ("__import__('os').open('x', 65)", "PermissionError"),
        ("__import__('os').listdir('/')", "PermissionError"),
        ("__import__('os').stat('/etc/passwd')", "PermissionError"),
        ("__import__('_socket').socket()", "ModuleNotFoundError"),
        ("__import__('os').fork()", "PermissionError"),
        ("__import__('os').execv('/bin/true', ['x'])", "PermissionError"),
        ("__import__('os').kill(__import__('os').getppid(), 9)", "PermissionError"),
        ("len(bytearray(3 << 30))", "MemoryError"),
        ("__import__('sys').exit(1)", "SystemExit"),
        ("__import__('ctypes').string_at(0)", "signal 11"),
        ("__import__('os').write(sample['pipe'], b'x' * 1000000)", "KiB"),
        ("float('nan')", "no finite number"),
        ("'high'", "ValueError"),
        ("grade(sample, item)", "RecursionError"),
    ],
)
def test_a_program_reaches_nothing_and_eats_little(sandbox: PythonSandbox, body: str, told: str) -> None:
    done = sandbox.grade(f"def grade(sample, item):\n    return {body}", {"pipe": _pipe_of(sandbox)}, {})
    assert done.failure == "runtime" and told in done.details
    assert sandbox.grade("def grade(sample, item):\n    return 1", {}, {}).value == 1  # it goes on


def _pipe_of(sandbox: PythonSandbox) -> int:
    """The one file that a program has open beyond the first three: where its answer goes."""
    return int(sandbox.grade(OPEN, {}, {}).value)


def test_a_program_sees_no_environment_and_none_of_the_samples_before(sandbox: PythonSandbox) -> None:
    assert sandbox.grade(HERITAGE, {}, {}).value == 0
    leave = "import math\ndef grade(sample, item):\n    math.left = getattr(math, 'left', 0) + 1\n    return math.left"
    assert [sandbox.grade(leave, {}, {}).value for _ in range(2)] == [1, 1]


def test_not_even_the_c_library_gives_a_program_a_socket(sandbox: PythonSandbox) -> None:
    source = """
import ctypes

def grade(sample, item):
    library = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if library.socket(2, 1, 0) == -1 else 0
"""
    assert sandbox.grade(source, {}, {}).value == errno.EPERM


def test_a_program_that_does_not_end_is_ended() -> None:
    with PythonSandbox(seconds=0.5) as sandbox:
        for body in ("while True: pass", "import time; time.sleep(1000)"):
            source = f"def grade(sample, item):\n    {body}"
            done = grade(read_grader(program(source)), "", {}, Means(Judge(), sandbox))
            assert done.errors.names == ["unresponsive_reward_error"] and done.reward == 0
        assert sandbox.grade("def grade(sample, item):\n    return 1", {}, {}).value == 1


def test_no_more_than_four_programs_run_at_a_time() -> None:
    """Each says from when to when it ran; at no moment there were five."""
    source = """
import time

def grade(sample, item):
    began = time.monotonic()
    time.sleep(0.3)
    return began
"""

    def one(number: int) -> float:
        with PythonSandbox(seconds=20) as sandbox:
            return sandbox.grade(source, {}, {}).value

    with ThreadPoolExecutor(9) as pool:
        began = sorted(pool.map(one, range(9)))
    assert all(later - earlier > 0.29 for earlier, later in zip(began, began[PROGRAMS:], strict=False))


def test_a_program_that_forges_an_answer_gains_nothing_but_its_own_number(sandbox: PythonSandbox) -> None:
    source = "import os\ndef grade(sample, item):\n    os.write(sample['pipe'], item['said'].encode())\n    os._exit(0)"
    pipe = {"pipe": _pipe_of(sandbox)}
    for said in ("[1]", '{"value": "x"}', '{"error": {"a": 1}}', "null", '{"value": NaN}', "x"):
        done = sandbox.grade(source, pipe, {"said": said})
        assert done.failure == "runtime" and done.value == 0
    assert sandbox.grade(source, pipe, {"said": '{"value": 3}\n{"value": 4}'}).failure == "runtime"
    assert sandbox.grade("def grade(sample, item):\n    return 5", {}, {}).value == 5
