"""The payment gateway: what we ask it, what it may answer, and a stand-in to ask."""
