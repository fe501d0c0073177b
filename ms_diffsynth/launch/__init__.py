"""The launcher: MindSpore's scheduler and N workers, supervised by one process that ends all of them or none.

    job.py        what is started: commands, variables, files
    ports.py      a free port; whether machines find each other
    front.py      the process the user sees; it does nothing but hand signals on
    supervise.py  the loop: who is dead, stopped or hung, and what follows
    process.py    one process and its group
    pulse.py      what the launcher makes of heartbeats
    screen.py     rank 0 on the user's terminal
    words.py      the last exception of a log
    worker.py     what a worker calls: `beat`

The collectives, and how workers find each other, are MindSpore's own: the launcher sets the variables that msrun sets.
Nothing here imports MindSpore.
"""
