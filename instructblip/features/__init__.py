"""Features of a folder of pictures or of a file of texts, for use elsewhere.

    python -m instructblip.features checkpoint=RUN images=FOLDER out=features.safetensors

`out` has a row for each picture, in the order of their paths: `image` (N, Q, D), states of BLIP-2's queries or BLIP's image
tokens, and `image_projected` (N, Q, E), of unit length, Q = 1 for BLIP; and one for each line of `texts`: `text_projected`
(M, E). The similarity of picture and text is the largest product of the text with a projected row
(`models.pairs.similarities`). Metadata: the paths as `images`, the lines as `texts`, both JSON lists.
"""
