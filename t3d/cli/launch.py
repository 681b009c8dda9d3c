"""`t3d train --launch FILE ...`: a command in the processes of an accelerate configuration.

It works as `accelerate launch --config_file FILE -m t3d train ...`, with two differences. Shipped configurations are
found by their names. If a process fails, only that process prints its error, and the launcher ends with its exit code.
"""

import logging
import os
import signal
import subprocess
from collections.abc import Sequence

from t3d.common import paths
from t3d.common.errors import UserError


def launch(file: str, command: str, arguments: Sequence[str]) -> int:
    """Run ``t3d <command> <arguments>`` in the processes of the accelerate configuration ``file``; the exit code.

    Raises:
        UserError: no such file.
    """
    config = paths.resolve(file)
    if not config.is_file():
        raise UserError(f"--launch {file}: no such file; give an accelerate configuration", "--launch")
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if not load_config_from_file(str(config)).use_cpu:  # accelerate tells it to a single process only
        os.environ["ACCELERATE_USE_CPU"] = "False"
    # On Ctrl-C the processes save their state and stop, and this process waits for them.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        launch_command(
            launch_command_parser().parse_args(["--config_file", str(config), "-m", "t3d", command, *arguments])
        )
        code = 0
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except SignalException as error:
        code = -error.sigval
    finally:
        signal.signal(signal.SIGINT, before)
    return 128 - code if code < 0 else code
