"""Random projections for feature maps, drawn once, in NumPy, outside every graph."""

import numpy as np


def iid(num_rows: int, head_dim: int, rng: np.random.Generator) -> np.ndarray:
    """Draw rows that are independent standard Gaussian vectors.

    **Args**
        num_rows: Number of rows M.
        head_dim: Head size H.
        rng: The source of randomness.

    **Returns** An array (M, H), float64.

    **Example**

    >>> iid(4, 2, np.random.default_rng(0)).shape
    (4, 2)
    """
    return rng.standard_normal((num_rows, head_dim))


def orthogonal(num_rows: int, head_dim: int, rng: np.random.Generator) -> np.ndarray:
    """Draw rows that are orthogonal within each block of H, with norms distributed as chi(H).

    Every row alone is a standard Gaussian vector, so estimates stay unbiased; orthogonality lowers
    their variance.

    **Args**
        num_rows: Number of rows M.
        head_dim: Head size H.
        rng: The source of randomness.

    **Returns** An array (M, H), float64. The rows i*H to (i+1)*H - 1 are orthogonal.

    **Cost** One QR decomposition of (H, H) for each block.

    **Example**

    >>> w = orthogonal(4, 4, np.random.default_rng(0))
    >>> bool(abs(w[0] @ w[1]) < 1e-12)
    True

    **Source** Choromanski et al. 2021, arXiv 2009.14794, section 2.4. The signs of the QR factor
    are fixed so that the directions are uniform (Haar).
    """
    blocks = []
    for _ in range(-(-num_rows // head_dim)):
        q, r = np.linalg.qr(rng.standard_normal((head_dim, head_dim)))
        blocks.append((q * np.sign(np.diag(r))).T)
    directions = np.concatenate(blocks)[:num_rows]
    norms = np.linalg.norm(rng.standard_normal((num_rows, head_dim)), axis=1, keepdims=True)
    return directions * norms


def with_constant_norm(rows: np.ndarray) -> np.ndarray:
    """Scale every row to norm sqrt(H): the regularised softmax kernel (SMREG).

    **Args**
        rows: An array (M, H).

    **Returns** An array (M, H). The kernel it estimates is a lower bound of exp(x.y), not exp(x.y).

    **Example**

    >>> np.linalg.norm(with_constant_norm(np.array([[3.0, 4.0]]))).round(6)
    np.float64(1.414214)

    **Source** Choromanski et al. 2021, arXiv 2009.14794, theorem 3.
    """
    return rows * (np.sqrt(rows.shape[1]) / np.linalg.norm(rows, axis=1, keepdims=True))


PROJECTIONS = {"orthogonal": orthogonal, "iid": iid}
