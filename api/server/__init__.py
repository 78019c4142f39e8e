"""The processes behind `reservation serve`."""
