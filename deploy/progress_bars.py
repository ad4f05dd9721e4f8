"""Progress on the terminal: the server's own training, the round, and each site that is training."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from common.config import StudyConfig
from deploy.local_grid import Watcher

MOST_SITES_SHOWN = 12


class ProgressBars:
    """Bars on standard error; plain lines when that is no terminal."""

    def __init__(self, *, audits: bool = False) -> None:
        self._audits, self._said = audits, set[str]()
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=False)
        self._server: dict[str, TaskID] = {}
        self._round: TaskID | None = None
        self._sites: dict[int, TaskID] = {}
        self._round_number = 0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line of text above the bars."""
        self._console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    def server_stepped(self, done: int, total: int) -> None:
        """Listener of the server's own work: the warm start, after a round of moments the generator, candidates."""
        what = "warm start" if self._round is None else f"round {self._round_number}: generator"
        if self._audits:
            what = "candidates compared with each other"
        if what not in self._server:
            self.say(f"{what}: {total} steps")
            self._server[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._server[what], completed=done)

    def _audit_asks(self, node: int, site: str, *, compares: bool) -> None:
        what = "the sites compare the candidates with their patients" if compares else "the sites filter"
        if what not in self._said:
            self._said.add(what)
            self.say(what)
        if compares and len(self._sites) < MOST_SITES_SHOWN:
            self._sites[node] = self._progress.add_task(f"  {site}", total=None)

    def watcher(self, study: StudyConfig, names: dict[int, str]) -> Watcher:
        """What the local grid tells about rounds and sites; ``names`` by node id."""
        rounds = study.total_rounds

        def started(node: int, group: str) -> None:
            number, step = _round_and_step(group)
            if number == 0:
                return
            if number > rounds:
                self._audit_asks(node, names[node], compares=number == study.audit_round)
                return
            if self._round is None:
                self._round = self._progress.add_task("rounds", total=rounds)
            if number > self._round_number:
                self._round_number = number
                self._progress.update(self._round, completed=self._round_number - 1)
                if not self._console.is_terminal:
                    self.say(f"round {number} of {rounds}")
            steps = study.phases[study.phase_number(number)].steps
            if node not in self._sites and len(self._sites) < MOST_SITES_SHOWN:
                self._sites[node] = self._progress.add_task(f"  {names[node]}", total=steps)
            if node in self._sites and step <= 1:
                self._progress.reset(self._sites[node], total=steps)
            if node in self._sites and step:
                self._progress.update(self._sites[node], completed=step)

        def stepped(node: int, done: int, total: int) -> None:
            if node in self._sites:
                self._progress.update(self._sites[node], completed=done, total=total)

        def finished(node: int, group: str) -> None:
            if self._round is not None and _round_and_step(group)[0] == rounds and len(names) <= MOST_SITES_SHOWN:
                if all(self._progress.tasks[task].finished for task in self._sites.values()):
                    self._progress.update(self._round, completed=rounds)

        return Watcher(started, stepped, finished)


def _round_and_step(group: str) -> tuple[int, int]:
    """What a site is asked for in a message of this group: a round, or a step of one; (0, 0) for a short question."""
    number, _, step = group.partition("/")
    return (int(number), int(step or 0)) if number.isdecimal() and (step or "0").isdecimal() else (0, 0)
