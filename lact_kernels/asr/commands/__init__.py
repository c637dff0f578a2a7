"""The commands of `lact-asr`: each module adds its arguments to a parser, and runs with what was parsed."""
