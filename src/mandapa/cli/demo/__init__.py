"""``mandapa demo``: a real, small training run that is killed and resumed, and what can be done with its history."""
