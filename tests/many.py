"""Under torchrun: runs one training after another, told as JSON lists of a script's name and flags, in the same processes.

torchrun --nproc_per_node 2 tests/many.py '[["student", "--data", ...], ...]'
"""

from __future__ import annotations

import json
import os
import signal
import sys

from conftest import run_script

from ae import train_ae
from configs import parallel
from student import baseline, train_student

SCRIPTS = {"ae": train_ae, "token_model": baseline, "student": train_student}
SIGNALS = {"die at": signal.SIGKILL, "stop at": signal.SIGTERM}


def signal_at(number: int, step: int) -> None:
    """Let the second process send itself a signal in front of this step, once."""
    backward = parallel.Replicas.backward

    def hit(replicas: parallel.Replicas, loss_of: object, batch: object, now: int, autocast: object) -> object:
        here = parallel.world()
        if (here.rank, now, here.restarts) == (1, step, 0):
            parallel.Replicas.backward = backward  # type: ignore[method-assign]
            os.kill(os.getpid(), number)
        return backward(replicas, loss_of, batch, now, autocast)  # type: ignore[arg-type]

    parallel.Replicas.backward = hit  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    for name, *flags in json.loads(sys.argv[1]):
        if name in SIGNALS:
            signal_at(SIGNALS[name], flags[0])
        elif code := run_script(SCRIPTS[name], *flags):
            sys.exit(code)
