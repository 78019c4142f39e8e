"""The use cases. They import the adapters directly: tests run on real servers, not on ports."""
