"""Make a TensorFlow Datasets data set of any FASTA file."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import tensorflow_datasets as tfds
except ImportError as error:
    raise ImportError(
        "FastaDataset needs TensorFlow Datasets. Run `pip install tensorflow-datasets`."
    ) from error

from training.data.clusters import read_clusters
from training.data.examples import SPLITS, split_of
from training.data.fasta import Protein, read_fasta


@dataclasses.dataclass(kw_only=True)
class FastaConfig(tfds.core.BuilderConfig):
    """Which files a data set is made of; `fasta_dataset` fills it.

    **Args**
        fasta: Path of the FASTA file.
        clusters: Path of the table of clusters, or None.
    """

    fasta: str = ""
    clusters: str | None = None


class FastaDataset(tfds.core.GeneratorBasedBuilder):
    """The proteins of a FASTA file, in fixed splits; `fasta_dataset` makes one.

    Elements have `name` and `description`, the words of the header, and `sequence`.
    """

    VERSION = tfds.core.Version("1.0.0")
    builder_config: FastaConfig

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in ("name", "description", "sequence")}
        return self.dataset_info_from_configs(
            description="Proteins of a FASTA file, split by the hash of sequence or cluster.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=None,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # The files are there.
        config = self.builder_config
        proteins = read_fasta(config.fasta)
        keys = _keys(proteins, config.clusters)
        splits = {
            split: [
                (i, protein) for i, protein in enumerate(proteins) if split_of(keys[i]) == split
            ]
            for split in SPLITS
        }
        for split, part in splits.items():
            if not part:
                raise ValueError(
                    f"{config.fasta}: {len(proteins)} proteins in {len(set(keys))} groups are too "
                    f"few, none falls into the {split} split. Pass a larger file."
                )
        return {split: self._generate_examples(part) for split, part in splits.items()}

    def _generate_examples(
        self, proteins: list[tuple[int, Protein]]
    ) -> Iterator[tuple[int, dict[str, str]]]:
        for i, protein in proteins:
            yield i, dataclasses.asdict(protein)


def _keys(proteins: list[Protein], clusters: str | None) -> list[str]:
    """Return what decides the split of each protein."""
    if clusters is None:
        return [protein.sequence for protein in proteins]
    representatives = read_clusters(clusters)
    keys = []
    for protein in proteins:
        # Of `sp|P12345|X_HUMAN` and other databases' names mmseqs writes the accession only.
        names = (protein.name, *protein.name.split("|"))
        name = next((name for name in names if name in representatives), None)
        if name is None:
            raise ValueError(
                f"{clusters}: every protein must be in a cluster, by the first word of its header "
                f"or a part of it between bars. Missing: {protein.name!r}. Cluster the same FASTA "
                "file again."
            )
        keys.append(representatives[name])
    return keys


def fasta_dataset(
    fasta: str | os.PathLike[str],
    clusters: str | os.PathLike[str] | None = None,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    file_format: str | None = None,
) -> FastaDataset:
    """Return the data set of a FASTA file, to be prepared and read as any of TFDS.

    The splits are `train` (80 %), `validation` and `test` (10 % each). Without clusters the hash of
    the sequence decides, so the same sequence is in one split, but relatives are in several. With
    them it is the hash of the cluster's representative, and clusters stay whole.

    **Args**
        fasta: The file, plain or gzip.
        clusters: A table of representative and member, with a tab between, as `mmseqs easy-cluster`
            writes it to `*_cluster.tsv`. Members are the first words of the headers, or their
            accessions between bars.
        data_dir: Where TFDS keeps prepared data. Default: its own.
        file_format: How. `array_record` gives random access, with `as_data_source`.

    **Returns** The builder. Its configuration is named by the content of the files, so a changed
    file is prepared anew.

    **Raises** FileNotFoundError if a file is missing. Preparing raises ValueError for what cannot
    be read, a protein in no cluster, and a split without proteins.

    **Example**

    >>> builder = fasta_dataset("proteins.fasta", "proteins_cluster.tsv")  # doctest: +SKIP
    >>> builder.download_and_prepare()  # doctest: +SKIP
    >>> train = builder.as_dataset("train")  # doctest: +SKIP
    """
    paths = [Path(path).resolve() for path in (fasta, clusters) if path is not None]
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    config = FastaConfig(
        name=digest.hexdigest()[:16],
        fasta=str(paths[0]),
        clusters=str(paths[1]) if clusters is not None else None,
    )
    return FastaDataset(
        config=config, data_dir=os.fspath(data_dir) if data_dir else None, file_format=file_format
    )
