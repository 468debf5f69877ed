"From activations to features: explanation, relevance, coverage, ground truth."
