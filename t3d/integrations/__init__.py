"""Plug-ins of lm-evaluation-harness and SGLang."""
