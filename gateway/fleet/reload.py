"""The configuration is read again when one of its files changes, and when `wake` is called (SIGHUP).

It is read whole and validated whole. If anything is wrong, all of it is said and the configuration before stays; if
nothing is, it is applied at once. A file that changes is read when it has rested for one look, so that one that is
still being written is seldom read, and one that is cut short and looks right is seldom believed; an empty one never.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from gateway.config import Config, ConfigError
from gateway.config.files import mark
from gateway.config.model import Files, Mark, Problem

_log = logging.getLogger("gateway.config")

#: two looks and the reading stay well below a second
LOOK_EVERY_S: Final = 0.2


class Reloads:
    """What became of reloads: how many were "applied", "unchanged", "refused", and why the last one was refused."""

    __slots__ = ("results", "trouble")

    def __init__(self) -> None:
        self.results = dict.fromkeys(("applied", "unchanged", "refused"), 0)
        self.trouble = ""


class Reloader:
    """Follows the files of `config`. `load` reads them again, in a thread; `apply` gives what it cannot change."""

    def __init__(
        self,
        config: Config,
        load: Callable[[], Config],
        apply: Callable[[Config], list[str]],
        reloads: Reloads,
        *,
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        self._config = config
        self._load = load
        self._apply = apply
        self._reloads = reloads
        self._look_every_s = look_every_s
        self._files: Files = config.files
        self._resting: dict[Path, Mark] = {}
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="configuration")

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def wake(self) -> None:
        """Read it again now, whether or not a file changed."""
        self._asked.set()

    async def reload(self) -> None:
        """Read it again and apply it, or say what is wrong."""
        empty = [path for path, before in self._files.items() if before and before[3] and _size(mark(path)) == 0]
        if empty:
            self._files = {**self._files, **{path: mark(path) for path in empty}}
            self._refuse([Problem(str(path), "is empty: taken for one that is being written") for path in empty])
            return
        try:
            config = await asyncio.to_thread(self._load)
        except ConfigError as error:
            # Files that were not reached this time are followed further: they may be wanted again.
            self._files = {**self._files, **error.files}
            self._refuse(error.problems)
            return
        self._files = config.files
        self._reloads.trouble = ""
        if config == self._config:
            self._reloads.results["unchanged"] += 1
            return
        for warning in config.warnings:
            _log.warning("%s [%s]", warning, warning.origin)
        fixed = self._apply(config)
        self._config = config
        self._reloads.results["applied"] += 1
        if fixed:
            _log.warning("changed, and needs a restart: %s", ", ".join(fixed))
        _log.info("the configuration was read again and applied")

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._look_every_s):
                    await self._asked.wait()
            except TimeoutError:
                pass
            if not self._asked.is_set() and not self._changed():
                continue
            self._asked.clear()
            self._resting = {}
            try:
                await self.reload()
            except Exception:
                # The gateway goes on with what it has; a defect here must not end the following.
                self._reloads.results["refused"] += 1
                self._reloads.trouble = "the configuration could not be applied: see the log"
                _log.exception("the configuration could not be applied")

    def _changed(self) -> bool:
        """Whether a file is not what it was when it was read, and has been so since the last look."""
        now = {path: mark(path) for path in self._files}
        rested = now == self._resting
        self._resting = now if now != self._files else {}
        return rested and bool(self._resting)

    def _refuse(self, problems: tuple[Problem, ...] | list[Problem]) -> None:
        self._reloads.results["refused"] += 1
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        self._reloads.trouble = f"the configuration was changed and refused ({count}); the one before is in use"
        for problem in problems:
            where = f" [{problem.origin}]" if problem.origin else ""
            _log.error("configuration refused, the one before stays: %s%s", problem, where)


def _size(now: Mark) -> int | None:
    return None if now is None else now[3]
