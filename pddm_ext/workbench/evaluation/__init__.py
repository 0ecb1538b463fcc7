"""Every figure of an embedding: rankings, how far pairs are apart, and probes."""
