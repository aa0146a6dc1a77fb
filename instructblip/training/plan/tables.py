"""What a plan prints: a table of what its run would need, and lines on how long it takes and whether it fits."""

from rich.table import Table

from instructblip.training.plan.flops import SampleLengths
from instructblip.training.plan.memory import GIB, USABLE, Plan, what_fits


def plan_table(plan: Plan, name: str) -> Table:
    """By part: GiB on each GPU, in a usual and in the largest pass, and GFLOP of a usual sample, forward and backward."""
    layout = plan.layout
    table = Table(title=f"{name} on {layout.gpus} x {layout.gpu.title}, {layout.kind}", title_justify="left")
    table.add_column("part", no_wrap=True)
    for heading in ("GiB", "at most", "forward", "backward"):
        table.add_column(heading, justify="right", no_wrap=True)
    needed = plan.needed()
    for row in (*plan.memory(), needed):
        if row is needed:
            table.add_section()
        table.add_row(row.part, f"{row.usual / GIB:.2f}", f"{row.largest / GIB:.2f}", "", "")
    table.add_section()
    parts = plan.sample_flops()
    for part in parts:
        table.add_row(part.part, "", "", f"{part.forward / 1e9:,.1f}", f"{part.backward / 1e9:,.1f}")
    whole = sum(part.forward for part in parts), sum(part.backward for part in parts)
    table.add_section()
    table.add_row("a usual sample", "", "", *(f"{value / 1e9:,.1f}" for value in whole))
    return table


def plan_summary(plan: Plan) -> list[str]:
    """What the table counts on, how long the run takes, and whether it fits, in a line each."""
    layout, needed = plan.layout, plan.needed()
    samples, steps = sum(p.steps * p.batch_size for p in plan.phases), sum(p.steps for p in plan.phases)
    rate, usual, longest = samples / plan.hours() / 3600, plan.shape.usual, layout.longest
    lines = [
        "GiB on each GPU, in a usual forward pass and in the largest; GFLOP of a usual sample, without padding. "
        f"A usual sample has {plan.shape.visual_tokens} visual tokens and "
        f"{_texts(usual, 'a prompt', 'an answer', 'a caption')}; the largest pass is full of "
        f"{_texts(longest, 'prompts', 'answers', 'captions')}.",
        f"{rate:,.0f} samples/s at {100 * layout.mfu:.0f}% of {layout.gpu.flops / 1e12:,.0f} bf16 TFLOP/s a GPU: "
        f"{steps:,} steps, {samples:,} samples, {plan.hours():,.1f} hours.",
    ]
    lines.append(
        f"Before that, each process builds the model in main memory: {plan.loading() / GIB:.1f} GiB for every GPU of a node."
    )
    if not layout.autocast:
        lines.append("recipe.precision=fp32 will not reach that by far: the peak is that of bf16.")
    room = USABLE * layout.gpu.memory
    says = f"{needed.largest / GIB:.1f} of {room:.1f} GiB at most, nine tenths of the GPU's"
    if plan.fits:
        return [*lines, f"It fits: {says}."]
    found = what_fits(plan)
    if found is None:
        return [*lines, f"It does not fit: {says}; take GPUs with more memory (plan_gpu=h200) or a smaller llm."]
    change, other = found
    after = f"{other.needed().largest / GIB:.1f} GiB, {other.hours():,.1f} hours"
    return [*lines, f"It does not fit: {says}; with {change} it does ({after})."]


def _texts(lengths: SampleLengths, prompt: str, answer: str, caption: str) -> str:
    """What a sample's texts are called, with their lengths."""
    if not lengths.prompt:
        return f"{caption} of {lengths.answer}"
    return f"{prompt} of {lengths.prompt} and {answer} of {lengths.answer}"
