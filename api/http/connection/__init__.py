"""HTTP/1.1 framing of every connection: bounds, time-outs and bodies."""
