"""Stages 1 and 2: the teacher decodes a data set, and the answers become a training file."""
