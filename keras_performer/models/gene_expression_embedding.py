"""The embedding of single-cell measurements."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_performer.layers._arguments import positive_int


@keras.saving.register_keras_serializable(package="keras_performer")
class GeneExpressionEmbedding(keras.layers.Layer):
    """Embed genes together with how strongly a cell expresses them.

    The output is gene_table[id] + bin_table[bin(value)], where bin(value) is the number of
    boundaries below the value: a value on a boundary belongs to the bin under it. A cell is a set
    of genes, so put encoder blocks without rotary positions on top.

    **Shapes** `gene_ids` (B, T) integers, `expression` (B, T); the output is (B, T, D).

    **Args**
        num_genes: Number of genes; their ids are 1 to num_genes, and 0 is padding.
        num_bins: Number of bins of expression values.
        hidden_dim: Width D.
        max_expression: Where the last bin begins if `boundaries` is None. The first bin is then
            that of zero, and the others have equal width on the scale log(1 + value).
        boundaries: num_bins - 1 increasing values between the bins, for other scales (quantiles of
            the data, for example).
        **kwargs: `name`, `dtype` and `trainable` of the layer.

    **Returns** The sum of both embeddings, in the compute dtype.

    **Masking** Padding gives zeros, and the output carries a Keras mask that is False there.

    **Precision** Values are compared with the boundaries in float32, whatever the dtype policy.

    **Cost** O(T (D + log num_bins)).

    **Raises** ValueError for sizes that are not positive integers, a `max_expression` that is not
    above zero, or boundaries that do not increase or whose number does not fit.

    **Example**

    >>> layer = GeneExpressionEmbedding(num_genes=20, num_bins=5, hidden_dim=8)
    >>> ids = np.array([[3, 7, 0]])
    >>> tuple(layer(ids, np.array([[0.0, 12.5, 0.0]])).shape)
    (1, 3, 8)

    **Source** Cui et al. 2024, scGPT, doi 10.1038/s41592-024-02201-0, and Yang et al. 2022,
    scBERT, doi 10.1038/s42256-022-00534-z, which runs on a Performer, for summing the embeddings
    of a gene and of its binned expression.
    """

    def __init__(
        self,
        num_genes: int,
        num_bins: int,
        hidden_dim: int,
        max_expression: float = 10000.0,
        boundaries: Sequence[float] | None = None,
        **kwargs: Any,
    ):
        # Counts above 256 are not all numbers of bfloat16.
        super().__init__(**{"autocast": False, **kwargs})
        self.num_genes = positive_int("num_genes", num_genes)
        self.num_bins = positive_int("num_bins", num_bins)
        self.hidden_dim = positive_int("hidden_dim", hidden_dim)
        if not max_expression > 0:
            raise ValueError(
                f"`max_expression` must be above zero. Received: max_expression={max_expression}"
            )
        self.max_expression = float(max_expression)
        share = np.arange(self.num_bins - 1) / max(self.num_bins - 2, 1)
        default = np.expm1(share * np.log1p(self.max_expression))
        edges: Any = default if boundaries is None else boundaries
        # What is compared is float32, and so what is saved.
        self.boundaries = [float(np.float32(edge)) for edge in edges]
        if len(self.boundaries) != self.num_bins - 1 or not np.all(np.diff(self.boundaries) > 0):
            raise ValueError(
                f"`boundaries` must be {self.num_bins - 1} increasing numbers, one fewer than "
                f"bins. Received: boundaries={self.boundaries}"
            )
        self.gene_embedding = keras.layers.Embedding(
            self.num_genes + 1, self.hidden_dim, dtype=self.dtype_policy, name="gene_embedding"
        )
        self.expression_embedding = keras.layers.Embedding(
            self.num_bins, self.hidden_dim, dtype=self.dtype_policy, name="expression_embedding"
        )

    def build(self, gene_ids_shape: Any, expression_shape: Any) -> None:
        """Create the tables."""
        self.gene_embedding.build(gene_ids_shape)
        self.expression_embedding.build(expression_shape)

    def bins(self, expression: Any) -> Any:
        """The bins (B, T) of expression values (B, T), from 0 to num_bins - 1; NaN is in bin 0."""
        expression = ops.cast(expression, "float32")
        if not self.boundaries:
            return ops.zeros_like(expression, dtype="int32")
        boundaries = ops.convert_to_tensor(self.boundaries, "float32")
        shape = ops.shape(expression)
        expression = ops.where(ops.isnan(expression), float("-inf"), expression)
        places = ops.searchsorted(boundaries, ops.reshape(expression, (-1,)), side="left")
        return ops.cast(ops.reshape(places, shape), "int32")

    def call(self, gene_ids: Any, expression: Any) -> Any:
        """Embed `gene_ids` (B, T) and `expression` (B, T)."""
        gene_ids = ops.cast(gene_ids, "int32")
        genes = self.gene_embedding(gene_ids)
        embedded = genes + self.expression_embedding(self.bins(expression))
        return embedded * ops.cast(ops.expand_dims(gene_ids != 0, -1), embedded.dtype)

    def compute_mask(self, gene_ids: Any, previous_mask: Any = None) -> Any:
        """True where there is a gene."""
        del previous_mask
        return ops.not_equal(gene_ids, 0)

    def compute_output_shape(self, gene_ids_shape: Any, expression_shape: Any = None) -> Any:
        """(B, T) -> (B, T, D)."""
        del expression_shape
        return (*gene_ids_shape, self.hidden_dim)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "num_genes": self.num_genes,
            "num_bins": self.num_bins,
            "hidden_dim": self.hidden_dim,
            "max_expression": self.max_expression,
            "boundaries": self.boundaries,
        }
