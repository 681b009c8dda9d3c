"""Grading of answers, one module per kind of question. Nothing here needs a model or torch."""
