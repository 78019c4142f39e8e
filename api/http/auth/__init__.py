"""Authentication of buyers, guests and operators."""
