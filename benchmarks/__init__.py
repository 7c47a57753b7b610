"""How long a step takes, ours and others', and what it costs in a training run."""
