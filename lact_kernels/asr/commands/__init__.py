"""The commands of `lact-asr`. Importing one imports nothing heavy, so that its help is quick."""
