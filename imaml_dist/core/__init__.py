"""Floor 1: pure mathematics on torch tensors, batched over tasks (leading axis T)."""
