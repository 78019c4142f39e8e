"""The Toss Payments adapter: client, circuit breaker and error codes."""
