"""Columns as JSON text that is the same in any session."""

from pyspark.sql import Column
from pyspark.sql import functions as F


def as_json(value: Column, *, nulls: bool = False) -> Column:
    """A struct as JSON text; fields that are null are left out unless `nulls` is set.

    The options are spelled out because Spark takes their defaults from the session.
    """
    return F.to_json(value, {"ignoreNullFields": str(not nulls).lower(), "timeZone": "UTC"})


def sort_json(text: Column) -> Column:
    """JSON text with sorted keys and no white space; text that is not JSON stays as it is."""
    return F.coalesce(F.to_json(F.try_parse_json(text)), text)
