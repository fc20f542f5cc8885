"""The trainer: image classification on accelerate with timm's data, augmentation, optimizers, schedules and losses.

main.py        one run from its configuration to its summary
arguments.py   the command line and YAML files       config.py    every setting, typed
launch.py      accelerate's engine                   assemble.py  puts a run together
data.py        data sets, loaders, batches           samples.py   images one by one, and their order
shards.py      few large files instead of many       unreadable.py  images that cannot be read
model.py       the network and its optimizer         task.py      the loss, with a teacher or without
loop.py        epochs, updates, interruption         evaluate.py  validation
state.py       where a run is                        checkpoint.py  what it leaves on disk, and how it resumes
health.py      numbers that are not finite; offsets  signals.py   SIGINT and SIGTERM
report.py      progress, CSV, trackers               summary.py   what remains to be seen in the end
plan.py        --dry-run                             errors.py    what ends a run with one line
"""
