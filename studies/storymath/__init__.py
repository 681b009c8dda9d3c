"""The embedded benchmark: StoryMath word problems, their tokenizer and the configuration of the tiny SDAR teacher."""
