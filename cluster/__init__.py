"""Floor 5: talking to Ray clusters. Knows Ray and nothing of meta-learning."""
