"""One command that measures everything on a GPU within minutes: ``python -m studies.gpu``, or ``make gpu-report``."""
