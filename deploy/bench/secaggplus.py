"""Flower's SecAgg+ on one case, unmodified: its client mod at every site, its workflow, a loop in place of its network.

Its threshold is ours, its other settings are its own; every site has the largest weight, where it rounds least.
"""

import logging
import os
from collections.abc import Iterable
from typing import Any, cast

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.client.mod.utils import make_ffn
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common import recorddict_compat
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.supercore.task_identity import TaskIdentity

from common.secagg import neighbours
from deploy.bench.meter import Case, Clock, Cost, Meter, Vector, wire_bytes

MAX_WEIGHT = 1000
FIRST_NODE = 10_000
UNAVAILABLE = 5  # Flower's error code of a node that does not answer
NOTHING = Parameters([], "numpy.ndarray")


def their_sum(case: Case, tracing: bool = False) -> Cost:
    """Run Flower's workflow once.

    Args:
        case: the sum.
        tracing: measure memory in place of seconds.
    """
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    # Private to Flower: without it no message can be made.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    strategy = _OneSum(case.sites)
    context = LegacyContext(
        Context(1, 1, {}, RecordDict(), {}), strategy=strategy, client_manager=cast(Any, _Manager())
    )
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    context.state.array_records[MAIN_PARAMS_RECORD] = recorddict_compat.parameters_to_arrayrecord(NOTHING, False)
    workflow = SecAggPlusWorkflow(1.0, neighbours.threshold_of(case.sites) / case.sites)
    loop, whole = _Loop(case, tracing), Clock()
    with whole:
        workflow(cast(Any, loop), context)
    loop.meter.end_server_peak()
    if strategy.mean is None:
        raise RuntimeError("Flower's workflow ended without a sum")
    server = loop.meter.server
    server.wall, server.cpu = whole.wall - loop.outside.wall, whole.cpu - loop.outside.cpu
    cost = loop.meter.cost()
    cost.masks = float(case.sites)
    cost.error = case.error_of(strategy.mean.astype(np.float64) * len(case.staying))
    return cost


class _Loop:
    """What the workflow takes for its grid."""

    def __init__(self, case: Case, tracing: bool) -> None:
        self.case, self.meter, self.outside = case, Meter(case, tracing), Clock()
        self._training, self._before = Clock(), 0
        self._sites = [
            (make_ffn(self._train, [secaggplus_mod]), Context(1, FIRST_NODE + site, {}, RecordDict(), {}))
            for site in range(case.sites)
        ]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Hand each message to its site and collect the answers."""
        self.meter.end_server_peak()
        with self.outside:
            replies = [self._deliver(message) for message in messages]
        self.meter.begin_peak()
        return replies

    def _deliver(self, message: Message) -> Message:
        site, stage = self._site(message), cast(str, message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE])
        # The mod takes entries out of what it is given; a network would have made a copy.
        content = RecordDict({key: _copy(record) for key, record in message.content.items()})
        sent = Message(content, message.metadata.dst_node_id, message.metadata.message_type)
        sent.metadata.__dict__["_message_id"] = f"{stage}/{site}"  # private to Flower: a SuperLink would set it
        self.meter.down[site] += wire_bytes(content)
        if site < self.case.dropped and stage in (Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK):
            return Message(Error(UNAVAILABLE, "dropped"), reply_to=sent)
        app, context = self._sites[site]
        clock, self._training = self.meter.clients[site], Clock()
        with clock:
            reply = app(sent, context)
        clock.wall -= self._training.wall
        clock.cpu -= self._training.cpu
        if stage == Stage.COLLECT_MASKED_VECTORS:
            self.meter.end_client_peak(self._before)
        self.meter.up[site] += wire_bytes(reply.content)
        return reply

    def _train(self, message: Message, context: Context) -> Message:
        with self._training:
            parameters = ndarrays_to_parameters([self.case.vector(self._site(message))])
            result = FitRes(Status(Code.OK, ""), parameters, MAX_WEIGHT, {})
            trained = Message(recorddict_compat.fitres_to_recorddict(result, False), reply_to=message)
        del parameters, result
        self._before = self.meter.begin_peak()
        return trained

    def _site(self, message: Message) -> int:
        return message.metadata.dst_node_id - FIRST_NODE


class _OneSum(FedAvg):
    """Picks every site; keeps the mean that the workflow hands over."""

    def __init__(self, sites: int) -> None:
        super().__init__()
        self._proxies = [_Proxy(FIRST_NODE + site) for site in range(sites)]
        self.mean: Vector | None = None

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        return [(proxy, FitIns(NOTHING, {})) for proxy in self._proxies]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        (self.mean,) = parameters_to_ndarrays(results[0][1].parameters)
        return None, {}


class _Proxy:
    def __init__(self, node: int) -> None:
        self.node_id, self.cid = node, str(node)


class _Manager:
    def num_available(self) -> int:
        return 0  # only a log line asks


def _copy(record: Any) -> Any:
    return ConfigRecord(dict(record)) if isinstance(record, ConfigRecord) else record
