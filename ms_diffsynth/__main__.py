"""``python -m ms_diffsynth``: the command ``ms-diffsynth``."""
import sys

from ms_diffsynth.cli.main import main

sys.exit(main())
