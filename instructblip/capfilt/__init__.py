"""CapFilt: captions for pictures of the web, and a filter for those captions and for the web's own texts.

    python -m instructblip.capfilt shards=WEB captioner=A filter=B out=WEB_CAPFILT

`variant=blip` (BLIP, section 3.3) draws one caption for each picture; it and the web's texts are kept where the filter says
that they match. `variant=blip2` (BLIP-2, section 3.4) draws ten, ranks them and the web's texts by CLIP, and keeps the best
two. `out` holds prepared shards of the dataset web_capfilt, `captions.json`, which its reader reads, and `report.json`.
docs/data.md, "Captions for web pictures", says more.

A caption is a function of seed, picture and models. Each shard has a journal, and the ranks share its pictures in chunks
that depend on the shard alone, so neither interruptions nor the number of ranks change a byte.
"""
