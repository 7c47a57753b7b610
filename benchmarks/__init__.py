"""The time of a step, of ours and of others', and its share of a training run."""
