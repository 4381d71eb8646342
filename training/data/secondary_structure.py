"""Secondary structure of each residue, as DSSP tells it from the coordinates of PDB chains.

The chains are those that Debian's promod3-data (Apache-2.0) carries: 21,105 different sequences.
"""

from training.data.clusters import require_mmseqs, split_by_cluster
from training.data.examples import Splits, cached_splits
from training.data.registry import fetch_debian_package, package_files
from training.data.structure_database import read_structure_database

PACKAGE = (
    "promod3-data",
    "3.2.1+ds-6",
    "7d1011a2686ea92e263f3daf9940f787351ff94f19eb47646c624754d80b8f56",
)
IDENTITY_PERCENT = 30

# The eight states: alpha, 3-10 and pi helix, strand, bridge, turn, bend, and none of them.
Q8 = "HGIEBTSC"
# The three: helix, strand, and all else.
Q3 = "HEC"
_TO_Q3 = str.maketrans(Q8, "HHHEECCC")


def to_q3(states: str) -> str:
    """Return the three states of a chain for its eight: H, G, I are H; E, B are E; the rest is C.

    **Example**

    >>> to_q3("HGIEBTSC")
    'HHHEECCC'
    """
    return states.translate(_TO_Q3)


def load_secondary_structure() -> Splits:
    """Read the chains, one letter of `Q8` per residue as label; `to_q3` makes three states of it.

    Clusters at 30 % identity go as a whole to one split, by the hash of their representative's
    name: 80 % training, 10 % validation, 10 % test. Members of two clusters may be relatives: 29 of
    250 test chains have a training chain of 30 % identity or more, and 1 of 50 %. Each sequence
    occurs once, under the first of its names. The first call fetches 371 MB.

    **Returns** The splits. Names are those of entry and chain, such as `1ABC_A`. Residues that the
    crystal does not show are missing, without a gap.

    **Raises** OSError or ValueError, with what to do, if the package cannot be had or mmseqs is
    missing.

    **Example**

    >>> to_q3(load_secondary_structure()["test"][0].label)  # doctest: +SKIP
    'CEEEECCCHHHHHHHHH'
    """

    def prepare() -> Splits:
        require_mmseqs()
        (content,) = dict(
            package_files(fetch_debian_package(*PACKAGE), "*/structure_db.dat")
        ).values()
        chains = sorted(read_structure_database(content), key=lambda chain: chain.name)
        distinct = list({chain.text: chain for chain in reversed(chains)}.values())[::-1]
        return split_by_cluster(distinct, IDENTITY_PERCENT)

    return cached_splits(f"secondary_structure_{PACKAGE[1]}_{IDENTITY_PERCENT}", prepare)
