"""Types of Arrow that a step of the retrieval lacks, and those in which it carries the same values."""

from collections.abc import Callable

import pyarrow as pa


def takeable(kind: pa.DataType) -> pa.DataType:
    """`kind` without views, from which Arrow cannot take rows."""
    if pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else within(kind, takeable)


def carried(kind: pa.DataType) -> pa.DataType:
    """The type in which DuckDB carries values of `kind` without a loss: itself, but for those that it or its way back to Arrow lacks."""
    if isinstance(kind, pa.BaseExtensionType):
        return carried(kind.storage_type)
    if pa.types.is_duration(kind):
        return pa.int64()
    if pa.types.is_float16(kind):
        return pa.float32()
    return pa.string() if pa.types.is_decimal256(kind) else within(kind, carried)


def comparable(kind: pa.DataType) -> pa.DataType:
    """The type in which join keys of `kind` are compared: no dictionary, text as large_string, decimals of 128 bits at least."""
    if pa.types.is_dictionary(kind):
        return comparable(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return comparable(kind.storage_type)
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    return pa.binary() if pa.types.is_binary_view(kind) else kind


def within(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """A nested type with `change` made to the types in it; any other type as it is."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(change(field.type)) for field in kind])
    if pa.types.is_map(kind):
        changed = pa.map_(change(kind.key_type), change(kind.item_type))
        return kind if changed == kind else changed
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(change(kind.value_type)), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(change(kind.value_type)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(change(kind.value_type)))
    return kind
