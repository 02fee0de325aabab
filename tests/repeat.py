"""Run a command a number of times while another process keeps a core busy; stop at the first failure.

python tests/repeat.py 20 python -m pytest tests
"""

from __future__ import annotations

import subprocess
import sys
import time


def main(times: int, command: list[str]) -> int:
    """Return the exit status of the run that failed, or 0; what it printed is shown then."""
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for number in range(1, times + 1):
            began = time.monotonic()
            run = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            last = run.stdout.rstrip().rpartition("\n")[2]
            print(f"{number} of {times}: {last} ({time.monotonic() - began:.0f} s)", flush=True)
            if run.returncode:
                print(run.stdout, f"failures: 1 of {number} runs", sep="\n")
                return run.returncode
    finally:
        burner.kill()
        burner.wait()
    print(f"failures: 0 of {times} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
