"""Which weights stay, given scores and a target; knows nothing of models."""
