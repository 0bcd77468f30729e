"""Many simulations at once, in worker processes that know nothing but physics and drawing.

Workers are started as programs of their own rather than by `multiprocessing`, which would import the caller's
main module, and JAX with it, into each of them.
"""

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np

from data_pipelines.processes import WorkerError, ending, out_of_reach_of_ctrl_c
from data_pipelines.simulation.env import AlohaSim, scene_file
from data_pipelines.simulation.rendering import check_rendering
from data_pipelines.simulation.tasks import TASKS


class ParallelSims:
    """One environment per seed, spread over worker processes that end with this object or its process.

    Args:
        task, image_sizes, randomise: as for `AlohaSim`.
        seeds: one environment each; N of them.
        processes: how many workers; more than seeds are not started.
        film: numbers (0 .. N-1) of the environments of which `run` collects frames.

    Attributes:
        stage: int [N], and success, held: bool [N], as in `AlohaSim`, after the latest `run`.
        films: {number: list of uint8 [240, 480, 3] frames, see `AlohaSim.film`}.
    """

    def __init__(
        self,
        task: str,
        seeds: Sequence[int],
        processes: int,
        image_sizes: Mapping[str, tuple[int, int]] | None = None,
        film: Sequence[int] = (),
        randomise: bool = False,
    ) -> None:
        if not len(seeds) or processes < 1:
            raise ValueError(f"Got {len(seeds)} seeds and {processes} processes: expected at least one of each.")
        scene_file(task)  # what the workers would miss is said here
        self._greatest = TASKS[task].greatest
        if problem := check_rendering():  # also chooses MUJOCO_GL, which the workers inherit
            raise RuntimeError(problem)
        self.films: dict[int, list[np.ndarray]] = {int(number): [] for number in film}
        if not set(self.films) <= set(range(len(seeds))):
            raise ValueError(f"film is {list(film)}: expected numbers of environments, 0 to {len(seeds) - 1}.")
        self._groups = np.array_split(np.arange(len(seeds)), min(processes, len(seeds)))
        self._workers: list[tuple[subprocess.Popen, Connection]] = []
        tasks = []
        for group in self._groups:
            self._workers.append(_start_worker())
            filmed = [i for i, number in enumerate(group) if number in self.films]
            tasks.append((task, [int(seeds[i]) for i in group], image_sizes, filmed, randomise))
        self._exchange(tasks)

    def observe(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """states float32 [N, 14] and, for each camera, images uint8 [N, height, width, 3] of now."""
        return self._states, self._images

    def run(self, actions: np.ndarray, record_every: int | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Execute `actions` [N, T, 14] and return what `observe` then sees.

        With `record_every` the frame after every so many actions, counted from the start, is added to `films`.
        """
        actions = np.asarray(actions, np.float64)
        count = sum(map(len, self._groups))
        if actions.ndim != 3 or (actions.shape[0], actions.shape[2]) != (count, 14):
            raise ValueError(f"The actions have shape {actions.shape}: expected [{count}, steps, 14].")
        self._exchange([(actions[group], record_every) for group in self._groups])
        return self.observe()

    def close(self) -> None:
        """End the workers, also in the midst of their work: they keep nothing."""
        for process, connection in self._workers:
            connection.close()
            process.terminate()
        for process, _ in self._workers:
            process.wait()
        self._workers = []

    def __enter__(self) -> "ParallelSims":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, requests: Sequence[tuple]) -> None:
        """Hands each worker its request and takes in what they answer. Raises WorkerError for one that is gone."""
        replies = []
        for (process, connection), request in zip(self._workers, requests, strict=True):
            with self._answering(process):
                # Not `send`: of what it holds when the other end is gone, Python 3.12.1 frees memory that is in use.
                connection.send_bytes(pickle.dumps(request))
        for process, connection in self._workers:
            with self._answering(process):
                replies.append(connection.recv())
        for reply in replies:
            if isinstance(reply, str):
                self.close()
                raise RuntimeError(f"A simulation worker failed:\n{reply}")
        states, images, stage, held, films = zip(*replies, strict=True)
        self._states = np.concatenate(states)
        self._images = {camera: np.concatenate([group[camera] for group in images]) for camera in images[0]}
        self.stage, self.held = np.concatenate(stage), np.concatenate(held)
        self.success = self.stage == self._greatest
        for group, frames in zip(self._groups, films, strict=True):
            for i, new in frames.items():
                self.films[int(group[i])] += new


    @contextmanager
    def _answering(self, process: subprocess.Popen) -> Iterator[None]:
        """Makes a WorkerError of a connection with nobody at the other end; what was simulated is lost."""
        try:
            yield
        except (EOFError, ConnectionError) as error:
            self.close()
            raise WorkerError(
                f"A worker process of the simulation {ending(process.returncode)}; its messages stand above. Start "
                "again: nothing of these episodes is kept."
            ) from error


def _start_worker() -> tuple[subprocess.Popen, Connection]:
    ours, theirs = socket.socketpair()
    with out_of_reach_of_ctrl_c():
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import _work; _work({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    theirs.close()
    return process, Connection(ours.detach())


def _work(descriptor: int) -> None:
    """A worker's life: set up, then for each request run its actions and say what is to be seen."""
    connection = Connection(descriptor)
    try:
        task, seeds, image_sizes, filmed, randomise = connection.recv()
        sims = [AlohaSim(task, image_sizes, randomise=randomise) for _ in seeds]
        for sim, seed in zip(sims, seeds, strict=True):
            sim.reset(seed)
        actions, record_every, taken = np.empty((len(sims), 0, 14)), None, 0
        while True:
            films: dict[int, list[np.ndarray]] = {i: [] for i in filmed}
            for i, sim in enumerate(sims):
                for step, action in enumerate(actions[i], start=taken + 1):
                    sim.step(action)
                    if record_every and i in films and step % record_every == 0:
                        films[i].append(sim.film())
            taken += actions.shape[1]
            views = [sim.images() for sim in sims]
            connection.send(
                (
                    np.stack([sim.state() for sim in sims]),
                    {camera: np.stack([view[camera] for view in views]) for camera in sims[0].image_sizes},
                    np.array([sim.stage for sim in sims]),
                    np.array([sim.held for sim in sims]),
                    films,
                )
            )
            actions, record_every = connection.recv()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the caller is gone
    except Exception:
        with contextlib.suppress(OSError):  # the caller is gone, as when another worker has failed as well
            connection.send(traceback.format_exc())  # the caller raises it
