"""Numbers for TensorBoard."""

import os
import socket
import time
from pathlib import Path
from typing import Any

_FILE_VERSION = "brain.Event:2"


class ScalarWriter:
    """Writes scalars to a new event file of TensorBoard, without TensorFlow.

    The `tensorboard` package's own `Writer` opens its file through TensorFlow where that is
    installed, and so imports it under every backend. This one puts the records, in the package's
    format, into a plain file. It writes to local folders only.

    **Args**
        log_dir: The folder, which is made if need be.

    **Raises** ImportError if the package `tensorboard` is not installed.

    **Example**

    >>> writer = ScalarWriter("logs")  # doctest: +SKIP
    >>> writer.write({"loss": 0.5}, step=3)  # doctest: +SKIP
    >>> writer.close()  # doctest: +SKIP
    """

    def __init__(self, log_dir: str) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder = Path(log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("xb"))
        self._add(file_version=_FILE_VERSION)

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Add one number for each tag, and flush."""
        values = [self._summary.Value(tag=t, simple_value=x) for t, x in scalars.items()]
        self._add(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _add(self, **fields: Any) -> None:
        event = self._event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        self._records.flush()
