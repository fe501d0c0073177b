"""The command ``ms-diffsynth``: one file a subcommand."""
