"""SDAR (arXiv 2510.06303), and TraDo (arXiv 2509.06949), which is trained from it and keeps its model type."""

from t3d.models.family import Family


class Sdar(Family):
    model_types = {"sdar": "sdar"}  # our own registration, on Qwen3
