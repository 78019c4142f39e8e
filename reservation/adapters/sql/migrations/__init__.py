"""The migrations, numbered; each one leaves tables that the code before it can use as well."""
