"""Helpers of the tests. What is where:

tiny             parts and models with random weights, pictures, questions; milliseconds, nothing fetched
vectors          numbers that LAVIS computed, models with the weights it computed them from, a like one of random weights
connectors       tiny models of other connectors than the Q-Former, transformers folders of LLaVA
blip2            tiny models of BLIP-2's stages, ours and transformers' folders of them
parity           folders that transformers and this code open, certificates, a small configs/
families         tiny language models of every family in configs/llm, as transformers folders
runs             the entry points on tiny parts and data: in this process, or as real processes that start fast
preload          what the server of those processes imports before it forks them
ranks            a function on several ranks that meet over gloo
stage1           training steps of BLIP-2's first stage, on LAVIS's samples or tiny ones
blip_training    training steps of BLIP, likewise
callbacks        Hydra callbacks that print what jobs return
untrained        a run that was never trained, as a checkpoint folder
mixtures         small prepared training splits, written so that single samples can be damaged
own_data         pictures, questions and a short card of one's own
own_tables       rows of one's own in every form that is read: tables, dialogues, tars
tars             tars as other writers make them, and those of whoever means harm
streams          tars of img2dataset with a card, and streams over them for any number of readers
raw_files        raw folders in official layouts: the cases of tests/data/readers, with real small images
web              shards of web pictures with their texts, and capfilt on them
all_datasets     raw folders and shards of all datasets that have files of their own
synthetic_tasks  made-up samples of every evaluated dataset, a model that knows the answers, one that guesses
studies          small studies on the tiny world, their runs in this process; the shipped ones in their short form
stored           results.json and predictions.jsonl as evaluate.py leaves them
videos           videos whose frames have known colours
servers          a file server on the loopback, as good or as bad as a test needs it
browser          a page in headless Chromium, driven by clicks and keys
"""
