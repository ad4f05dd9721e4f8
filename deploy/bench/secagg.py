"""Our secure sum beside Flower's SecAgg+, in one run on the same vectors: seconds, bytes, memory, error.

    python -m deploy.bench.secagg [--dim N ...] [--sites N ...] [--drop F ...] [--repeats N] [--only-ours] [--json FILE]
    python -m deploy.bench.secagg --growth [--dim N ...] [--sites N ...]    ours alone, 10 to 1000 sites

Both run in this process, one site after the other, the two in turns. Flower's client mod and workflow are its own; only
its network is replaced. A site's seconds are from a message in to a message out, Flower's records included, training
not: the mean over the sites that stay. Shown are the median of the wall seconds and the least CPU seconds, all threads
together; on a busy machine trust the latter. "On disk" is ours at a real site, once: with its round file, and with the
keys for the next attempt. Sites drop out before their masked vector. The model's broadcast is left out on both sides.
Memory is traced in a run of its own, in vectors of 4 bytes a coordinate: a site's while it masks, its own vector
included, ours without the copies that Flower's record of the answer takes; and the server's, with what was sent to it.
Ratios are ours / theirs.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import flwr
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import secure_round
from client.identity import Member
from client.secagg import SiteRound
from client.secure_round import SecureSite
from client.updates import MadeUpdate
from common import wire
from common.config import StudyConfig
from common.messages import (
    AdvertiseKeysRequest,
    ConfirmSurvivorsRequest,
    MaskedInputRequest,
    Reply,
    Request,
    ShareKeysRequest,
    TrainRequest,
    UnmaskRequest,
)
from common.secagg import neighbours
from common.secagg.keys import AdvertisedKeys, Attempt
from common.secagg.roster import make_roster
from deploy.bench.account import account_for
from deploy.bench.meter import Case, Cost, Meter, Vector, mean, wire_bytes
from deploy.bench.secaggplus import their_sum
from server.secagg import SecureSum, SumPlan, check_keys

MINIMUM_SITES = 2
LARGE = 200_000_000  # coordinates of all sites together: from here on one repeat
MOST_TRACED = 100_000_000
NOTHING = np.zeros(0, np.float32)
HEAD = (
    "coordinates | sites | dropped | whose | client s | CPU s | on disk s | server s | CPU s | up MB | down MB | "
    "client vectors | server vectors | error"
)
GROWTH_HEAD = "coordinates | sites | masks a site | client s | CPU s | CPU ms / log2 sites | up kB | down kB | error"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case and print a line each, or three with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, nargs="+", help="coordinates; 1e6 and 1e7, or 1e5 with --growth")
    parser.add_argument("--sites", type=int, nargs="+", help="5, 10 and 30, or 10 to 1000 with --growth")
    parser.add_argument("--drop", type=float, nargs="+", default=[0.0, 0.2], help="shares of the sites that drop out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--json", type=Path, help="write every number here too")
    options = parser.parse_args(arguments)
    for sites, share in itertools.product(options.sites or (), () if options.growth else options.drop):
        if sites - round(share * sites) < neighbours.threshold_of(min(sites, neighbours.COMPLETE)):
            parser.error(f"{sites} sites cannot lose a share of {share:g}: too few would be left to unmask")
    machine = (
        f"{_processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
        f"numpy {np.__version__}, flwr {flwr.__version__}"
    )
    print(machine)
    rows = _growth(options) if options.growth else _side_by_side(options)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


# ------------------------------------------------------------ the two tables


def _side_by_side(options: argparse.Namespace) -> list[dict[str, Any]]:
    print(HEAD)
    rows = []
    for dim in options.dim or (1_000_000, 10_000_000):
        for sites in options.sites or (5, 10, 30):
            for share in options.drop:
                case = Case(dim, sites, round(share * sites))
                repeats = options.repeats if dim * sites < LARGE else 1
                sums: dict[str, Callable[..., Cost]] = {"ours": our_sum}
                if not options.only_ours:
                    sums["SecAgg+"] = their_sum
                costs = _in_turns(case, sums, repeats)
                disk = _on_disk(case)
                for whose, cost in costs.items():
                    _print_costs(case, whose, cost, disk if whose == "ours" else None)
                    rows.append({**asdict(case), "whose": whose, **asdict(cost)})
                rows[-len(costs)]["on_disk"] = asdict(disk)
                if "SecAgg+" in costs:
                    _print_ratios(case, costs["ours"], costs["SecAgg+"], disk)
    return rows


def _in_turns(case: Case, sums: Mapping[str, Callable[..., Cost]], repeats: int) -> dict[str, Cost]:
    found: dict[str, list[Cost]] = {whose: [] for whose in sums}
    for number in range(repeats):
        for whose, run in sums.items():
            _say(f"{case} {whose} {number + 1}/{repeats}")
            found[whose].append(run(case))
    costs = {whose: _typical(several) for whose, several in found.items()}
    for whose, run in sums.items():
        costs[whose].client_vectors = costs[whose].server_vectors = math.nan
        if case.dim * case.sites <= MOST_TRACED:
            _say(f"{case} {whose} memory")
            traced = run(case, tracing=True)
            costs[whose].client_vectors, costs[whose].server_vectors = traced.client_vectors, traced.server_vectors
    return costs


def _typical(costs: Sequence[Cost]) -> Cost:
    """Medians, but the least of the CPU seconds and the largest error."""
    choose = {"client_cpu_seconds": min, "server_cpu_seconds": min, "error": max}
    names = asdict(costs[0])
    return Cost(**{name: choose.get(name, statistics.median)(getattr(cost, name) for cost in costs) for name in names})


def _on_disk(case: Case) -> Cost:
    _say(f"{case} ours on disk")
    with tempfile.TemporaryDirectory() as folder:
        return our_sum(case, folder=Path(folder))


def _print_costs(case: Case, whose: str, cost: Cost, disk: Cost | None) -> None:
    print(
        f"{case.dim:.0e} | {case.sites} | {case.dropped} | {whose} | {cost.client_seconds:.4f} | "
        f"{cost.client_cpu_seconds:.4f} | {f'{disk.client_seconds:.4f}' if disk else ''} | {cost.server_seconds:.4f} | "
        f"{cost.server_cpu_seconds:.4f} | {cost.up_bytes / 1e6:.3f} | {cost.down_bytes / 1e6:.4f} | "
        f"{cost.client_vectors:.2f} | {cost.server_vectors:.2f} | {cost.error:.1e}",
        flush=True,
    )


def _print_ratios(case: Case, ours: Cost, theirs: Cost, disk: Cost) -> None:
    ratios = {name: getattr(ours, name) / (getattr(theirs, name) or math.nan) for name in asdict(ours)}
    print(
        f"{case.dim:.0e} | {case.sites} | {case.dropped} | ratio | {ratios['client_seconds']:.3f} | "
        f"{ratios['client_cpu_seconds']:.3f} | {disk.client_seconds / theirs.client_seconds:.3f} | "
        f"{ratios['server_seconds']:.3f} | {ratios['server_cpu_seconds']:.3f} | {ratios['up_bytes']:.3f} | "
        f"{ratios['down_bytes']:.3f} | {ratios['client_vectors']:.2f} | {ratios['server_vectors']:.2f} | "
        f"{ratios['error']:.1f}",
        flush=True,
    )


def _growth(options: argparse.Namespace) -> list[dict[str, Any]]:
    print(GROWTH_HEAD)
    rows = []
    for dim in options.dim or (100_000,):
        for sites in options.sites or (10, 32, 100, 320, 1000):
            _say(f"{dim} coordinates, {sites} sites")
            case = Case(dim, sites)
            cost = our_sum(case)
            print(
                f"{dim:.0e} | {sites} | {cost.masks:.1f} | {cost.client_seconds:.4f} | {cost.client_cpu_seconds:.4f} | "
                f"{1e3 * cost.client_cpu_seconds / math.log2(sites):.2f} | {cost.up_bytes / 1e3:.1f} | "
                f"{cost.down_bytes / 1e3:.1f} | {cost.error:.1e}",
                flush=True,
            )
            rows.append({**asdict(case), **asdict(cost)})
    return rows


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


# ------------------------------------------------------------ our sum


def our_sum(case: Case, tracing: bool = False, folder: Path | None = None) -> Cost:
    """Make one sum with an honest server; every message goes through Flower's records.

    Args:
        case: the sum.
        tracing: measure memory in place of seconds.
        folder: where every site keeps its round file; None for sites that keep the attempt in memory.
    """
    names = [f"site-{number:04d}" for number in range(case.sites)]
    study = StudyConfig(name="bench").with_changes("federation", contracted_patients=dict.fromkeys(names, 100))
    identities = {name: Ed25519PrivateKey.generate() for name in names}
    roster = make_roster({name: key.public_key().public_bytes_raw() for name, key in identities.items()})
    members = [Member(name, identity, roster, MINIMUM_SITES) for name, identity in identities.items()]
    attempt, encoding = Attempt(study.digest, 1), study.encoding
    plan = SumPlan(attempt, 1, case.dim, encoding, MINIMUM_SITES, roster.digest, roster.sites)
    sites: dict[str, _InMemory | _OnDisk] = {
        member.site: _OnDisk(study, member, folder) if folder else _InMemory(member, plan) for member in members
    }
    meter, advertised = Meter(case, tracing), dict[str, AdvertisedKeys]()

    def take_keys(name: str, keys: AdvertisedKeys) -> None:
        check_keys(keys, name, plan)
        advertised[name] = keys

    def exchange(requests: Mapping[str, Request], take: Callable[[str, Any], None]) -> None:
        for number, name in enumerate(names):
            if name in requests:
                _one_exchange(meter, number, sites[name], requests[name], partial(take, name))

    exchange(dict.fromkeys(names, AdvertiseKeysRequest(study.digest, 1, 1)), take_keys)
    server = meter.serve(lambda: SecureSum(plan, advertised))
    exchange(meter.serve(server.share_keys_requests), server.take_sealed_shares)
    train = TrainRequest(study.digest, 1, NOTHING, NOTHING)
    requests = meter.serve(lambda: server.masked_input_requests(train))
    exchange({names[site]: requests[names[site]] for site in case.staying}, server.take_masked_input)
    exchange(meter.serve(server.confirm_requests), server.take_confirmation)
    exchange(meter.serve(server.unmask_requests), server.take_unmask_shares)
    total = meter.serve(server.result)
    cost = meter.cost()
    cost.error, cost.masks = case.error_of(total), mean(sites[names[site]].masks for site in case.staying)
    return cost


def _one_exchange(
    meter: Meter, number: int, site: "_InMemory | _OnDisk", request: Request, take: Callable[[Any], None]
) -> None:
    content = meter.serve(lambda: wire.pack(request))
    meter.down[number] += wire_bytes(content)
    masking = isinstance(request, MaskedInputRequest)
    vector = meter.case.vector(number) if masking else NOTHING
    before = meter.begin_peak()
    with meter.clients[number]:
        reply = site.answer(cast(Request, wire.unpack(content)), vector)
    if masking:
        meter.end_client_peak(before)
    with meter.clients[number]:
        answer = wire.pack(reply)
    del vector, reply
    meter.up[number] += wire_bytes(answer)
    meter.serve(lambda: take(wire.unpack(answer)))


class _InMemory:
    """A site that keeps its attempt in memory."""

    def __init__(self, member: Member, plan: SumPlan) -> None:
        self.masks, self._encoding = 0, plan.encoding
        self._round = SiteRound(member, plan.attempt, MINIMUM_SITES)

    def answer(self, request: Request, vector: Vector) -> Reply:
        match request:
            case AdvertiseKeysRequest():
                return self._round.advertise_keys()
            case ShareKeysRequest():
                return self._round.share_keys(request)
            case MaskedInputRequest():
                self._round.open_shares(request)
                self.masks = len({*self._round.picks, *self._round.held})  # with its own share it holds its own mask
                return self._round.masked_input(vector, self._encoding, request.work.round)[0]
            case ConfirmSurvivorsRequest():
                return self._round.confirm_survivors(request)
            case UnmaskRequest():
                return self._round.unmask(request)
        raise TypeError("expected a request of the secure sum")


class _OnDisk:
    """A site as it is deployed, but for its training."""

    def __init__(self, study: StudyConfig, member: Member, folder: Path) -> None:
        own = folder / member.site
        own.mkdir()
        account = account_for(study, own, map(str, range(100)))
        self.masks, self._at = 0, SecureSite(study, member, own, lambda: account)

    def answer(self, request: Request, vector: Vector) -> Reply:
        match request:
            case AdvertiseKeysRequest():
                return secure_round.advertise_keys(self._at, request)
            case ShareKeysRequest():
                return secure_round.share_keys(self._at, request)
            case MaskedInputRequest():
                return secure_round.masked_input(
                    self._at, request, lambda train: MadeUpdate(train.round, vector, "update")
                )
            case ConfirmSurvivorsRequest():
                return secure_round.confirm_survivors(self._at, request)
            case UnmaskRequest():
                return secure_round.unmask(self._at, request)
        raise TypeError("expected a request of the secure sum")


if __name__ == "__main__":
    main()
