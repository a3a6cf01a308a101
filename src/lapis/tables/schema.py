"""What all tables share: their names' convention, and the type of counting keys.

Times are seconds since 1970 as double precision, which SQLite and PostgreSQL both give back bit for bit.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import BigInteger, Integer

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)
Counter = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only an INTEGER key
