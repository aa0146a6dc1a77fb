"""From a dataset's official files to the samples a model is trained and evaluated on.

`cards` says what a dataset is, `readers` understand its raw files, `prepare` writes `shards`; `mixture`, `templates`,
`transforms` and `loader` turn shards into batches.
"""
