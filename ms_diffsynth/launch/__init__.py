"""The launcher: MindSpore's scheduler and N workers, supervised, and ended together.

    job.py         what is started: commands, variables, files
    ports.py       a free port; whether machines find each other
    supervise.py   `launch`: starts everything, hands signals on, ends everything
    diagnosis.py   which process is dead, stopped or hung, and the line that says so
    process.py     one process and its group; rank 0's output, copied to ours
    worker.py      heartbeats, written: `beat`, for training loops

How workers find each other, and every collective, are MindSpore's own: the launcher sets the variables that msrun sets.
Nothing here imports MindSpore.
"""
