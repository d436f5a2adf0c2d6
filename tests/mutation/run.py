"""Mutation test of the recipe, the step, the data and readers of models: does some test fail when a line is wrong?

    python tests/mutation/run.py --results=mutation.jsonl                       # a sample of every module
    python tests/mutation/run.py --results=mutation.jsonl --modules=recipe/mup --per_module=0    # all of one module
    python tests/mutation/run.py --results=mutation.jsonl --again               # only those that survived so far

Each mutant of mutants.py is imported in place of its module in a process of its own, forked from one that has imported
JAX and touched no device; no file is changed. The tests of the module stop at the first that fails. Results are
appended to a file, so a run that was stopped goes on. Exit code 1: one survived that survivors.md does not justify.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
SURVIVORS = Path(__file__).with_name("survivors.md")
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

# Module -> the arguments of pytest that find its faults fastest; tests that start processes do not see a mutant.
TESTS = {
    "recipe/curriculum": ["tests/recipe/test_curriculum.py"],
    "recipe/mup": ["tests/recipe/test_mup.py"],
    "recipe/optimizer": ["tests/recipe/test_optimizer.py"],
    "recipe/config": ["tests/recipe/test_config.py"],
    "data/order": ["tests/data/test_order.py"],
    "data/loader": ["tests/data/test_loader.py"],
    "model/loss": ["tests/model/test_loss.py"],
    "train/step": ["tests/train/test_step.py"],
    "train/checkpoint": ["tests/train/test_checkpoint.py"],
    "tokenizers/prompt_bos": ["tests/tokenizers/test_prompt_bos.py"],
    "hub/published": ["tests/hub/test_published.py"],
    "hub/safetensors_files": ["tests/hub/test_safetensors_files.py", "tests/hub/test_huggingface.py"],
    "hub/huggingface": ["tests/hub/test_huggingface.py"],
    "hub/client_files": ["tests/convert/test_kept_files.py", "tests/hub/test_model_json.py"],
    "generate/output": ["tests/generate/test_output.py"],
}
OPTIONS = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what the parent process has imported
SLOWER_BY = 6.0  # a mutant may take this many times what the unchanged module takes before it counts as endless
SPARE_SECONDS = 60.0


class MutatedModule(importlib.abc.MetaPathFinder):
    """Imports one module from a given syntax tree instead of its file."""

    def __init__(self, name: str, tree: ast.Module):
        self._name, self._tree = name, tree

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self._name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        tree, file = self._tree, spec.origin

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname):
                return compile(tree, file, "exec")

        spec.loader = Loader(fullname, file)
        return spec


def run_tests(arguments: list[str], *, output: Path, seconds: float, prepare) -> tuple[str, float]:
    """Run pytest in a forked process after `prepare()`; return "survived", "killed" or "timeout", and the seconds."""
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of forks; no device was touched
        child = os.fork()
    if not child:
        os.setsid()
        code = 99
        try:
            with open(output, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            prepare()
            import pytest

            code = int(pytest.main([*OPTIONS, *arguments]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while time.monotonic() - began < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return ("survived" if status == 0 else "killed"), time.monotonic() - began
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout", time.monotonic() - began


def import_what_the_tests_import(arguments: list[str], *, output: Path) -> None:
    """Import into this process every module that is not ours and that the tests load, so that forks begin with them."""
    with tempfile.NamedTemporaryFile("r") as names:

        def prepare():
            import pytest

            class Plugin:
                def pytest_sessionfinish(self):
                    Path(names.name).write_text("\n".join(sys.modules))

            original = pytest.main
            pytest.main = lambda arguments: original([*arguments, "--collect-only"], plugins=[Plugin()])

        run_tests(arguments, output=output, seconds=600.0, prepare=prepare)
        loaded = names.read().split("\n")
    for name in loaded:
        first = name.partition(".")[0]
        if first not in ("btlm_jax", "support", "conftest", "__main__", "pytest", "_pytest") and "test_" not in name:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def justified() -> set[tuple[str, str]]:
    """Return the (module, mutant) of every line `- module | mutant | reason` of survivors.md."""
    if not SURVIVORS.is_file():
        return set()
    lines = re.findall(r"^- `(.+?)` `(.+)`: .", SURVIVORS.read_text(), flags=re.MULTILINE)
    return {(module, mutant.replace("\\|", "|")) for module, mutant in lines}


def read_results(path: Path) -> dict[tuple[str, str], dict]:
    """Return the latest result of each (module, mutant)."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {(row["module"], row["mutant"]): row for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines; appended to")
    parser.add_argument("--modules", nargs="*", default=list(TESTS), choices=list(TESTS))
    parser.add_argument(
        "--per_module", type=int, default=60, help="mutants of each module, drawn by a fixed seed; 0: all"
    )
    parser.add_argument("--again", action="store_true", help="run again what survived so far, and nothing else")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no mutant after so long")
    given = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "MPLBACKEND": "agg"}
    scratch = Path(tempfile.mkdtemp())
    output = scratch / "output"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(scratch / "compiled")  # see tests/conftest.py
    end = time.monotonic() + given.seconds
    results = read_results(given.results)
    current = set()
    for module in given.modules:
        source = ROOT / "btlm_jax" / f"{module}.py"
        tree = ast.parse(source.read_text())
        mutants = find_mutants(tree)
        if given.per_module and len(mutants) > given.per_module:
            mutants = sorted(random.Random(0).sample(mutants, given.per_module), key=lambda mutant: mutant.line)
        current |= {(module, mutant.name) for mutant in mutants}
        todo = [mutant for mutant in mutants if _is_due(results.get((module, mutant.name)), again=given.again)]
        if not todo or time.monotonic() > end:
            continue
        import_what_the_tests_import(TESTS[module], output=output)
        outcome, unchanged_seconds = run_tests(TESTS[module], output=output, seconds=900.0, prepare=lambda: None)
        if outcome != "survived":
            print(output.read_text(), f"the tests of {module} fail on the unchanged module", file=sys.stderr)
            return 2
        print(f"{module}: {len(todo)} of {len(mutants)} mutants; unchanged {unchanged_seconds:.1f} s", flush=True)
        for mutant in todo:
            if time.monotonic() > end:
                break

            def prepare(mutant=mutant, tree=tree, module=module):
                mutant.apply()
                name = f"btlm_jax.{module.replace('/', '.')}"
                sys.meta_path.insert(0, MutatedModule(name, ast.fix_missing_locations(tree)))

            limit = SPARE_SECONDS + SLOWER_BY * unchanged_seconds
            outcome, seconds = run_tests(TESTS[module], output=output, seconds=limit, prepare=prepare)
            row = {"module": module, "mutant": mutant.name, "line": mutant.line, "outcome": outcome}
            row |= {"seconds": round(seconds, 1), "by": _failed_test(output)}
            results[(module, mutant.name)] = row
            with open(given.results, "a") as file:
                file.write(json.dumps(row) + "\n")
    return report({key: row for key, row in results.items() if key in current}, modules=given.modules)


