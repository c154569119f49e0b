import subprocess
import sys

HANGS = """
import time
from phibatch.model.engine.watchdog import step, watch
with watch(0.5):
    for _ in range(8):
        time.sleep(0.1)
        step()
with watch(0):
    time.sleep(0.6)
print("still here", flush=True)
with watch(0.5):
    # A long match holds the GIL: no thread of Python's own would get a turn.
    import re
    re.match(r"(a+)+$", "a" * 60 + "b")
print("never")
"""


def test_a_process_that_hangs_in_native_code_ends():
    """One that shows that it goes on lives; one that does not is ended, even where it never lets go of the GIL."""
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stdout == "still here\n"
    assert "Timeout" in done.stderr
