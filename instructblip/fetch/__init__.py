"""Bytes onto the disk: parts of models, raw data, shards from elsewhere. Nothing here knows what they mean."""
