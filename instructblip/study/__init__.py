"""Studies: a question, conditions, seeds; their runs, and the table and plot that answer it.

    python -m instructblip.study study=sampling
    python -m instructblip.study study=sampling form=short
    python -m instructblip.study study=sampling hydra/launcher=slurm hydra.launcher.partition=gpu jobs=8

`configs/study/NAME.yaml` says what is compared. Each run is a process of its own with a folder of its own, named after what
decides its result: its configuration, its cards and the runs that it starts from. So a study that was killed goes on with
the same command, a changed file makes the affected runs anew and no others, and two studies that have a run in common make
it once. docs/studies.md, "A study of your own", says more.

plan.py turns the file into runs; scheduling.py and places.py carry them out, carrying.py is what happens in the process of
one; findings.py reads and compares them; report.py and plot.py write.
"""
