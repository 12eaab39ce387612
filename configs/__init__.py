"""Configuration: dataclasses, YAML and flags; run folders, checkpoints and the training loop."""
