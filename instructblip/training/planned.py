"""What `plan=true` prints: what a run would need, with nothing opened or loaded."""

from rich.console import Console

from instructblip.config.schema import TrainConfig
from instructblip.distributed import Ranks
from instructblip.training.budget import matched
from instructblip.training.checks import check_objectives
from instructblip.training.plan.parts import make_plan
from instructblip.training.plan.start import plan_start
from instructblip.training.plan.tables import plan_summary, plan_table


def print_plan(config: TrainConfig, console: Console) -> int:
    """Print the plan of a run, by the first of torchrun's processes; 0, or 1 when the run does not fit.

    Raises:
        UserError: anything in the configuration that a run would refuse before it opens a file.
    """
    check_objectives(config)
    config, said = matched(config)
    plan = make_plan(config)
    if Ranks.from_environment().is_first:
        console.print(plan_table(plan, config.name))
        for line in (*plan_summary(plan), *plan_start(config, plan), *said):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0 if plan.fits else 1
