"""Progress on the terminal: the warm start, the round, and each site that is training."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from common.config import StudyConfig
from deploy.local_grid import Watcher

MOST_SITES_SHOWN = 12


class ProgressBars:
    """Bars on standard error; plain lines when that is no terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=False)
        self._warm_start: TaskID | None = None
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

    def warm_start_stepped(self, done: int, total: int) -> None:
        """Listener of the warm start's steps."""
        if self._warm_start is None:
            self.say(f"warm start: {total} steps on public phantoms")
            self._warm_start = self._progress.add_task("warm start", total=total)
        self._progress.update(self._warm_start, completed=done)

    def watcher(self, study: StudyConfig, names: dict[int, str]) -> Watcher:
        """What the local grid tells about rounds and sites; ``names`` by node id."""
        rounds, steps = study.federation.rounds, study.federation.local_steps

        def started(node: int, group: str) -> None:
            if not group.isdecimal():
                return
            if self._round is None:
                self._round = self._progress.add_task("rounds", total=rounds)
            if int(group) > self._round_number:
                self._round_number = int(group)
                self._progress.update(self._round, completed=self._round_number - 1)
                if not self._console.is_terminal:
                    self.say(f"round {group} of {rounds}")
            if node not in self._sites and len(self._sites) < MOST_SITES_SHOWN:
                self._sites[node] = self._progress.add_task(f"  {names[node]}", total=steps)
            if node in self._sites:
                self._progress.reset(self._sites[node], total=steps)

        def stepped(node: int, done: int, total: int) -> None:
            if node in self._sites:
                self._progress.update(self._sites[node], completed=done, total=total)

        def finished(node: int, group: str) -> None:
            if self._round is not None and group == str(rounds) and len(names) <= MOST_SITES_SHOWN:
                if all(self._progress.tasks[task].finished for task in self._sites.values()):
                    self._progress.update(self._round, completed=rounds)

        return Watcher(started, stepped, finished)
