"""The ``synthward`` command. Imports are inside the commands, so that ``--help`` answers at once."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from common.errors import ConfigError, FederationError

DEFECT, INTERRUPTED = 1, 130
EXAMPLES = """examples:
  synthward data phantom phantoms --sites 3 --patients 40   make three phantom hospitals
  synthward data check phantoms/site-1                      see what a site would accept and refuse
  synthward simulate --phantom 60 --sites 3 --out runs/try  train on phantoms, no data needed
  synthward simulate study.toml --site a=DIR --site b=DIR   train on the data of two sites
  synthward simulate --resume runs/try                      go on after Ctrl-C
  synthward generate runs/try --count 100 --out images      draw synthetic images
  synthward site init FOLDER --name north --data SCANS      write a site's settings; then site keygen
  synthward policy init FOLDER --epsilon 8 --delta 1e-5     write its policy and ledger; then site pin
  synthward ledger show FOLDER                              what is spent and left
  synthward roster make north=a.pub south=b.pub --out roster.json

exit status: 0 done, 1 a defect (please report it), 2 wrong usage or configuration, 3 refused by a site,
4 the federation failed, 130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the command; always exits."""
    parser = _parser()
    options = parser.parse_args(arguments)
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
    _add_debug(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_data(commands)
    _add_simulate(commands)
    _add_generate(commands)
    _add_site(commands)
    _add_roster(commands)
    _add_study(commands)
    _add_policy(commands)
    _add_ledger(commands)
    _add_privacy(commands)
    return parser


def _add_debug(parser: argparse.ArgumentParser) -> None:
    """``--debug`` is understood before and after the command."""
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show a traceback when something fails"
    )


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
    phantom.add_argument("--sites", type=_positive, default=3, metavar="N", help="number of sites (default 3)")
    phantom.add_argument("--patients", type=_positive, default=40, metavar="N", help="patients a site (default 40)")
    phantom.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="other seeds give other patients (default 0)"
    )
    _add_debug(phantom)
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
    _add_debug(check)
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
        "--site", action="append", type=_named_path, metavar="NAME=PATH", help="one site's data; repeat it"
    )
    source.add_argument("--data", type=Path, metavar="PATH", help="one data set, split over --sites by patient")
    source.add_argument("--phantom", type=_positive, metavar="PATIENTS", help="phantom patients at each of --sites")
    source.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run that was interrupted")
    simulate.add_argument(
        "--sites", type=_positive, metavar="N", help="number of sites for --data and --phantom (default 3)"
    )
    simulate.add_argument(
        "--rounds", type=_positive, metavar="N", help="rounds instead of the study's; noise is planned anew"
    )
    simulate.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default runs/NAME-OF-STUDY)")
    simulate.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="where to compute (default auto; as before with --resume)"
    )
    simulate.add_argument(
        "--seed", type=_seed, metavar="N", help="seed of weights and latents; never of noise or sampling"
    )
    simulate.add_argument(
        "--record-is-patient", action="store_true", help="count every image as a patient; reports say so"
    )
    _add_debug(simulate)
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
    generate.add_argument("--count", type=_positive, required=True, metavar="N", help="number of images")
    generate.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the images")
    generate.add_argument("--label", metavar="L", help="only this label (default: all labels in turn)")
    generate.add_argument("--format", choices=("png", "nifti"), default="png", help="file format (default png)")
    generate.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="other seeds give other images (default 0)"
    )
    _add_debug(generate)
    generate.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> None:
    from deploy.generate import generate

    print(generate(options.run_folder, options.count, options.out, options.label, options.format, options.seed))


# ---------------------------------------------------------------- site, roster


def _add_site(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    site = commands.add_parser("site", help="write a site's settings, make its key, pin the roster")
    parts = site.add_subparsers(required=True, metavar="COMMAND")
    init = parts.add_parser(
        "init",
        help="write a site's settings, site.toml",
        epilog="example: synthward site init /srv/synthward/north --name north --data /srv/scans",
    )
    init.add_argument("folder", type=Path, metavar="FOLDER", help="the site's own folder; made when absent")
    init.add_argument("--name", required=True, metavar="NAME", help="the site's name in study and roster")
    init.add_argument("--data", type=Path, required=True, metavar="PATH", help="the site's images, only read")
    _add_debug(init)
    init.set_defaults(run=_site_init)

    keygen = parts.add_parser(
        "keygen",
        help="make the key that signs for a site; its private half never leaves the folder",
        epilog="example: synthward site keygen /srv/synthward/north",
    )
    keygen.add_argument("folder", type=Path, metavar="FOLDER", help="the site's folder; made when absent")
    _add_debug(keygen)
    keygen.set_defaults(run=_site_keygen)

    pin = parts.add_parser(
        "pin",
        help="accept a roster at a site, after comparing its digest by telephone",
        epilog="example: synthward site pin /srv/synthward/north roster.json --digest 5f0c...",
    )
    pin.add_argument("folder", type=Path, metavar="FOLDER", help="the site's folder, with site.toml and its key")
    pin.add_argument("roster", type=Path, metavar="ROSTER", help="the roster from the coordinator")
    pin.add_argument("--digest", required=True, metavar="HEX", help="the digest that the coordinator told you")
    _add_debug(pin)
    pin.set_defaults(run=_site_pin)


def _site_init(options: argparse.Namespace) -> None:
    from deploy.identities import init

    init(options.folder.resolve(), options.name, options.data)


def _site_keygen(options: argparse.Namespace) -> None:
    from deploy.identities import keygen

    keygen(options.folder)


def _site_pin(options: argparse.Namespace) -> None:
    from deploy.identities import pin

    pin(options.folder.resolve(), options.roster, options.digest.strip().lower())


def _add_roster(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    roster = commands.add_parser("roster", help="make and show the list of sites and their public keys")
    parts = roster.add_subparsers(required=True, metavar="COMMAND")
    make = parts.add_parser(
        "make",
        help="write a roster from the sites' public keys",
        epilog="example: synthward roster make north=north.pub south=south.pub --out roster.json",
    )
    make.add_argument("keys", type=_named_path, nargs="+", metavar="NAME=FILE", help="a site's identity.pub")
    make.add_argument("--out", type=Path, required=True, metavar="ROSTER", help="new file")
    _add_debug(make)
    make.set_defaults(run=_roster_make)

    show = parts.add_parser("show", help="print every site's public key and the digest")
    show.add_argument("roster", type=Path, metavar="ROSTER", help="a roster file")
    show.add_argument("--json", action="store_true", help="print JSON")
    _add_debug(show)
    show.set_defaults(run=_roster_show)

    digest = parts.add_parser("digest", help="print the digest that sites compare and pin")
    digest.add_argument("roster", type=Path, metavar="ROSTER", help="a roster file")
    _add_debug(digest)
    digest.set_defaults(run=_roster_digest)


def _roster_make(options: argparse.Namespace) -> None:
    from deploy.identities import make

    make(options.keys, options.out)


def _roster_show(options: argparse.Namespace) -> None:
    from deploy.identities import show

    show(options.roster, as_json=options.json)


def _roster_digest(options: argparse.Namespace) -> None:
    from deploy.identities import digest

    digest(options.roster)


# ---------------------------------------------------------------- study, policy


def _add_study(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    study = commands.add_parser("study", help="print a study's digest, or sign it for sites that trust the signer")
    parts = study.add_subparsers(required=True, metavar="COMMAND")
    digest = parts.add_parser("digest", help="print the digest that a site's policy lists")
    digest.add_argument("study", type=Path, metavar="STUDY.toml", help="the study, with its contracted patients")
    _add_debug(digest)
    digest.set_defaults(run=_study_digest)

    sign = parts.add_parser(
        "sign",
        help="sign a study; writes STUDY.toml.sig beside it",
        epilog="example: synthward study sign study.toml --key coordinator/identity.key (made by site keygen)",
    )
    sign.add_argument("study", type=Path, metavar="STUDY.toml", help="the study, with its contracted patients")
    sign.add_argument("--key", type=Path, required=True, metavar="FILE", help="the signer's private key")
    _add_debug(sign)
    sign.set_defaults(run=_study_sign)


def _study_digest(options: argparse.Namespace) -> None:
    from deploy.policies import study_digest

    study_digest(options.study)


def _study_sign(options: argparse.Namespace) -> None:
    from deploy.policies import study_sign

    study_sign(options.study, options.key)


def _add_policy(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    policy = commands.add_parser("policy", help="write a site's policy, or explain what it says to a study")
    parts = policy.add_subparsers(required=True, metavar="COMMAND")
    init = parts.add_parser(
        "init",
        help="write a commented policy.toml that allows no study yet, and an empty ledger",
        epilog="example: synthward policy init /srv/synthward/north --epsilon 8 --delta 1e-5 --minimum-cohort 3",
    )
    init.add_argument("folder", type=Path, metavar="FOLDER", help="the site's folder, with site.toml")
    init.add_argument("--epsilon", type=float, required=True, metavar="E", help="budget of each patient, for ever")
    init.add_argument("--delta", type=float, required=True, metavar="D", help="at most 1 / (10 x patients)")
    init.add_argument(
        "--minimum-cohort", type=_positive, default=2, metavar="N", help="join no sum over fewer sites (default 2)"
    )
    init.add_argument("--public", action="store_true", help="anyone may have these images: not for a hospital's own")
    _add_debug(init)
    init.set_defaults(run=_policy_init)

    check = parts.add_parser(
        "check",
        help="show, rule by rule, whether the policy allows a study, and why",
        epilog="exit status 0 when the study is allowed, 3 when it is refused",
    )
    check.add_argument("folder", type=Path, metavar="FOLDER", help="the site's folder")
    check.add_argument("study", type=Path, metavar="STUDY.toml", help="the study, with its contracted patients")
    check.add_argument("--signature", type=Path, metavar="FILE", help="STUDY.toml.sig, where signers are trusted")
    check.add_argument("--json", action="store_true", help="print JSON")
    _add_debug(check)
    check.set_defaults(run=_policy_check)


def _policy_init(options: argparse.Namespace) -> None:
    from deploy.policies import init

    init(options.folder.resolve(), options.epsilon, options.delta, options.minimum_cohort, options.public)


def _policy_check(options: argparse.Namespace) -> None:
    from deploy.policies import check

    check(options.folder.resolve(), options.study, options.signature, options.json)


# ---------------------------------------------------------------- ledger, privacy


def _add_ledger(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    ledger = commands.add_parser("ledger", help="what a site has spent, over all studies")
    parts = ledger.add_subparsers(required=True, metavar="COMMAND")
    show = parts.add_parser("show", help="print what is spent and left, by data set and study")
    show.add_argument("folder", type=Path, metavar="FOLDER", help="the site's folder")
    show.add_argument("--json", action="store_true", help="print JSON")
    _add_debug(show)
    show.set_defaults(run=_ledger_show)

    verify = parts.add_parser("verify", help="walk the chain of lines; compare with a signed statement")
    verify.add_argument("folder", type=Path, metavar="FOLDER", help="the site's folder")
    verify.add_argument("--statement", type=Path, metavar="FILE", help="an earlier file of `synthward ledger export`")
    _add_debug(verify)
    verify.set_defaults(run=_ledger_verify)

    export = parts.add_parser(
        "export",
        help="write a signed statement for the data protection officer",
        epilog="example: synthward ledger export /srv/synthward/north --out ledger-2026-11.json",
    )
    export.add_argument("folder", type=Path, metavar="FOLDER", help="the site's folder, with its key")
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="new file")
    _add_debug(export)
    export.set_defaults(run=_ledger_export)

    plan = parts.add_parser(
        "plan",
        help="print whether a study would fit into what is left, before anyone joins",
        epilog="exit status 0 when it fits, 3 when it does not",
    )
    plan.add_argument("folder", type=Path, metavar="FOLDER", help="the site's folder")
    plan.add_argument("study", type=Path, metavar="STUDY.toml", help="the study")
    plan.add_argument("--json", action="store_true", help="print JSON")
    _add_debug(plan)
    plan.set_defaults(run=_ledger_plan)


def _ledger_show(options: argparse.Namespace) -> None:
    from deploy.ledgers import show

    show(options.folder.resolve(), as_json=options.json)


def _ledger_verify(options: argparse.Namespace) -> None:
    from deploy.ledgers import verify

    verify(options.folder.resolve(), options.statement)


def _ledger_export(options: argparse.Namespace) -> None:
    from deploy.ledgers import export

    export(options.folder.resolve(), options.out)


def _ledger_plan(options: argparse.Namespace) -> None:
    from deploy.ledgers import plan

    plan(options.folder.resolve(), options.study, as_json=options.json)


def _add_privacy(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    privacy = commands.add_parser("privacy", help="attack the mechanism itself, and compare with its claim")
    parts = privacy.add_subparsers(required=True, metavar="COMMAND")
    audit = parts.add_parser(
        "audit",
        help="look at many single steps with and without canary patients; print the lower bound beside the claim",
        epilog="exit status 0 when the claim stands, 3 when it is refuted",
    )
    audit.add_argument("study", nargs="?", type=Path, metavar="STUDY.toml", help="default: the built-in phantom study")
    audit.add_argument("--trials", type=_positive, default=10_000, metavar="N", help="steps a side (default 10000)")
    audit.add_argument("--json", action="store_true", help="print JSON")
    _add_debug(audit)
    audit.set_defaults(run=_privacy_audit)


def _privacy_audit(options: argparse.Namespace) -> None:
    from deploy.privacy_audit import audit

    audit(options.study, options.trials, as_json=options.json)


# ---------------------------------------------------------------- arguments


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text}")
    return value


def _seed(text: str) -> int:
    value = int(text) if text.isdecimal() else -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 4294967295, found {text}")
    return value


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, found {text!r}")
    return name, Path(path)


if __name__ == "__main__":
    main()
