"""The run-time type checker of the tests: as beartype, and an int passes for a float."""

from beartype import BeartypeConf, beartype

typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
