"""The SQL adapter: tables, migrations and queries, for SQLite and PostgreSQL."""
