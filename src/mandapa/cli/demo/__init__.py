"""``mandapa demo``: a small training run, killed and resumed, with its history in a repository."""
