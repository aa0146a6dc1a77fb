"""The schema of every configuration, its checks, and the entry point around Hydra."""
