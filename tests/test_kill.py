"""`kill -9` at random moments costs no more than the steps since the last save: the end is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT, World
from test_resume import SCRIPTS, losses, weights

KILLS, STEPS = 20, 80


def test_twenty_kills_change_nothing(world: World, tmp_path: Path) -> None:
    command = [sys.executable, "tests/killed.py", str(world.root), str(tmp_path), str(KILLS), str(STEPS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    hits = json.loads(done.stdout)
    print(hits)
    for name in SCRIPTS:
        whole, killed = tmp_path / name / "whole", tmp_path / name / "killed"
        assert hits[name]["kills"] == KILLS
        one, two = weights(whole, name), weights(killed, name)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
        assert losses(whole) == losses(killed) and [step for step, _ in losses(killed)] == list(range(1, STEPS + 1))
        assert sorted(p.name for p in (killed / "checkpoints").iterdir() if p.is_file()) == sorted(
            f"{name}.{kind}" for kind in ("pt", "state.pt", "state.prev.pt")
        )
    for what in ("starting", "saving"):  # about 12 and 15 of the 60
        assert sum(hit[what] for hit in hits.values()) >= 1, hits
