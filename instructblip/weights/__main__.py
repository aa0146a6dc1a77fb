"""Convert a trained model from one format to another, and show that it computes the same.

    python -m instructblip.weights Salesforce/instructblip-vicuna-7b models/vicuna_7b --to native
    python -m instructblip.weights instruct_blip_vicuna7b_trimmed.pth models/vicuna_7b --to huggingface --llm vicuna_7b
    python -m instructblip.weights outputs/train/mine mine.pth --to lavis
    python -m instructblip.weights outputs/train/mine models/mine --to huggingface --adapters separate
    python -m instructblip.weights blip2_pretrained.pth models/blip2_retrieval --to huggingface
    python -m instructblip.weights outputs/train/mine models/mine --to huggingface --card --push USER/NAME

SOURCE is a run or a checkpoint of ours, a transformers folder or hub id (of InstructBLIP, BLIP-2's stages, LLaVA or BLIP),
or a .pth file of LAVIS (of the same but LLaVA) or of BLIP's own repository. Prints the largest absolute difference between
SOURCE and the re-opened TARGET at each stage, on a fixed random input, in the types that they are loaded in; of a model in
half precision also in float32. --card writes a model card into TARGET, and --push sends it to the Hugging Face hub, private
unless --public. Ends with status 1, and without TARGET, when a difference is above the bound; with 2 and one line when
something has to be mended first.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

FORMATS = ("huggingface", "lavis", "native")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _parse(arguments)
    from instructblip.weights.conversion import convert  # of which help needs nothing

    return convert(options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    lines = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m instructblip.weights",
        description=lines[0],
        epilog=lines[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET", help="folder, or .pth file with --to lavis")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument(
        "--llm", metavar="NAME", help="name in configs/llm, or the path of a YAML; a .pth file needs it"
    )
    parser.add_argument("--llm-path", metavar="PATH", help="folder with that language model")
    parser.add_argument("--vision-path", metavar="PATH", help="the frozen ViT: a folder, or LAVIS's eva_vit_g.pth")
    parser.add_argument("--qformer-path", metavar="PATH", help="folder with BERT's config.json and tokenizer")
    parser.add_argument("--adapter", metavar="PATH", help="folder in peft's format, whose adapters SOURCE gets")
    parser.add_argument(
        "--adapters",
        choices=("merged", "separate"),
        default="merged",
        help="with --to huggingface: into the weights, or into TARGET/adapter for peft (default %(default)s)",
    )
    parser.add_argument("--bound", type=float, default=1e-4, help="largest difference in float32 (default %(default)g)")
    parser.add_argument("--overwrite", action="store_true", help="replace a TARGET, or a repository, of the same kind")
    parser.add_argument("--card", action="store_true", help="write TARGET/README.md, a model card")
    parser.add_argument(
        "--results", metavar="PATH", type=Path, help="evaluation whose scores it has (a run's own is found)"
    )
    parser.add_argument("--licence", metavar="ID", help="of the model, as the hub calls it, such as apache-2.0")
    parser.add_argument("--push", metavar="USER/NAME", help="send TARGET to the Hugging Face hub")
    parser.add_argument("--public", action="store_true", help="for everybody to see; else what is sent is private")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
