"""A page to try checkpoints on: a picture, a prompt, the answer as it is written.

    python -m instructblip.demo checkpoint=outputs/train/demo

`asking` asks a checkpoint, `inputs` keeps what a visitor gives within bounds, `heat` draws where queries look, `examples`
finds pictures to begin with, `page` is the page, made with gradio.
"""
