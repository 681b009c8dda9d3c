"""StoryCode: short Python functions from worded requirements, the embedded counterpart of MBPP and HumanEval."""
