"""Floor 3: meta-learning algorithms as small frozen records, and the learner that runs any of them."""
