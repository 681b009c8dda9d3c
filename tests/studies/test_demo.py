"""demo.command, by which demo.py and tables.py run their stages."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

STAGE = """
import pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(0.3)
    pathlib.Path({path!r}).write_text("checkpoint")
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
print("ready", flush=True)
time.sleep(60)
"""
MAIN = """
from t3d.common.errors import run_main
from studies.storymath.demo import command
run_main(lambda: command('python', '-c', {stage!r}))
"""


@pytest.mark.parametrize("number, to_group", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_told_to_stop_it_waits_for_its_stage(tmp_path, number, to_group):
    """SIGTERM reaches the stage through it; Ctrl-C reaches both, and the stage has the time that it takes."""
    path = tmp_path / "written"
    line = [sys.executable, "-c", MAIN.format(stage=STAGE.format(path=str(path)))]
    main = subprocess.Popen(
        line,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while main.stdout.readline().strip() != "ready":
        assert main.poll() is None
    if to_group:
        os.killpg(main.pid, number)
    else:
        main.send_signal(number)
    _, told = main.communicate(timeout=30)
    assert main.returncode == 128 + number and "Traceback" not in told
    assert path.read_text() == "checkpoint"