def _is_due(result: dict | None, *, again: bool) -> bool:
    return result is not None and result["outcome"] == "survived" if again else result is None


def _failed_test(output: Path) -> str:
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", output.read_text(errors="replace"), flags=re.MULTILINE)
    return found[1] if found else ""


def report(results: dict[tuple[str, str], dict], *, modules: list[str]) -> int:
    """Print a table and the survivors without a reason; return the exit code."""
    reasons = justified()
    print(f"{'module':<20}{'mutants':>9}{'killed':>9}{'timeout':>9}{'justified':>11}{'survived':>10}{'s each':>8}")
    survivors = []
    for module in modules:
        rows = [row for row in results.values() if row["module"] == module]
        counts = collections.Counter(
            "justified" if row["outcome"] == "survived" and (module, row["mutant"]) in reasons else row["outcome"]
            for row in rows
        )
        survivors += [row for row in rows if row["outcome"] == "survived" and (module, row["mutant"]) not in reasons]
        each = sum(row["seconds"] for row in rows) / max(len(rows), 1)
        print(
            f"{module:<20}{len(rows):>9}{counts['killed']:>9}{counts['timeout']:>9}{counts['justified']:>11}"
            f"{counts['survived']:>10}{each:>8.1f}"
        )
    for row in survivors:
        print(f"survived: {row['module']}.py:{row['line']} {row['mutant']}")
    return 1 if survivors else 0


if __name__ == "__main__":
    from mutants import find_mutants

    sys.exit(main())
