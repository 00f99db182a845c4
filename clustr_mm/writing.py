"""Writes files all or nothing."""

import os
import uuid
from pathlib import Path


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file such that an interruption leaves the old or the new one.

    Args:
        path (Path): The file, replaced if it is there.
        content (bytes or memoryview): What it gets.

    Raises:
        OSError: If it cannot be written. Then it is as it was.
    """
    # In the same folder, because only within one file system a file takes the place
    # of another at once. Of a name of its own, for others that write the same file.
    temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}.tmp')
    try:
        with temporary.open('xb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
