"""The model: frozen vision encoder, Q-Former, projection, frozen language model. Knows no files, ranks or logging."""
