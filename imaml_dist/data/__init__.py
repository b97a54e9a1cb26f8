"""Floor 3: class-record shards, their index, and the episodes drawn from them."""
