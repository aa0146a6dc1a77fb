"""The tables of a mixture that a run prints: the shares of its datasets before and after training."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from instructblip.data.mixture import Mixture, share_table
from instructblip.training.datasets import Steps


def shares_planned(mixture: Mixture, phases: Sequence[Steps]) -> Table:
    """What a run will draw from each dataset."""
    samples = sum(phase.steps * phase.batch_size for phase in phases)
    table = Table(title=f"{samples:,} samples in {sum(phase.steps for phase in phases):,} steps")
    table.add_column("dataset")
    for name in ("records", "multiplier", "share %", "samples", "epochs"):
        table.add_column(name, justify="right")
    for row in share_table(mixture, samples):
        table.add_row(
            str(row["dataset"]),
            f"{row['records']:,}",
            f"{row['multiplier']:g}",
            f"{100 * float(row['share']):.1f}",
            f"{float(row['samples']):,.0f}",
            f"{row['epochs']:.2f}",
        )
    return table


def shares_realised(mixture: Mixture, phases: Sequence[Steps], lost: Mapping[str, int]) -> Table:
    """What a run has drawn from each dataset, and how many draws of it were lost and replaced."""
    samples = sum(phase.steps * phase.batch_size for phase in phases)
    table = Table(title="shares, planned and realised")
    table.add_column("dataset")
    for name in ("planned %", "realised %", "samples", "lost"):
        table.add_column(name, justify="right")
    for entry, share, count in zip(mixture.entries, mixture.shares, mixture.counts(samples).tolist(), strict=True):
        realised = f"{100 * count / samples:.2f}"
        table.add_row(entry.name, f"{100 * share:.2f}", realised, f"{count:,}", f"{lost.get(entry.name, 0):,}")
    return table
