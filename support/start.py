"""Import this before PyTorch and transformers, because their imports take seconds. It prints a first line,
and lets Ctrl-C end the script at once. It does nothing if the main program is not a script of this
repository."""

import os
import signal
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def stop(*_):
    print("\ninterrupted", file=sys.stderr)
    os._exit(130)  # a KeyboardInterrupt would show the traceback of an import


main_file = getattr(sys.modules["__main__"], "__file__", None)
if main_file and REPOSITORY in list(Path(main_file).resolve().parents)[:2]:
    print("loading PyTorch and transformers …", file=sys.stderr, flush=True)
    signal.signal(signal.SIGINT, stop)  # run_script() sets Python's own handler again
