"""``ms-diffsynth template``: look at a template's code without running it, or pack a trained one to share it."""
from __future__ import annotations

import argparse
import sys

from ms_diffsynth.config.flags import path_argument
from ms_diffsynth.errors import TemplateError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two actions: ``show`` and ``pack``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print model.py and its sha256; its code does not run")
    show.add_argument("template", type=path_argument, metavar="TEMPLATE", help="folder of the template")
    pack = actions.add_parser("pack", help="write model.py and all weights into a new folder")
    pack.add_argument("template", metavar="TEMPLATE", help="folder of the template, or owner/name: on a hub")
    pack.add_argument("checkpoint", type=path_argument, metavar="CHECKPOINT",
                      help="safetensors file that training wrote")
    pack.add_argument("output", type=path_argument, metavar="OUTPUT", help="new folder")
    add_trust_flags(pack)


def add_trust_flags(parser: argparse.ArgumentParser) -> None:
    """The two flags by which a user trusts a template's code."""
    parser.add_argument("--trust_template_code", action="store_true", help="run the template's model.py, which is code")
    parser.add_argument("--trust_template_sha256", help="run it only with this SHA-256 (one each, with commas)")


def execute(args: argparse.Namespace) -> int:
    """Show or pack."""
    from ms_diffsynth.template.code import read_code

    if args.action == "show":
        code = read_code(args.template)
        try:
            sys.stdout.write(code.source.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise TemplateError(f"{code.path} is not UTF-8 ({error}): expected Python code.") from error
        sys.stderr.write(f"{code}\n")
        return 0
    from ms_diffsynth import runtime
    from ms_diffsynth.template.package import pack_template

    runtime.configure("pynative", None)
    folder = pack_template(args.template, args.checkpoint, args.output, trust_template_code=args.trust_template_code,
                           trust_template_sha256=args.trust_template_sha256)
    sys.stdout.write(f"{folder}\n")
    return 0
