"""From C4 shards to tokens (`.bin`/`.idx`), and from tokens to a step's microbatches."""
