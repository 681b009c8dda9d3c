"""Boxes for untrusted Python programs: isolated, limited processes of which nothing is left afterwards.

    walls         a program sees                      made by
    "namespaces"  the standard library, numpy, /tmp   this package, as root or as anybody, from Linux namespaces
    "bubblewrap"  the same                            bwrap, where the machine grants namespaces to it alone
    "rlimits"     all files of its user               nothing: refused unless asked for

A test run finds the walls that this machine grants (`isolation`). In all of them a seccomp filter refuses system calls
that no answer needs, such as network sockets. The environment is empty, and the kernel limits each process. Every 20 ms
a supervisor checks the CPU time, the resident memory and the number of processes of the whole tree (`inside/box.py`).
So memory may exceed its limit by the amount touched in 20 ms, plus /tmp, which is memory.

Within its limits a program runs like `LANG=C.UTF-8 python answer.py`, in a folder that holds only answer.py:
`inside/box.py` starts a new interpreter. Interpreter, time zone and numpy are this machine's (`world`). Other
differences to a run without a box are the walls themselves: no /proc, no shell, no network, no other packages.
"""

from t3d.grading.sandbox.boxes import Box, Limits, SandboxError, attend, run_script
from t3d.grading.sandbox.choice import can_try, isolation, probe, walls

__all__ = ["Box", "Limits", "SandboxError", "attend", "can_try", "isolation", "probe", "run_script", "walls"]
