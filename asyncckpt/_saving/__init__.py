"""The life of a save: admit, stage, write, commit, evict."""
