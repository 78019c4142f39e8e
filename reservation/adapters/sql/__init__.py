"""Orders in SQL: the tables, the migrations, and everything that is asked of them."""
