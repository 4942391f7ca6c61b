"""Images as files, without shards: which there are, and their pixels."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from vitfreeze.data.addresses import is_remote
from vitfreeze.data.decoding import IMAGE_SUFFIXES
from vitfreeze.evaluate.visual import read_images
from vitfreeze.files import suggest_path

logger = logging.getLogger("vitfreeze")
SHOWN = 3  # of what is left out


def find_image_files(sources: Sequence[str]) -> list[Path]:
    """Return the image files that are named, and those in folders without shards, sorted; [] if these are shards.

    Links in a folder are followed, but a folder is entered once only; what is hidden is not seen. Folders that cannot
    be read, or were read already, are logged.

    Raises:
        ValueError: an image is not there, files and shards are mixed, or a folder holds neither.
    """
    files: list[Path] = []
    are_files = []
    for source in sources:
        path = Path(source).expanduser()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir():
            found = [path]
            if not path.is_file():
                raise ValueError(f"there is no image {source!r}{suggest_path(path)}")
        elif path.is_dir() and not (any(path.glob("*.tar")) or (path / "_info.json").is_file()):
            found, left_out = _search(path)
            if left_out:
                logger.warning("%d folders are left out: %s", len(left_out), name_first(left_out))
            if not found:
                raise ValueError(f"{source} holds neither images ({', '.join(sorted(IMAGE_SUFFIXES))}) nor shards")
        elif "{" not in source and not is_remote(source) and not path.exists():
            raise ValueError(f"there is no image, folder or shard {source!r}{suggest_path(path)}")
        else:
            found = []
        are_files.append(bool(found))
        files += found
    if any(are_files) and not all(are_files):
        raise ValueError(f"images and shards are mixed in {', '.join(sources)}: give one kind")
    return files


def read_readable(paths: Sequence[Path], *, img_size: int) -> tuple[list[Tensor], list[str], list[str]]:
    """Read image files as evaluation does, less those that cannot be read.

    Returns:
        The images, (1, 3, img_size, img_size) uint8 each, their names, and of each that was left out the reason.
    """
    images, names, left_out = list[Tensor](), list[str](), list[str]()
    for path in paths:
        try:
            images.append(read_images([path], img_size=img_size))
            names.append(str(path))
        except OSError as error:
            left_out.append(f"{path}: {error.strerror}")
        except ValueError as error:
            left_out.append(str(error))
    return images, names, left_out


def name_first(things: Sequence[str]) -> str:
    """Return the first few of them as one text."""
    return "; ".join(things[:SHOWN]) + ("; ..." if len(things) > SHOWN else "")


def _search(top: Path) -> tuple[list[Path], list[str]]:
    """Return the image files below a folder, sorted, and why folders were left out."""
    found, left_out = list[Path](), list[str]()
    seen, around = set[tuple[int, int]](), {_identify(path) for path in top.resolve().parents}
    folders, links = [top], list[Path]()  # a folder goes by its own name rather than by a link's
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        try:
            identity = _identify(folder)
            if identity in seen or (identity in around and folder != top):
                left_out.append(f"{folder}: a link to a folder around it, or one that was read already")
                continue
            seen.add(identity)
            inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        except OSError as error:
            left_out.append(f"{folder}: {error.strerror}")
            continue
        for path in inside:
            if os.path.isdir(path):
                (links if path.is_symlink() else folders).append(path)
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                found.append(path)
    return sorted(found), left_out


def _identify(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
