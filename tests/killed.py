"""Kill trainings with SIGKILL at random moments, and resume them. tests/test_kill.py runs this in a process of its own:

    OMP_NUM_THREADS=1 python tests/killed.py WORLD FOLDER KILLS STEPS

Every life is a fork of this process, which has imported everything and computes nothing: starting Python and torch anew
would take seconds. Each model is trained undisturbed into FOLDER/NAME/whole, then through KILLS deaths into
FOLDER/NAME/killed. Prints, as JSON, what the kills hit, and the seed that they were drawn with (SEED=... draws them again).
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

from conftest import World, run_script
from test_resume import SCRIPTS, flags_of

from configs import loop
from configs.run import saved_states


class Life:
    """A training in a forked child; `step` is the one it is in, -1 before the first."""

    def __init__(self, name: str, flags: list[str], log: Path) -> None:
        self._shared, self._log = mmap.mmap(-1, 8), log
        self._shared.write(struct.pack("q", -1))
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
            rate = loop.learning_rate

            def told(step: int, *rest: object) -> float:  # the loop asks for it at the beginning of every step
                struct.pack_into("q", self._shared, 0, step)
                return rate(step, *rest)  # type: ignore[arg-type]

            loop.learning_rate = told  # type: ignore[assignment]
            code = run_script(SCRIPTS[name], *flags)
        finally:
            os._exit(code)

    @property
    def step(self) -> int:
        return struct.unpack_from("q", self._shared)[0]

    def wait_for(self, step: int) -> float:
        """Until it is in `step`; returns the seconds since it began."""
        while self.step < step:
            self._must(os.waitpid(self.pid, os.WNOHANG)[0] == 0, "ended too early")
            time.sleep(0.0005)
        return time.monotonic() - self.began

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._must(os.waitpid(self.pid, 0)[1] == signal.SIGKILL, "ended before its kill")

    def end(self) -> None:
        self._must(os.waitpid(self.pid, 0)[1] == 0, "failed")

    def _must(self, right: bool, what: str) -> None:
        if not right:
            sys.exit(f"a life {what}:\n{self._log.read_text()[-2000:]}")


def torture(name: str, world: World, folder: Path, kills: int, steps: int) -> dict[str, int]:
    """Train `name` for `steps`, killed `kills` times; returns what the kills hit."""
    own = [*map(str, flags_of(name, world)), "--max_steps", str(steps), "--save_every", "1"]
    folder.mkdir(parents=True)
    whole = Life(name, [*world.train_flags(folder / "whole"), *own], folder / "whole.log")
    starting = whole.wait_for(0)
    a_step = (whole.wait_for(steps - 1) - starting) / (steps - 1)  # with its save
    whole.end()

    checkpoints = folder / "killed" / "checkpoints"
    state = checkpoints / f"{name}.state.pt"
    hit = dict.fromkeys(("kills", "starting", "saving", "before_the_first_save"), 0)
    step = 0
    flags = [*world.train_flags(folder / "killed"), *own]
    while hit["kills"] < kills:
        life = Life(name, flags + ["--resume"] * bool(saved_states(state)), folder / "killed.log")
        if hit["kills"] % 5 == 4:  # while it loads and resumes
            time.sleep(random.uniform(0, starting))
        else:
            share = (steps - step) // (kills - hit["kills"])  # half of it at most: no life may come to the end
            life.wait_for(min(step + random.randint(0, share // 2), steps - 2))
            time.sleep(random.uniform(0, a_step))
        life.kill()
        step = max(step, life.step)
        hit["kills"] += 1
        hit["starting"] += life.step < 0
        hit["saving"] += bool(list(checkpoints.glob(".*.tmp")))
        hit["before_the_first_save"] += not saved_states(state)
    Life(name, [*flags, "--resume"], folder / "killed.log").end()
    return hit


def main() -> None:
    root, folder, kills, steps = sys.argv[1:]
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(1 << 32)))
    print("kills drawn with SEED", seed, file=sys.stderr)
    random.seed(seed)
    hits = {name: torture(name, World(Path(root)), Path(folder) / name, int(kills), int(steps)) for name in SCRIPTS}
    print(json.dumps({name: {**hit, "seed": seed} for name, hit in hits.items()}))


if __name__ == "__main__":
    main()
