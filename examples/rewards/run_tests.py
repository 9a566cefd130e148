"""A reward from running code: the share of a row's tests that the completion passes.

Reads a sample as JSON from standard input, with the column `tests`: a list of statements such as
"assert double(2) == 4". Each runs in a Python of its own, after the completion (or the first block
of code in it). Writes {"reward": share, "compiles": 0 or 1}. It bounds each test by time alone:
memory, processes and files are the affair of `CommandReward`, which starts it.

    rlhf-flows train grpo model=... prompts=... \\
        'reward.command=[python, examples/rewards/run_tests.py]' reward.on_failure=score
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid

TEST_TIMEOUT_S = 1.0


def code_of(completion: str) -> str:
    """The first fenced block, or all of it."""
    block = re.search(r"```(?:python)?\n(.*?)```", completion, re.DOTALL)
    return block.group(1) if block else completion


def passes(code: str, test: str) -> bool:
    # A word that the code does not know: it may print and exit early, and has passed nothing.
    word = uuid.uuid4().hex
    program = f"{code}\n{test}\nprint({word!r})"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", program],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TEST_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and done.stdout.endswith(f"{word}\n".encode())


def main() -> None:
    row = json.load(sys.stdin)
    code, tests = code_of(row["completion"]), row["tests"]
    try:
        compile(code, "completion", "exec")
    except (SyntaxError, ValueError):
        print(json.dumps({"reward": 0.0, "compiles": 0}))
        return
    passed = sum(passes(code, test) for test in tests)
    print(json.dumps({"reward": passed / len(tests), "compiles": 1}))


if __name__ == "__main__":
    main()
