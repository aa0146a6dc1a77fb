"""Evaluation: run a frozen protocol, score it, give its uncertainty, and write the report."""
