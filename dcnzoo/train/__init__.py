"""The trainer: image classification on accelerate with timm's data, augmentation, optimizers and schedules.

main.py        one run from its configuration to its summary
config.py      every setting, typed, from YAML and command line
data.py        data sets, loaders, what happens to a batch
model.py       the network and its optimizer
loop.py        epochs, steps, validation, interruption
checkpoint.py  what a run leaves on disk, and how it resumes
report.py      progress, CSV, curves
errors.py      what ends a run with one line
"""
