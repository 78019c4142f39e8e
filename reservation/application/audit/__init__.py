"""The audit of Redis against SQL and the payment gateway."""
