"""The trainer: image classification on accelerate with timm's data, augmentation, optimizers, schedules and losses.

main.py        one run from its configuration to its summary
arguments.py   the command line and YAML files       config.py    every setting, typed
launch.py      accelerate's engine                   assemble.py  puts a run together
data.py        data sets, loaders, batches           samples.py   images one by one, and their order
shards.py      few large files instead of many       streams.py   these from end to end
cores.py       of the processor, and their share     unreadable.py  images that cannot be read
model.py       the network and its optimizer         task.py      the loss, with a teacher or without
schedule.py    the learning rate                     guard.py     numbers that are not finite
loop.py        epochs, updates, interruption         evaluate.py  validation
timing.py      when a run stops, and when it saves   health.py    what offsets and modulation do
state.py       where a run is                        checkpoint.py  what it leaves on disk, and how it resumes
report.py      progress, CSV, trackers               summary.py   what remains to be seen in the end
plan.py        --dry-run                             errors.py    what ends a run with one line
"""
