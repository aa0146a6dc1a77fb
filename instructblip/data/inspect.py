"""Look at a mixture before training on it: its shares, some of its samples, and how fast the loader alone is.

python -m instructblip.data.inspect mixture=held_in data.shards=/data/shards samples=8 workers=8
"""

from rich.console import Console
from rich.table import Table

from instructblip.cli import main
from instructblip.config import InspectConfig, check_at_least
from instructblip.data.loader import MixtureDataset, decoded
from instructblip.data.timing import loading_parts, loading_seconds
from instructblip.errors import UserError
from instructblip.prepared import shards_folder
from instructblip.training.data import check_data, make_mixture, mixture_cards, open_sets
from instructblip.training.tables import shares_planned


def inspect(config: InspectConfig, console: Console) -> None:
    """Print the plan's table, the first samples of the sequence, and the loader's rate.

    Raises:
        UserError: a setting that cannot be, data that is missing or damaged.
    """
    _check(config)
    cards = mixture_cards(config.mixture)
    sets = open_sets(cards, shards_folder(cards, config.data, console))
    mixture = make_mixture(config.mixture, sets, [config], seed=config.seed)
    console.print(shares_planned(mixture, [config]))
    dataset = MixtureDataset(mixture, sets, decoded(config.data.transform, config.image_size))
    for position in range(config.samples):
        _show(dataset, position, console)
    console.print(_timing(dataset, config))


def _check(config: InspectConfig) -> None:
    check_data(config.data)
    numbers = {
        name: getattr(config, name) for name in ("image_size", "steps", "batch_size", "micro_batch_size", "timed")
    }
    check_at_least(1, numbers)
    check_at_least(0, {"samples": config.samples, "data.workers": config.data.workers})
    if config.data.cache_features:
        raise UserError("data.cache_features=true leaves nothing to decode; inspect with data.cache_features=false")


def _show(dataset: MixtureDataset, position: int, console: Console) -> None:
    (sample, image), lost = dataset.read(position)
    lines = [
        f"{position}: {sample.id}",
        f"  template     {sample.template!r}",
        f"  instruction  {sample.instruction!r}",
        f"  target       {sample.target!r}",
        f"  image        {len(image)} x {image.shape[2]} x {image.shape[3]} pixels",
        *(f"  in place of  {missing.key}: {missing.reason}" for missing in lost),
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _timing(dataset: MixtureDataset, config: InspectConfig) -> Table:
    workers = config.data.workers
    whole = loading_seconds(dataset, config.timed, workers)
    parts = loading_parts(dataset, config.data.transform, config.image_size, config.timed, workers)
    table = Table(title=f"the loader alone: {1 / whole:,.0f} samples/s with {workers} workers")
    for name in ("part", "ms a sample and process", "share %"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, seconds in parts.items():
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{100 * seconds / sum(parts.values()):.0f}")
    return table


if __name__ == "__main__":
    main("inspect", InspectConfig, inspect)
