"""Bringing pretrained weights and packaged data in."""
