"""The event feed, and the delivery of its events to webhook endpoints."""
