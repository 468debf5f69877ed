"Contrastive pairs, covered samples, baselines, diversity, and fine-tuning on them."
