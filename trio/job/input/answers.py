"""Right answers of a row as text, whatever type their column has; types with no plain text refused.

INPUT strings, bytes (UTF-8), numbers, structs with a field ``answer`` or ``text``, dictionaries and
lists of these; OUTPUT strings. 5.0 is "5", as a person would write it.
"""

from __future__ import annotations

from decimal import Decimal

import pyarrow as pa
import pyarrow.types as pt

FIELDS = ("answer", "text")
# of a struct that hold its answer, the first that it has
EXPECTED = (
    "strings, UTF-8 bytes, numbers, structs with a field answer or text, or lists of these; others"
    " (yes or no too) have to be written as text"
)
TEXTS = pa.string(), pa.large_string(), pa.string_view(), pa.null()
BYTES = pa.binary(), pa.large_binary(), pa.binary_view()


def readable(kind: pa.DataType, *, in_list: bool = False) -> bool:
    """Whether a column's type says without doubt what its answers are."""
    if pt.is_dictionary(kind):
        return readable(kind.value_type, in_list=in_list)
    if is_list(kind):
        return not in_list and readable(kind.value_type, in_list=True)
    if pt.is_struct(kind):
        name = _field_of(kind)
        return name is not None and readable(kind.field(name).type, in_list=in_list)
    return is_text(kind) or is_bytes(kind) or _is_number(kind)


def texts(cell: pa.Scalar) -> list[str]:
    """The answers in a cell of a readable type; none where it is null or no number.

    Raises:
        UnicodeDecodeError: text or bytes that are not UTF-8.
    """
    kind = cell.type
    if not cell.is_valid:
        return []
    if pt.is_dictionary(kind):
        return texts(cell.value)
    if is_list(kind):
        return [text for item in cell.values for text in texts(item)]
    if pt.is_struct(kind):
        return texts(cell[_field_of(kind)])
    if is_bytes(kind):
        return [cell.as_py().decode().rstrip("\0")]
    return _number(cell) if _is_number(kind) else [cell.as_py()]


def _number(cell: pa.Scalar) -> list[str]:
    """In the fewest digits that tell it from others of its type, as Arrow writes it."""
    value = Decimal(cell.cast(pa.string()).as_py())
    if value.is_nan():  # how a missing one is written
        return []
    if value.is_infinite():
        return [str(float(value))]
    text = f"{value if value else abs(value):f}"
    return [text.rstrip("0").rstrip(".") if "." in text else text]


def _field_of(kind: pa.DataType) -> str | None:
    names = [kind.field(i).name for i in range(kind.num_fields)]
    return next((name for name in FIELDS if names.count(name) == 1), None)


def is_list(kind: pa.DataType) -> bool:
    kinds = pt.is_list, pt.is_large_list, pt.is_fixed_size_list, pt.is_list_view
    return any(is_kind(kind) for is_kind in (*kinds, pt.is_large_list_view))


def type_of_values(kind: pa.DataType) -> pa.DataType:
    """What a dictionary stands for; any other type itself."""
    return kind.value_type if pt.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Whether its values are text, or all null."""
    return type_of_values(kind) in TEXTS


def is_bytes(kind: pa.DataType) -> bool:
    kind = type_of_values(kind)
    return kind in BYTES or pt.is_fixed_size_binary(kind)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind))
