"""The training side: a run whose calls return at once, a journal that survives, and an uploader that makes versions."""
