"""Columns of tables that are the user's: found by their names, whatever letters those have."""

from collections.abc import Iterable

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F


def named(name: str) -> Column:
    """The column of just this name: a dot or a backtick is a letter of it."""
    quoted = name.replace("`", "``")
    return F.col(f"`{quoted}`")


def find_name(table: DataFrame, name: str) -> str | None:
    """A column's name as the table spells it: as given, else ignoring case; None where there is no such column.

    The session may tell names by their case, and the table then have several.
    """
    alike = [own for own in table.columns if own.lower() == name.lower()]
    return name if name in alike else next(iter(alike), None)


def find(table: DataFrame, name: str) -> Column:
    """A column that the table has, by `find_name`."""
    return named(find_name(table, name) or name)


def pick(table: DataFrame, names: Iterable[str]) -> list[Column]:
    """Columns that the table has, each under the name that is given here."""
    return [find(table, name).alias(name) for name in names]
