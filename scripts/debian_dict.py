"""Read dictionaries in dictd format out of Debian packages.

A dictd dictionary is a text file compressed with dictzip (which gunzip understands) and an index
of lines `headword TAB offset TAB length`, the numbers in a base-64 notation of dictd's own, both
counted in bytes of the uncompressed text.
"""

import gzip
import pathlib
import subprocess
import tempfile

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def read(package: str, name: str) -> list[str]:
    """The articles of dictionary `name` of Debian package `package`, in the order of the text.

    The installed package is read where there is one; otherwise `apt-get download` fetches it into
    a temporary folder, for which no root is needed.
    """
    installed = pathlib.Path("/usr/share/dictd")
    if (installed / f"{name}.index").exists():
        return articles(installed, name)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        archive = next(pathlib.Path(folder).glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
        return articles(pathlib.Path(folder) / "usr/share/dictd", name)


def articles(folder: pathlib.Path, name: str) -> list[str]:
    """The articles that the index names, without dictd's own `00-database` ones."""
    text = gzip.open(folder / f"{name}.dict.dz").read()
    places = set()
    for line in (folder / f"{name}.index").read_text().splitlines():
        headword, offset, length = line.split("\t")[:3]
        if not headword.startswith(("00-database", "00database")):
            places.add((number(offset), number(length)))
    return [text[start : start + length].decode() for start, length in sorted(places)]


def number(digits: str) -> int:
    """The value of a number in dictd's base 64."""
    value = 0
    for digit in digits:
        value = value * 64 + DIGITS.index(digit)
    return value
