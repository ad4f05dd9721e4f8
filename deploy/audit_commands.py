"""``synthward audit``: the plan before training, the audit after it, and a hospital's own look at its closest pairs."""

import argparse
from pathlib import Path

from deploy.arguments import add_debug

PARTS = ("plan", "run", "inspect")


def add_audit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    audit = commands.add_parser("audit", help="check synthetic images for memorised patients, without pooling any")
    parts = audit.add_subparsers(required=True, metavar="COMMAND")

    plan = parts.add_parser(
        "plan",
        help="make and sign the plan of a study's audit, before training",
        epilog="example: synthward audit plan study.toml --roster roster.json --key coordinator/identity.key",
    )
    plan.add_argument("study", type=Path, metavar="STUDY.toml", help="the study, with its contract")
    plan.add_argument("--roster", type=Path, metavar="ROSTER", help="the sites' roster (none without secure sums)")
    plan.add_argument("--key", type=Path, required=True, metavar="KEY", help="the coordinator's private key")
    plan.add_argument("--out", type=Path, default=Path("audit-plan.json"), metavar="FILE", help="default %(default)s")
    add_debug(plan)
    plan.set_defaults(run=_plan)

    run = parts.add_parser(
        "run",
        help="audit what a run has made (`synthward audit RUN` is the same)",
        epilog="example: synthward audit runs/demo. One verdict a run: PASS, FAIL or NO RELEASE, in audit.json.",
    )
    run.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a finished run")
    run.add_argument("--plan", type=Path, metavar="PLAN.json", help="the plan that was registered before training")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute (default: as in training)")
    add_debug(run)
    run.set_defaults(run=_run)

    inspect = parts.add_parser(
        "inspect",
        help="write a hospital's own page of its closest pairs, inside its folder only",
        epilog="example: synthward audit inspect /srv/synthward/north. It shows patients: for the hospital's eyes.",
    )
    inspect.add_argument("folder", type=Path, metavar="SITE_FOLDER", help="the site's own folder, with site.toml")
    add_debug(inspect)
    inspect.set_defaults(run=_inspect)


def with_run(arguments: list[str]) -> list[str]:
    """``audit RUN`` as ``audit run RUN``."""
    rest = [word for word in arguments if word != "--debug"]
    if rest[:1] != ["audit"] or len(rest) == 1 or rest[1] in (*PARTS, "-h", "--help"):
        return arguments
    at = arguments.index("audit") + 1
    return [*arguments[:at], "run", *arguments[at:]]


def _plan(options: argparse.Namespace) -> None:
    from deploy.audits import make_plan

    make_plan(options.study, options.roster, options.key, options.out)


def _run(options: argparse.Namespace) -> None:
    from deploy.audits import audit_run

    audit_run(options.run_folder, options.plan, options.device)


def _inspect(options: argparse.Namespace) -> None:
    from deploy.inspection import inspect

    inspect(options.folder.resolve())
