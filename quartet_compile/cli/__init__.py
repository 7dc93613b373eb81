"""The command `quartet`: what a user wants to know before, and without, writing code.

`main` reads the command line; `doctor`, `explain` and `scripts` (bench and demo) are the commands; `check`, `machine`, `gpus`, `operators`
and `step` are what `doctor` looks at, `loading` finds the model of `explain`, `output` writes for terminals, pipes and programs.

Nothing here imports PyTorch at its top: `quartet doctor` has to run where PyTorch does not.
"""
