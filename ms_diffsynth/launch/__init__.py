"""The launcher: MindSpore's scheduler and N workers, supervised, and ended together.

    job.py         what is started: commands, variables, files
    ports.py       a free port; whether machines find each other
    front.py       the process that the user sees; it only hands signals on to
    supervise.py   the loop, which starts everything and ends everything
    diagnosis.py   who is dead, stopped or hung, and the line that says so
    process.py     one process and its group
    screen.py      rank 0 on the user's terminal
    pulse.py       heartbeats, read
    words.py       the last exception of a log
    worker.py      heartbeats, written: `beat`, for training loops

How workers find each other, and every collective, are MindSpore's own: the launcher sets the variables that msrun sets.
Nothing here imports MindSpore.
"""
