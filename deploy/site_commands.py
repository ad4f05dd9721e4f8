"""Commands about a site and a consortium's papers: settings, keys, rosters, studies, policies, ledgers."""

import argparse
from pathlib import Path

from deploy.arguments import add_debug, named_path, positive


def add_site_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add all of them."""
    for add in (_add_site, _add_roster, _add_study, _add_policy, _add_ledger, _add_privacy):
        add(commands)


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
    add_debug(init)
    init.set_defaults(run=_site_init)

    keygen = parts.add_parser(
        "keygen",
        help="make the key that signs for a site; its private half never leaves the folder",
        epilog="example: synthward site keygen /srv/synthward/north",
    )
    keygen.add_argument("folder", type=Path, metavar="FOLDER", help="the site's folder; made when absent")
    add_debug(keygen)
    keygen.set_defaults(run=_site_keygen)

    pin = parts.add_parser(
        "pin",
        help="accept a roster at a site, after comparing its digest by telephone",
        epilog="example: synthward site pin /srv/synthward/north roster.json --digest 5f0c...",
    )
    pin.add_argument("folder", type=Path, metavar="FOLDER", help="the site's folder, with site.toml and its key")
    pin.add_argument("roster", type=Path, metavar="ROSTER", help="the roster from the coordinator")
    pin.add_argument("--digest", required=True, metavar="HEX", help="the digest that the coordinator told you")
    add_debug(pin)
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
    make.add_argument("keys", type=named_path, nargs="+", metavar="NAME=FILE", help="a site's identity.pub")
    make.add_argument("--out", type=Path, required=True, metavar="ROSTER", help="new file")
    add_debug(make)
    make.set_defaults(run=_roster_make)

    show = parts.add_parser("show", help="print every site's public key and the digest")
    show.add_argument("roster", type=Path, metavar="ROSTER", help="a roster file")
    show.add_argument("--json", action="store_true", help="print JSON")
    add_debug(show)
    show.set_defaults(run=_roster_show)

    digest = parts.add_parser("digest", help="print the digest that sites compare and pin")
    digest.add_argument("roster", type=Path, metavar="ROSTER", help="a roster file")
    add_debug(digest)
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
    add_debug(digest)
    digest.set_defaults(run=_study_digest)

    sign = parts.add_parser(
        "sign",
        help="sign a study; writes STUDY.toml.sig beside it",
        epilog="example: synthward study sign study.toml --key coordinator/identity.key (made by site keygen)",
    )
    sign.add_argument("study", type=Path, metavar="STUDY.toml", help="the study, with its contracted patients")
    sign.add_argument("--key", type=Path, required=True, metavar="FILE", help="the signer's private key")
    add_debug(sign)
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
        "--minimum-cohort", type=positive, default=2, metavar="N", help="join no sum over fewer sites (default 2)"
    )
    init.add_argument("--public", action="store_true", help="anyone may have these images: not for a hospital's own")
    add_debug(init)
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
    add_debug(check)
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
    add_debug(show)
    show.set_defaults(run=_ledger_show)

    verify = parts.add_parser("verify", help="walk the chain of lines; compare with a signed statement")
    verify.add_argument("folder", type=Path, metavar="FOLDER", help="the site's folder")
    verify.add_argument("--statement", type=Path, metavar="FILE", help="an earlier file of `synthward ledger export`")
    add_debug(verify)
    verify.set_defaults(run=_ledger_verify)

    export = parts.add_parser(
        "export",
        help="write a signed statement for the data protection officer",
        epilog="example: synthward ledger export /srv/synthward/north --out ledger-2026-11.json",
    )
    export.add_argument("folder", type=Path, metavar="FOLDER", help="the site's folder, with its key")
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="new file")
    add_debug(export)
    export.set_defaults(run=_ledger_export)

    plan = parts.add_parser(
        "plan",
        help="print whether a study would fit into what is left, before anyone joins",
        epilog="exit status 0 when it fits, 3 when it does not",
    )
    plan.add_argument("folder", type=Path, metavar="FOLDER", help="the site's folder")
    plan.add_argument("study", type=Path, metavar="STUDY.toml", help="the study")
    plan.add_argument("--json", action="store_true", help="print JSON")
    add_debug(plan)
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
    audit.add_argument("--trials", type=positive, default=10_000, metavar="N", help="steps a side (default 10000)")
    audit.add_argument("--json", action="store_true", help="print JSON")
    add_debug(audit)
    audit.set_defaults(run=_privacy_audit)


def _privacy_audit(options: argparse.Namespace) -> None:
    from deploy.privacy_audit import audit

    audit(options.study, options.trials, as_json=options.json)
