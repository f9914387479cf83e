"""Takes the views that applications count in Redis and makes them durable in Postgres, each view exactly once."""

__version__ = "0.1.0"
