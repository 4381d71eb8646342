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
    blocks = [_haar(head_dim, rng) for _ in range(-(-num_rows // head_dim))]
    return _with_gaussian_norms(np.concatenate(blocks)[:num_rows], rng)


def simplex(num_rows: int, head_dim: int, rng: np.random.Generator) -> np.ndarray:
    """Draw rows that point to the corners of a regular simplex, within each block of H.

    The H directions of a block are as far apart as H directions can be: any two have the cosine
    -1/(H-1). They sum to zero, so they span H-1 dimensions, in which no further row fits at that
    cosine. Each block is turned by a rotation of its own, so every row alone is a standard Gaussian
    vector and estimates stay unbiased; with positive features their variance is below that of
    `orthogonal`.

    **Args**
        num_rows: Number of rows M.
        head_dim: Head size H. With H = 1 a block is one row, as in `orthogonal`.
        rng: The source of randomness.

    **Returns** An array (M, H), float64. The rows i*H to (i+1)*H - 1 are one simplex.

    **Cost** One QR decomposition of (H, H) for each block.

    **Example**

    >>> w = simplex(3, 3, np.random.default_rng(0))
    >>> u = w / np.linalg.norm(w, axis=1, keepdims=True)
    >>> bool(abs(u[0] @ u[1] + 1 / 2) < 1e-12)
    True

    **Source** Reid et al. 2023, arXiv 2301.13856. We turn the simplex whose corners are
    the unit vectors less their mean, which differs from theirs by a rotation.
    """
    if head_dim == 1:
        return orthogonal(num_rows, head_dim, rng)
    blocks = []
    for _ in range(-(-num_rows // head_dim)):
        axes = _haar(head_dim, rng)
        blocks.append((axes - axes.mean(axis=0)) * np.sqrt(head_dim / (head_dim - 1)))
    return _with_gaussian_norms(np.concatenate(blocks)[:num_rows], rng)


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


def _haar(head_dim: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a rotation or reflection of H dimensions from the uniform (Haar) distribution."""
    q, r = np.linalg.qr(rng.standard_normal((head_dim, head_dim)))
    return (q * np.sign(np.diag(r))).T


def _with_gaussian_norms(directions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Multiply unit vectors (M, H) by independent norms distributed as chi(H)."""
    return directions * np.linalg.norm(rng.standard_normal(directions.shape), axis=1, keepdims=True)


PROJECTIONS = {"orthogonal": orthogonal, "iid": iid, "simplex": simplex}
