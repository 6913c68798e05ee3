"""`take_rows`: some rows of one table or of several alike. PyTorch's `index_select`, or one launch.

PyTorch takes up to 16 rows in a launch of 2 to 10 µs a table, which a decoding step does not have.

Shape key: T rows that are taken, L rows there are, D numbers of a row.
"""

from torch import Tensor

from longwing.kernels.choice import is_for_triton


def take_rows(index_T: Tensor, *tables_LD: Tensor) -> tuple[Tensor, ...]:
    """Of each table its rows, (T, D).

    Args:
        index_T: int32 or int64, each from 0 to L - 1.
        tables_LD: one or two, of one shape and number type; without gradients.
    """
    if is_for_triton(tables_LD[0]) and all(table_LD.is_contiguous() for table_LD in tables_LD):
        from longwing.kernels import step_triton

        return step_triton.take_rows(index_T, *tables_LD)
    return tuple(table_LD.index_select(0, index_T) for table_LD in tables_LD)
