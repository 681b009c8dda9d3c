"""Boxes for untrusted Python programs: processes of their own behind walls, limited, and gone afterwards.

    walls         a program sees                      made by
    "namespaces"  the standard library, numpy, /tmp   this package, as root or as anybody, from Linux namespaces
    "bubblewrap"  the same                            bwrap, where the machine grants namespaces to it alone
    "rlimits"     all files of its user               nothing: refused unless asked for

Running a program shows which walls this machine grants (`isolation`). Behind all of them a seccomp filter takes away
system calls that no answer needs, network sockets among them. The environment is empty, and the kernel bounds each
process. A supervisor looks every 20 ms at the CPU time, the resident memory and the number of processes of the whole
tree (`inside/box.py`). The sum of memory is bounded up to what can be touched in 20 ms, plus /tmp, which is memory.

Within its limits a program runs as `LANG=C.UTF-8 python answer.py` runs it, in a folder that holds answer.py alone:
`inside/box.py` starts the interpreter anew. Interpreter, time zone and numpy are this machine's (`world`). Other
differences to a run without a box are the walls themselves: no /proc, no shell, no network, no other packages.
"""

from t3d.grading.sandbox.boxes import Box, Limits, SandboxError, attend, run_script
from t3d.grading.sandbox.choice import can_try, isolation, probe, walls

__all__ = ["Box", "Limits", "SandboxError", "attend", "can_try", "isolation", "probe", "run_script", "walls"]
