"""The ``synthward`` command. Imports are inside the commands, so that ``--help`` answers at once."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from common.errors import ConfigError, FederationError
from deploy.arguments import add_debug, named_path, positive, seed
from deploy.audit_commands import add_audit, with_run
from deploy.site_commands import add_site_commands

DEFECT, INTERRUPTED = 1, 130
EXAMPLES = """examples:
  synthward data phantom phantoms --sites 3 --patients 40   make three phantom hospitals
  synthward data check phantoms/site-1                      see what a site would accept and refuse
  synthward simulate --phantom 60 --sites 3 --out runs/try  train on phantoms, no data needed
  synthward simulate study.toml --site a=DIR --site b=DIR   train on the data of two sites
  synthward simulate --resume runs/try                      go on after Ctrl-C
  synthward audit runs/try                                  check them for memorised patients
  synthward generate runs/try --count 100 --out images      draw synthetic images
  synthward site init FOLDER --name north --data SCANS      write a site's settings; then site keygen
  synthward policy init FOLDER --epsilon 8 --delta 1e-5     write its policy and ledger; then site pin
  synthward ledger show FOLDER                              what is spent and left
  synthward roster make north=a.pub south=b.pub --out roster.json

exit status: 0 done, 1 a defect (please report it), 2 wrong usage or configuration, 3 refused by a site,
4 the federation failed, 5 audited and not to be released, 130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the command; always exits."""
    parser = _parser()
    options = parser.parse_args(with_run(list(sys.argv[1:] if arguments is None else arguments)))
    # Before torch is imported: threads that wait by spinning make a busy machine several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    try:
        options.run(options)
    except FederationError as error:
        _fail(str(error), error.exit_status, options.debug)
    except KeyboardInterrupt as error:
        _fail(str(error) or "Interrupted.", INTERRUPTED, debug=False)
    except BrokenPipeError:  # `synthward ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        _fail(
            f"The operating system refused{where}: {error.strerror or error}. Check the path, rights and space.",
            2,
            options.debug,
        )
    except Exception as error:
        text = f"Unexpected {type(error).__name__}: {error}. This is a defect of Synthward: report what --debug shows."
        _fail(text, DEFECT, options.debug)
    sys.exit(0)


def _fail(text: str, status: int, debug: bool) -> NoReturn:
    if debug:
        raise
    print(f"synthward: {text}", file=sys.stderr)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="synthward",
        description="Hospitals train a GAN together with patient-level differential privacy; no image leaves them.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    parser.set_defaults(debug=False)
    add_debug(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_data(commands)
    _add_simulate(commands)
    _add_generate(commands)
    add_audit(commands)
    add_site_commands(commands)
    return parser


# ---------------------------------------------------------------- data


def _add_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    data = commands.add_parser("data", help="make phantoms, or check a site's data")
    parts = data.add_subparsers(required=True, metavar="COMMAND")

    phantom = parts.add_parser(
        "phantom",
        help="write BIDS folders of 3D phantom brains, one a site",
        epilog="example: synthward data phantom phantoms --sites 3 --patients 40",
    )
    phantom.add_argument("folder", type=Path, metavar="DIR", help="folder to write; its sites must not exist")
    phantom.add_argument("--sites", type=positive, default=3, metavar="N", help="number of sites (default 3)")
    phantom.add_argument("--patients", type=positive, default=40, metavar="N", help="patients a site (default 40)")
    phantom.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="other seeds give other patients (default 0)"
    )
    add_debug(phantom)
    phantom.set_defaults(run=_data_phantom)

    check = parts.add_parser(
        "check",
        help="show what a site would accept and refuse, and why",
        epilog="example: synthward data check phantoms/site-1 --json. Reasons name files: for the site's eyes.",
    )
    check.add_argument(
        "folder", type=Path, metavar="PATH", help="folder of images: BIDS, PNG/JPEG with a table, or DICOM"
    )
    check.add_argument(
        "--study", type=Path, metavar="STUDY.toml", help="check labels and minimum patients of this study"
    )
    check.add_argument("--record-is-patient", action="store_true", help="count every image as a patient of its own")
    check.add_argument("--json", action="store_true", help="print JSON")
    add_debug(check)
    check.set_defaults(run=_data_check)


def _data_phantom(options: argparse.Namespace) -> None:
    from deploy.phantoms import write_bids

    for folder in write_bids(options.folder, sites=options.sites, patients=options.patients, seed=options.seed):
        print(folder)


def _data_check(options: argparse.Namespace) -> None:
    from deploy.data_check import check

    check(options.folder, options.study, record_is_patient=options.record_is_patient, as_json=options.json)


# ---------------------------------------------------------------- simulate


def _add_simulate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    simulate = commands.add_parser(
        "simulate",
        help="train a federation of several sites on this machine",
        epilog="Without STUDY.toml the built-in study for the kind of data is used (phantom, brain T1, chest X-ray).",
    )
    simulate.add_argument("study", nargs="?", type=Path, metavar="STUDY.toml", help="the study")
    source = simulate.add_argument_group("data (one of these)")
    source.add_argument(
        "--site", action="append", type=named_path, metavar="NAME=PATH", help="one site's data; repeat it"
    )
    source.add_argument("--data", type=Path, metavar="PATH", help="one data set, split over --sites by patient")
    source.add_argument("--phantom", type=positive, metavar="PATIENTS", help="phantom patients at each of --sites")
    source.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run that was interrupted")
    simulate.add_argument(
        "--sites", type=positive, metavar="N", help="number of sites for --data and --phantom (default 3)"
    )
    simulate.add_argument(
        "--rounds", type=positive, metavar="N", help="rounds instead of the study's; noise is planned anew"
    )
    simulate.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default runs/NAME-OF-STUDY)")
    simulate.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="where to compute (default auto; as before with --resume)"
    )
    simulate.add_argument(
        "--seed", type=seed, metavar="N", help="seed of weights and latents; never of noise or sampling"
    )
    simulate.add_argument(
        "--record-is-patient", action="store_true", help="count every image as a patient; reports say so"
    )
    add_debug(simulate)
    simulate.set_defaults(run=_simulate)


def _simulate(options: argparse.Namespace) -> None:
    sources = [name for name in ("site", "data", "phantom", "resume") if getattr(options, name) is not None]
    if len(sources) != 1:
        raise ConfigError(
            f"Expected exactly one of --site, --data, --phantom and --resume, found {len(sources)}.",
            "See `synthward simulate --help`.",
        )
    if sources[0] in ("site", "resume") and options.sites is not None:
        raise ConfigError(f"--sites does not go with --{sources[0]}.", "Leave it out.")
    from deploy import runs

    study = None if options.resume else runs.choose_study(options)
    out = options.resume if study is None else options.out or Path("runs") / study.name
    try:
        if study is None:
            runs.resume_run(options)
        else:
            runs.new_run(options, study, out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_after_interruption(out)) from None
    print(out / "report.html")


def _after_interruption(out: Path) -> str:
    from deploy.simulate import can_resume

    if not can_resume(out):
        return "Interrupted before training began; nothing was spent. Start again with another --out."
    return f"Interrupted; completed rounds are kept. Go on with: synthward simulate --resume {out}"


# ---------------------------------------------------------------- generate


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    generate = commands.add_parser(
        "generate",
        help="draw synthetic images from a run's generator",
        epilog="example: synthward generate runs/demo --count 100 --out images --format png",
    )
    generate.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a run")
    generate.add_argument("--count", type=positive, required=True, metavar="N", help="number of images")
    generate.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the images")
    generate.add_argument("--label", metavar="L", help="only this label (default: all labels in turn)")
    generate.add_argument("--format", choices=("png", "nifti"), default="png", help="file format (default png)")
    generate.add_argument("--seed", type=seed, default=0, metavar="N", help="other seeds give other images (default 0)")
    add_debug(generate)
    generate.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> None:
    from deploy.generate import generate

    print(generate(options.run_folder, options.count, options.out, options.label, options.format, options.seed))


if __name__ == "__main__":
    main()
