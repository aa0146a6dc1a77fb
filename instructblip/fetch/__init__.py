"""Get files onto the disk: parts of models, raw data, shards from a URL. Nothing here knows what they mean."""
